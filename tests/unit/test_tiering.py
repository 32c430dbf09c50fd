"""What lies where: write-through, write-back, demotion, and what is written down in the end."""

import pytest

from hand_lanes import Lower, Stack, redis, words
from ragkv.benchmarks.internal.faulty_stores import Fault, on_calls
from ragkv.errors import StoreError
from ragkv.kvstore import metrics as m
from ragkv.kvstore.codec import BLOCK_BYTES, address, decode
from ragkv.kvstore.keys import tail_key

TEXT = words(1, 60)  # chunks of 21 and 23 tokens, and a tail of 16: 6 + 6 + 4 pages


def one(pages=100, **changes):
    lower = Lower(**changes)
    return Stack(lower, pages=pages), lower


def places(stack, tokens=TEXT):
    """Where a text's chunks and its tail lie."""
    keys = stack.chain(tokens).keys
    return {*keys, tail_key(keys[-1])}


# --- written through ---


def test_what_is_stored_is_written_through():
    stack, disk = one()
    chunks = stack.keep(TEXT)
    assert len(disk.writes.jobs) == 3 and not any(chunk.stored_in for chunk in chunks)
    stack.settle()
    assert disk.stored() == places(stack) and all(chunk.stored_in for chunk in chunks)
    header, raw = decode(disk.values.get(chunks[1].key))
    assert bytes(raw) == stack.bytes_of(chunks[1])
    assert (header.parent, header.position, header.open) == (chunks[0].key, 21, False)
    assert decode(disk.values.get(address(chunks[2])))[0].open
    stack.check()


def test_what_is_being_written_keeps_its_pages():
    stack, _ = one()
    first, second, tail = stack.keep(TEXT)
    assert (first.pins, second.pins, tail.pins) == (1, 1, 0), "a tail is copied"
    stack.settle()
    assert not first.pins and not second.pins


def test_a_tail_is_written_right_though_a_longer_one_takes_its_pages():
    stack, disk = one()
    (tail,) = stack.keep(words(1, 16))
    raw = stack.bytes_of(tail)
    stack.memory.discard(tail)
    stack.bytes[:] = 0
    stack.settle()
    (value,) = (value for value, _ in disk.values.values.values())
    assert bytes(decode(value)[1]) == raw


def test_two_tiers_are_written_through():
    stack = Stack(Lower(), redis())
    stack.keep(TEXT), stack.settle()
    for lower in stack.lowers:
        assert lower.stored() == places(stack)


def test_what_is_there_is_not_written_again():
    stack, disk = one()
    stack.keep(TEXT), stack.settle(), stack.forget()
    stack.keep(TEXT), stack.settle()
    assert disk.store.calls["put"] == 4, "but for the tail, which may be another"


def test_a_newer_tail_replaces_an_older_one_whose_write_is_pending():
    stack, _ = one()
    stack.keep(TEXT[:50]), stack.keep(TEXT[:58])
    stack.settle()
    stack.start()
    assert stack.get(TEXT) == 58


def test_a_tail_that_became_a_whole_chunk_is_written_where_it_lies_now():
    stack, disk = one()
    first, tail = stack.keep(TEXT[:44])
    stack.settle()
    assert tail.open and disk.stored() == {first.key, tail_key(first.key)}
    stack.keep(TEXT)
    assert not tail.open and not tail.stored_in
    stack.settle()
    assert disk.stored() == {first.key, tail_key(first.key), tail.key, tail_key(tail.key)} and tail.stored_in


def test_a_tail_may_become_whole_while_it_is_written():
    stack, disk = one()
    _, tail = stack.keep(TEXT[:44])
    stack.memory.reserve(stack.SPACE, stack.chain(words(1, 90)), 44)
    stack.settle()
    assert not tail.open and not tail.stored_in, "it was written as a tail"
    assert stack.cache.close(1.0) and tail.key in disk.stored()


def test_what_could_not_be_written_is_written_with_what_comes_behind_it():
    stack, disk = one(plan=on_calls({("put", 1): Fault.FAIL}))
    first, second, *_ = stack.keep(TEXT)
    stack.settle()
    assert first.stored_in and not second.stored_in
    stack.keep(words(1, 100)), stack.settle()
    assert second.stored_in and {*stack.chain(words(1, 100)).keys} <= disk.stored()


# --- written back ---


