"""The fuzzer of engines, on engines that compute nothing: its plan, its judgement, what it counts and says."""

import contextlib
import json
import pickle
import zlib
from collections import Counter
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from ragkv.benchmarks.engine import EngineError
from ragkv.benchmarks.internal import engine_fuzz, engine_fuzz_play, engine_fuzz_report
from ragkv.benchmarks.internal.commands import app as internal
from ragkv.benchmarks.internal.engine_fuzz import Faults, FuzzOptions, judge
from ragkv.benchmarks.internal.engine_fuzz_plan import (
    LONGEST_ANSWER,
    LONGEST_PROMPT,
    Abort,
    Ask,
    Episode,
    Reset,
    Shares,
    Step,
    asks_of,
)
from ragkv.benchmarks.internal.engine_fuzz_play import Output, Played, injected, play
from ragkv.benchmarks.report import shared_prefix
from ragkv.errors import RagKVError, StoreError

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


def test_a_plan_has_everything_in_it():
    operations = [operation for number in range(20) for wave in plan(0, number) for operation in wave]
    asks = asks_of(operations)
    assert len(asks) == 2000 and len({ask.name for ask in asks}) == 2000
    assert {type(each) for each in operations} >= {Step, Abort, Reset}
    assert {(each.connector, each.running) for each in operations if isinstance(each, Reset)} == {
        *((False, False), (False, True), (True, True))
    }
    assert {ask.copies for ask in asks} == {1, 2, 3} and max(len(ask.prompt) for ask in asks) <= LONGEST_PROMPT
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


class FakeLLM:
    """vLLM's engine, as far as the fuzzer drives it: every step ends the request that came first."""

    def __init__(self, reasons=("length",), refuse=0):
        self.llm_engine = self
        self.asked, self.waiting, self.steps = {}, [], 0
        self._reasons, self._refuse = reasons, refuse

    def add_request(self, name, prompt, sampling):
        self.asked[name] = prompt, sampling
        self.waiting.append(name)

    def abort_request(self, names):
        self.waiting = [name for name in self.waiting if name not in names]

    def step(self):
        self.steps += 1
        if not self.waiting:
            return []
        name = self.waiting.pop(0)
        _, sampling = self.asked[name]
        one = SimpleNamespace(
            token_ids=[7] * sampling.max_tokens,
            logprobs=[{7: SimpleNamespace(logprob=-0.1)}] * sampling.max_tokens,
            finish_reason=self._reasons[len(self.asked) % len(self._reasons)],
        )
        found = {"request_id": name, "finished": True, "num_cached_tokens": 3, "outputs": [one] * sampling.n}
        return [SimpleNamespace(**found)]

    def reset_prefix_cache(self, running, connector):
        if self._refuse:
            self._refuse -= 1
            if running:
                raise RuntimeError("Failed to reset KV cache even when all are preempted")
            return False
        return True


def test_operations_are_played():
    llm = FakeLLM()
    a, b, c = Ask("a", (1, 2), 2, "tenant", 2), Ask("b", (1, 2), 1), Ask("c", (1,), 1)
    played = play(llm, [a, b, Step(1), Abort("a"), Abort("b"), Reset(), c])
    assert {name: len(outputs) for name, outputs in played.outputs.items()} == {"a": 2, "c": 1}
    assert played.outputs["c"] == [Output((7,), ({7: -0.1},))] and played.cached["a"] == 3
    assert (played.aborted, played.resets, played.refused, played.failed) == (1, 1, 0, [])
    prompt, sampling = llm.asked["a"]
    assert prompt == {"prompt_token_ids": [1, 2], "cache_salt": "tenant"}
    assert (sampling.n, sampling.top_k) == (2, 1) and llm.asked["b"][1].temperature == 0


def test_a_reset_waits_for_stores_but_not_for_requests():
    assert play(FakeLLM(refuse=3), [Reset()]).resets == 1
    ask = Ask("a", (1,), 1)
    for reset in (Reset(), Reset(running=True)):
        played = play(FakeLLM(refuse=1), [ask, reset])
        assert (played.resets, played.refused, len(played.outputs)) == (0, 1, 1)


def test_a_request_that_ends_otherwise_has_failed():
    assert play(FakeLLM(reasons=("error",)), [Ask("a", (1,), 1)]).failed == ["a"]


def test_an_engine_that_ends_nothing_is_stuck(monkeypatch):
    monkeypatch.setattr(engine_fuzz_play, "STUCK_SECONDS", -1.0)
    llm = FakeLLM()
    llm.step = list
    with pytest.raises(RagKVError, match="stuck"):
        play(llm, [Ask("a", (1,), 1)])


def test_faults_are_injected_into_stores_and_copies(monkeypatch, tmp_path):
    from ragkv.benchmarks.internal.faulty_stores import FaultyStore
    from ragkv.connectors.vllm import builder
    from ragkv.connectors.vllm.transfer import DirectMover

    for owner, name in ((builder, "DiskStore"), (DirectMover, "load"), (DirectMover, "store")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # so that it is put back
    before = injected(None).copy()
    pickle.loads(pickle.dumps(Faults(1)))()
    assert not issubclass(builder.DiskStore, FaultyStore)
    Faults(1, store=1.0, copy=1.0)()
    store = builder.DiskStore(tmp_path / "disk", fsync=False)
    for number in range(8):
        with contextlib.suppress(StoreError):
            store.put(bytes([number] * 16), [b"value"])
    store.close()
    with pytest.raises(OSError, match="injected"):
        DirectMover.load(None, None, None)
    counted = injected(None) - before
    assert sum(count for kind, count in counted.items() if kind.startswith("put: ")) == 8
    assert counted["load copy: fail"] == 1
