"""The load gate beside simulated engines: what they measure is noisy, slow at first, shared and drifting."""

import math
import random
from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from ragkv.connectors.vllm.streams import Ticket
from ragkv.kvstore.gate import BELIEF, PROBE, Gate, range_of
from toy_engine import Engine, closing, text
from toy_worker import Took

PLAY = settings(max_examples=60, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32)


class Simulated:
    """An engine's steps and loads. `fixed`, `slope`: seconds of a step, and of a token in it. `tier`: loads come
    from a lower tier. `budget`: most tokens a step. `tail`: the share that is slower by far. `spread`:
    of all (log-normal). `first`: by how much the first prefill and the first load are slower."""

    def __init__(self, seed, *, fixed, slope, tier, budget=2048, spread=0.0, tail=0.0, first=1.0):
        self.chance, self.gate = random.Random(seed), Gate()
        self.fixed, self.slope, self.tier, self.budget = fixed, slope, tier, budget
        self.spread, self.tail, self.first = spread, tail, {"prefill": first, "load": first}
        self.speed = 1.0  # of the machine: both of prefill and of loads

    def prefill(self, tokens):
        """Seconds of all steps for so many tokens, undisturbed."""
        return (math.ceil(tokens / self.budget) * self.fixed + self.slope * tokens) * self.speed

    def compute(self, tokens, beside=0):
        """Compute a prompt, with others' tokens in the same steps."""
        while tokens > 0:
            step = min(tokens, self.budget)
            self.gate.prefill.note(step + beside, self._seen("prefill", self.prefill(step + beside)))
            tokens -= step

    def load(self, tokens, seconds):
        """Load if it is allowed; whether it was."""
        sizes = {"disk": 1000 * tokens} if self.tier else None
        if not self.gate.allows(tokens, "disk" if self.tier else "memory", sizes):
            return False
        share = self.chance.uniform(0.0, 0.3) if self.tier else 1.0
        self.gate.copy.note(tokens, self._seen("load", seconds * share))
        if self.tier:
            self.gate.tier("disk").note(1000 * tokens, self._seen("load", seconds * (1 - share)))
        return True

    def drift(self):
        """The machine becomes a little quicker or slower."""
        self.speed = min(1.6, max(0.6, self.speed * self.chance.choice([0.95, 1.0, 1.05])))

    def _seen(self, kind, seconds):
        slower, self.first[kind] = self.first[kind], 1.0
        if self.chance.random() < self.tail:
            slower *= self.chance.uniform(5, 100)
        return seconds * slower * self.chance.lognormvariate(0, self.spread)


@st.composite
def engines(draw, spread=0.3, tail=0.01):
    """GPUs and CPUs: from 5 ms a step and 20 us a token to a second and 1 ms."""
    return Simulated(
        draw(seeds),
        fixed=draw(st.floats(0.001, 0.1)),
        slope=draw(st.floats(2e-5, 2e-3)),
        tier=draw(st.booleans()),
        budget=draw(st.sampled_from([512, 2048, 8192])),
        spread=draw(st.floats(0, spread)),
        tail=draw(st.floats(0, tail)),
        first=draw(st.sampled_from([1.0, 3.0, 100.0])),
    )


@PLAY
@given(engines(), st.booleans(), st.floats(0.001, 0.1))
def test_what_takes_a_tenth_of_its_prefill_is_always_loaded(engine, drifts, part):
    """Documents, tiny hits, suffixes and shared steps in any order."""
    for _ in range(300):
        tokens = round(10 ** engine.chance.uniform(2.3, 4.3))
        kind = engine.chance.random()
        if kind < 0.2:
            engine.compute(tokens, beside=engine.chance.choice([0, 0, 30, 500]))
        elif kind < 0.4:
            engine.compute(engine.chance.randint(32, 100))
        elif kind < 0.5:  # all of it fixed: as slow as 200 tokens
            engine.load(engine.chance.randint(1, 31), part * engine.prefill(200))
        else:
            assert engine.load(tokens, part * engine.prefill(tokens))
        if drifts:
            engine.drift()


