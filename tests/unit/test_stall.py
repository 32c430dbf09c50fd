"""`internal stall` on an engine whose steps take as long as the test says."""

import json

import pytest
import transformers
from typer.testing import CliRunner

from ragkv.benchmarks.internal import stall
from ragkv.benchmarks.internal.commands import app as internal
from stall_tools import LOAD, STEP, Side, StepEngine, Tokenizer

PREFILL = 8.0


class Timed(Side):
    def call(self, function, running, prompt):
        took = (LOAD if self.reuses else PREFILL) - STEP
        engine = StepEngine(self.clock, lambda *_: took, lambda tokens: len(tokens) - 1 if self.reuses else 0)
        return function(engine, running, prompt)


def test_bench_stall(monkeypatch, tmp_path):
    monkeypatch.setattr(stall, "ensure_model", lambda progress: tmp_path)
    monkeypatch.setattr(stall, "Resting", Timed)
    monkeypatch.setattr(stall, "time", Side.clock)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda model: Tokenizer())
    monkeypatch.chdir(tmp_path)
    command = ["stall", "--tokens", "200", "--rounds", "3", "--json", "stall.json"]
    done = CliRunner().invoke(internal, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "stall.json").read_text())
    assert report["hit_fraction"] == 1 and report["rounds"] == 3 == len(report["samples"]["load"])
    assert report["quiet_gap_s"] == report["plain_quiet_gap_s"] == pytest.approx(STEP)
    assert report["load_over_quiet"] == pytest.approx(LOAD)
    assert report["prefill_over_quiet"] == pytest.approx(PREFILL)
    assert "1.50 times as long, within the limit" in done.output


def test_the_judgement_says_when_it_is_too_long():
    report = {"load_over_quiet": 2.5, "prefill_over_quiet": 40.0, "hit_fraction": 1.0}
    assert "beyond the limit of 2" in stall.judgement(report)
