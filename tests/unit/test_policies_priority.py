"""Priorities: the lower class goes first, and chains and pins hold across classes."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ragkv.benchmarks.compared import COMPARED
from ragkv.policies import LRU, Prioritized


@pytest.fixture(params=sorted(COMPARED))
def policy(request):
    made = Prioritized(COMPARED[request.param])
    yield made
    made.check_integrity()


def test_a_lower_class_goes_first_however_used(policy):
    policy.insert("high", priority=2)
    policy.insert("low")
    policy.insert("middle", priority=1)
    for _ in range(5):
        policy.touch("low")
    assert policy.evict(3) == ["low", "middle", "high"]


def test_a_child_raises_its_ancestors(policy):
    policy.insert("root")
    policy.insert("other", "root")
    policy.insert("inner", "root")
    policy.insert("leaf", "inner", priority=3)
    policy.insert("alone", priority=1)
    assert [policy.priority(key) for key in ("root", "inner", "leaf", "other")] == [3, 3, 3, 0]
    assert policy.evict(5) == ["other", "alone", "leaf", "inner", "root"]


def test_raising_a_key_raises_its_ancestors_and_never_lowers(policy):
    policy.insert("root", priority=2)
    policy.insert("inner", "root")
    policy.insert("leaf", "inner")
    policy.raise_priority("leaf", 1)
    assert [policy.priority(key) for key in ("root", "inner", "leaf")] == [2, 1, 1]
    policy.raise_priority("root", 0)
    assert policy.priority("root") == 2
    policy.insert("low")
    assert policy.evict(2) == ["low", "leaf"]


def test_a_pin_below_holds_a_parent_above(policy):
    policy.insert("root", priority=3)
    policy.insert("leaf", "root")
    policy.insert("other", priority=1)
    policy.pin("leaf")
    policy.raise_priority("leaf", 1)
    assert policy.evictable == 1 and policy.evict(2) is None
    assert policy.evict(1) == ["other"]
    policy.unpin("leaf")
    assert policy.evict(2) == ["leaf", "root"]


def test_a_raised_key_counts_as_just_used():
    policy = Prioritized(LRU)
    for key in "abc":
        policy.insert(key, priority=key == "b")
    policy.raise_priority("a", 1)
    assert policy.evict(3) == ["c", "b", "a"]


def test_bad_priorities_are_refused_and_change_nothing(policy):
    policy.insert("a", priority=1)
    for priority in (-1, 4):
        with pytest.raises(ValueError, match=f"priority = {priority}; allowed: 0 to 3"):
            policy.insert("b", priority=priority)
        with pytest.raises(ValueError, match=f"priority = {priority}; allowed: 0 to 3"):
            policy.raise_priority("a", priority)
    with pytest.raises(KeyError):
        policy.raise_priority("b", 2)
    with pytest.raises(ValueError, match="tracked already"):
        policy.insert("a", priority=3)
    assert len(policy) == 1 and policy.priority("a") == 1
    with pytest.raises(ValueError, match="levels = 0; allowed: 1 or more"):
        Prioritized(LRU, levels=0)


class PriorityMachine(RuleBasedStateMachine):
    """Against LRU's order within a class; a raised key is as just used in its new one."""

    keys = Bundle("keys")

    def __init__(self):
        super().__init__()
        self.policy = Prioritized(LRU, levels=3)
        self.parent, self.weight, self.pins, self.priority, self.used = {}, {}, {}, {}, {}
        self.serial = self.clock = 0

    def children(self, key):
        return [k for k, above in self.parent.items() if above == key]

    def held(self, key):
        return self.pins[key] > 0 or any(self.held(child) for child in self.children(key))

    def stamp(self, key):
        self.clock += 1
        self.used[key] = self.clock

    def raise_all(self, key, priority):
        while key is not None:
            if self.priority[key] < priority:
                self.priority[key] = priority
                self.stamp(key)
            key = self.parent[key]

    @rule(target=keys, parent=keys | st.none(), weight=st.integers(1, 3), priority=st.integers(0, 2))
    def insert(self, parent, weight, priority):
        parent = parent if parent in self.parent else None
        self.serial += 1
        key = self.serial
        self.policy.insert(key, parent, weight, 1.0, priority)
        self.parent[key], self.weight[key], self.pins[key], self.priority[key] = parent, weight, 0, priority
        self.stamp(key)
        self.raise_all(parent, priority)
        return key

    @rule(key=keys, priority=st.integers(0, 2))
    def raise_priority(self, key, priority):
        if key in self.parent:
            self.policy.raise_priority(key, priority)
            self.raise_all(key, priority)

    @rule(key=keys)
    def touch(self, key):
        if key in self.parent:
            self.policy.touch(key)
            self.stamp(key)

    @rule(key=keys)
    def pin(self, key):
        if key in self.parent:
            self.policy.pin(key)
            self.pins[key] += 1

    @precondition(lambda self: any(self.pins.values()))
    @rule(data=st.data())
    def unpin(self, data):
        key = data.draw(st.sampled_from([k for k, n in self.pins.items() if n]))
        self.policy.unpin(key)
        self.pins[key] -= 1

    @rule(key=keys)
    def remove(self, key):
        if key in self.parent and not self.children(key):
            self.policy.remove(key)
            self.forget(key)

    def forget(self, key):
        for table in (self.parent, self.weight, self.pins, self.priority, self.used):
            del table[key]

    @rule(weight=st.integers(0, 10))
    def evict(self, weight):
        victims = self.policy.evict(weight)
        if weight > sum(self.weight[key] for key in self.parent if not self.held(key)):
            assert victims is None
            return
        for key in victims:
            assert weight > 0
            frontier = [k for k in self.parent if not self.held(k) and not self.children(k)]
            assert key == min(frontier, key=lambda k: (self.priority[k], self.used[k]))
            weight -= self.weight[key]
            self.forget(key)
        assert weight <= 0

    @invariant()
    def agree(self):
        self.policy.check_integrity()
        assert {key: self.policy.priority(key) for key in self.parent} == self.priority
        assert len(self.policy) == len(self.parent)
        assert self.policy.evictable == sum(self.weight[key] for key in self.parent if not self.held(key))


def test_state_machine():
    run_state_machine_as_test(
        PriorityMachine, settings=settings(max_examples=150, stateful_step_count=40, deadline=None)
    )