@PLAY
@given(engines(spread=0.15, tail=0.01), st.booleans(), st.floats(2, 50))
def test_what_takes_twice_its_prefill_is_loaded_once_in_sixteen_times(engine, drifts, times):
    """Beside what it takes to learn, in each range of sizes; documents that are new are computed."""
    asked, made = Counter(), Counter()
    engine.first["load"] = 1.0
    for _ in range(6):
        engine.compute(3000)
    for _ in range(1500):
        tokens = round(10 ** engine.chance.uniform(2.3, 4.3))
        if engine.chance.random() < 0.3:
            engine.compute(tokens)
        else:
            asked[range_of(tokens)] += 1
            if engine.load(tokens, times * engine.prefill(tokens)):
                made[range_of(tokens)] += 1
            else:
                engine.compute(tokens)
        if drifts:
            engine.drift()
    for size, count in asked.items():
        assert made[size] <= BELIEF + 2 + count / PROBE, (size, made[size], count)


@PLAY
@given(engines(spread=0.15, tail=0.0), st.integers(20, 100))
def test_a_tier_that_becomes_slow_is_left_and_one_that_recovers_is_found_again(engine, spell):
    def ask(part):
        loaded = engine.load(3000, part * engine.prefill(3000))
        if not loaded:
            engine.compute(3000)
        return loaded

    for _ in range(6):
        engine.compute(3000)
    assert all(ask(0.05) for _ in range(20))
    slow = [ask(4.0) for _ in range(spell)]
    assert sum(slow) <= 2 * BELIEF + spell / PROBE
    again = [ask(0.05) for _ in range((BELIEF + 1) * PROBE)]
    assert True in again and all(again[again.index(True) :]), "one quick trial is enough"


def test_the_faults_of_lines():
    """A slow first prefill, of which a falling line was made; and a load of one token, from which 3,000 were
    extrapolated."""
    gate = Gate()
    gate.copy.note(2900, 0.05)
    gate.prefill.note(2000, 4.0)
    for _ in range(4):
        gate.prefill.note(2965, 2.0)
    assert all(gate.allows(2944, "memory") for _ in range(PROBE))
    gate = Gate()
    for _ in range(4):
        gate.prefill.note(2965, 2.0)
        gate.copy.note(1, 0.001)
    assert all(gate.allows(2944, "memory") for _ in range(PROBE))


# --- a whole scheduler and worker, and an independent program's order of requests ---


class Watch:
    """Finds that a forward takes what its work does, with noise, and the first far longer."""

    def __init__(self, worker, noise):
        self.noise, self.slower, self.begun = noise, 20.0, None
        self.begin, worker.begin = worker.begin, self.note

    def note(self, orders):
        """A step begins."""
        self.begun = orders.work
        self.begin(orders)

    def record(self):
        """The beginning of a step, or its end."""
        if self.begun is not None:
            self.work, self.begun = self.begun, None
            return Took(0)
        seconds, self.slower = (0.01 + 7e-4 * self.work) * self.noise() * self.slower, 1.0
        return Took(seconds)


def timed(engine, noise):
    """Let an engine measure noisy times: a load takes a fixed millisecond, and a tenth of prefill at most."""

    def slowed(load):
        return lambda rows, *more: (
            load(rows, *more) and Ticket(Took((0.001 + 7e-5 * len(rows)) * noise()), Took(0))
        )

    for worker, equipment in zip(engine.workers, engine.equipment, strict=True):
        equipment.compute.record = Watch(worker, noise).record
        equipment.memory.load = slowed(equipment.memory.load)
    return engine


@pytest.mark.parametrize("seed", range(20))
def test_an_independent_programs_order_hits_every_document(seed):
    """A short request, then four documents and one question each, then other questions to the same documents;
    every prompt begins with the same token."""
    chance, tokens = random.Random(seed), 2952

    def noise():
        slower = chance.uniform(5, 50) if chance.random() < 0.05 else 1.0
        return slower * chance.lognormvariate(0, 0.5)

    gate = Gate()
    documents = [[7, *text(100 * seed + n, tokens - 1)] for n in range(4)]
    with closing(timed(Engine(pages=6000, blocks=1000, workers=1, gate=gate), noise)) as engine:
        engine.run([7, *text(9000 + seed, 30)])
        for n, document in enumerate(documents):
            assert engine.run([*document, *text(9100 + n, 20)]) == 0, "a few tokens alike are no hit"
        for question in range(3):
            for n, document in enumerate(documents):
                hit = engine.run([*document, *text(9200 + 10 * question + n, 20)])
                assert hit >= tokens, (seed, question, n)
