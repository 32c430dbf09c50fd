"""A chunk's bytes in the memory tier: out and in again, and never a byte that is not its own."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from ragkv.kvstore.pages import Pages, PageShape
from ragkv.kvstore.planes import Window
from ragkv.kvstore.prefix_tree import Chunk

CANARY = 0xA5
QUICK = settings(max_examples=300, deadline=None)
shapes = st.builds(
    PageShape,
    ranks=st.integers(1, 3),
    layers=st.integers(1, 3),
    page_tokens=st.integers(1, 5),
    row_elements=st.integers(1, 4),
    itemsize=st.sampled_from([1, 2, 4]),
    dtype=st.just("any"),
)


def chunk_of(tokens, pages=(), key=b"key"):
    chunk = Chunk(key, None, np.arange(tokens, dtype=np.int32).tobytes())
    chunk.pages = np.array(pages, dtype=np.int32).tobytes()
    return chunk


def grid(buffer, shape):
    """The buffer as [pages, ranks, layers, 2, page_tokens, bytes of a row]."""
    row = shape.row_elements * shape.itemsize
    return np.frombuffer(buffer, np.uint8).reshape(-1, shape.ranks, shape.layers, 2, shape.page_tokens, row)


def place(chunk, shape):
    """(page, offset) of every token of a chunk, found without the code under test."""
    pages = np.frombuffer(chunk.pages, np.int32).tolist()
    return [(pages[at // shape.page_tokens], at % shape.page_tokens) for at in range(len(chunk))]


def naive(buffer, chunk, shape):
    """The raw bytes as the docstring says them: page by page, of the last the filled rows alone."""
    cells, pages = grid(buffer, shape), np.frombuffer(chunk.pages, np.int32).tolist()
    left, found = len(chunk), b""
    for page in pages:
        found += cells[page][:, :, :, : min(left, shape.page_tokens)].tobytes()
        left -= shape.page_tokens
    return found


@st.composite
def worlds(draw):
    """A shape, a buffer of noise, and chunks that share its pages out in any order."""
    shape = draw(shapes)
    count = draw(st.integers(1, 12))
    order, chunks = draw(st.permutations(range(count))), []
    while order:
        taken = draw(st.integers(1, len(order)))
        pages, order = order[:taken], order[taken:]
        tokens = draw(st.integers((taken - 1) * shape.page_tokens + 1, taken * shape.page_tokens))
        chunks.append(chunk_of(tokens, pages, bytes([len(chunks)])))
    chance = np.random.default_rng(draw(st.integers(0, 2**32)))
    return shape, bytearray(chance.bytes(count * shape.page_bytes)), chunks


@QUICK
@given(worlds(), st.booleans())
def test_parts_are_a_chunks_own_bytes(world, copy):
    shape, buffer, chunks = world
    before, pages = bytes(buffer), Pages(buffer, shape)
    for chunk in chunks:
        raw = b"".join(pages.parts(chunk, copy=copy))
        assert raw == naive(buffer, chunk, shape)
        assert len(raw) == pages.size(chunk) == len(chunk) * shape.token_bytes
    assert bytes(buffer) == before


@QUICK
@given(worlds())
def test_fill_writes_what_parts_gave_and_nothing_else(world):
    shape, buffer, chunks = world
    pages = Pages(buffer, shape)
    raws = [b"".join(pages.parts(chunk)) for chunk in chunks]
    for chunk, raw in zip(chunks, raws, strict=True):
        buffer[:] = bytes([CANARY]) * len(buffer)
        pages.fill(chunk, memoryview(raw))
        assert b"".join(pages.parts(chunk)) == raw
        cells = grid(bytes(buffer), shape).copy()
        for page, offset in place(chunk, shape):
            cells[page, :, :, :, offset] = CANARY
        assert (cells == CANARY).all(), "a byte was written that is not the chunk's"
    for chunk, raw in zip(chunks, raws, strict=True):
        pages.fill(chunk, memoryview(raw))
    assert [b"".join(pages.parts(chunk)) for chunk in chunks] == raws, "chunks share no byte"


@QUICK
@given(worlds(), st.booleans())
def test_what_a_page_has_free_is_in_no_part(world, copy):
    """The free rest may hold another tenant's KV."""
    shape, buffer, chunks = world
    cells = grid(buffer, shape)
    cells[:] = np.minimum(cells, 0x7F)
    own = np.zeros(cells.shape, dtype=bool)
    for chunk in chunks:
        for page, offset in place(chunk, shape):
            own[page, :, :, :, offset] = True
    cells[~own] = 0xFF
    pages = Pages(buffer, shape)
    assert all(0xFF not in part for chunk in chunks for part in map(bytes, pages.parts(chunk, copy=copy)))


