"""The tier over memory and device tier: what its state machine would find late or not tell."""

import numpy as np
import pytest

from hand_lanes import Recorded
from memory_tier_tools import PAGE_BYTES, PAGE_TOKENS, SPACES, chain_of
from ragkv.kvstore import metrics as m
from ragkv.kvstore.device_tier import DeviceTier
from ragkv.kvstore.memory_tier import MemoryTier
from ragkv.policies import POLICIES, make_policy
from ragkv.policies.admission import AdmissionPolicy


@pytest.fixture(params=sorted(POLICIES))
def make_tier(request):
    """Makes a tier of 8 pages; `metrics`: its own."""

    def make(*more, **named):
        metrics = Recorded()
        made = MemoryTier(8, make_policy(request.param), PAGE_TOKENS, PAGE_BYTES, metrics, *more, **named)
        made.metrics = metrics
        return made

    return make


@pytest.fixture
def tier(make_tier):
    made = make_tier()
    yield made
    made.check_integrity()


SPACE = SPACES[0]


def stored(tier, tokens, upto=None):
    chain = chain_of(SPACE, tokens)
    for chunk in tier.reserve(SPACE, chain, len(tokens) if upto is None else upto):
        tier.commit(chunk)
    return chain


def test_of_a_chain_as_much_is_reserved_as_there_is_room_for(tier):
    parent = stored(tier, [1] * 20)  # a chunk, which the new ones must not push out
    held = tier.match(SPACE, parent, 20).chunks
    pages = held[0].page_count
    tokens = [np.full(PAGE_TOKENS, number, dtype=np.int32).tobytes() for number in range(8)]
    new = tier.reserve_chain(held[0], [(b"key %d" % number, each) for number, each in enumerate(tokens)])
    assert [chunk.tokens for chunk in new] == tokens[: 8 - pages] and tier.used == 8
    assert [chunk.parent for chunk in new] == [*held, *new[:-1]]
    assert tier.metrics.get(m.REFUSED_CHUNKS, m.NO_ROOM) == 1
    tier.commit(*new)
    assert tier.match(SPACE, parent, 20).chunks == held
    assert tier.reserve_chain(new[-1], []) == []


def test_a_tail_that_is_being_written_is_no_collision(tier):
    chain = chain_of(SPACE, [1] * 10)
    (first,) = tier.reserve(SPACE, chain, 10)
    assert tier.reserve(SPACE, chain, 10) == []
    tier.commit(first)
    assert not tier.metrics.get(m.REFUSED_CHUNKS, m.COLLISION)


def test_a_tail_within_a_stored_one_is_not_stored_again(tier):
    stored(tier, [1] * 12)
    assert tier.reserve(SPACE, chain_of(SPACE, [1] * 10), 10) == []
    assert tier.used == 3


def test_an_abandoned_chunk_with_others_behind_it_is_written_anew(tier):
    chain = chain_of(SPACE, [1] * 16 + [0] + [2] * 8)
    first, second = tier.reserve(SPACE, chain, 25)
    tier.commit(second)
    tier.abandon(first)
    assert not tier.match(SPACE, chain, 25)
    (again,) = tier.reserve(SPACE, chain, 25)
    assert again.position == 0 and again is first
    tier.commit(again)
    assert tier.match(SPACE, chain, 25).chunks == (first, second)


def test_what_a_reset_leaves_goes_when_its_own_pin_goes(tier):
    """Not only when nothing at all is pinned, which under load is never."""
    one, two = stored(tier, [1] * 12), stored(tier, [2] * 12)
    first, second = (tier.match(SPACE, chain, 12).chunks for chain in (one, two))
    tier.pin(first)
    tier.pin(second)
    tier.reset()
    assert len(tier) == 0 and tier.used == 6
    assert not tier.match(SPACE, one, 12)
    tier.unpin(first)
    assert tier.used == 3
    stored(tier, [3] * 20)
    tier.reset()
    assert tier.used == 3
    tier.unpin(second)
    assert tier.used == 0
    assert tier.metrics.get(m.EVICTED_CHUNKS, m.MEMORY, m.RESET) == 3


def test_what_is_written_while_a_reset_comes_never_matches(tier):
    chain = chain_of(SPACE, [1] * 12)
    (old,) = tier.reserve(SPACE, chain, 12)
    tier.reset()
    (new,) = tier.reserve(SPACE, chain, 12)
    tier.commit(old)
    assert not tier.match(SPACE, chain, 12)
    tier.discard(old)
    tier.commit(new)
    assert tier.match(SPACE, chain, 12).chunks == (new,) and tier.used == 3


# --- pins with owners, and chunks whose time is over ---


def gauge(tier, *name):
    tier.report()
    return tier.metrics.get(*name)


def test_owners_leave_half_of_memory_to_everyone(tier):
    chains = [stored(tier, [number] * 8) for number in range(1, 4)]
    first, second, third = (tier.match(SPACE, chain, 8).chunks[0] for chain in chains)
    assert tier.pins.hold("a", first, 10.0, b"1")
    assert not tier.pins.hold("b", second, 10.0, b"1"), "that is a quarter"
    assert tier.pins.hold("b", second, 10.0, b"2")
    assert not tier.pins.hold("c", third, 10.0, b"3")


def test_a_chunk_that_was_evicted_takes_its_time_along(tier):
    """The same tokens, stored anew without a time, stay."""
    chain = stored(tier, [1] * 12)
    tier.pins.expire(tier.match(SPACE, chain, 12).chunks[0], 10.0)
    stored(tier, [2] * 32)
    stored(tier, [1] * 12)
    tier.tick(10.0)
    assert tier.match(SPACE, chain, 12).length == 12


