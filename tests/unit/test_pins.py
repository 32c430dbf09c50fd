"""Pins with owners and expiries, against a dict of who holds what until when."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from memory_growth import grown
from ragkv.kvstore import pins as module
from ragkv.kvstore.pins import NEVER, SHARE, TENANT_SHARE, Pins
from ragkv.kvstore.prefix_tree import Chunk

PAGES, ENTRIES = 20, 5
LITTLE = 20_000  # bytes; 5,000 entries take 25 times as much
PLACES = [(b"a", "desk 1"), (b"a", "desk 2"), (b"b", "desk 1"), (b"c", "desk 3")]
owners = st.sampled_from(PLACES)
seconds = st.integers(1, 20)


def chunk_of(pages, number=0):
    chunk = Chunk(bytes([number]), None, b"")
    chunk.pages = bytes(4 * pages)
    return chunk


class Tier:
    """What pins do: counts them."""

    def __init__(self):
        self.pins = {}

    def pin(self, chunks):
        for chunk in chunks:
            self.pins[chunk] = self.pins.get(chunk, 0) + 1

    def unpin(self, chunks):
        for chunk in chunks:
            self.pins[chunk] -= 1
            assert self.pins[chunk] >= 0


class Machine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.tier = Tier()
        self.holds = Pins(PAGES, self.tier.pin, self.tier.unpin)
        self.chunks = [chunk_of(1 + number % 4, number) for number in range(6)]
        self.now, self.until, self.expiries = 100.0, {}, {}

    def held(self, *tenants):
        return {chunk for owner, chunk in self.until if not tenants or owner[0] in tenants}

    def pages(self, chunks):
        return sum(len(chunk.pages) // 4 for chunk in chunks)

    @rule(owner=owners, number=st.integers(0, 5), seconds=seconds)
    def hold(self, owner, number, seconds):
        chunk = self.chunks[number]
        known = (owner, chunk) in self.until
        fits = self.pages(self.held() | {chunk}) <= SHARE * PAGES
        fits &= self.pages(self.held(owner[0]) | {chunk}) <= TENANT_SHARE * PAGES
        fits &= len(self.until) < ENTRIES and len([1 for each, _ in self.until if each[0] == owner[0]]) < ENTRIES
        fits |= known
        assert self.holds.hold(owner[1], chunk, self.now + seconds, owner[0]) == fits
        if fits:
            self.until[owner, chunk] = self.now + seconds

    @rule(owner=owners)
    def release(self, owner):
        gone = [key for key in self.until if key[0] == owner]
        assert self.holds.release(owner[1], owner[0]) == len(gone)
        for key in gone:
            del self.until[key]

    @rule(number=st.integers(0, 5), seconds=seconds)
    def expire(self, number, seconds):
        chunk = self.chunks[number]
        self.holds.expire(chunk, self.now + seconds)
        self.expiries[chunk] = max(self.expiries.get(chunk, 0.0), self.now + seconds)

    @rule(number=st.integers(0, 5), seconds=st.one_of(seconds, st.just(NEVER)))
    def outlive(self, number, seconds):
        chunk, at = self.chunks[number], self.now + seconds
        changes = chunk in self.expiries and at > self.expiries[chunk]
        assert self.holds.outlive(chunk, at) == changes
        if changes:
            self.expiries[chunk] = at

    @rule(number=st.integers(0, 5))
    def left(self, number):
        self.holds.left(self.chunks[number])
        self.expiries.pop(self.chunks[number], None)

    @rule(seconds=st.integers(0, 8))
    def due(self, seconds):
        self.now += seconds
        over = self.holds.due(self.now)
        assert len(set(over)) == len(over)
        assert set(over) == {chunk for chunk, at in self.expiries.items() if at <= self.now}
        self.expiries = {chunk: at for chunk, at in self.expiries.items() if at > self.now}
        self.until = {key: until for key, until in self.until.items() if until > self.now}

    @rule()
    def forget(self):
        self.holds.forget()
        self.until, self.expiries = {}, {}

    @invariant()
    def agree(self):
        self.holds.check_integrity()
        assert {chunk for chunk, pins in self.tier.pins.items() if pins} == self.held()
        assert all(pins <= 1 for pins in self.tier.pins.values()), "several owners pin a chunk once"
        assert self.holds.pages == self.pages(self.held()) <= SHARE * PAGES
        told = {chunk: 0.0 if at == NEVER else at for chunk, at in self.expiries.items()}
        assert all(self.holds.expiry(chunk) == told.get(chunk, 0.0) for chunk in self.chunks)


def test_state_machine(monkeypatch):
    monkeypatch.setattr(module, "LEAST_ENTRIES", ENTRIES)
    monkeypatch.setattr(module, "ENTRIES", 0)
    run_state_machine_as_test(Machine, settings=settings(max_examples=100, stateful_step_count=50, deadline=None))


@pytest.fixture
def tier():
    return Tier()


@pytest.fixture
def holds(tier):
    made = Pins(PAGES, tier.pin, tier.unpin)
    yield made
    made.check_integrity()


def test_a_pin_ends_when_its_time_is_over(holds, tier):
    chunk = chunk_of(2)
    assert holds.hold("a", chunk, 10.0)
    assert holds.due(9.9) == [] and tier.pins[chunk] == 1
    assert holds.due(10.0) == [] and tier.pins[chunk] == 0 and holds.pages == 0


def test_a_renewal_counts_even_where_it_is_shorter(holds, tier):
    chunk = chunk_of(2)
    holds.hold("a", chunk, 10.0)
    holds.hold("a", chunk, 30.0)
    holds.due(20.0)
    assert tier.pins[chunk] == 1
    holds.hold("a", chunk, 25.0)
    holds.due(25.0)
    assert tier.pins[chunk] == 0


def test_a_chunk_of_several_owners_counts_once_and_stays_for_the_last(holds, tier):
    chunk = chunk_of(4)
    assert holds.hold("a", chunk, 10.0) and holds.hold("b", chunk, 20.0)
    assert holds.pages == 4
    assert holds.release("a") == 1 and tier.pins[chunk] == 1
    assert holds.release("a") == 0
    holds.due(20.0)
    assert tier.pins[chunk] == 0 and holds.pages == 0


def test_chunks_that_never_match_again_are_nobodys(holds, tier):
    gone, stays = chunk_of(2, 1), chunk_of(2, 2)
    assert holds.hold("a", gone, 10.0) and holds.hold("b", gone, 10.0) and holds.hold("a", stays, 10.0)
    holds.drop({gone, chunk_of(4, 3)})
    assert (tier.pins[gone], tier.pins[stays], holds.pages) == (0, 1, 2)
    holds.drop({gone})
    holds.check_integrity()
    assert holds.release("a") == 1 and holds.release("b") == 0


def test_the_shares_are_never_exceeded(holds):
    first, second, third, fourth = chunk_of(4, 1), chunk_of(2, 2), chunk_of(4, 3), chunk_of(2, 4)
    assert holds.hold("x", first, 10.0, b"a")
    assert not holds.hold("y", second, 10.0, b"a"), "a tenant has a quarter, whatever it calls its owners"
    assert holds.hold("y", first, 10.0, b"a"), "it is pinned already: that costs nothing"
    assert holds.hold("x", third, 10.0, b"b") and holds.hold("x", second, 10.0, b"c") and holds.pages == 10
    assert not holds.hold("x", fourth, 10.0, b"d"), "all together have half"
    holds.release("x", b"c")
    assert holds.hold("x", fourth, 10.0, b"d")


def test_an_owner_of_the_same_name_is_another_tenants_own(holds, tier):
    first, second = chunk_of(2, 1), chunk_of(2, 2)
    assert holds.hold("desk", first, 10.0, b"a") and holds.hold("desk", second, 10.0, b"b")
    assert holds.release("desk") == holds.release("desk", b"c") == 0
    assert holds.release("desk", b"b") == 1
    assert (tier.pins[first], tier.pins[second]) == (1, 0)


def test_the_books_of_very_many_owners_are_bounded(holds):
    chunk = chunk_of(1)
    held = [holds.hold(f"desk {number}", chunk, 10.0) for number in range(3000)]
    assert sum(held) == 1024 and all(held[:1024])
    assert holds.release("desk 1500") == 0 and holds.release("desk 7") == 1
    assert holds.hold("desk 1500", chunk, 10.0)
    while holds.pages:
        assert holds.due(10.0) == []


def test_renewals_take_no_memory(holds):
    chunks = [chunk_of(1, number) for number in range(3)]

    def renew():
        for number in range(5000):
            for chunk in chunks:
                holds.hold("a", chunk, 1e6 + number)
            holds.expire(chunks[0], 1e6 + number)

    assert grown(renew) < LITTLE
    assert holds.due(1e6 + 4998) == [] and holds.pages == 3
    assert holds.due(1e6 + 4999) == chunks[:1] and holds.pages == 0


def test_chunks_that_left_long_before_their_time_take_no_memory(holds):
    """Requests may name a time of years."""
    stays = chunk_of(1, 7)
    holds.expire(stays, 1e9)

    def pass_by():
        for number in range(5000):
            chunk = chunk_of(1)
            holds.expire(chunk, 2e9 + number)
            holds.left(chunk)

    assert grown(pass_by) < LITTLE
    assert holds.due(1e9) == [stays]


def test_a_chunk_that_must_go_is_told_once_at_its_latest_time(holds):
    chunk = chunk_of(1)
    for at in (20.0, 10.0, 30.0, 30.0):
        holds.expire(chunk, at)
    assert holds.expiry(chunk) == 30.0
    assert holds.due(29.0) == [] and holds.due(30.0) == [chunk] and holds.due(99.0) == []
    assert holds.expiry(chunk) == 0.0