def test_write_back_waits_until_memory_needs_the_room():
    stack, disk = one(pages=18, through=False)
    stack.keep(TEXT), stack.settle()
    assert not disk.stored()
    old = stack.match(TEXT).chunks
    stack.keep(words(2, 20))  # 5 pages; 2 are free
    stack.bytes[:] = 0  # whoever has the pages now writes there
    assert len(disk.writes.jobs) == 1 and not disk.stored()
    stack.settle()
    assert disk.stored() == {address(old[-1])}
    header, raw = decode(disk.values.get(address(old[-1])))
    assert bytes(raw) == stack.bytes_of(old[-1]) and header.position == 44


def test_what_was_demoted_comes_back_right():
    stack = Stack(Lower(through=False), pages=40)
    texts = [words(seed, 60) for seed in range(8)]
    for _ in range(3):
        for each in texts:
            stack.get(each)
            stack.keep(each)
            stack.memory.check_integrity()
    stack.settle()
    assert stack.metrics.get(m.PROMOTED_TOKENS, "disk") > 300
    assert stack.metrics.get(m.REFUSED_CHUNKS, m.NO_ROOM) == 0
    stack.check()


@pytest.mark.parametrize("lost", [False, True])
def test_what_a_tier_has_is_demoted_only_where_it_has_lost_it(lost):
    stack, disk = one(pages=18)
    chunks = stack.keep(TEXT)
    stack.settle()
    if lost:
        disk.index.drop(address(chunks[-1]))
    stack.keep(words(2, 20), named=[20])
    assert len(disk.writes.jobs) == 1 + lost, "the new one, and what was lost"


@pytest.mark.parametrize(
    ("change", "throttled"),
    [({"queue": BLOCK_BYTES}, 2), ({"plan": on_calls({("put", 2): Fault.FAIL})}, 0)],  # a chunk takes one block
    ids=["the queue is full", "the write fails"],
)
def test_what_was_not_written_is_demoted_later(change, throttled):
    stack, disk = one(pages=18, **change)
    chunks = stack.keep(TEXT)
    assert stack.metrics.get(m.UNWRITTEN_CHUNKS, "disk", m.THROTTLED) == throttled
    stack.settle()
    assert chunks[0].stored_in and not chunks[2].stored_in and address(chunks[2]) not in disk.stored()
    stack.keep(words(2, 20), named=[20])
    assert stack.metrics.get(m.EVICTED_CHUNKS, m.MEMORY, m.CAPACITY) == 1
    stack.settle()
    assert address(chunks[2]) in disk.stored()


def test_what_one_tier_took_and_the_other_could_not_is_offered_to_that_again():
    stack = Stack(Lower(), redis(queue=BLOCK_BYTES), pages=18)
    disk, server = stack.lowers
    chunks = stack.keep(TEXT)
    stack.settle()
    assert address(chunks[2]) in disk.stored() and address(chunks[2]) not in server.stored()
    stack.keep(words(2, 20), named=[20])
    stack.settle()
    assert address(chunks[2]) in server.stored()


@pytest.mark.parametrize(("queue", "stored"), [(1 << 20, [1, 0]), (10, [0, 1])])
def test_one_tier_is_enough_and_where_the_first_refuses_the_next_one_is_asked(queue, stored):
    stack = Stack(Lower(through=False, queue=queue), redis(through=False), pages=18)
    stack.keep(TEXT), stack.settle()
    stack.keep(words(2, 20)), stack.settle()
    assert [len(lower.stored()) for lower in stack.lowers] == stored


def test_what_was_never_written_in_memory_is_not_demoted():
    stack = Stack(Lower(through=False), pages=18)
    new = stack.memory.reserve(stack.SPACE, stack.chain(words(1, 90)), 30)
    stack.memory.commit(new[1])
    stack.memory.abandon(new[0])  # it stays, unready, before the other
    stack.keep(words(2, 60)), stack.settle()
    assert len(stack.lowers[0].stored()) == 1


def test_what_was_never_written_in_memory_is_not_written_with_its_child():
    stack, disk = one()
    new = stack.memory.reserve(stack.SPACE, stack.chain(words(1, 90)), 30)
    first, second = new
    stack.memory.commit(second), stack.memory.abandon(first)
    stack.tiering.stored(new[1:]), stack.settle()
    assert disk.stored() == {address(second)}


def test_what_a_tier_had_all_along_is_given_to_no_other():
    stack = Stack(Lower(through=False), redis(through=False), pages=18)
    stack.keep(words(1, 60), named=[60]), stack.keep(words(2, 20)), stack.settle()
    (there,) = stack.lowers[0].stored()
    stack.forget()
    stack.keep(words(1, 60), named=[60]), stack.keep(words(2, 20)), stack.settle()
    assert stack.lowers[0].stored() == {there} and not stack.lowers[1].stored()


