"""vLLM's server with ragkv, as `ragkv serve` starts it, and what one does with it from outside."""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

from typer.testing import CliRunner

from engine_tools import segments
from otlp_collector import check_one_trace
from ragkv import rag
from ragkv.benchmarks.tenk import generate_filing
from ragkv.cli import app
from ragkv.kvstore.metrics import METRICS

ROOT = Path(__file__).resolve().parents[2]


def invoke(*arguments):
    said = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert said.exit_code == 0, said.output
    return said.output


def complete(server, prompt, tokens=4):
    """The text of a greedy answer."""
    body = {"model": "llama", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]["text"]


def test_it_answers_and_its_metrics_are_all_there(server, filings):
    first, second = (complete(server, filings[0][:600]) for _ in range(2))
    assert first and first == second
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        page = answer.read().decode()
    typed = {line.split()[2] for line in page.splitlines() if line.startswith("# TYPE ragkv_")}
    assert typed >= METRICS.keys()
    stored = [line for line in page.splitlines() if line.startswith("ragkv_stored_tokens_total{")]
    assert float(stored[0].split()[-1]) >= 600
    assert not segments(), "its memory has no name any more"


def test_passages_are_ingested_and_fused_in_another_order(server, tmp_path):
    """As an application does it: passages ahead of time, and then in another order, as completion and as chat."""
    files = [tmp_path / f"passage {number}.txt" for number in range(3)]
    for number, file in enumerate(files):
        file.write_text(generate_filing(100 + number, 400).text[:1200])
    system, question = "Answer from the excerpts, in a few words.", "Question: what were net sales?\nAnswer:"
    options = ("--url", server.url, "--system-prompt", system, "--whole", "--journal", tmp_path / "journal")
    invoke("ingest", *files, *options)
    client = rag.Server(server.url)
    passages = [(file.name, file.read_text()) for file in reversed(files)]
    asked = rag.prompt(client, system, passages, question)
    told = client.complete(asked, max_tokens=4)["kv_transfer_params"]["ragkv"]
    assert [each["id"] for each in told["documents"]] == [file.name for file in reversed(files)]
    assert [each["decision"] for each in told["documents"]] == ["reused", "moved", "moved"]
    text = "\n\n".join([*(text for _, text in passages), question])
    messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    asked = rag.chat(client, messages, passages)
    body = {"model": client.models()[0]["id"], "messages": messages, "max_tokens": 4, **asked.extra_body}
    told = client.call("/v1/chat/completions", body)["kv_transfer_params"]["ragkv"]
    assert [each["decision"] for each in told["documents"]] == ["moved"] * 3


def test_passages_are_asked_for_in_the_order_in_which_they_are_stored(server):
    """As an application does it, as completion and as chat: what the server says of an order, it then hits."""
    client = rag.Server(server.url)
    system, question = "Answer from the filings, in a few words.", "Question: what were net sales?\nAnswer:"
    passages = [(f"part {number}", generate_filing(200 + number, 300).text[:900].strip()) for number in range(4)]
    for order in ((2, 0, 3), (1,)):
        first = rag.prompt(client, system, [passages[number] for number in order], "Other?", fuse=False)
        client.complete(first, max_tokens=1)
    found = rag.order(client, system, passages)
    assert [passages.index(each) for each in found.passages] == [2, 0, 3, 1]
    assert found.given_tokens == 0 < found.ordered_tokens < found.tokens
    asked = rag.prompt(client, system, found.passages, f"{found.relevance}\n\n{question}", fuse=False)
    told = client.complete(asked, max_tokens=4)["kv_transfer_params"]["ragkv"]
    start, edge = asked.documents[0]["start"], asked.documents[2]["end"]
    assert edge - start == found.ordered_tokens and edge <= told["exact_tokens"] < edge + 40
    assert told["exact_tokens"] + told["computed_tokens"] == len(asked.token_ids) and told["fused_tokens"] == 0

    def messages(order, question):
        text = "\n\n".join([*(passages[number][1] for number in order), question])
        return [{"role": "system", "content": system}, {"role": "user", "content": text}]

    model = client.models()[0]["id"]
    chat = rag.chat(client, messages((3, 1), "Other?"), [passages[3], passages[1]], fuse=False)
    body = {"model": model, "messages": messages((3, 1), "Other?"), "max_tokens": 1, **chat.extra_body}
    client.call("/v1/chat/completions", body)
    new, found = rag.order_chat(client, messages((0, 1, 3), question), passages)
    assert new == messages((3, 1, 0), question) and found.ordered_tokens > 0


def example(name, *arguments, folder):
    """What an example prints."""
    file = ROOT / "examples" / name
    program = [sys.executable, str(file)] if file.suffix == ".py" else [str(file)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    said = subprocess.run(
        [*program, *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr
    return said.stdout.splitlines()


def test_the_examples_work(server, tmp_path):
    filing = tmp_path / "filing.txt"
    filing.write_text(generate_filing(200, 700).text[:4000])
    turns = example("chat_about_a_filing.py", filing, "--url", server.url, folder=tmp_path)
    reused = [int(line.rpartition("(")[2].split()[0]) for line in turns]
    assert len(turns) == 3 and reused[1] > 500 and reused[2] > reused[1]
    passages = [tmp_path / f"passage {number}.txt" for number in range(3)]
    for number, file in enumerate(passages):
        file.write_text(generate_filing(300 + number, 400).text[:1200])
    example("ingest.sh", server.url, *passages, folder=tmp_path)
    said = example("retrieval.py", *passages, "--url", server.url, folder=tmp_path)
    decisions = [line.partition(": ")[2].split(",")[0] for line in said[-3:]]
    assert decisions == ["reused", "moved", "moved"]


def test_spans_stand_in_vllms_trace(server, collector):
    check_one_trace(server.url, collector)


def test_top_shows_what_was_hit(server, filings):
    for _ in range(2):
        complete(server, filings[1][:700])
    frame = json.loads(invoke("top", "--url", server.url, "--once", "--json"))
    assert frame["sources"]["memory"] >= 699 or frame["sources"]["engine"] >= 640
    assert 0 < frame["tiers"]["memory"]["used_bytes"] <= frame["tiers"]["memory"]["capacity_bytes"]
    assert frame["tiers"]["disk"]["read"] == frame["tiers"]["disk"]["write"] == "in use"


def test_the_doctor_finds_it_well(server):
    findings = json.loads(invoke("doctor", "--url", server.url, "--json"))
    first = {each["check"]: each["status"] for each in reversed(findings)}  # faults of other tests come behind
    assert first["server"] == first["interface"] == first["vllm"] == "ok", findings


def test_the_serving_benchmark_plays_against_it(server, tmp_path):
    """A server that runs already; two runs of the same compare, and name no difference in errors."""
    shape = ("--documents", 2, "--turns", 2, "--tokens", 300, "--answer-tokens", 4, "--rounds", 1)
    for name in ("a", "b"):
        files = ("--json", tmp_path / f"{name}.json", "--plot", tmp_path / f"{name}.png")
        invoke("bench", "serve", "--url", f"ragkv={server.url}", *shape, *files)
    report = json.loads((tmp_path / "a.json").read_text())
    (system,) = report["systems"]
    assert system["errors"] == 0 and system["requests"] == 4
    assert system["first_turn_ttft_s"]["n"] == system["followup_ttft_s"]["n"] == 2
    assert 0 < sum(system["hit_tokens"].values()) < system["prompt_tokens"]
    assert (tmp_path / "a.png").stat().st_size > 10_000
    invoke("bench", "compare", tmp_path / "a.json", tmp_path / "b.json")
