"""The suite of eviction policies: the contract, and a state machine against a naive model.

class TestNewest(PolicyTests):
    def make(self):
        return Newest()
"""

import tracemalloc
from collections.abc import Hashable, Iterator
from typing import Any

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

from ragkv.policies.contract import EvictionPolicy
from ragkv.testing.salted import salted

Policy = EvictionPolicy[Any]


def chain(policy: Policy, *keys: Hashable) -> None:
    """Insert keys, each with the one before it as its parent."""
    for parent, key in zip((None, *keys), keys, strict=False):
        policy.insert(key, parent)


def churn(policy: Policy, first: int, last: int) -> int:
    """Insert so many keys, keep some sixty of them; the bytes that Python holds then."""
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


def victims(policy: Policy, salt: int) -> list[Hashable]:
    """What a policy evicts under a fixed sequence of calls, with keys of that salt."""
    gone: list[Hashable] = []
    for number in range(3000):
        key = salted(number * number % 97, salt)
        if key in policy:
            policy.touch(key)
            continue
        if len(policy) > 30:
            gone += policy.evict(1) or []
        policy.insert(key)
    return gone


class PolicyTests:
    """Every policy passes these. `make` is all that a subclass owes."""

    def make(self) -> Policy:
        """A new, empty policy."""
        raise NotImplementedError

    def model(self) -> "NaivePolicy":
        """What the state machine compares with: a model that knows the policy's order, where there is one."""
        return NaivePolicy()

    @pytest.fixture
    def policy(self) -> Iterator[Policy]:
        made = self.make()
        yield made
        made.check_integrity()

    def test_eviction_is_atomic(self, policy: Policy) -> None:
        chain(policy, "a", "b")
        policy.insert("c", weight=3)
        policy.pin("c")
        assert policy.evict(3) is None
        assert len(policy) == 3 and policy.evictable == 2
        assert policy.evict(0) == policy.evict(-1) == []
        assert policy.evict(2) == ["b", "a"]

    def test_a_parent_outlives_its_children(self, policy: Policy) -> None:
        chain(policy, "root", "middle", "leaf")
        assert [policy.evict(1), policy.evict(1), policy.evict(1)] == [["leaf"], ["middle"], ["root"]]

    def test_a_parent_outlives_a_child_that_is_used_alone(self, policy: Policy) -> None:
        chain(policy, "root", "leaf")
        policy.insert("other")
        for _ in range(3):
            policy.touch("leaf")
        gone = policy.evict(3)
        assert gone is not None and gone.index("leaf") < gone.index("root")

    def test_a_pin_keeps_the_ancestors_too(self, policy: Policy) -> None:
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

    def test_weights_count(self, policy: Policy) -> None:
        weights = {"a": 5, "b": 2}
        for key, weight in weights.items():
            policy.insert(key, weight=weight)
        assert policy.evictable == 7
        gone = policy.evict(4)
        assert gone is not None and sum(weights[key] for key in gone) >= 4
        assert sum(weights[key] for key in gone[:-1]) < 4, "it takes no more than it needs"
        assert [key in policy for key in weights] == [key not in gone for key in weights]

    def test_wrong_use_raises_and_changes_nothing(self, policy: Policy) -> None:
        chain(policy, "a", "b")
        for key, weight, cost in (("a", 1, 1.0), ("x", 0, 1.0), ("x", 1, 0.0)):
            with pytest.raises(ValueError):
                policy.insert(key, None, weight, cost)
        with pytest.raises(KeyError):
            policy.insert("x", "nobody")
        for misused in (policy.remove, policy.unpin):
            with pytest.raises(ValueError):
                misused("a")
        for method in (policy.touch, policy.remove, policy.pin, policy.unpin):
            with pytest.raises(KeyError):
                method("nobody")
        assert len(policy) == 2 and policy.evictable == 2 and "x" not in policy

    def test_a_pinned_key_can_be_removed(self, policy: Policy) -> None:
        chain(policy, "a", "b")
        policy.pin("b")
        policy.pin("b")
        policy.remove("b")
        assert policy.evictable == 1 and policy.evict(1) == ["a"]

    def test_a_leaf_goes_before_its_parent_however_much_it_is_used(self, policy: Policy) -> None:
        chain(policy, "root", "used", "more")
        policy.insert("unused", "root")
        for key in ("used", "more", "more"):
            policy.touch(key)
        gone = policy.evict(4)
        assert gone is not None and sorted(gone) == ["more", "root", "unused", "used"]
        assert gone.index("more") < gone.index("used") < gone.index("root") == 3

    def test_a_key_can_come_back(self, policy: Policy) -> None:
        for _ in range(3):
            chain(policy, "a", "b")
            assert policy.evict(2) == ["b", "a"]
            assert len(policy) == policy.evictable == 0

    def test_memory_does_not_grow_with_the_keys_that_went(self, policy: Policy) -> None:
        tracemalloc.start()
        try:
            before = churn(policy, 0, 4000)
            after = churn(policy, 4004, 12000)
        finally:
            tracemalloc.stop()
        assert after < before + 100_000, "8,000 more keys went, and something was kept of them"

    def test_removal_leaves_nothing_behind(self, policy: Policy) -> None:
        tracemalloc.start()
        try:
            for key in range(6000):
                policy.insert(key)
                policy.remove(key)
            assert tracemalloc.get_traced_memory()[0] < 200_000
        finally:
            tracemalloc.stop()

    def test_decisions_do_not_depend_on_hashes(self) -> None:
        """Hashes of bytes and str differ from process to process, and decisions must not."""
        first, second = (victims(self.make(), salt) for salt in (1, 2))
        assert first == second and len(first) > 1000

    def test_state_machine(self) -> None:
        run_state_machine_as_test(
            lambda: PolicyMachine(self.make(), self.model()),  # type: ignore[arg-type]  # a factory is documented
            settings=settings(max_examples=80, stateful_step_count=40, deadline=None),
        )


