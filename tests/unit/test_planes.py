"""Planes: how far a match reaches where layers attend to a part of it, against a search position by position."""

from hypothesis import given
from hypothesis import strategies as st

from ragkv.kvstore.pages import PageShape
from ragkv.kvstore.planes import Plane, Window, reachable
from ragkv.kvstore.prefix_tree import Chunk, Match, PrefixTree

SHAPE = PageShape(1, 1, 4, 1, 4, "float32")


def planes():
    blocks = st.sampled_from([1, 4, 16])
    windows = st.builds(
        lambda size, block: Plane(SHAPE, window=size, block_tokens=block), st.integers(1, 40), blocks
    )
    spans = st.builds(lambda size, block: Plane(SHAPE, span=size, block_tokens=block), st.integers(1, 40), blocks)
    return st.lists(st.one_of(windows, spans), min_size=1, max_size=2)


@st.composite
def matches(draw):
    """A match, and which positions each of two planes has."""
    sizes = draw(st.lists(st.integers(1, 20), min_size=1, max_size=8))
    tree, parent, chunks = PrefixTree(), Chunk(b"n" * 16, None, b""), []
    covered = {1: set(), 2: set()}
    for number, size in enumerate(sizes):
        (parent,) = tree.insert(parent, [(bytes([number]) * 16, bytes(4 * size))])
        tree.mark_ready(parent)
        chunks.append(parent)
        for plane in (1, 2):
            from_ = draw(st.none() | st.integers(parent.position, parent.end - 1))
            if from_ is not None:
                window = Window(parent, plane, from_)
                tree.add(window, parent)
                if draw(st.integers(0, 9)):
                    tree.mark_ready(window)
                    covered[plane] |= set(range(from_, parent.end))
    length = draw(st.integers(chunks[-1].position + 1, chunks[-1].end))
    return Match(tuple(chunks), length, shared=length), covered


def wanted(match, covered, several, have):
    """By trying every position."""
    for end in range(match.length, have, -1):
        needs = [(number, range(max(plane.first(end), have), end)) for number, plane in enumerate(several, 1)]
        if all(covered[number].issuperset(need) for number, need in needs):
            return end
    return 0


@given(matches(), planes(), st.integers(0, 100))
def test_a_match_reaches_as_far_as_all_planes_have_what_is_needed(made, several, have):
    match, covered = made
    found, end = reachable(match, several, have), wanted(match, covered, several, have)
    assert found.length == end if end else found.length <= have
    assert found.shared == match.length
    if not end:
        assert found.windows == ()
        return
    assert found.chunks == tuple(chunk for chunk in match.chunks if chunk.position < end)
    for number, plane in enumerate(several, 1):
        held = {at for w in found.windows if w.plane == number for at in range(w.position, w.end)}
        assert held >= set(range(max(plane.first(end), have), end))
        assert all(w.end > max(plane.first(end), have) for w in found.windows if w.plane == number)


@given(planes(), st.integers(0, 300))
def test_what_is_kept_serves_the_position_and_the_one_before_it(several, position):
    for plane in several:
        needed, more = plane.first(position), plane.first(max(0, position - 1))
        assert plane.kept_from(position, needed + 1) is None
        for live in (0, needed // 2, needed):
            assert live <= plane.kept_from(position, live) <= needed
        assert min(needed, more) - 128 < plane.kept_from(position, 0) <= min(needed, more)
        assert plane.first(plane.free(position)) == plane.free(position) <= position
