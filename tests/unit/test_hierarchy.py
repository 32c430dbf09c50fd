"""The hierarchy over memory and device tier: what its state machine would find late or not tell."""

import numpy as np
import pytest

from hierarchy_tools import PAGE_BYTES, PAGE_TOKENS, SPACES, chain_of
from ragkv.kvstore import metrics as m
from ragkv.kvstore.hierarchy import Hierarchy
from ragkv.kvstore.memory import DeviceTier, MemoryTier
from ragkv.kvstore.metrics import Metrics
from ragkv.policies import POLICIES, make_policy
from ragkv.policies.admission import AdmissionPolicy


@pytest.fixture(params=sorted(POLICIES))
def tier(request):
    return MemoryTier(8, make_policy(request.param))


@pytest.fixture
def hierarchy(tier):
    made = Hierarchy(tier, PAGE_TOKENS, PAGE_BYTES, Metrics())
    yield made
    made.check_integrity()


SPACE = SPACES[0]


def stored(hierarchy, tokens, upto=None):
    chain = chain_of(SPACE, tokens)
    for _, chunk in hierarchy.reserve(SPACE, chain, len(tokens) if upto is None else upto):
        hierarchy.commit(chunk)
    return chain


def counted(hierarchy):
    counters = hierarchy._metrics.drain().get("counters", {})
    return {tuple(key.split(m.SEPARATOR)): value for key, value in counters.items()}


def test_a_namespace_outlives_the_eviction_of_its_last_chunk(hierarchy):
    stored(hierarchy, [1] * 32)
    chain = stored(hierarchy, [2] * 32)
    assert hierarchy.match(SPACE, chain, 32).length == 32
    assert not hierarchy.match(SPACE, chain_of(SPACE, [1] * 32), 32)
    assert counted(hierarchy)[m.EVICTED_CHUNKS, m.MEMORY, m.CAPACITY] == 1


def test_looking_up_keeps_nothing(hierarchy):
    for number in range(100):
        hierarchy.match(number.to_bytes(16, "big"), chain_of(SPACE, [1] * 32), 32)
    assert not hierarchy._catalogue._roots


def test_a_tail_that_is_being_written_is_no_collision(hierarchy):
    chain = chain_of(SPACE, [1] * 10)
    ((_, first),) = hierarchy.reserve(SPACE, chain, 10)
    assert hierarchy.reserve(SPACE, chain, 10) == []
    hierarchy.commit(first)
    assert (m.REFUSED_CHUNKS, m.COLLISION) not in counted(hierarchy)


def test_a_tail_within_a_stored_one_is_not_stored_again(hierarchy, tier):
    stored(hierarchy, [1] * 12)
    assert hierarchy.reserve(SPACE, chain_of(SPACE, [1] * 10), 10) == []
    assert tier.used == 3


def test_what_is_too_large_evicts_nothing_and_is_counted(hierarchy, tier):
    chain = stored(hierarchy, [1] * 10)
    hierarchy.pin(hierarchy.match(SPACE, chain, 10).chunks)
    assert hierarchy.reserve(SPACE, chain_of(SPACE, [2] * 26), 26) == []
    assert counted(hierarchy)[m.REFUSED_CHUNKS, m.NO_ROOM] == 1
    assert tier.used == 3 and len(hierarchy) == 1


def test_the_rest_is_left_out_where_room_ends(hierarchy, tier):
    chain = chain_of(SPACE, [1] * 20 + [0] + [2] * 20)
    ((at, chunk),) = hierarchy.reserve(SPACE, chain, 41)
    assert (at, len(chunk), tier.used) == (0, 21, 6)
    hierarchy.commit(chunk)
    assert hierarchy.match(SPACE, chain, 41).length == 21


def test_an_abandoned_chunk_with_others_behind_it_is_written_anew(hierarchy):
    chain = chain_of(SPACE, [1] * 16 + [0] + [2] * 8)
    (_, first), (_, second) = hierarchy.reserve(SPACE, chain, 25)
    hierarchy.commit(second)
    hierarchy.abandon(first)
    assert not hierarchy.match(SPACE, chain, 25)
    ((at, again),) = hierarchy.reserve(SPACE, chain, 25)
    assert at == 0 and again is first
    hierarchy.commit(again)
    assert hierarchy.match(SPACE, chain, 25).chunks == (first, second)


def test_an_abandoned_leaf_is_gone(hierarchy, tier):
    chain = chain_of(SPACE, [1] * 16 + [0] + [2] * 8)
    for _, chunk in reversed(hierarchy.reserve(SPACE, chain, 25)):
        hierarchy.abandon(chunk)
    assert tier.used == 0 and len(hierarchy) == 0
    assert counted(hierarchy)[m.EVICTED_CHUNKS, m.MEMORY, m.ABANDONED] == 2


