"""Pages: which are free, their shape, and the bytes of chunks in them, out for storing, in for loading."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from ragkv.kvstore.prefix_tree import PAGE_NUMBER_BYTES, Chunk

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class PageShape:
    """A page is `[ranks, layers, kinds, page_tokens, row]`; a row is one token's K or V in one layer and one rank,
    `row_elements` elements of `itemsize` bytes. `dtype` is their name; `kinds`: 2, or 1 where a token has one
    vector a layer. Where there are no `layers`, a page holds nothing, and its chunk takes it all the same.

    `spread`: how many pages each rank's share of one token takes, where that is larger than a page (a state); 0: a
    page holds `page_tokens` tokens."""

    ranks: int
    layers: int
    page_tokens: int
    row_elements: int
    itemsize: int
    dtype: str
    kinds: int = 2
    spread: int = 0

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return self.ranks * self.layers * self.kinds * self.row_elements * self.itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return -(-self.rank_bytes // self.spread) if self.spread else self.token_bytes * self.page_tokens

    @property
    def rank_bytes(self) -> int:
        """Bytes of one token of one rank."""
        return self.token_bytes // self.ranks

    def pages(self, tokens: int) -> int:
        """Pages that so many tokens take."""
        return self.ranks * self.spread * tokens if self.spread else -(-tokens // self.page_tokens)

    def of(self, tokens: int) -> tuple[int, ...]:
        """The shape that a payload of so many tokens states. Its raw bytes are the full pages one after the other,
        then of the last page the filled rows alone, `[ranks, layers, kinds, rest, row]`."""
        return (tokens, self.ranks, self.layers, self.kinds, self.row_elements)


class PagePool:
    """`pages` pages; the budget is the pages: there are never more in use. `held`: pages in use, by plane."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.held: Counter[int] = Counter()
        self._free = list(range(pages - 1, -1, -1))  # from the end: lowest first, so that copies run together

    @property
    def used(self) -> int:
        """Pages in use."""
        return self.pages - len(self._free)

    @property
    def free(self) -> int:
        """Pages not in use."""
        return len(self._free)

    def take(self, pages: int, plane: int = 0) -> bytes:
        """`pages` free pages as int32 bytes, for a plane. IndexError: fewer are free."""
        if pages > len(self._free):
            raise IndexError(f"pages: {pages} asked for, {len(self._free)} free")
        cut = len(self._free) - pages
        taken = self._free[cut:][::-1]
        del self._free[cut:]
        self.held[plane] += pages
        return np.array(taken, dtype=np.int32).tobytes()

    def give_back(self, pages: bytes, plane: int = 0) -> None:
        """Take back what `take` gave."""
        self._free.extend(np.frombuffer(pages, dtype=np.int32)[::-1].tolist())
        self.held[plane] -= len(pages) // PAGE_NUMBER_BYTES

    def check_integrity(self) -> None:
        """Raise AssertionError where a page is free twice, or is none."""
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        assert all(0 <= page < self.pages for page in self._free)
        assert sum(self.held.values()) == self.used and min(self.held.values(), default=0) >= 0