class NaivePolicy:
    """The contract in the plainest words: a look at everything each time."""

    def __init__(self) -> None:
        self.parent: dict[int, int | None] = {}
        self.weight: dict[int, int] = {}
        self.pins: dict[int, int] = {}

    def children(self, key: int) -> list[int]:
        """Keys whose parent this is."""
        return [child for child, above in self.parent.items() if above == key]

    def held(self, key: int) -> bool:
        """Whether a pin keeps a key, its own or that of a descendant."""
        return self.pins[key] > 0 or any(self.held(child) for child in self.children(key))

    def evictable(self) -> int:
        """Weight of all keys that may go."""
        return sum(self.weight[key] for key in self.parent if not self.held(key))

    def insert(self, key: int, parent: int | None, weight: int, cost: float) -> None:
        """A key is tracked from now on."""
        self.parent[key], self.weight[key], self.pins[key] = parent, weight, 0

    def touch(self, key: int) -> None:
        """A key was used; the order of use is a matter of subclasses."""

    def forget(self, key: int) -> None:
        """A key has gone; AssertionError where it had to stay."""
        assert not self.children(key) and not self.held(key)
        for table in (self.parent, self.weight, self.pins):
            del table[key]

    def evict(self, key: int) -> None:
        """The policy has chosen this key to go next."""
        self.forget(key)

    def check_eviction(self, weight: int, gone: list[int] | None) -> None:
        """AssertionError where so much weight was to be evicted, and these keys were not the answer."""
        if weight > self.evictable():
            assert gone is None
            return
        assert gone is not None
        for key in gone:
            assert weight > 0, "more went than was needed"
            weight -= self.weight[key]
            self.evict(key)
        assert weight <= 0, "less went than was needed"


class PolicyMachine(RuleBasedStateMachine):
    """A policy beside its model."""

    keys: Bundle[int] = Bundle("keys")

    def __init__(self, policy: Policy, model: NaivePolicy) -> None:
        super().__init__()
        self.policy, self.tracked = policy, model
        self.serial = 0

    def _add(self, key: int, parent: int | None, weight: int, cost: float) -> None:
        parent = parent if parent in self.tracked.parent else None
        self.policy.insert(key, parent, weight, cost)
        self.tracked.insert(key, parent, weight, cost)

    @rule(target=keys, parent=keys | st.none(), weight=st.integers(1, 4), cost=st.sampled_from([0.5, 1, 3]))
    def insert(self, parent: int | None, weight: int, cost: float) -> int:
        self.serial += 1
        self._add(self.serial, parent, weight, cost)
        return self.serial

    @rule(key=keys, parent=keys | st.none(), weight=st.integers(1, 4))
    def insert_again(self, key: int, parent: int | None, weight: int) -> None:
        if key not in self.tracked.parent:
            self._add(key, parent, weight, 1)

    @rule(key=keys)
    def touch(self, key: int) -> None:
        if key in self.tracked.parent:
            self.policy.touch(key)
            self.tracked.touch(key)

    @rule(key=keys)
    def touch_chain(self, key: int) -> None:
        line: list[int] = []
        above: int | None = key
        while above is not None and above in self.tracked.parent:
            line.append(above)
            above = self.tracked.parent[above]
        for each in reversed(line):
            self.policy.touch(each)
            self.tracked.touch(each)

    @rule(key=keys)
    def pin(self, key: int) -> None:
        if key in self.tracked.parent:
            self.policy.pin(key)
            self.tracked.pins[key] += 1

    @precondition(lambda self: any(self.tracked.pins.values()))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from([k for k, n in self.tracked.pins.items() if n]))
        self.policy.unpin(key)
        self.tracked.pins[key] -= 1

    @rule(key=keys)
    def remove(self, key: int) -> None:
        if key in self.tracked.parent and not self.tracked.children(key):
            self.policy.remove(key)
            self.tracked.pins[key] = 0
            self.tracked.forget(key)

    @rule(weight=st.integers(0, 12))
    def evict(self, weight: int) -> None:
        self.tracked.check_eviction(weight, self.policy.evict(weight))

    @invariant()
    def agree(self) -> None:
        self.policy.check_integrity()
        assert len(self.policy) == len(self.tracked.parent)
        assert all(key in self.policy for key in self.tracked.parent)
        assert self.policy.evictable == self.tracked.evictable()