def test_what_a_reset_leaves_goes_when_its_own_pin_goes(hierarchy, tier):
    """Not only when nothing at all is pinned, which under load is never."""
    one, two = stored(hierarchy, [1] * 12), stored(hierarchy, [2] * 12)
    first, second = (hierarchy.match(SPACE, chain, 12).chunks for chain in (one, two))
    hierarchy.pin(first)
    hierarchy.pin(second)
    hierarchy.reset()
    assert len(hierarchy) == 0 and tier.used == 6
    assert not hierarchy.match(SPACE, one, 12)
    hierarchy.unpin(first)
    assert tier.used == 3
    stored(hierarchy, [3] * 20)
    hierarchy.reset()
    assert tier.used == 3
    hierarchy.unpin(second)
    assert tier.used == 0
    assert counted(hierarchy)[m.EVICTED_CHUNKS, m.MEMORY, m.RESET] == 3


def test_what_is_written_while_a_reset_comes_never_matches(hierarchy, tier):
    chain = chain_of(SPACE, [1] * 12)
    ((_, old),) = hierarchy.reserve(SPACE, chain, 12)
    hierarchy.reset()
    ((_, new),) = hierarchy.reserve(SPACE, chain, 12)
    hierarchy.commit(old)
    assert not hierarchy.match(SPACE, chain, 12)
    hierarchy.discard(old)
    hierarchy.commit(new)
    assert hierarchy.match(SPACE, chain, 12).chunks == (new,) and tier.used == 3


def test_pages_come_back_and_more_than_all_are_refused(tier):
    assert np.frombuffer(tier.take(8), np.int32).tolist() == list(range(8))
    with pytest.raises(IndexError, match="1 asked for, 0 free"):
        tier.take(1)
    assert tier.make_room(1) is None and tier.used == 8


# --- pins with owners, and chunks whose time is over ---


def gauge(hierarchy, gauges, name, tier=None):
    gauges.update(hierarchy._metrics.drain().get("gauges", {}))
    return gauges[name if tier is None else name + m.SEPARATOR + tier]


def test_what_an_owner_pins_stays_and_is_counted(hierarchy, tier):
    gauges = {}
    chain = stored(hierarchy, [1] * 8)
    (chunk,) = hierarchy.match(SPACE, chain, 8).chunks
    assert hierarchy.holds.hold("desk", chunk, 10.0)
    assert gauge(hierarchy, gauges, m.PINNED_BYTES) == 2 * PAGE_BYTES
    stored(hierarchy, [2] * 20)
    stored(hierarchy, [3] * 20)
    assert hierarchy.match(SPACE, chain, 8).length == 8
    hierarchy.tick(10.0)
    assert gauge(hierarchy, gauges, m.PINNED_BYTES) == 0
    stored(hierarchy, [4] * 32)
    assert not hierarchy.match(SPACE, chain, 8) and tier.used == 8


def test_owners_leave_half_of_memory_to_everyone(hierarchy):
    chains = [stored(hierarchy, [number] * 8) for number in range(1, 4)]
    first, second, third = (hierarchy.match(SPACE, chain, 8).chunks[0] for chain in chains)
    assert hierarchy.holds.hold("a", first, 10.0, b"1")
    assert not hierarchy.holds.hold("b", second, 10.0, b"1"), "that is a quarter"
    assert hierarchy.holds.hold("b", second, 10.0, b"2")
    assert not hierarchy.holds.hold("c", third, 10.0, b"3")


def test_a_chunk_goes_in_time_with_all_behind_it(hierarchy, tier):
    chain = stored(hierarchy, [1] * 16 + [0] + [2] * 8)
    first, _ = hierarchy.match(SPACE, chain, 25).chunks
    hierarchy.holds.expire(first, 10.0)
    hierarchy.tick(9.9)
    assert hierarchy.match(SPACE, chain, 25).length == 25
    hierarchy.tick(10.0)
    assert tier.used == len(hierarchy) == 0
    assert counted(hierarchy)[m.EVICTED_CHUNKS, m.MEMORY, m.EXPIRED] == 2


def test_a_chunk_whose_time_is_over_is_read_to_the_end(hierarchy, tier):
    chain = stored(hierarchy, [1] * 12)
    chunks = hierarchy.match(SPACE, chain, 12).chunks
    hierarchy.pin(chunks)
    hierarchy.holds.expire(chunks[0], 10.0)
    hierarchy.tick(10.0)
    assert not hierarchy.match(SPACE, chain, 12) and chunks[0] not in hierarchy
    assert tier.used == 3, "its pages are still read"
    hierarchy.unpin(chunks)
    assert tier.used == 0


def test_a_chunk_that_was_evicted_takes_its_time_along(hierarchy):
    """The same tokens, stored anew without a time, stay."""
    chain = stored(hierarchy, [1] * 12)
    hierarchy.holds.expire(hierarchy.match(SPACE, chain, 12).chunks[0], 10.0)
    stored(hierarchy, [2] * 32)
    stored(hierarchy, [1] * 12)
    hierarchy.tick(10.0)
    assert hierarchy.match(SPACE, chain, 12).length == 12


