"""`internal hints` on an engine whose steps take as long as the test says."""

import json

import pytest
import transformers
from typer.testing import CliRunner

from ragkv.benchmarks.internal import hints as bench
from ragkv.benchmarks.internal import stall
from ragkv.benchmarks.internal.commands import app as internal
from ragkv.connectors.vllm.hints import HINT_NAMES, MOST_ORDERED_TOKENS, MOST_PASSAGES, read_hints
from stall_tools import LOAD, STEP, Side, StepEngine, Tokenizer

LONGER = {"spans": 0.001, "pins": 0.002, "junk": 0.003, "order": 0.004, "fuse": 0.25}
ASKED = []  # prompts, each with its hints


class Hinted(Side):
    """A step takes longer where hints come."""

    def ask(self, prompts):
        ASKED.append((prompts[0], "known"))

    def call(self, function, running, prompt, hints):
        assert self.reuses
        ASKED.append((prompt, hints))
        return function(StepEngine(self.clock, self._took), running, prompt, hints)

    def _took(self, sampling, tokens):
        hints = sampling.extra_args and sampling.extra_args["kv_transfer_params"]["ragkv"]
        kinds = (kind for kind in LONGER if hints and bench.KINDS[kind](len(tokens), 0).keys() == hints.keys())
        return LOAD - STEP + (LONGER[next(kinds)] if hints else 0.0)


def test_bench_hints(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "ensure_model", lambda progress: tmp_path)
    monkeypatch.setattr(bench, "Engine", Hinted)
    monkeypatch.setattr(stall, "time", Hinted.clock)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda model: Tokenizer())
    monkeypatch.chdir(tmp_path)
    command = ["hints", "--tokens", "400", "--rounds", "3", "--json", "hints.json"]
    done = CliRunner().invoke(internal, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "hints.json").read_text())
    assert {kind: each["longer_s"] for kind, each in report["kinds"].items()} == pytest.approx(LONGER)
    assert all(each["quiet_gap_s"] == pytest.approx(STEP) for each in report["kinds"].values())
    assert "The worst hints (fuse) make others wait 250.0 ms longer" in done.output
    assert "beyond the limit of 20 ms" in done.output
    new = [tuple(prompt) for prompt, hints in ASKED if prompt != ASKED[0][0]]
    assert len(new) == len(set(new)) == 2 * 3 + 2, "each prompt that is fused has a beginning of its own"
    assert all(len(prompt) == 400 for prompt, _ in ASKED)


def test_a_machine_that_does_other_things_is_told():
    pairs = [(stall.Stall(gap, gap, gap, 0), stall.Stall(gap, gap, gap, 0)) for gap in (0.02, 0.03, 0.3, 0.4)]
    said = bench.judgement(bench.summarize(400, 4, {"spans": pairs}))
    assert said.startswith("Nothing can be said: ") and "from 30 to 400 ms" in said


def test_the_worst_hints_are_what_they_should_be():
    spans, pins, junk, order, fuse = (read_hints({"ragkv": bench.KINDS[kind](3000, 7)}) for kind in LONGER)
    assert len(spans.documents) == len(fuse.documents) == 256 and fuse.fuse and len(fuse.problems) == 1
    assert pins.pin.owner == "desk 7" and pins.unpin == "desk 6" and pins.priority == 9 and not pins.problems
    assert len(order.order.passages) == MOST_PASSAGES and not order.problems
    assert sum(map(len, order.order.passages)) == MOST_ORDERED_TOKENS
    assert len(junk.problems) == len(HINT_NAMES), "all but `store` are wrong, and some are unknown"
