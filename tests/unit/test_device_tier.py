"""The device tier's accounting, against a dict of what was ordered and what was made."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from ragkv.kvstore.device_tier import DeviceTier
from ragkv.kvstore.pages import PagePool, rows
from ragkv.kvstore.prefix_tree import Chunk
from ragkv.policies import POLICIES, make_policy

PAGES, AFTER, PAGE_TOKENS = 8, 2, 4


def chunk_of(pages, number=0):
    chunk = Chunk(bytes([number]), None, np.zeros(pages * PAGE_TOKENS, np.int32).tobytes())
    chunk.pages = np.full(pages, number, np.int32).tobytes()
    return chunk


def pages_of(chunk):
    return np.frombuffer(chunk.device, np.int32).tolist()


def use(tier, chunks):
    """As the hierarchy does."""
    for chunk in chunks:
        chunk.hits += 1
    return tier.used_now(chunks)


class Machine(RuleBasedStateMachine):
    policy = ""

    def __init__(self):
        super().__init__()
        self.tier = DeviceTier(PAGES, make_policy(self.policy), AFTER)
        self.chunks = [chunk_of(1 + number % 4, number) for number in range(8)]
        self.hits = dict.fromkeys(self.chunks, 0)
        self.content = {}  # of each page: the chunk whose copy was made there last
        self.orders = []
        self.copied = set()  # made, and in the tier since

    def there(self):
        return {chunk for chunk in self.chunks if chunk.device}

    @rule(first=st.integers(0, 7), count=st.integers(1, 5))
    def use(self, first, count):
        chain = [self.chunks[(first + at) % 8] for at in range(count)]
        before = self.there()
        for chunk in chain:
            self.hits[chunk] += 1
        given = use(self.tier, chain)
        due = [chunk for chunk in chain if chunk not in before and self.hits[chunk] >= AFTER]
        assert given == [chunk for chunk in due if chunk in given], "root first"
        assert all(len(pages_of(chunk)) == len(chunk.pages) // 4 for chunk in given)
        assert before & set(chain) <= self.there(), "a chain made room for itself"
        kept = sum(len(chunk.pages) // 4 for chunk in chain if chunk in before)
        for chunk in due:  # in order, each that fits beside those of the chain that are there
            size = len(chunk.pages) // 4
            assert (chunk in given) == (kept + size <= PAGES)
            kept += size if chunk in given else 0
        self.copied &= self.there()
        self.orders += [(chunk, chunk.device) for chunk in given]

    @precondition(lambda self: self.orders)
    @rule(ok=st.booleans())
    def made(self, ok):
        """Copies are made, and reported, in the order of the steps."""
        chunk, pages = self.orders.pop(0)
        self.content |= dict.fromkeys(np.frombuffer(pages, np.int32).tolist(), chunk if ok else None)
        current = chunk.device is pages
        self.tier.made(chunk, pages, ok=ok)
        if current and ok:
            self.copied.add(chunk)
        elif current:
            assert not chunk.device, "a failed copy is forgotten"

    @rule(number=st.integers(0, 7))
    def drop(self, number):
        chunk = self.chunks[number]
        was_there = bool(chunk.device)
        assert self.tier.drop(chunk) == was_there
        assert not chunk.device and not self.tier.drop(chunk)
        self.copied.discard(chunk)
        if number % 2:  # it left memory, and comes as another
            self.chunks[number] = chunk_of(1 + number % 4, number)
            self.hits[self.chunks[number]] = 0

    @invariant()
    def agree(self):
        self.tier.check_integrity()
        owned = [page for chunk in self.there() for page in pages_of(chunk)]
        assert len(owned) == len(set(owned)) == self.tier.used <= PAGES
        assert {chunk for chunk in self.chunks if chunk in self.tier} == self.copied
        assert len(self.tier) == len(self.copied)
        for chunk in self.copied:
            assert all(self.content[page] is chunk for page in pages_of(chunk)), "its pages hold another's KV"


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_state_machine(policy):
    machine = type(f"{policy}Machine", (Machine,), {"policy": policy})
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=40, deadline=None))


@pytest.fixture
def tier():
    made = DeviceTier(PAGES, make_policy("lru"), AFTER)
    yield made
    made.check_integrity()


def test_a_chunk_is_copied_at_its_second_use(tier):
    chunk = chunk_of(3)
    assert use(tier, [chunk]) == [] and tier.used == 0
    assert use(tier, [chunk]) == [chunk] and tier.used == 3
    assert chunk not in tier and len(tier) == 0, "before a worker has said that it was made"
    assert use(tier, [chunk]) == [], "it is ordered once"
    tier.made(chunk, chunk.device, ok=True)
    assert chunk in tier and len(tier) == 1
    assert rows([chunk], PAGE_TOKENS, device=True).tolist() == list(range(12))


def test_a_failed_copy_is_ordered_anew_at_the_next_use(tier):
    chunk = chunk_of(3)
    use(tier, [chunk])
    use(tier, [chunk])
    tier.made(chunk, chunk.device, ok=False)
    assert chunk not in tier and tier.used == 0
    assert use(tier, [chunk]) == [chunk]


def test_a_chain_longer_than_the_tier_is_copied_as_far_as_it_fits(tier):
    chain = [chunk_of(3, number) for number in range(4)]
    use(tier, chain)
    assert use(tier, chain) == chain[:2]
    assert [len(chunk.device) // 4 for chunk in chain] == [3, 3, 0, 0]
    assert use(tier, chain) == [], "and it does not push itself out"


def test_the_longest_unused_makes_room_and_the_tail_before_the_root(tier):
    first, second = [chunk_of(2, 1), chunk_of(2, 2)], [chunk_of(2, 3), chunk_of(2, 4)]
    for chain in (first, first, second, second, second, first):
        use(tier, chain)
    new = chunk_of(2, 5)
    use(tier, [new])
    assert use(tier, [new]) == [new]
    assert [bool(chunk.device) for chunk in (*first, *second)] == [True, True, True, False]


def test_word_of_a_copy_that_was_dropped_meanwhile_counts_for_nothing(tier):
    """Even where the chunk was given equal pages again: another's copy may stand between the two orders."""
    chunk, other = chunk_of(8, 1), chunk_of(8, 2)
    chunk.hits = other.hits = AFTER
    tier.used_now([chunk])
    old = chunk.device
    tier.used_now([other])
    assert not chunk.device
    tier.used_now([chunk])
    assert chunk.device == old
    tier.made(chunk, old, ok=True)
    assert chunk not in tier
    tier.made(chunk, old, ok=False)
    assert chunk.device, "nor does its failure undo the new order"
    tier.made(chunk, chunk.device, ok=True)
    assert chunk in tier


def test_dropping_a_stranger_is_no_matter(tier):
    assert tier.drop(chunk_of(1)) is False


def test_pages_are_taken_lowest_first_and_never_twice():
    pool = PagePool(5)
    first = pool.take(3)
    assert np.frombuffer(first, np.int32).tolist() == [0, 1, 2] and (pool.used, pool.free) == (3, 2)
    with pytest.raises(IndexError, match="3 asked for, 2 free"):
        pool.take(3)
    pool.give_back(first)
    pool.check_integrity()
    assert np.frombuffer(pool.take(5), np.int32).tolist() == [0, 1, 2, 3, 4]
    assert pool.take(0) == b""
    pool.give_back(first)
    pool.give_back(first)
    with pytest.raises(AssertionError, match="free twice"):
        pool.check_integrity()
