"""`ragkv bench hints` on an engine whose steps take as long as the test says."""

import json
from types import SimpleNamespace

import pytest
import transformers
from typer.testing import CliRunner

from fusion_bench_tools import Words
from ragkv.benchmarks import hints as bench
from ragkv.benchmarks import stall
from ragkv.cli import app
from ragkv.connectors.vllm.hints import HINT_NAMES, read_hints

STEP, LOAD = 1.0, 1.5
LONGER = {"spans": 0.001, "pins": 0.002, "junk": 0.003, "fuse": 0.25}


class Tokenizer(Words):
    """Words."""

    def encode(self, text, add_special_tokens=False):
        return super().encode(text, add_special_tokens)


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


class Side:
    """An engine of the benchmark, in which a step takes longer where hints come."""

    clock, asked = Clock(), []

    def __init__(self, options):
        assert options.ragkv is not None
        self.llm_engine = self
        self._running = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def evict(self):
        return None

    def ask(self, prompts):
        self.asked.append((prompts[0], "known"))

    def call(self, function, running, prompt, hints):
        self.asked.append((prompt, hints))
        return function(self, running, prompt, hints)

    def add_request(self, name, prompt, sampling):
        self._running[name] = sampling.max_tokens
        if name == "second":
            self.clock.now += LOAD - STEP
            hints = sampling.extra_args and sampling.extra_args["kv_transfer_params"]["ragkv"]
            if hints:
                name = next(
                    kind
                    for kind in LONGER
                    if bench.KINDS[kind](len(prompt["prompt_token_ids"]), 0).keys() == hints.keys()
                )
                self.clock.now += LONGER[name]

    def step(self):
        self.clock.now += STEP
        outputs = [SimpleNamespace(request_id=name, num_cached_tokens=0) for name in self._running]
        self._running = {name: left - 1 for name, left in self._running.items() if left > 1}
        return outputs

    def abort_request(self, names):
        for name in names:
            self._running.pop(name)

    def has_unfinished_requests(self):
        return bool(self._running)


def test_bench_hints(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "ensure_model", lambda progress: tmp_path)
    monkeypatch.setattr(bench, "Engine", Side)
    monkeypatch.setattr(stall, "time", Side.clock)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda model: Tokenizer())
    monkeypatch.chdir(tmp_path)
    command = ["bench", "hints", "--tokens", "400", "--rounds", "3", "--json", "hints.json"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "hints.json").read_text())
    assert {kind: each["longer_s"] for kind, each in report["kinds"].items()} == pytest.approx(LONGER)
    assert all(each["quiet_gap_s"] == pytest.approx(STEP) for each in report["kinds"].values())
    assert "The worst hints (fuse) make others wait 250.0 ms longer" in done.output
    assert "beyond the limit of 20 ms" in done.output
    new = [tuple(prompt) for prompt, hints in Side.asked if prompt != Side.asked[0][0]]
    assert len(new) == len(set(new)) == 2 * 3 + 2, "each prompt that is fused has a beginning of its own"
    assert all(len(prompt) == 400 for prompt, _ in Side.asked)


def test_a_machine_that_does_other_things_is_told():
    pairs = [(stall.Stall(gap, gap, gap, 0), stall.Stall(gap, gap, gap, 0)) for gap in (0.02, 0.03, 0.3, 0.4)]
    said = bench.judgement(bench.summarize(400, 4, {"spans": pairs}))
    assert said.startswith("Nothing can be said: ") and "from 30 to 400 ms" in said


def test_the_worst_hints_are_what_they_should_be():
    spans, pins, junk, fuse = (read_hints({"ragkv": bench.KINDS[kind](3000, 7)}) for kind in LONGER)
    assert len(spans.documents) == len(fuse.documents) == 256 and fuse.fuse and len(fuse.problems) == 1
    assert pins.pin.owner == "desk 7" and pins.unpin == "desk 6" and pins.priority == 9 and not pins.problems
    assert len(junk.problems) == len(HINT_NAMES), "all but `store` are wrong, and some are unknown"