def test_a_parent_may_be_dropped_while_a_forgotten_child_is_read(tier):
    chain = stored(tier, [1] * 16 + [0] + [2] * 8)
    parent, child = tier.match(SPACE, chain, 25).chunks
    tier.pin([child])
    tier.forget([child], m.EXPIRED)
    tier.discard(parent)
    assert len(tier) == 0 and tier.used == 7, "what the child stands on stays as long"
    tier.check_integrity()
    tier.unpin([child])
    assert tier.used == 0


# --- admission, the hook, the device tier ---


class Refuses(AdmissionPolicy):
    def __init__(self):
        self.asked, self.limit = [], 99

    def admit(self, key, weight=1, cost=1.0):
        self.asked.append((key, weight, cost))
        return len(self.asked) <= self.limit


def test_admission_is_asked_for_new_chunks_with_weight_and_cost(make_tier):
    door = Refuses()
    tier = make_tier(door, attention_tokens=34.0)
    chain = stored(tier, [1] * 16 + [0] + [2] * 8)
    assert door.asked[0] == (chain.keys[0], 5, 17.0)
    assert door.asked[1][1:] == (2, 8 * 1.5)
    assert stored(tier, [1] * 16 + [0] + [2] * 8) and len(door.asked) == 2, "what is stored needs no leave"


def test_what_is_not_admitted_ends_the_chain_and_evicts_nothing(make_tier):
    door = Refuses()
    tier = make_tier(door)
    stored(tier, [3] * 12)
    door.limit = 2
    chain = stored(tier, [1] * 16 + [0] + [2] * 8)
    assert tier.match(SPACE, chain, 25).length == 17
    assert tier.metrics.get(m.REFUSED_CHUNKS, m.ADMISSION) == 1
    assert tier.match(SPACE, chain_of(SPACE, [3] * 12), 12).length == 12
    tier.check_integrity()


def test_the_hook_is_told_of_evictions_for_room_alone(make_tier):
    told = []
    tier = make_tier(evicting=lambda chunk: told.append((chunk, chunk in tier)))
    chain = stored(tier, [1] * 16 + [0] + [2] * 8)
    parent, child = tier.match(SPACE, chain, 25).chunks
    stored(tier, [3] * 32)
    assert told == [(child, True), (parent, True)], "from the tail on, while they stand in the tree"
    told.clear()
    tier.discard(tier.match(SPACE, chain_of(SPACE, [3] * 32), 32).chunks[0])
    stored(tier, [4] * 12)
    tier.reset()
    stored(tier, [5] * 12)
    tier.forget([tier.match(SPACE, chain_of(SPACE, [5] * 12), 12).chunks[0]], m.EXPIRED)
    (unready,) = tier.reserve(SPACE, chain_of(SPACE, [6] * 12), 12)
    tier.abandon(unready)
    assert told == []


def test_the_hook_is_not_told_of_what_was_never_written(make_tier):
    told = []
    tier = make_tier(evicting=told.append)
    chain = chain_of(SPACE, [1] * 16 + [0] + [2] * 8)
    first, second = tier.reserve(SPACE, chain, 25)
    tier.commit(second)
    tier.abandon(first)
    stored(tier, [3] * 32)
    assert told == [second]


@pytest.fixture
def with_device(make_tier):
    made = make_tier(device=DeviceTier(5, make_policy("lru"), after=2))
    yield made
    made.check_integrity()


def copied(tier, match, times=2):
    """Use a match until its chunks are copied; what was ordered."""
    ordered = [chunk for _ in range(times) for chunk in tier.touch(match)]
    for chunk in ordered:
        tier.device.made(chunk, chunk.device, ok=True)
    return ordered


def test_a_hot_chunk_is_copied_and_goes_with_its_original(with_device):
    chain = stored(with_device, [1] * 12)
    match = with_device.match(SPACE, chain, 12)
    assert copied(with_device, match) == list(match.chunks)
    assert match.chunks[0] in with_device.device
    assert gauge(with_device, m.USED_PAGES, m.DEVICE) == 3
    stored(with_device, [2] * 32)
    assert match.chunks[0] not in with_device.device and with_device.device.used == 0
    assert with_device.metrics.get(m.EVICTED_CHUNKS, m.DEVICE, m.SUPERSEDED) == 1


def test_a_chunk_of_which_only_a_part_was_used_is_not_copied(with_device):
    """The engine holds no more of it."""
    stored(with_device, [1] * 12)
    part = with_device.match(SPACE, chain_of(SPACE, [1] * 9 + [2]), 10)
    assert part.length == 9 and copied(with_device, part, 5) == []
    assert part.chunks[0].hits == 5


def test_a_copy_outlives_the_tree_as_long_as_it_is_pinned(with_device):
    chain = stored(with_device, [1] * 12)
    match = with_device.match(SPACE, chain, 12)
    copied(with_device, match)
    with_device.pin(match.chunks)
    with_device.reset()
    assert match.chunks[0] in with_device.device
    with_device.unpin(match.chunks)
    assert match.chunks[0] not in with_device.device and with_device.device.used == 0


def test_what_is_stored_anew_counts_its_uses_anew(with_device):
    chain = stored(with_device, [1] * 12)
    with_device.touch(with_device.match(SPACE, chain, 12))
    stored(with_device, [2] * 32)
    stored(with_device, [1] * 12)
    assert with_device.touch(with_device.match(SPACE, chain, 12)) == []