@QUICK
@given(worlds(), st.integers(-9, 9).filter(bool))
def test_a_wrong_number_of_bytes_is_refused_and_writes_nothing(world, more):
    shape, buffer, chunks = world
    pages, before = Pages(buffer, shape), bytes(buffer)
    size = pages.size(chunks[0])
    with pytest.raises(ValueError, match=f"which take {size}"):
        pages.fill(chunks[0], memoryview(bytes(max(0, size + more) or size + 1)))
    assert bytes(buffer) == before


SHAPE = PageShape(ranks=2, layers=3, page_tokens=4, row_elements=5, itemsize=2, dtype="bfloat16")


def test_sizes():
    assert SHAPE.token_bytes == 2 * 3 * 2 * 5 * 2
    assert SHAPE.page_bytes == 4 * SHAPE.token_bytes
    assert SHAPE.of(7) == (7, 2, 3, 2, 5)
    assert np.prod(SHAPE.of(7)) * SHAPE.itemsize == 7 * SHAPE.token_bytes


def test_full_pages_are_views_and_copies_are_not():
    buffer = bytearray(6 * SHAPE.page_bytes)
    pages, chunk = Pages(buffer, SHAPE), chunk_of(18, [1, 2, 5, 3, 0])
    views, copies = pages.parts(chunk), pages.parts(chunk, copy=True)
    assert [len(part) // SHAPE.page_bytes for part in views] == [2, 1, 1, 0], "neighbours go as one"
    buffer[:] = b"\x01" * len(buffer)
    assert all(set(bytes(part)) == {1} for part in views[:3])
    assert set(bytes(views[3])) == {0}, "part of a page is always a copy"
    assert all(set(bytes(part)) == {0} for part in copies)


def test_a_buffer_may_be_shared_memory_and_is_let_go(tmp_path):
    import mmap

    file = tmp_path / "segment"
    file.write_bytes(bytes(2 * SHAPE.page_bytes))
    with file.open("r+b") as stream:
        memory = mmap.mmap(stream.fileno(), 0)
    view = memoryview(memory)
    pages, chunk = Pages(view, SHAPE), chunk_of(5, [1, 0])
    pages.fill(chunk, memoryview(b"\x07" * pages.size(chunk)))
    assert memory[SHAPE.page_bytes :] == b"\x07" * SHAPE.page_bytes
    pages.close()
    view.release()
    memory.close()  # BufferError, were there a view left


def test_a_buffer_of_part_of_a_page_is_refused():
    with pytest.raises(ValueError, match="reshape"):
        Pages(bytearray(SHAPE.page_bytes + 1), SHAPE)


@given(st.integers(1, 3), st.integers(1, 60), st.integers(1, 60))
def test_a_state_is_spread_over_whole_pages_rank_by_rank(ranks, size, room):
    spread = -(-size // room)
    shape = PageShape(ranks, 1, 1, size, 1, "uint8", 1, spread)
    full = PageShape(1, 1, 1, max(room, shape.page_bytes), 1, "uint8", 1)
    buffer = bytearray([CANARY]) * (full.page_bytes * (shape.pages(1) + 2))
    pages, numbers = Pages(buffer, full, [shape]), list(range(1, shape.pages(1) + 1))[::-1]
    chunk = Window(chunk_of(5), 1, 4)
    chunk.pages = np.array(numbers, dtype=np.int32).tobytes()
    raw = bytes(1 + n % 99 for n in range(ranks * size))
    pages.fill(chunk, memoryview(raw))
    assert b"".join(pages.parts(chunk)) == b"".join(pages.parts(chunk, copy=True)) == raw
    assert len(raw) == pages.size(chunk) and buffer.count(CANARY) == len(buffer) - len(raw)
    first = full.page_bytes * numbers[0]
    assert buffer[first : first + min(size, shape.page_bytes)] == raw[: min(size, shape.page_bytes)]


def test_where_there_are_no_layers_a_chunk_has_no_bytes():
    shape = PageShape(1, 0, 64, 1, 4, "float32")
    pages, chunk = Pages(bytearray(64), shape, [PageShape(1, 1, 4, 1, 4, "float32")]), chunk_of(50, [1])
    assert pages.parts(chunk) == [] and pages.size(chunk) == 0
    pages.fill(chunk, memoryview(b""))
    assert pages.token_bytes == 8, "of all other layers"
