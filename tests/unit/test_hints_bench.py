"""`ragkv bench hints` on an engine that waits as long as the test says."""

import json
from random import Random

import pytest
from typer.testing import CliRunner

from ragkv.benchmarks import hints
from ragkv.benchmarks.stall import Stall
from ragkv.cli import app
from ragkv.connectors.vllm.hints import read_hints


class Side:
    """Every hint costs `more` seconds."""

    more = 0.0

    def __init__(self, options):
        self.evicted = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def evict(self, *, ragkv_too):
        self.evicted += ragkv_too

    def ask(self, prompts):
        return []

    def call(self, function, running, prompt, given):
        assert function is hints.stall and len(prompt) > 6000
        return Stall(quiet=0.01, gap=0.1 + (self.more if given is not None else 0), ttft=1.0, cached_tokens=0)


@pytest.fixture(autouse=True)
def no_engine(monkeypatch):
    monkeypatch.setattr(hints, "Engine", Side)
    monkeypatch.setattr(hints, "random_llama", lambda folder: folder)


@pytest.mark.parametrize(("more", "said"), [(0.019, "within"), (0.021, "beyond")])
def test_bench_hints(monkeypatch, tmp_path, more, said):
    monkeypatch.setattr(Side, "more", more)
    file = tmp_path / "hints.json"
    run = CliRunner().invoke(app, ["bench", "hints", "--rounds", "2", "--output", str(file)])
    assert run.exit_code == 0 and f"{said} the limit" in " ".join(run.output.split()), run.output
    report = json.loads(file.read_text())
    assert len(report["cases"]) == len(hints.CASES)
    for case in report["cases"].values():
        assert case["more_s"] == pytest.approx(more) and len(case["samples"]) == 2


@pytest.mark.parametrize("case", hints.CASES, ids=lambda case: case.name)
def test_the_hints_are_what_they_are_called(case):
    before, prompt, given = case.make(Random(0))
    assert not before or prompt[-len(before) :] == before, "it comes back, elsewhere"
    assert len(prompt) + 1 <= 8192
    found, said = read_hints({"ragkv": given})
    assert found.given and json.dumps(given)
    assert said or "mistakes" not in case.name