def test_a_parent_may_be_dropped_while_a_forgotten_child_is_read(hierarchy, tier):
    chain = stored(hierarchy, [1] * 16 + [0] + [2] * 8)
    parent, child = hierarchy.match(SPACE, chain, 25).chunks
    hierarchy.pin([child])
    hierarchy.forget([child], m.EXPIRED)
    hierarchy.discard(parent)
    assert len(hierarchy) == 0 and tier.used == 7, "what the child stands on stays as long"
    hierarchy.check_integrity()
    hierarchy.unpin([child])
    assert tier.used == 0


# --- admission, the hook, the device tier ---


class Refuses(AdmissionPolicy):
    def __init__(self):
        self.asked, self.limit = [], 99

    def admit(self, key, weight=1, cost=1.0):
        self.asked.append((key, weight, cost))
        return len(self.asked) <= self.limit


def test_admission_is_asked_for_new_chunks_with_weight_and_cost(tier):
    door = Refuses()
    hierarchy = Hierarchy(tier, PAGE_TOKENS, PAGE_BYTES, Metrics(), door, attention_tokens=34.0)
    chain = stored(hierarchy, [1] * 16 + [0] + [2] * 8)
    assert door.asked[0] == (chain.keys[0], 5, 17.0)
    assert door.asked[1][1:] == (2, 8 * 1.5)
    assert stored(hierarchy, [1] * 16 + [0] + [2] * 8) and len(door.asked) == 2, "what is stored needs no leave"


def test_what_is_not_admitted_ends_the_chain_and_evicts_nothing(tier):
    door = Refuses()
    hierarchy = Hierarchy(tier, PAGE_TOKENS, PAGE_BYTES, Metrics(), door)
    stored(hierarchy, [3] * 12)
    door.limit = 2
    chain = stored(hierarchy, [1] * 16 + [0] + [2] * 8)
    assert hierarchy.match(SPACE, chain, 25).length == 17
    assert counted(hierarchy)[m.REFUSED_CHUNKS, m.ADMISSION] == 1
    assert hierarchy.match(SPACE, chain_of(SPACE, [3] * 12), 12).length == 12
    hierarchy.check_integrity()


def test_the_hook_is_told_of_evictions_for_room_alone(hierarchy):
    told = []
    hierarchy.evicting = lambda chunk: told.append((chunk, chunk in hierarchy))
    chain = stored(hierarchy, [1] * 16 + [0] + [2] * 8)
    parent, child = hierarchy.match(SPACE, chain, 25).chunks
    stored(hierarchy, [3] * 32)
    assert told == [(child, True), (parent, True)], "from the tail on, while they stand in the tree"
    told.clear()
    hierarchy.discard(hierarchy.match(SPACE, chain_of(SPACE, [3] * 32), 32).chunks[0])
    stored(hierarchy, [4] * 12)
    hierarchy.reset()
    stored(hierarchy, [5] * 12)
    hierarchy.forget([hierarchy.match(SPACE, chain_of(SPACE, [5] * 12), 12).chunks[0]], m.EXPIRED)
    ((_, unready),) = hierarchy.reserve(SPACE, chain_of(SPACE, [6] * 12), 12)
    hierarchy.abandon(unready)
    assert told == []


def test_the_hook_is_not_told_of_what_was_never_written(hierarchy):
    told = []
    hierarchy.evicting = told.append
    chain = chain_of(SPACE, [1] * 16 + [0] + [2] * 8)
    (_, first), (_, second) = hierarchy.reserve(SPACE, chain, 25)
    hierarchy.commit(second)
    hierarchy.abandon(first)
    stored(hierarchy, [3] * 32)
    assert told == [second]


@pytest.fixture
def with_device(tier):
    made = Hierarchy(tier, PAGE_TOKENS, PAGE_BYTES, Metrics(), device=DeviceTier(5, make_policy("lru"), after=2))
    yield made
    made.check_integrity()


def copied(hierarchy, match, times=2):
    """Use a match until its chunks are copied; what was ordered."""
    ordered = [chunk for _ in range(times) for chunk in hierarchy.touch(match)]
    for chunk in ordered:
        hierarchy.device.made(chunk, chunk.device, well=True)
    return ordered


def test_a_hot_chunk_is_copied_and_goes_with_its_original(with_device):
    gauges = {}
    chain = stored(with_device, [1] * 12)
    match = with_device.match(SPACE, chain, 12)
    assert copied(with_device, match) == list(match.chunks)
    assert match.chunks[0] in with_device.device
    assert gauge(with_device, gauges, m.USED_PAGES, m.DEVICE) == 3
    stored(with_device, [2] * 32)
    assert match.chunks[0] not in with_device.device and with_device.device.used == 0
    assert counted(with_device)[m.EVICTED_CHUNKS, m.DEVICE, m.SUPERSEDED] == 1


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