def frame_bytes(shapes: Sequence[PageShape]) -> int:
    """Bytes of memory that a page of any of these shapes takes: of the largest, and a multiple of every row's."""
    row = math.lcm(*(shape.row_elements * shape.itemsize for shape in shapes if not shape.spread))
    return -(-max(shape.page_bytes for shape in shapes) // row) * row


class Pages:
    """`buffer`: the whole tier, a whole number of pages. `shape`: of plane 0's pages, `others`: of the pages of
    other planes (`ragkv.kvstore.planes`). Threads may use it for chunks that nobody else writes."""

    def __init__(self, buffer: bytearray | memoryview, shape: PageShape, others: Sequence[PageShape] = ()) -> None:
        self.shape, self.shapes = shape, (shape, *others)
        self.frame_bytes = frame_bytes(self.shapes)
        self.token_bytes = shape.token_bytes or sum(each.token_bytes for each in others)  # of a token, about
        self._bytes: Bytes = np.frombuffer(buffer, dtype=np.uint8).reshape(-1, self.frame_bytes)

    def __len__(self) -> int:
        """Pages that there are."""
        return len(self._bytes)

    def close(self) -> None:
        """Let the buffer go."""
        self._bytes = np.empty((0, self.frame_bytes), dtype=np.uint8)

    def size(self, chunk: Chunk) -> int:
        """Bytes of a chunk's KV, without what its last page has free."""
        return len(chunk) * self.shapes[chunk.plane].token_bytes

    def parts(self, chunk: Chunk, *, copy: bool = False) -> list[memoryview]:
        """The raw bytes of a chunk, in order. Views of the tier, which hold as long as the chunk is pinned, or
        copies. Never a byte that is not the chunk's own (what a page has free may be another tenant's)."""
        shape = self.shapes[chunk.plane]
        if not shape.layers:
            return []
        if shape.spread:
            parts = self._spread(chunk, shape)
            return [(part.copy() if copy else part).data for part in parts]
        full, rest = divmod(len(chunk), shape.page_tokens)
        pages = _numbers(chunk)
        parts = self._whole(pages[:full], shape)
        if copy:
            parts = [part.copy() for part in parts]
        if rest:
            parts.append(self._rows(int(pages[full]), shape)[:, :rest].copy().reshape(-1))  # not in one piece
        return [part.data for part in parts]

    def fill(self, chunk: Chunk, raw: memoryview, tokens: int | None = None) -> None:
        """Write the raw bytes of a chunk, or of so many `tokens`, from its first page on. ValueError: there are
        more or fewer bytes."""
        shape, most = self.shapes[chunk.plane], chunk.end - chunk.position
        tokens = most if tokens is None else tokens
        size = tokens * shape.token_bytes
        if len(raw) != size or tokens > most:
            raise ValueError(f"pages: {len(raw)} bytes for {tokens} of {most} tokens, which take {size}")
        if not shape.layers:
            return
        source: Bytes = np.frombuffer(raw, dtype=np.uint8)
        full, rest = (0, 0) if shape.spread else divmod(tokens, shape.page_tokens)
        pages, at = _numbers(chunk), 0
        for part in self._spread(chunk, shape) if shape.spread else self._whole(pages[:full], shape):
            part[:] = source[at : at + len(part)]
            at += len(part)
        if rest:
            rows = self._rows(int(pages[full]), shape)
            rows[:, :rest] = source[at:].reshape(rows.shape[0], rest, -1)

    def _whole(self, pages: npt.NDArray[np.int32], shape: PageShape) -> list[Bytes]:
        """Views of whole pages, in as few pieces as may be."""
        if shape.page_bytes < self.frame_bytes:
            return [self._bytes[page, : shape.page_bytes] for page in map(int, pages)]
        return [self._bytes[first : last + 1].reshape(-1) for first, last in _runs(pages)]

    def _spread(self, chunk: Chunk, shape: PageShape) -> list[Bytes]:
        """Views of what one token has, in order: rank by rank, page by page."""
        sizes = [min(shape.page_bytes, shape.rank_bytes - n * shape.page_bytes) for n in range(shape.spread)]
        return [self._bytes[page, :size] for page, size in zip(_numbers(chunk), sizes * shape.ranks, strict=True)]

    def _rows(self, page: int, shape: PageShape) -> Bytes:
        """A page as [ranks * layers * kinds, page_tokens, bytes of a row]."""
        rows: Bytes = self._bytes[page, : shape.page_bytes].reshape(
            shape.kinds * shape.ranks * shape.layers, shape.page_tokens, -1
        )
        return rows


def rows(
    chunks: Sequence[Chunk], page_tokens: int, *, device: bool = False
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Rows in the paged tier (page * `page_tokens` + offset) of all tokens of `chunks`, in order; int64. `device`:
    in the device tier."""
    held = [chunk.device if device else chunk.pages for chunk in chunks]
    pages = np.frombuffer(b"".join(held), dtype=np.int32).astype(np.int64)
    sizes = np.array([len(chunk) for chunk in chunks], dtype=np.int64)
    first_pages = list(accumulate((len(each) // PAGE_NUMBER_BYTES for each in held), initial=0))[:-1]
    first_rows = np.array(first_pages, dtype=np.int64) * page_tokens  # were all pages full, and beside each other
    index = np.repeat(first_rows - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
    found: np.ndarray[tuple[int], np.dtype[np.int64]] = pages[index // page_tokens] * page_tokens
    found += index % page_tokens
    return found


def _numbers(chunk: Chunk) -> npt.NDArray[np.int32]:
    return np.frombuffer(chunk.pages, dtype=np.int32)


def _runs(pages: Sequence[int] | npt.NDArray[np.int32]) -> list[tuple[int, int]]:
    """Pages that follow one another, as (first, last)."""
    runs: list[tuple[int, int]] = []
    for page in map(int, pages):
        if runs and runs[-1][1] + 1 == page:
            runs[-1] = (runs[-1][0], page)
        else:
            runs.append((page, page))
    return runs
