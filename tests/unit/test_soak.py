"""The soak benchmark: what it asks, and what it calls flat."""

import json
import random
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from fake_vllm import serving
from ragkv.benchmarks.internal import soak, soak_load
from ragkv.benchmarks.internal.commands import app as internal
from ragkv.benchmarks.internal.soak import DISK, PLAIN, RAGKV, Reading, growth, judge
from ragkv.benchmarks.internal.soak_load import Users

FLAT = [Reading(n, 10 * n, 0, 1000 << 20, 50, 30, disk=DISK) for n in range(1, 13)]


def changed(first, **values):
    """From a turn on other values."""
    return [replace(each, **values) if number >= first else each for number, each in enumerate(FLAT)]


def test_what_stays_is_flat():
    assert judge({PLAIN: FLAT, RAGKV: FLAT}) == []
    warm = [*(replace(each, memory=500 << 20, threads=10, descriptors=9) for each in FLAT[:4]), *FLAT[4:]]
    assert judge({PLAIN: FLAT, RAGKV: warm}) == [], "it may warm up"
    higher = [*FLAT[:-1], replace(FLAT[-1], memory=1200 << 20)]
    assert judge({PLAIN: FLAT, RAGKV: higher}) == [], "one turn is no growth"
    both = changed(8, memory=1100 << 20)
    assert growth(both) == pytest.approx(0.1) and judge({PLAIN: both, RAGKV: both}) == [], "as plain vLLM's does"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"descriptors": 60}, "ragkv: descriptors grow, from 50 to 60"),
        ({"threads": 34}, "ragkv: threads grow, from 30 to 34"),
        ({"disk": DISK + 1}, "ragkv: 268435457B in disk, which may hold 256MiB"),
        ({"memory": 1100 << 20}, "ragkv: memory grows by 10.0% from the middle third to the last, plain by 0.0%"),
        ({"failed": 2}, "ragkv: 2 requests failed"),
    ],
)
def test_what_grows_is_found(values, said):
    assert judge({PLAIN: FLAT, RAGKV: changed(8, **values)}) == [said]
    if "failed" not in values:
        assert judge({PLAIN: changed(8, **values), RAGKV: FLAT}) == [], "plain vLLM's growth is not ragkv's"


def test_the_load_is_of_all_kinds_and_fits():
    users, chance = Users("http://127.0.0.1:1", "m", 500, 1), random.Random(0)
    bodies = [users.body(chance) for _ in range(400)]
    assert max(len(body["prompt"]) for body in bodies) + soak_load.ANSWER_TOKENS <= soak.LONGEST
    assert all(0 <= token < 500 for body in bodies for token in body["prompt"])
    assert {body.get("cache_salt") for body in bodies} == set(soak_load.TENANTS)
    assert {(body["n"], body["temperature"]) for body in bodies} == {(1, 0.0), (2, 1.0)}, "as vLLM takes them"
    hints = [json.dumps(body["kv_transfer_params"]["ragkv"]) for body in bodies if "kv_transfer_params" in body]
    assert set(hints) == set(map(json.dumps, soak_load.HINTS))
    heads = {tuple(body["prompt"][: soak_load.SYSTEM_TOKENS + 64]) for body in bodies}
    assert soak_load.KNOWN < len(heads) < 300, "documents come again, and new ones come"


class Standing:
    """A player whose turns cost no time. `complaints`: of its last request."""

    complaints = ()

    def __init__(self, *later):
        self.readings, self.left = [], [*FLAT, *later]

    def play(self, seconds):
        self.readings.append(self.left.pop(0))


def test_bench_soak(monkeypatch, tmp_path):
    players = {PLAIN: Standing(), RAGKV: Standing()}
    monkeypatch.setattr(soak, "start_both", lambda *_: players)
    file = tmp_path / "soak.json"
    arguments = ["soak", "--minutes", "12", "--model", str(tmp_path), "--output", str(file)]
    said = CliRunner().invoke(internal, arguments)
    assert said.exit_code == 0 and said.output.rstrip().endswith("Flat."), said.output
    report = json.loads(file.read_text())
    assert [len(each) for each in report["readings"].values()] == [12, 12] and report["findings"] == []
    players.update({name: Standing() for name in players})
    players[RAGKV].left[-1] = replace(FLAT[-1], failed=1)
    said = CliRunner().invoke(internal, arguments)
    assert said.exit_code == 1 and "ragkv: 1 requests failed" in said.output


def test_every_request_is_counted(monkeypatch):
    """Every seventh request fails."""
    ticks, asked = iter(range(10_000)), []
    monkeypatch.setattr(soak_load.time, "monotonic", lambda: next(ticks))

    def answer(body):
        asked.append(body)
        return (500 if len(asked) % 7 == 0 else 200), {"choices": []}

    with serving() as server:
        server.answers["/v1/completions"] = answer
        users = Users(server.url, "m", 500, 3)
        users.ask_for(200)
    tally = users.tally
    left = sum(body.get("stream", False) for body in asked)
    assert tally.answered + tally.left + tally.failed.total() == len(asked) > 100
    assert tally.failed.total() == len(asked) // 7 and 0 < tally.left <= left
    assert all("500" in said for said in tally.failed)
