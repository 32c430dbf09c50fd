"""One suite for every registered policy: the contract, and a state machine against a naive model."""

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

from ragkv.policies import POLICIES, make_policy


@pytest.fixture(params=sorted(POLICIES))
def policy(request):
    made = make_policy(request.param)
    yield made
    made.check_integrity()


def chain(policy, *keys):
    for parent, key in zip((None, *keys), keys, strict=False):
        policy.insert(key, parent)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'mru' is not one of lfu, lru"):
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


def test_lru_takes_the_longest_unused_and_of_a_chain_the_tail():
    policy = make_policy("lru")
    chain(policy, "a1", "a2", "a3")
    chain(policy, "b1", "b2")
    for key in ("a1", "a2"):
        policy.touch(key)
    assert policy.evict(5) == ["a3", "b2", "b1", "a2", "a1"]


def test_lfu_takes_the_least_used_first():
    policy = make_policy("lfu")
    for key in "abc":
        policy.insert(key)
    for key in "aab":
        policy.touch(key)
    policy.insert("d")
    assert policy.evict(4) == ["c", "d", "b", "a"]


class NaiveModel:
    """The contract in the plainest words: lists, and a look at everything each time."""

    def __init__(self, name):
        self.frequency_counts = name == "lfu"
        self.keys = []  # in order of going, within one frequency
        self.parent, self.weight, self.pins, self.uses = {}, {}, {}, {}

    def children(self, key):
        return [k for k in self.keys if self.parent[k] == key]

    def held(self, key):
        return self.pins[key] > 0 or any(self.held(child) for child in self.children(key))

    def place(self, key):
        self.keys = [k for k in self.keys if k != key]
        above = self.parent[key]
        ahead = above is not None and not self.held(above)
        if self.frequency_counts and ahead:
            ahead = self.uses[above] == self.uses[key]
        self.keys.insert(self.keys.index(above) if ahead else len(self.keys), key)

    def insert(self, key, parent, weight):
        self.parent[key], self.weight[key], self.pins[key], self.uses[key] = parent, weight, 0, 1
        self.place(key)

    def touch(self, key):
        above = self.parent[key]
        counted = above is None or self.uses[key] < self.uses[above]
        self.uses[key] += counted
        if not self.held(key):
            self.place(key)

    def unpin(self, key):
        self.pins[key] -= 1
        self.release(key)

    def release(self, key):
        """What is held no more goes to the end, from the tail of the chain on."""
        while key is not None and not self.held(key):
            self.keys.append(self.keys.pop(self.keys.index(key)))
            key = self.parent[key]

    def order(self):
        free = [k for k in self.keys if not self.held(k)]
        return sorted(free, key=self.uses.__getitem__) if self.frequency_counts else free

    def forget(self, key):
        above = self.parent[key]
        was_held = self.held(key)
        self.keys.remove(key)
        for table in (self.parent, self.weight, self.pins, self.uses):
            del table[key]
        if was_held:
            self.release(above)

    def evict(self, weight):
        victims = []
        order = self.order()
        if weight > sum(self.weight[k] for k in order):
            return None
        for key in order:
            if weight <= 0:
                break
            victims.append(key)
            weight -= self.weight[key]
        for key in victims:
            self.forget(key)
        return victims


class PolicyMachine(RuleBasedStateMachine):
    name = ""
    keys = Bundle("keys")

    def __init__(self):
        super().__init__()
        self.policy, self.model = make_policy(self.name), NaiveModel(self.name)
        self.serial = 0

    @rule(target=keys, parent=keys | st.none(), weight=st.integers(1, 4))
    def insert(self, parent, weight):
        parent = parent if parent in self.model.parent else None
        self.serial += 1
        self.policy.insert(self.serial, parent, weight)
        self.model.insert(self.serial, parent, weight)
        return self.serial

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
        self.model.unpin(key)

    @rule(key=keys)
    def remove(self, key):
        if key in self.model.parent and not self.model.children(key):
            self.policy.remove(key)
            self.model.forget(key)

    @rule(weight=st.integers(0, 12))
    def evict(self, weight):
        assert self.policy.evict(weight) == self.model.evict(weight)

    @invariant()
    def agree(self):
        self.policy.check_integrity()
        assert len(self.policy) == len(self.model.keys)
        assert self.policy.evictable == sum(self.model.weight[k] for k in self.model.order())


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_state_machine(name):
    machine = type(f"{name}Machine", (PolicyMachine,), {"name": name})
    run_state_machine_as_test(machine, settings=settings(max_examples=150, stateful_step_count=40, deadline=None))
