"""The index of a private store, against a dict of sizes and parents."""

import copy

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from ragkv.kvstore.budget import Index
from ragkv.kvstore.stores.contract import Entry
from ragkv.policies import POLICIES, make_policy

CAPACITY = 20
KEYS = [bytes([number]) * 16 for number in range(12)]
keys = st.sampled_from(KEYS)
sizes = st.integers(0, 9)


class Machine(RuleBasedStateMachine):
    policy = ""

    def __init__(self):
        super().__init__()
        self.index = Index(CAPACITY, make_policy(self.policy))
        self.sizes, self.parents, self.gone = {}, {}, set()

    def forget(self, keys):
        for key in keys:
            assert key not in self.parents.values(), "a parent went before its child"
            del self.sizes[key], self.parents[key]
            self.gone.discard(key)

    def refusable(self, size, parent):
        """Whether even the eviction of all that may go leaves no room."""
        kept, above = 0, parent
        while above is not None:
            kept, above = kept + self.sizes[above], self.parents[above]
        return kept + size > CAPACITY

    @rule(key=keys, size=sizes, parent=st.none() | keys, cost=st.floats(0.1, 10))
    def add(self, key, size, parent, cost):
        self.note(self.index, key, size, parent, cost)

    def note(self, index, key, size, parent, cost):
        """Add a key to an index and to the model; its victims."""
        before, used, size = set(self.sizes), index.used, max(1, size)
        victims = index.add(key, size, parent, cost)
        if key in self.gone:
            assert victims == []
            self.gone.discard(key)
            return victims
        above = parent if parent in before else None
        if victims is None:
            assert key in before or self.refusable(size, above)
            assert index.used == used
            return victims
        assert key not in before and not self.refusable(size, above)
        assert not victims or used + size > CAPACITY, "evicted without need"
        assert len(set(victims)) == len(victims) and above not in victims
        self.forget(victims)
        self.sizes[key], self.parents[key] = size, above
        return victims

    @rule(key=keys)
    def drop(self, key):
        self.index.drop(key)
        if key in self.parents.values():
            self.gone.add(key)
        elif key in self.sizes:
            self.forget([key])

    @precondition(lambda self: self.sizes)
    @rule(data=st.data())
    def touch(self, data):
        self.index.touch(data.draw(st.lists(keys, max_size=4)))

    @rule(entries=st.lists(st.builds(Entry, keys, sizes, st.floats(0, 9)), max_size=6, unique_by=lambda e: e.key))
    def adopt(self, entries):
        """As if each that is not there were added, longest unused first."""
        twin, went = copy.deepcopy(self.index), []
        for entry in sorted(entries, key=lambda entry: entry.used):
            if entry.key not in self.sizes.keys() - self.gone:
                victims = self.note(twin, entry.key, entry.size, None, 1.0)
                went += [entry.key] if victims is None else victims
        assert self.index.adopt(entries) == [key for key in went if key not in twin]

    @invariant()
    def agree(self):
        self.index.check_integrity()
        there = self.sizes.keys() - self.gone
        assert self.index.keys() == there and len(self.index) == len(there)
        assert all((key in self.index) == (key in there) for key in KEYS)
        assert self.index.used == sum(self.sizes.values()) <= CAPACITY


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_state_machine(policy):
    machine = type(f"{policy}Machine", (Machine,), {"policy": policy})
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=30, deadline=None))


A, B, C, D = KEYS[:4]


@pytest.fixture
def index():
    made = Index(10, make_policy("lru"))
    yield made
    made.check_integrity()


def test_a_chain_goes_from_its_tail_on(index):
    assert index.add(A, 3, None, 1.0) == index.add(B, 3, A, 1.0) == index.add(C, 3, B, 1.0) == []
    assert index.add(D, 6, None, 1.0) == [C, B]
    assert index.keys() == {A, D}


def test_a_parent_is_not_evicted_for_its_child(index):
    index.add(A, 6, None, 1.0)
    assert index.add(B, 6, A, 1.0) is None
    assert index.keys() == {A} and index.used == 6
    assert index.add(B, 4, A, 1.0) == []


def test_what_is_larger_than_the_budget_evicts_nothing(index):
    index.add(A, 5, None, 1.0)
    assert index.add(B, 11, None, 1.0) is None and index.keys() == {A}


def test_a_lost_parent_counts_until_it_can_go(index):
    index.add(A, 3, None, 1.0)
    index.add(B, 3, A, 1.0)
    index.drop(A)
    assert A not in index and index.keys() == {B} and len(index) == 1
    assert index.used == 6
    assert index.add(A, 3, None, 1.0) == [] and A in index, "it came back"
    index.drop(A)
    index.drop(B)
    assert index.keys() == set()
    assert index.add(C, 9, None, 1.0) == [A] and index.used == 9, "what was lost makes room"


def test_a_lost_parent_comes_back_as_large_as_it_was(index):
    index.add(A, 3, None, 1.0)
    index.add(B, 3, A, 1.0)
    for find in (lambda: index.add(A, 9, None, 1.0), lambda: index.adopt([Entry(A, 9, 0.0)])):
        index.drop(A)
        assert find() == [] and A in index and index.used == 6


def test_dropping_a_stranger_is_no_matter(index):
    index.drop(A)
    assert len(index) == 0


def test_touching_keeps_a_chain_and_passes_strangers_over(index):
    for key in (A, B, C):
        index.add(key, 3, None, 1.0)
    index.touch([A, D])
    assert index.add(D, 3, None, 1.0) == [B]


def test_what_was_found_is_entered_longest_unused_first(index):
    entries = [Entry(A, 4, 30.0), Entry(B, 4, 10.0), Entry(C, 4, 20.0), Entry(D, 11, 40.0)]
    assert index.adopt(entries) == [B, D]
    assert index.keys() == {A, C}
    assert index.add(B, 4, None, 1.0) == [C], "the longest unused of them"
    assert index.adopt([Entry(A, 4, 50.0)]) == [] and index.used == 8


def test_values_without_bytes_have_weight(index):
    """An empty file, as a crash may leave it."""
    index.adopt([Entry(key, 0, 0.0) for key in KEYS])
    assert len(index) == 10
    assert len(index.add(KEYS[0][:1] * 15 + b"\xff", 10, None, 1.0)) == 10
    assert index.used == 10
