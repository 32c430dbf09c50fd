"""Chunks that wait to be confirmed: what is written down when, and what is dropped."""

from collections import deque

import pytest

from hand_lanes import Lower, Stack

TEXT = list(range(100, 164))


@pytest.fixture(params=[True, False], ids=["through", "back"])
def disk(request):
    return Lower(through=request.param)


def reserved(stack):
    """Chunks of a text with their bytes in memory, that nobody has been told of."""
    new = stack.memory.reserve(stack.SPACE, stack.chain(TEXT), len(TEXT))
    for chunk in new:
        stack.memory.commit(chunk)
    return new


def test_numbers_confirm_all_up_to_them_once(disk):
    stack = Stack(disk)
    one, two = reserved(stack)[:2]
    stack.tiering.stored([one], 1), stack.tiering.stored([two], 3)
    assert stack.cache.unconfirmed == 2
    stack.cache.confirm(2), stack.cache.confirm(2)
    assert stack.cache.unconfirmed == 1
    stack.tiering.stored([one], 2)
    assert stack.cache.unconfirmed == 1, "it is confirmed already"
    stack.cache.invalidate()
    assert stack.cache.unconfirmed == 0 and two not in stack.memory and one in stack.memory
    stack.cache.confirm(3)


def test_nothing_is_written_before_it_is_confirmed(disk):
    stack = Stack(disk)
    new = reserved(stack)
    stack.tiering.stored(new, 2)
    everything = deque(stack.memory.everything())
    for number in (0, 1):
        stack.cache.confirm(number)
        assert not stack.tiering.flush(everything), "a flush waits"
        stack.settle()
        assert stack.cache.unconfirmed == len(new) and not disk.stored()
    stack.cache.confirm(2)
    assert stack.tiering.flush(everything)
    stack.settle()
    assert stack.cache.unconfirmed == 0 and len(disk.stored()) == len(new)


def test_what_is_not_confirmed_when_the_engine_ends_is_not_written(disk):
    stack = Stack(disk)
    stack.tiering.stored(reserved(stack), 1)
    assert not stack.cache.close(1.0) and not disk.stored()


def test_what_is_outdated_leaves_memory_with_all_behind_it(disk):
    stack = Stack(disk)
    first, *more = reserved(stack)
    stack.tiering.stored(more[:1], 1)
    stack.cache.invalidate()
    assert stack.memory.everything() == [first] and not stack.cache.unconfirmed
    stack.cache.confirm(1)
    stack.settle()
    assert not disk.stored()
