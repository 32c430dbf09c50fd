"""`ragkv demo`, `ragkv bench prefix`, and our programs `restart` and `plan`, on engines that only count."""

import io
import json

import pytest
import torch
import transformers
from rich.console import Console
from typer.testing import CliRunner

from fusion_bench_tools import Words
from ragkv.benchmarks import demo, prefix
from ragkv.benchmarks.engine import Answer
from ragkv.benchmarks.internal import restart
from ragkv.benchmarks.internal.commands import app as internal
from ragkv.benchmarks.report import shared_prefix
from ragkv.cli import app

SECONDS = 0.001  # for each token that is computed


class Tokenizer(Words):
    """Words, with what the demonstration needs besides."""

    def encode(self, text, add_special_tokens=False):
        return super().encode(text, add_special_tokens)

    def decode(self, ids):
        return " ".join(f"w{number}" for number in ids)

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return "".join(f"<{each['role']}> {each['content']} </> " for each in messages) + "<assistant>"


class CountingEngine:
    """Reuses prefixes of what it was asked, as vLLM with or without ragkv does. `below`: what lies on disk or in
    Redis, which outlives it."""

    below: dict[str, list[list[int]]] = {}  # noqa: RUF012

    def __init__(self, options):
        self._own, self._memory = [], []
        self._with_ragkv = options.ragkv is not None
        place = {name: value for name, value in (options.ragkv or {}).items() if name != "memory"}
        self._below = self.below.setdefault(json.dumps(place), []) if place else []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def wait(self):
        return self

    def ask(self, prompts, max_tokens=1):
        answers = []
        for prompt in prompts:
            known = [*self._own, *self._memory, *self._below]
            hits = min(max((shared_prefix(prompt, each) for each in known), default=0), len(prompt) - 1)
            tokens = tuple(range(max_tokens))
            self._own.append([*prompt, *tokens])
            if self._with_ragkv:
                self._memory.append([*prompt, *tokens])
                self._below.append([*prompt, *tokens])
            ttft = SECONDS * (len(prompt) - hits)
            answers.append(Answer(ttft, tokens, "an answer", hits, {"host": hits} if hits else {}))
        return answers

    def evict(self, *, ragkv_too=False):
        self._own.clear()

    def dtype(self):
        return "float32"

    def metrics(self):
        names = ("store_seconds_sum", "store_seconds_count", "load_seconds_sum", "load_seconds_count")
        return {f"ragkv_{name}": 1.0 for name in names}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a command; what it wrote to --json."""
    for module, engine in ((demo, "Engine"), (prefix, "Resting"), (restart, "Engine")):
        monkeypatch.setattr(module, "ensure_model", lambda progress: tmp_path)
        monkeypatch.setattr(module, engine, CountingEngine)
    monkeypatch.setattr(CountingEngine, "below", {})
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda model: Tokenizer())
    monkeypatch.chdir(tmp_path)

    def run(*arguments, app=app):
        done = CliRunner().invoke(app, [*arguments, "--json", "report.json"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads((tmp_path / "report.json").read_text())

    return run


def names_what_it_computed_in(module, report):
    """As those of `bench serve` do: a time in float32 is none of a time in bfloat16."""
    assert report["environment"]["dtype"] == "float32"
    assert report["environment"].keys() >= {"ragkv", "vllm", "torch", "cpu", "cores", "gpu", "model"}
    console = Console(file=io.StringIO(), width=300)
    module.show(report, console)
    assert "The model computed in float32." in console.file.getvalue()


def test_demo(run, tmp_path):
    report = run("demo", "--tokens", "200")
    summary = report["summary"]
    assert summary["outputs_equal"] and 0.9 < summary["hit_fraction"] <= 1
    assert len(report["turns"]) == 8
    first, later = report["turns"][0], report["turns"][2]
    assert first["ttft_s"] == first["plain_ttft_s"] == pytest.approx(SECONDS * first["prompt_tokens"])
    assert later["ttft_s"] < 0.3 * later["plain_ttft_s"]
    assert (tmp_path / "out" / "demo.png").is_file()


def test_bench_prefix(run):
    report = run("bench", "prefix", "--tokens", "200", "--rounds", "2", "--starts", "3")
    assert report["cold_over_plain"] == pytest.approx(1, abs=0.01)
    assert report["cold_over_plain_spread"] == pytest.approx([1, 1], abs=0.01)
    assert len(report["levels"]["cold"]) == 3 and len(report["seconds"]["cold"]) == 6
    assert report["prefill_tokens_per_second"] == pytest.approx(1 / SECONDS, rel=0.1)
    assert report["warm_over_floor"] == pytest.approx(1)
    assert report["hit_fraction"] == 1
    assert min(report["seconds"]["cold"]) > 10 * max(report["seconds"]["warm"])
    names_what_it_computed_in(prefix, report)


def test_bench_restart(run):
    report = run("restart", "--tier", "disk", "--tokens", "200", "--rounds", "2", app=internal)
    assert report["hit_fraction"] == 1 and report["below_over_memory"] == pytest.approx(1)
    assert min(report["seconds"]["cold"]) > 100 * max(report["seconds"]["below"])
    names_what_it_computed_in(restart, report)


def test_bench_fingerprint(run, tmp_path):
    from safetensors.torch import save_file

    save_file({"a.weight": torch.ones(300, 200), "b.weight": torch.ones(200)}, tmp_path / "m.safetensors")
    report = run("fingerprint", "--model", str(tmp_path), app=internal)
    assert report["tensors"] == 2 and report["weight_bytes"] == 4 * 60_200
    assert 0 < report["round_bytes"] <= 2 * 4 * 128
    assert all(report[f"{what}_seconds"] > 0 for what in ("look", "step", "part", "round"))


def test_bench_plan(run):
    report = run("plan", "--tokens", "1000", "--chunks", "1000", app=internal)
    assert report["chunks"] >= 1000 and report["plan_hit_s"] > 0
