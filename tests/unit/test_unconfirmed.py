"""Chunks that wait to be confirmed: what is written down when, and what is dropped."""

from collections import deque

import pytest

from hand_lanes import Lower, Stack
from ragkv.kvstore.unconfirmed import Unconfirmed

TEXT = list(range(100, 164))


@pytest.fixture(params=[True, False], ids=["through", "back"])
def disk(request):
    return Lower(through=request.param)


def reserved(stack):
    """Chunks of a text with their bytes in memory, that nobody has been told of."""
    new = stack.hierarchy.reserve(stack.SPACE, stack.chain(TEXT), len(TEXT))
    for _, chunk in new:
        stack.hierarchy.commit(chunk)
    return new


def test_numbers_confirm_all_up_to_them_once():
    held = Unconfirmed()
    one, two, three = object(), object(), object()
    assert held.hold(1, b"n", [(0, one)]) and held.hold(3, b"m", [(5, two)]) and held.hold(2, b"n", [])
    assert len(held) == 2 and one in held and three not in held
    assert held.confirm(2) == [(b"n", [(0, one)])] and held.confirm(2) == []
    assert not held.hold(2, b"n", [(0, three)]), "it is confirmed already"
    assert held.drop() == [two] and len(held) == 0 and held.confirm(3) == []


def test_nothing_is_written_before_it_is_confirmed(disk):
    stack = Stack(disk)
    new = reserved(stack)
    stack.placement.stored(stack.SPACE, new, after=2)
    everything = deque(stack.hierarchy.everything())
    for number in (0, 1):
        stack.placement.confirm(number)
        assert not stack.placement.write_down(everything), "a flush waits"
        stack.settle()
        assert stack.placement.unconfirmed == len(new) and not disk.stored()
    stack.placement.confirm(2)
    assert stack.placement.write_down(everything)
    stack.settle()
    assert stack.placement.unconfirmed == 0 and len(disk.stored()) == len(new)


def test_what_is_not_confirmed_when_the_engine_ends_is_not_written(disk):
    stack = Stack(disk)
    stack.placement.stored(stack.SPACE, reserved(stack), after=1)
    assert not stack.placement.close(1.0) and not disk.stored()


def test_what_is_outdated_leaves_memory_with_all_behind_it(disk):
    stack = Stack(disk)
    first, *more = reserved(stack)
    stack.placement.stored(stack.SPACE, more[:1], after=1)
    stack.placement.outdate()
    assert stack.hierarchy.everything() == [first[1]] and not stack.placement.unconfirmed
    stack.placement.confirm(1)
    stack.settle()
    assert not disk.stored()