def test_what_came_from_a_tier_is_not_given_back():
    server = redis(through=False)
    stack = Stack(server, pages=18)
    stack.keep(TEXT), stack.cache.close(1.0)
    stack.start()
    assert stack.get(TEXT) == 60
    stack.keep(words(2, 20))
    assert stack.metrics.get(m.EVICTED_CHUNKS, m.MEMORY, m.CAPACITY) == 1 and not server.writes.jobs


def test_below_too_a_parent_outlives_its_child():
    stack, disk = one(capacity=2 * BLOCK_BYTES)
    first, second = stack.keep(words(1, 44), named=[44])
    stack.settle()
    disk.tier.touch([second.key])
    stack.keep(words(2, 20), named=[20]), stack.settle()
    assert first.key in disk.stored() and second.key not in disk.stored()


# --- uses, pins, resets ---


def test_uses_are_told_to_who_holds_it():
    stack = Stack(Lower(), Lower("nfs", through=False))
    chunks = stack.keep(TEXT)
    stack.tiering.touch(chunks), stack.settle()
    assert not any(lower.store.calls["touch"] for lower in stack.lowers), "not written yet"
    told = []
    stack.lowers[0].store.inner.touch = told.extend
    stack.tiering.touch(chunks), stack.settle()
    assert told == [address(chunk) for chunk in chunks]
    assert not stack.lowers[1].store.calls["touch"]


def test_a_reset_while_it_is_written():
    stack, disk = one()
    stack.keep(TEXT)
    stack.memory.reset()
    assert stack.memory.used == 12, "the tail is copied, the others are being read"
    stack.settle()
    assert stack.memory.used == 0 and disk.stored() == places(stack)
    stack.check()


def test_of_what_is_reset_nothing_more_is_written():
    stack, disk = one()
    new = stack.memory.reserve(stack.SPACE, stack.chain(TEXT), 60)
    stack.memory.reset()
    for chunk in new:
        stack.memory.commit(chunk)
    stack.tiering.stored(new)
    assert not disk.writes.jobs
    stack.check()


# --- the end ---


def test_close_writes_what_no_tier_has():
    stack = Stack(Lower(through=False), redis(through=False))
    stack.keep(TEXT), stack.settle()
    assert stack.cache.close(5.0)
    assert stack.lowers[0].stored() == places(stack) and not stack.lowers[1].stored()
    stack.start()
    assert stack.get(TEXT) == 60


def test_close_has_nothing_to_do_where_all_is_below():
    stack, disk = one()
    stack.keep(TEXT), stack.settle()
    assert stack.cache.close(5.0) and disk.store.calls["put"] == 3


def test_close_gives_to_the_next_tier_what_the_first_cannot_write():
    stack = Stack(Lower(through=False), redis(through=False))
    stack.keep(TEXT), stack.settle()
    stack.lowers[0].store.errors["put"] = StoreError("full", "no space left")
    assert stack.cache.close(5.0)
    assert stack.lowers[1].stored() == places(stack)


def test_close_says_what_could_not_be_written():
    stack, disk = one(through=False)
    stack.keep(TEXT), stack.settle()
    disk.store.errors["put"] = StoreError("full", "no space left")
    assert not stack.cache.close(5.0)


def test_close_keeps_to_the_queue():
    stack, disk = one(through=False, queue=4 * BLOCK_BYTES)
    for seed in range(4):
        stack.keep(words(seed, 60))
    most = []

    def work():
        most.append(disk.tier.queued)
        disk.writes.step()

    stack.completions.meanwhile = work
    assert stack.cache.close(5.0)
    assert len(disk.stored()) == 12 and 0 < max(most) <= 4 * BLOCK_BYTES
    assert stack.metrics.get(m.UNWRITTEN_CHUNKS, "disk", m.THROTTLED) == 0


@pytest.mark.parametrize("hanging", ["both", "first"])
def test_close_ends_in_time(hanging):
    stack = Stack(Lower(through=False, queue=2 * BLOCK_BYTES), redis(through=False))
    stack.keep(words(1, 100)), stack.settle()
    stack.lowers[0].writes.hangs = True
    stack.lowers[1].writes.hangs = hanging == "both"
    begun = stack.clock.now
    assert not stack.cache.close(5.0)
    assert stack.clock.now == pytest.approx(begun + 5)


def test_without_tiers_there_is_nothing_to_do():
    stack = Stack()
    stack.keep(TEXT)
    assert stack.fetch(words(1, 90)) is None
    stack.cache.tick()
    assert stack.cache.close(0.0)
