"""The fuzzer of engines, on engines that compute nothing: its plan, its judgement, what it counts and says."""

import json
import zlib
from collections import Counter

import pytest
from typer.testing import CliRunner

from ragkv.benchmarks.engine import EngineError
from ragkv.benchmarks.internal import engine_fuzz, engine_fuzz_report
from ragkv.benchmarks.internal.commands import app as internal
from ragkv.benchmarks.internal.engine_fuzz import FuzzOptions, judge
from ragkv.benchmarks.internal.engine_fuzz_plan import LONGEST_ANSWER, Episode, Reset, Shares, asks_of
from ragkv.benchmarks.internal.engine_fuzz_play import Output, Played, play
from ragkv.benchmarks.report import shared_prefix
from ragkv.errors import RagKVError

VOCABULARY = 512


def likely(prompt, at):
    """The two likeliest tokens of a made-up model."""
    first = zlib.crc32(repr((prompt, at)).encode()) % VOCABULARY
    return {first: -0.1, (first + 1) % VOCABULARY: -2.0}


def answer(prompt, tokens, wrong=False):
    tops = [likely((*prompt, wrong), at) for at in range(tokens)]
    return Output(tuple(next(iter(top)) for top in tops), tuple(tops))


class FakeEngine:
    """Answers at once. `sick`: what the engine with ragkv does with a request: None, or its output."""

    sick = staticmethod(lambda ask: None)
    deaths = 0
    cached = staticmethod(lambda ask: 0)

    def __init__(self, options):
        self.options = options

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def metrics(self):
        return {'ragkv_hit_tokens_total{tier="memory"}': 7.0, "vllm:num_preemptions_total": 2.0}

    def kill(self):
        return None

    close = kill

    def call(self, function, *args):
        if function is not play:
            return Counter({"get: flip": 1})
        plain = self.options.ragkv is None
        if not plain and FakeEngine.deaths:
            FakeEngine.deaths -= 1
            raise EngineError("the engine's process died")
        played = Played()
        for ask in asks_of(args[0]):
            output = None if plain else FakeEngine.sick(ask)
            if output == "failed":
                played.failed.append(ask.name)
            else:
                played.outputs[ask.name] = [output or answer(ask.prompt, ask.tokens)] * ask.copies
                played.cached[ask.name] = 0 if plain else FakeEngine.cached(ask)
        return played


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(engine_fuzz, "Engine", FakeEngine)
    monkeypatch.setattr(engine_fuzz, "tiny_llama", lambda folder: folder)
    for name, value in (("sick", staticmethod(lambda ask: None)), ("deaths", 0)):
        monkeypatch.setattr(FakeEngine, name, value)
    monkeypatch.setattr(FakeEngine, "cached", staticmethod(lambda ask: 0))
    return FakeEngine


def plan(seed, number=0, waves=4):
    episode = Episode(seed, number, Shares())
    operations = []
    for _ in range(waves):
        wave = episode.wave()
        episode.learn({ask.prompt: answer(ask.prompt, LONGEST_ANSWER).tokens for ask in asks_of(wave)})
        operations.append(wave)
    return operations


def test_a_seed_gives_a_plan():
    assert plan(1) == plan(1) != plan(2)


def test_a_plan_has_every_kind_of_reset_and_of_request():
    operations = [operation for number in range(20) for wave in plan(0, number) for operation in wave]
    resets = {(each.connector, each.running) for each in operations if isinstance(each, Reset)}
    assert resets == {(False, False), (False, True), (True, True)}
    asks = asks_of(operations)
    assert len(asks) == 2000 == len({ask.name for ask in asks}) and {ask.copies for ask in asks} == {1, 2, 3}
    assert len({ask.salt for ask in asks}) > 20


def test_prompts_of_an_episode_diverge_anywhere_and_those_of_two_share_nothing():
    offsets, turns = set(), 0
    for number in range(10):
        asks = [ask for wave in plan(0, number) for ask in asks_of(wave)]
        for at, ask in enumerate(asks[1:], 1):
            earlier = max(asks[:at], key=lambda each: shared_prefix(each.prompt, ask.prompt))
            offsets.add(shared_prefix(earlier.prompt, ask.prompt))
            said = ask.prompt[len(earlier.prompt) :][:1]
            turns += bool(said) and ask.prompt[: len(earlier.prompt)] == earlier.prompt
    assert len(offsets) > 120
    assert turns > 50
    first, other = (asks_of(plan(0, number)[0])[0].prompt for number in (0, 1))
    assert shared_prefix(first, other) <= 1


