"""Examples that need no engine; tests/engine/test_server.py runs the others."""

import runpy
import sys
from pathlib import Path

import pytest

from fake_vllm import serving

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def complete(body):
    """The answer of /v1/chat/completions, of which all but the last 5 tokens were hits."""
    tokens = sum(len(message["content"].split()) for message in body["messages"])
    usage = {"prompt_tokens": tokens, "completion_tokens": 1, "total_tokens": tokens + 1}
    choice = {"index": 0, "message": {"role": "assistant", "content": " 7."}, "finish_reason": "stop"}
    return 200, {
        "id": "chat-1",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [choice],
        "usage": usage | {"prompt_tokens_details": {"cached_tokens": tokens - 5}},
    }


def test_langchain(tmp_path, monkeypatch, capsys):
    pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    files = {name: tmp_path / name for name in ("rain", "snow")}
    for name, file in files.items():
        file.write_text(f"Of {name}: it fell all day, and nobody went out.\n")
    with serving() as fake:
        fake.answers["/v1/chat/completions"] = complete
        monkeypatch.setattr(sys, "argv", ["langchain_rag.py", *map(str, files.values()), "--url", fake.url])
        runpy.run_path(str(EXAMPLES / "langchain_rag.py"), run_name="__main__")
        asked = [body for path, body, _ in fake.asked if path == "/v1/chat/completions"]
    systems = {body["messages"][0]["content"] for body in asked}
    assert len(asked) == 2 and len(systems) == 1, "the question comes after what both prompts share"
    assert all(file.read_text().strip() in next(iter(systems)) for file in files.values())
    for body in asked:
        hints = body["kv_transfer_params"]["ragkv"]
        assert [each["id"] for each in hints["documents"]] == ["rain", "snow"]
        tokens = fake.tokenizer.lay_out(body["messages"])
        found = [fake.tokenizer.decode(tokens[each["start"] : each["end"]]) for each in hints["documents"]]
        assert [text.strip() for text in found] == [file.read_text().strip() for file in files.values()]
    assert capsys.readouterr().out.splitlines() == [
        "What were net sales? '7.' (21 of 26 tokens reused)",
        "What are the main risks? '7.' (22 of 27 tokens reused)",
    ]
