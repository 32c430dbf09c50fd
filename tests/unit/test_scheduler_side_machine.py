"""The scheduler side, the toy engine and the lower tiers, everything interleaved; the engine checks all loads."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hand_lanes import Lower, redis
from ragkv.benchmarks.internal.faulty_stores import Fault
from ragkv.kvstore.codec import BLOCK_BYTES
from toy_engine import Engine, text

PROMPTS = st.builds(
    lambda seed, length, tail, more: text(seed, 90)[:length] + text(10 + tail, more),
    seed=st.integers(0, 3),
    length=st.sampled_from([1, 17, 40, 40, 70, 90, 90]),
    tail=st.integers(0, 1),
    more=st.sampled_from([0, 0, 5, 50]),
)
WORLD = st.sampled_from([0, 0, 0, 1])
FAILS = st.sampled_from([(), (), (), ("load",), ("store",), ("load", "store")])
HINTS = st.sampled_from(
    [
        *(None, None, None),
        {"pin": {"owner": "a", "seconds": 30}},
        {
            "pin": {"owner": "b", "seconds": 1, "documents": ["x"]},
            "documents": [{"id": "x", "start": 4, "end": 33}],
        },
        {"unpin": {"owner": "a"}},
        {"ttl": 2},
        {"ttl": 50, "priority": 3},
        {"documents": [{"start": 0, "end": 19}, {"start": 19, "end": 70}], "priority": 9},
        {"ttl": "soon"},
        {"store": False},
        {"store": False, "pin": {"owner": "a", "seconds": 30}, "ttl": 2},
    ]
)
TIERS = {
    "none": list,
    "disk back": lambda: [Lower(capacity=40 * BLOCK_BYTES, through=False)],
    "disk through, redis back": lambda: [
        Lower(capacity=10 * BLOCK_BYTES, queue=6 * BLOCK_BYTES),
        redis(through=False, queue=6 * BLOCK_BYTES),
    ],
    "shared disk back, redis through": lambda: [
        Lower(capacity=10 * BLOCK_BYTES, queue=6 * BLOCK_BYTES, through=False, asks=True, policy="lfu"),
        redis(queue=6 * BLOCK_BYTES),
    ],
}


class Machine(RuleBasedStateMachine):
    """`tiers`: makes those below memory. `own`: vLLM has a prefix cache; else a rule says what it has, and that is
    the truth."""

    tiers, own = staticmethod(TIERS["none"]), True

    def __init__(self):
        super().__init__()
        self.lowers = self.tiers()
        self.troubles = []
        for lower in self.lowers:
            lower.plan = lambda method, number: self.troubles.pop() if self.troubles else None
        self.engine = Engine(
            pages=52, blocks=120, workers=2, device=12, lowers=self.lowers, step_tokens=24, own_cache=self.own
        )
        for seed in range(4 if self.lowers else 0):  # more than memory holds
            self.engine.run(text(seed, 90))

    def request(self, prompt, world, hints):
        params = None if hints is None else {"ragkv": hints}
        salt = f"{world}" if world else None
        return self.engine.request(prompt, world=world, cache_salt=salt, kv_transfer_params=params)

    @rule(prompt=PROMPTS, world=WORLD, hints=HINTS)
    def arrives(self, prompt, world, hints):
        if len(self.engine.waiting) < 4:
            self.request(prompt, world, hints)

    @rule(
        prompt=PROMPTS,
        world=WORLD,
        hints=HINTS,
        budget=st.sampled_from([40, 200]),
        fails=FAILS,
        worker=st.integers(0, 1),
        lanes=st.booleans(),
    )
    def is_served(self, prompt, world, hints, budget, fails, worker, lanes):
        """A request from arrival to end; what fails, fails in its first step."""
        request = self.request(prompt, world, hints)
        self.engine.fail(*fails, worker=worker)
        for _ in range(8):
            self.engine.step(budget=budget)
            self.engine.fail(worker=worker)
            if lanes:
                self.engine.work()
                self.engine.pass_time(0.1)
            if request.num_tokens > len(prompt):
                break
        self.engine.finish(request)

    @rule(
        budget=st.sampled_from([1, 9, 40, 200]),
        local=st.sampled_from([0, 0, 8, 32]),
        admit=st.booleans(),
        deliver=st.booleans(),
        answer=st.integers(0, 1),
        fails=FAILS,
        worker=st.integers(0, 1),
    )
    def steps(self, budget, local, admit, deliver, answer, fails, worker):
        locals_ = {request.request_id: local for request in self.engine.waiting}
        self.engine.fail(*fails, worker=worker)
        if len(self.engine.free) > 8:
            sample = text(20 + answer, 60)
            self.engine.step(admit=admit, budget=budget, local=locals_, sample=sample, deliver=deliver)
        self.engine.fail(worker=worker)

    @precondition(lambda self: self.engine.running)
    @rule(which=st.integers(0, 9))
    def preempts(self, which):
        self.engine.preempt(self.engine.running[which % len(self.engine.running)])

    @precondition(lambda self: self.engine.running or self.engine.waiting or self.engine.loading)
    @rule(which=st.integers(0, 9))
    def finishes(self, which):
        everyone = [*self.engine.running, *self.engine.waiting, *self.engine.loading.values()]
        self.engine.finish(everyone[which % len(everyone)])

    @rule(worker=st.integers(0, 1))
    def reports(self, worker):
        self.engine.deliver(worker)

    @rule(really=st.integers(0, 5))
    def resets(self, really):
        if not really:
            self.engine.reset()

    @rule(worker=st.integers(0, 1))
    def a_device_tier_is_emptied(self, worker):
        self.engine.empty_device(worker)

    @rule(seconds=st.sampled_from([0.01, 0.6, 2.5, 40]))
    def time_passes(self, seconds):
        self.engine.pass_time(seconds)

    @precondition(lambda self: self.lowers)
    @rule(which=st.integers(0, 9), reads=st.booleans(), place=st.integers(0, 3), jobs=st.integers(1, 4))
    def a_lane_works(self, which, reads, place, jobs):
        lower = self.lowers[which % len(self.lowers)]
        for _ in range(jobs):
            lower.reads.step(place) if reads else lower.writes.step()

    @precondition(lambda self: self.lowers)
    @rule()
    def all_lanes_work(self):
        self.engine.work()

    @precondition(lambda self: self.lowers)
    @rule(faults=st.lists(st.sampled_from([None, *Fault]), min_size=1, max_size=6))
    def calls_will_break(self, faults):
        self.troubles[:] = faults

    @precondition(lambda self: any(lower.stored() for lower in self.lowers))
    @rule(which=st.integers(0, 9), place=st.integers(0, 99), other=st.integers(0, 99), how=st.integers(0, 3))
    def a_value_changes(self, which, place, other, how):
        """Behind everybody's back it is gone, cut off, spoilt, or another's."""
        lower = self.lowers[which % len(self.lowers)]
        if not (keys := sorted(lower.stored())):
            return
        key, values = keys[place % len(keys)], lower.values.values
        if how == 0:
            del values[key]
        elif how == 1:
            values[key] = values[keys[other % len(keys)]]
        else:
            lower.spoil(key, lambda value: value[:-9] if how == 2 else value[:-9] + b"\x00" + value[-8:])

    @precondition(lambda self: self.lowers)
    @rule(seconds=st.sampled_from([None, 0.0, 5.0]), really=st.integers(0, 2))
    def restarts(self, seconds, really):
        if not really:
            self.engine.restart(seconds)

    @invariant()
    def whole(self):
        self.engine.memory.check_integrity()
        for lower in self.lowers:
            assert 0 <= lower.tier.queued <= lower.queue
            if lower.index is not None:
                lower.index.check_integrity()

    def teardown(self):
        engine = self.engine
        self.troubles.clear()
        for request in [*engine.running, *engine.waiting, *engine.loading.values()]:
            engine.finish(request)
        engine.settle()
        for _ in range(4):  # breakers close, pins and chunks expire
            engine.pass_time(40)
            engine.settle()
        engine.check()
        assert engine.pins == 0 and not engine.side.requests
        assert all(lower.tier.readable for lower in self.lowers)
        for seed in range(2):
            engine.run(text(seed, 90))
            assert engine.run(text(seed, 90)) > 0
        engine.check()
        if self.lowers:
            engine.restart()  # under the first weights again
            engine.run(text(7, 90))
            assert engine.restart(5.0)
            assert engine.run(text(7, 90)) >= 67  # and the tail, unless the queue was full when it was one
            engine.check()


@pytest.mark.slow
@pytest.mark.parametrize(("tiers", "own"), [*((name, True) for name in TIERS), ("none", False)])
def test_machine(tiers, own):
    made = type("MachineOfThese", (Machine,), {"tiers": staticmethod(TIERS[tiers]), "own": own})
    run_state_machine_as_test(made, settings=settings(max_examples=50, stateful_step_count=40, deadline=None))
