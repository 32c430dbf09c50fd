"""One suite for every policy: the contract, and a state machine against a naive model."""

import tracemalloc
from pathlib import Path

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

from processes import told_by_seeds
from ragkv.benchmarks.compared import COMPARED, make_compared
from ragkv.policies import LRU, POLICIES, Adaptive, Prioritized, make_policy

FACTORIES = dict(COMPARED)
FACTORIES["prioritized-lru"] = lambda: Prioritized(LRU)
FACTORIES["prioritized-adaptive"] = lambda: Prioritized(Adaptive)


@pytest.fixture(params=sorted(FACTORIES))
def policy(request):
    made = FACTORIES[request.param]()
    yield made
    made.check_integrity()


def chain(policy, *keys):
    for parent, key in zip((None, *keys), keys, strict=False):
        policy.insert(key, parent)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=f"'mru' is not one of {', '.join(sorted(POLICIES))}"):
        make_policy("mru")


def test_eviction_is_atomic(policy):
    chain(policy, "a", "b")
    policy.insert("c", weight=3)
    policy.pin("c")
    assert policy.evict(3) is None
    assert len(policy) == 3 and policy.evictable == 2
    assert policy.evict(0) == []
    assert policy.evict(2) == ["b", "a"]


def test_a_parent_outlives_its_children(policy):
    chain(policy, "root", "middle", "leaf")
    assert [policy.evict(1), policy.evict(1), policy.evict(1)] == [["leaf"], ["middle"], ["root"]]


def test_a_parent_outlives_a_child_that_is_used_alone(policy):
    chain(policy, "root", "leaf")
    policy.insert("other")
    for _ in range(3):
        policy.touch("leaf")
    gone = policy.evict(3)
    assert gone.index("leaf") < gone.index("root")


def test_a_pin_keeps_the_ancestors_too(policy):
    chain(policy, "root", "middle", "leaf")
    policy.insert("sibling", "root")
    policy.pin("leaf")
    assert policy.evictable == 1
    assert policy.evict(1) == ["sibling"]
    policy.pin("leaf")
    policy.unpin("leaf")
    assert policy.evictable == 0
    policy.unpin("leaf")
    assert policy.evict(3) == ["leaf", "middle", "root"]


def test_weights_count(policy):
    policy.insert("a", weight=5)
    policy.insert("b", weight=2)
    assert policy.evictable == 7
    assert policy.evict(4) == ["a"]
    assert "a" not in policy and "b" in policy


def test_wrong_use_raises_and_changes_nothing(policy):
    chain(policy, "a", "b")
    with pytest.raises(ValueError, match="tracked already"):
        policy.insert("a")
    with pytest.raises(ValueError, match="below 1"):
        policy.insert("x", weight=0)
    with pytest.raises(KeyError):
        policy.insert("x", "nobody")
    with pytest.raises(ValueError, match="1 children"):
        policy.remove("a")
    with pytest.raises(ValueError, match="not pinned"):
        policy.unpin("a")
    for method in (policy.touch, policy.remove, policy.pin, policy.unpin):
        with pytest.raises(KeyError):
            method("nobody")
    assert len(policy) == 2 and policy.evictable == 2


def test_a_pinned_key_can_be_removed(policy):
    chain(policy, "a", "b")
    policy.pin("b")
    policy.pin("b")
    policy.remove("b")
    assert policy.evictable == 1 and policy.evict(1) == ["a"]


def test_a_leaf_goes_before_its_parent_however_much_it_is_used(policy):
    chain(policy, "root", "used", "more")
    policy.insert("unused", "root")
    for key in ("used", "more", "more"):
        policy.touch(key)
    gone = policy.evict(4)
    assert sorted(gone) == ["more", "root", "unused", "used"]
    assert gone.index("more") < gone.index("used") < gone.index("root") == 3


def test_a_key_can_come_back(policy):
    for _ in range(3):
        chain(policy, "a", "b")
        assert policy.evict(2) == ["b", "a"]
        assert len(policy) == policy.evictable == 0


def test_memory_does_not_grow_with_the_keys_that_went(policy):
    def churn(first, last):
        for key in range(first, last):
            policy.insert(key, key - 1 if key % 7 and key - 1 in policy else None, 1 + key % 3)
            policy.pin(key)
            if key % 5 == 0:
                policy.touch(key)
            policy.unpin(key)
            if len(policy) > 60:
                policy.evict(1 + key % 4)
            if key % 11 == 0 and key % 7 == 6 and key in policy:
                policy.remove(key)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = churn(0, 4000)
        after = churn(4004, 12000)
    finally:
        tracemalloc.stop()
    assert after < before + 100_000, "8,000 more keys went, and something was kept of them"


def test_removal_leaves_nothing_behind(policy):
    tracemalloc.start()
    try:
        for key in range(6000):
            policy.insert(key)
            policy.remove(key)
        assert tracemalloc.get_traced_memory()[0] < 200_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["arc", "lfu", "s3fifo", "wtinylfu"])
def test_what_was_used_again_outlives_a_scan(name):
    policy = make_compared(name)
    for key in range(50):
        policy.insert(key)
    for key in [*range(50)] * 2:
        policy.touch(key)
    for key in range(50, 500):
        if len(policy) == 100:
            policy.evict(1)
        policy.insert(key)
    assert sum(key in policy for key in range(50)) >= 45