@pytest.mark.parametrize(
    ("tokens", "tops", "verdict"),
    [
        ((5, 6), ({5: -0.1, 7: -2.0}, {6: -0.5, 8: -0.5001}), "equal"),
        ((5, 6), ({5: -0.1002, 7: -2.0}, {6: -0.5, 9: -0.6}), "equal"),
        ((5,), ({5: -0.1, 7: -2.0},), "equal"),
        ((5, 8), ({5: -0.1, 7: -2.0}, {8: -0.5, 6: -0.5001}), "near tie"),
        ((5, 6), ({5: -0.11, 7: -2.0}, {6: -0.5, 8: -0.5001}), "wrong"),
        ((5, 6), ({5: -0.1, 7: -2.1}, {6: -0.5, 8: -0.5001}), "wrong"),
        ((7, 6), ({7: -0.1, 5: -2.0}, {6: -0.5, 8: -0.5001}), "wrong"),
        ((5, 9), ({5: -0.1, 7: -2.0}, {9: -0.5, 6: -0.5001}), "wrong"),
    ],
)
def test_a_near_tie_is_told_from_a_wrong_answer(tokens, tops, verdict):
    right = Output((5, 6), ({5: -0.1, 7: -2.0}, {6: -0.5, 8: -0.5001}))
    assert judge(right, Output(tokens, tops))[0] == verdict


def test_right_answers_are_counted(fake, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command = ["fuzz", "--engine", "--prompts", "200", "--json", "report.json"]
    done = CliRunner().invoke(internal, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["prompts"] == 200 and report["equal"] == report["outputs"] > 200, "some were asked for n > 1"
    assert report["wrong"] == [] == report["dead_engines"]
    assert (report["hit_tokens"], report["preemptions"], report["faults_injected"]) == (7, 2, 1)


def test_a_wrong_answer_is_told_with_what_shows_it_again(fake, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        fake, "sick", lambda ask: answer(ask.prompt, ask.tokens, True) if ask.name == "1-26" else None
    )
    with pytest.raises(RagKVError, match=r"1 wrong answers .*, 0 dead"):
        engine_fuzz_report.run(FuzzOptions(200, seed=3, shares=Shares(copies=0)), tmp_path / "report.json")
    (wrong,) = json.loads((tmp_path / "report.json").read_text())["wrong"]
    assert (wrong["episode"], wrong["wave"]) == (1, 1)
    assert "--seed 3 --only 1" in wrong["again"] and wrong["again"] in capsys.readouterr().out
    assert {"ask", "step"} <= {each["operation"] for each in wrong["operations"]}
    assert any(each.get("name") == "1-26" and each["prompt"] for each in wrong["operations"])


def test_failed_requests_count_and_too_many_wrong_ones_end_it(fake, monkeypatch):
    monkeypatch.setattr(fake, "sick", lambda ask: "failed")
    findings = engine_fuzz.fuzz(FuzzOptions(1000))
    assert findings.failed >= engine_fuzz.MOST_WRONG and findings.prompts < 1000


def test_an_engine_that_dies_is_started_again(fake, monkeypatch):
    monkeypatch.setattr(fake, "deaths", 1)
    findings = engine_fuzz.fuzz(FuzzOptions(100))
    assert findings.prompts == 75 and findings.bad == 1 and "wave 0" in findings.dead[0]
    monkeypatch.setattr(fake, "deaths", 9)
    assert len(engine_fuzz.fuzz(FuzzOptions(1000)).dead) == engine_fuzz.MOST_DEAD


def test_hits_on_what_a_tenant_never_asked_are_told(fake, monkeypatch):
    asks = asks_of(plan(0)[0])

    def is_alone(ask):
        others = [each.prompt for each in asks if each.salt == ask.salt and each is not ask]
        return ask.copies == 1 and all(shared_prefix(ask.prompt, each) < len(ask.prompt) - 1 for each in others)

    alone = next(ask for ask in asks if is_alone(ask))
    monkeypatch.setattr(fake, "cached", lambda ask: len(ask.prompt) - 1 if ask.name == alone.name else 0)
    (wrong,) = engine_fuzz.fuzz(FuzzOptions(100)).wrong
    assert wrong.request == str(alone) and "the tenant has asked" in wrong.what
    assert not engine_fuzz.fuzz(FuzzOptions(100, fusion=True)).wrong


def test_answers_that_are_all_alike_prove_nothing(fake, monkeypatch):
    monkeypatch.setitem(answer.__globals__, "likely", lambda prompt, at: {1: -0.1, 2: -2.0})
    with pytest.raises(RagKVError, match="prove nothing"):
        engine_fuzz.fuzz(FuzzOptions(100))
