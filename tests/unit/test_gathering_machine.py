"""Texts that share passages, over two lower tiers whose jobs end in any order and whose values are lost or
damaged: what is found by its tokens is right, and in the end nothing is left over."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from hand_lanes import ContentStack, Lower, redis, words
from ragkv.errors import StoreError
from ragkv.kvstore import metrics as m
from ragkv.kvstore.catalogue import is_loose, origin
from ragkv.kvstore.keys import as_tokens, chain_key

PASSAGES = [words(seed, length) for seed, length in ((1, 16), (2, 18), (3, 17), (4, 20))]
texts = st.lists(st.sampled_from(range(4)), min_size=1, max_size=3)


class Machine(RuleBasedStateMachine):
    lowers = (lambda: Lower(capacity=60 << 10, asks=True), redis)

    def __init__(self):
        super().__init__()
        self.stack = ContentStack(*(make() for make in self.lowers), pages=20)
        self.true = {}  # by chain key, where a chunk was computed
        self.lifts = []

    def text(self, parts):
        """Tokens, cuts, and keys."""
        tokens, cuts, key = [], [], self.stack.SPACE
        for part in parts:
            key = chain_key(key, as_tokens(PASSAGES[part]).tobytes())
            self.true[key] = len(tokens)
            tokens += PASSAGES[part]
            cuts.append(len(tokens))
        return tokens, cuts

    @rule(parts=texts, ttl=st.sampled_from([None, None, 5]))
    def keep(self, parts, ttl):
        tokens, cuts = self.text(parts)
        self.stack.keep(tokens, cuts, ttl)

    @rule(parts=texts)
    def fetch(self, parts):
        self.lifts.append(self.stack.fetch(*self.text(parts)))

    @rule(parts=texts)
    def gather(self, parts):
        self.lifts.append(self.stack.gather(*(PASSAGES[part] for part in parts)))

    @rule(parts=texts)
    def bring(self, parts):
        self.stack.bring(*(PASSAGES[part] for part in parts))

    @rule(tier=st.integers(0, 1), write=st.booleans(), place=st.integers(0, 3), times=st.integers(1, 4))
    def work(self, tier, write, place, times):
        lower = self.stack.lowers[tier]
        for _ in range(times):
            if write:
                lower.writes.step()
            else:
                lower.reads.step(place)
        self.stack.placement.tick()

    @rule(seconds=st.sampled_from([0, 0.5, 3]))
    def time(self, seconds):
        self.stack.clock.now += seconds
        self.stack.wall.now += seconds
        self.stack.placement.tick()
        self.lifts = [lift for lift in self.lifts if lift is not None and self.stack.placement.waits(lift)]

    @rule(part=st.integers(0, 3))
    def use(self, part):
        chunks = self.stack.holders(PASSAGES[part])
        self.stack.placement.used(chunks[:1])

    @rule(part=st.integers(0, 3), hold=st.booleans())
    def hold(self, part, hold):
        for chunk in self.stack.holders(PASSAGES[part])[:1]:
            if hold:
                self.stack.hierarchy.holds.hold("owner", chunk, self.stack.clock() + 4)
            else:
                self.stack.hierarchy.forget([chunk], m.EXPIRED)

    @rule()
    def reset(self):
        self.stack.hierarchy.reset()

    @rule()
    def restart(self):
        self.stack.start()
        self.lifts = []

    @precondition(lambda self: any(lower.stored() for lower in self.stack.lowers))
    @rule(data=st.data(), lose=st.booleans())
    def harm(self, data, lose):
        lower = data.draw(st.sampled_from([lower for lower in self.stack.lowers if lower.stored()]))
        key = data.draw(st.sampled_from(sorted(lower.stored())))
        if lose:
            lower.values.delete([key])
        else:
            at = data.draw(st.integers(0, 10**6))
            lower.spoil(key, lambda value: value.__setitem__(at % len(value), value[at % len(value)] ^ 1) or value)

    @rule(tier=st.integers(0, 1), method=st.sampled_from(["get_many", "contains", "put", "delete"]))
    def fail(self, tier, method):
        errors = self.stack.lowers[tier].store.errors
        if errors.pop(method, None) is None:
            errors[method] = StoreError("timeout", "slow")

    @invariant()
    def what_is_found_is_right(self):
        self.stack.hierarchy.check_integrity()
        for tokens in PASSAGES:
            for chunk in self.stack.holders(tokens):
                key = chunk.parent.holder if is_loose(chunk) else chunk.key
                assert origin(chunk) == (self.stack.SPACE, self.true[key])

    @invariant()
    def nobody_waits_for_nothing(self):
        for lift in self.lifts:
            if lift is not None and not lift.over:
                assert any(
                    lower.reads.jobs or self.stack.completions._queue.qsize() for lower in self.stack.lowers
                )

    def teardown(self):
        for lower in self.stack.lowers:
            lower.store.errors.clear()
        self.stack.hierarchy.holds.release("owner")
        self.stack.settle()
        self.stack.check()
        assert all(lift is None or lift.over for lift in self.lifts)
        self.stack.start()
        self.stack.bring(*PASSAGES)
        self.stack.check()


@pytest.mark.slow
def test_state_machine():
    run_state_machine_as_test(Machine, settings=settings(max_examples=150, stateful_step_count=40, deadline=None))