VICTIMS = """
import sys
sys.path[:0] = {path!r}
from test_policies import FACTORIES
for name in sorted(FACTORIES):
    policy, gone = FACTORIES[name](), []
    keys = [b"%d" % (i * i % 97) if i % 2 else str(i * i % 89) for i in range(3000)]
    for key in keys:
        if key in policy:
            policy.touch(key)
        else:
            if len(policy) > 30:
                gone += policy.evict(1)
            policy.insert(key)
    print(name, gone)
"""


def test_decisions_are_the_same_in_every_process():
    program = VICTIMS.format(path=[str(each) for each in Path(__file__).parents[:2]])
    told = told_by_seeds(program)
    assert told[0] == told[1] and len(told[0]) == len(FACTORIES)


class Naive:
    """The contract in the plainest words: a look at everything each time. `rank` says who goes first, where the
    policy's order is as simple as that."""

    def __init__(self, name):
        self.rank = RANKS.get(name)
        self.clock = self.inflation = 0
        self.parent, self.weight, self.cost, self.pins = {}, {}, {}, {}
        self.born, self.used, self.uses, self.risen = {}, {}, {}, {}

    def children(self, key):
        return [k for k, above in self.parent.items() if above == key]

    def held(self, key):
        return self.pins[key] > 0 or any(self.held(child) for child in self.children(key))

    def evictable(self):
        return sum(self.weight[key] for key in self.parent if not self.held(key))

    def insert(self, key, parent, weight, cost):
        self.clock += 1
        self.parent[key], self.weight[key], self.cost[key], self.pins[key] = parent, weight, cost, 0
        self.born[key], self.used[key], self.uses[key] = self.clock, self.clock, 1
        self.risen[key] = self.inflation

    def touch(self, key):
        self.clock += 1
        self.used[key] = self.clock
        self.uses[key] += 1
        self.risen[key] = self.inflation

    def next(self):
        frontier = [key for key in self.parent if not self.held(key) and not self.children(key)]
        return min(frontier, key=lambda key: self.rank(self, key))

    def forget(self, key):
        assert not self.children(key) and not self.held(key)
        for table in (self.parent, self.weight, self.cost, self.pins):
            del table[key]

    def check_eviction(self, weight, victims):
        if weight > self.evictable():
            assert victims is None
            return
        assert victims is not None
        for key in victims:
            assert weight > 0, "more went than was needed"
            if self.rank is not None:
                assert key == self.next()
            weight -= self.weight[key]
            self.inflation = max(self.inflation, RANKS["gdsf"](self, key)[0])
            self.forget(key)
        assert weight <= 0, "less went than was needed"


RANKS = {
    "lru": lambda model, key: model.used[key],
    "prioritized-lru": lambda model, key: model.used[key],
    "fifo": lambda model, key: model.born[key],
    "lfu": lambda model, key: (model.uses[key], model.used[key]),
    "gdsf": lambda model, key: (
        model.risen[key] + model.uses[key] * model.cost[key] / model.weight[key],
        model.used[key],
    ),
}


class PolicyMachine(RuleBasedStateMachine):
    name = ""
    keys = Bundle("keys")

    def __init__(self):
        super().__init__()
        self.policy, self.model = FACTORIES[self.name](), Naive(self.name)
        self.serial = 0

    def add(self, key, parent, weight, cost):
        parent = parent if parent in self.model.parent else None
        self.policy.insert(key, parent, weight, cost)
        self.model.insert(key, parent, weight, cost)

    @rule(target=keys, parent=keys | st.none(), weight=st.integers(1, 4), cost=st.sampled_from([0.5, 1, 3]))
    def insert(self, parent, weight, cost):
        self.serial += 1
        self.add(self.serial, parent, weight, cost)
        return self.serial

    @rule(key=keys, parent=keys | st.none(), weight=st.integers(1, 4))
    def insert_again(self, key, parent, weight):
        if key not in self.model.parent:
            self.add(key, parent, weight, 1)

    @rule(key=keys)
    def touch(self, key):
        if key in self.model.parent:
            self.policy.touch(key)
            self.model.touch(key)

    @rule(key=keys)
    def touch_chain(self, key):
        line = []
        while key in self.model.parent:
            line.append(key)
            key = self.model.parent[key]
        for each in reversed(line):
            self.policy.touch(each)
            self.model.touch(each)

    @rule(key=keys)
    def pin(self, key):
        if key in self.model.parent:
            self.policy.pin(key)
            self.model.pins[key] += 1

    @precondition(lambda self: any(self.model.pins.values()))
    @rule(data=st.data())
    def unpin(self, data):
        key = data.draw(st.sampled_from([k for k, n in self.model.pins.items() if n]))
        self.policy.unpin(key)
        self.model.pins[key] -= 1

    @rule(key=keys)
    def remove(self, key):
        if key in self.model.parent and not self.model.children(key):
            self.policy.remove(key)
            self.model.pins[key] = 0
            self.model.forget(key)

    @rule(weight=st.integers(0, 12))
    def evict(self, weight):
        self.model.check_eviction(weight, self.policy.evict(weight))

    @invariant()
    def agree(self):
        self.policy.check_integrity()
        assert len(self.policy) == len(self.model.parent)
        assert all(key in self.policy for key in self.model.parent)
        assert self.policy.evictable == self.model.evictable()


@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_state_machine(name):
    machine = type(f"{name}Machine", (PolicyMachine,), {"name": name})
    run_state_machine_as_test(machine, settings=settings(max_examples=80, stateful_step_count=40, deadline=None))
