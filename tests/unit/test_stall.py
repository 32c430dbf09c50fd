"""`ragkv bench stall` on an engine whose steps take as long as the test says."""

import json
from types import SimpleNamespace

import pytest
import transformers
from typer.testing import CliRunner

from fusion_bench_tools import Words
from ragkv.benchmarks import stall
from ragkv.cli import app

STEP, LOAD, PREFILL = 1.0, 1.5, 8.0


class Tokenizer(Words):
    """Words."""

    def encode(self, text, add_special_tokens=False):
        return super().encode(text, add_special_tokens)


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


class FakeEngine:
    """One step gives every running request a token; a new prompt's first step takes longer."""

    def __init__(self, clock, seconds, cached):
        self.llm_engine = self
        self._clock, self._seconds, self._cached = clock, seconds, cached
        self._running = {}

    def add_request(self, name, prompt, sampling):
        self._running[name] = sampling.max_tokens
        if name == "second":
            self._clock.now += self._seconds - STEP

    def step(self):
        self._clock.now += STEP
        outputs = [SimpleNamespace(request_id=name, num_cached_tokens=self._cached) for name in self._running]
        self._running = {name: left - 1 for name, left in self._running.items() if left > 1}
        return outputs

    def abort_request(self, names):
        for name in names:
            self._running.pop(name)

    def has_unfinished_requests(self):
        return bool(self._running)


class Side:
    """An engine of the benchmark."""

    clock = Clock()

    def __init__(self, options):
        self._ragkv = options.ragkv is not None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def evict(self):
        return None

    def ask(self, prompts):
        return []

    def call(self, function, running, prompt):
        engine = FakeEngine(self.clock, LOAD if self._ragkv else PREFILL, len(prompt) - 1 if self._ragkv else 0)
        return function(engine, running, prompt)


def test_bench_stall(monkeypatch, tmp_path):
    monkeypatch.setattr(stall, "ensure_model", lambda progress: tmp_path)
    monkeypatch.setattr(stall, "Resting", Side)
    monkeypatch.setattr(stall, "time", Side.clock)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda model: Tokenizer())
    monkeypatch.chdir(tmp_path)
    command = ["bench", "stall", "--tokens", "200", "--rounds", "3", "--json", "stall.json"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
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
