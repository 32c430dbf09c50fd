"""Layouts that mix the elements of consecutive tokens (AMX tiles), copied a tile of tokens at a time.

Where a layout is not strided, every run of elements is found by an address of its own, which is slow where runs
are of one or two elements. But all elements of a tile of tokens may lie in a few long runs, in an order that one
strided copy makes. What a tile's elements are for (which token, head, dimension) is never assumed: it is computed
from the places that `layout.probe` has proven.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

SIZES = (2, 4, 8, 16, 32, 64)  # tokens of a tile, the smallest that will do
LEAST_RUN = 256  # bytes that must lie together
RAW, WIDEST = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}, 8  # integers, by bytes

Digits = list[tuple[int, int]]  # sizes and strides, the fastest first


@dataclass(frozen=True, slots=True)
class Order:
    """How a tile's elements [tokens, heads, head_dim], counted in this order, lie in the cache.

    `width` of them, `apart` from one another, are put together to one integer; then an array of `sizes` and
    `strides` (in such integers, the fastest last) is what lies in the cache, in runs of `run` elements.
    """

    tokens: int
    width: int
    apart: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    run: int


class Scratch:
    """A CPU's memory for what is on its way. It is kept: fresh memory must be mapped by the system first, which
    takes longer than to copy there."""

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def get(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An array, until the next one of that name."""
        size = math.prod(shape) * dtype.itemsize
        if name not in self._kept or len(self._kept[name]) < size:
            self._kept[name] = torch.empty(size, dtype=torch.uint8)
        return self._kept[name][:size].view(dtype).view(*shape)


class Tiles:
    """One layer's K or V. `storage`: one-dimensional, raw; `first` int64 [tiles of a block, runs of a tile]: where
    the runs of block 0 begin, and `stride` from block to block, both counted in runs."""

    def __init__(
        self, order: Order, storage: torch.Tensor, first: torch.Tensor, stride: int, shape: Sequence[int]
    ) -> None:
        """`shape`: of a token, (heads, head_dim)."""
        self.tokens = order.tokens
        self.order, self._first, self._stride, self._shape = order, first, stride, tuple(shape)
        self._raw, self._wide = storage.dtype, RAW[storage.element_size() * order.width]
        self._size = order.tokens * shape[0] * shape[1] // order.width  # integers of a tile
        runs = storage[: len(storage) // order.run * order.run].view(-1, order.run)
        self._runs = runs.view(RAW[WIDEST])

    def rows(self, blocks: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Where the tiles lie that begin at these blocks' offsets, as `read` and `write` take it."""
        return (self._first[offsets // self.tokens] + (blocks * self._stride)[:, None]).flatten()

    def read(self, rows: torch.Tensor, scratch: Scratch) -> torch.Tensor:
        """Whole tiles, raw [tokens, heads, head_dim], in scratch."""
        order = self.order
        image = scratch.get("image", (len(rows), self._runs.shape[1]), self._runs.dtype)
        torch.index_select(self._runs, 0, rows, out=image)
        count = image.numel() * WIDEST // self._wide.itemsize // self._size
        wide = scratch.get("wide", (count, self._size), self._wide)
        self._in_order(wide).copy_(image.view(self._wide).view(count, *order.sizes))
        raw = wide.view(self._raw)
        if order.apart > 1:
            pairs = raw.view(-1, order.apart, order.width).transpose(1, 2)
            raw = scratch.get("tokens", pairs.shape, self._raw).copy_(pairs)
        return raw.view(-1, *self._shape)

    def write(self, rows: torch.Tensor, raw: torch.Tensor, scratch: Scratch) -> None:
        """Put whole tiles, raw [tokens, heads, head_dim], there."""
        order = self.order
        flat = raw.reshape(-1)
        if order.apart > 1:  # by parts: a transposed copy would have an inner loop as short as `width`
            parts = flat.view(-1, order.width, order.apart).unbind(1)
            pairs = scratch.get("wide", (*parts[0].shape, order.width), self._raw)
            flat = torch.stack(parts, -1, out=pairs).view(-1)
        wide = self._in_order(flat.view(self._wide).view(-1, self._size))
        image = scratch.get("image", wide.shape, self._wide).copy_(wide)
        self._runs.index_copy_(0, rows, image.view(-1).view(RAW[WIDEST]).view(len(rows), -1))

    def _in_order(self, wide: torch.Tensor) -> torch.Tensor:
        """A view of tiles [tiles, integers] in the cache's order."""
        order = self.order
        return wide.as_strided((len(wide), *order.sizes), (self._size, *order.strides))


def find_tiles(storage: torch.Tensor, places: torch.Tensor, stride: int) -> list[Tiles] | None:
    """K's and V's (of MLA one), with tiles of one size; None where they are not so, or not on a CPU.

    `storage`: one-dimensional, raw; `places` int64 [kernel_tokens, kinds, heads, head_dim]: where the elements of
    block 0 lie in it; `stride`: from block to block.
    """
    if storage.device.type != "cpu" or storage.data_ptr() % WIDEST:
        return None
    for tokens in SIZES:
        if len(places) % tokens == 0:
            tiles = [_tiles(storage, one, stride, tokens) for one in places.unbind(1)]
            found = [each for each in tiles if each is not None]
            if len(found) == len(tiles):
                return found
    return None


def _tiles(storage: torch.Tensor, places: torch.Tensor, stride: int, tokens: int) -> Tiles | None:
    flat = places.reshape(len(places) // tokens, -1)
    relative = flat - flat[:, :1]
    if not torch.equal(relative, relative[:1].expand_as(relative)):
        return None
    source = relative[0].argsort()
    run = _run(relative[0][source])
    first = flat[:, source].view(len(flat), -1, run)[..., 0]
    itemsize = storage.element_size()
    if run * itemsize < LEAST_RUN or run * itemsize % WIDEST or stride % run or bool((first % run).any()):
        return None
    digits = _digits(source)
    order = None if digits is None else _order(digits, tokens, run, itemsize)
    if order is None:
        return None
    return Tiles(order, storage, (first // run).contiguous(), stride // run, places.shape[1:])


def _run(ascending: torch.Tensor) -> int:
    """How many numbers follow one another without a gap, everywhere."""
    ends = (torch.diff(ascending) != 1).nonzero().flatten() + 1
    return int(torch.gcd(ends, torch.full_like(ends, len(ascending))).amin()) if len(ends) else len(ascending)


def _digits(source: torch.Tensor) -> Digits | None:
    """Numbers as those of a strided array from 0 on; None if they are not."""
    found, left = [], source
    if int(left[0]):
        return None
    while len(left) > 1:
        step = int(left[1] - left[0])
        ends = (torch.diff(left) != step).nonzero()
        size = int(ends[0]) + 1 if len(ends) else len(left)
        lines = left.view(-1, size) if len(left) % size == 0 else None
        if step < 1 or lines is None or not torch.equal(lines, lines[:, :1] + torch.arange(size) * step):
            return None
        found.append((size, step))
        left = lines[:, 0]
    return found


def _order(digits: Digits, tokens: int, run: int, itemsize: int) -> Order | None:
    """With as many elements in one integer as will go."""
    (count, apart), most = digits[0], WIDEST // itemsize
    fitting = [width for width in (8, 4, 2, 1) if width <= most and count % width == 0]
    width = fitting[0] if apart == 1 else count if count in fitting else 1
    if width == 1 or apart == 1:
        rest = [(count // width, max(1, apart // width)), *((size, step // width) for size, step in digits[1:])]
        whole = all(step % width == 0 for _, step in digits[1:])
        apart = 1
    else:
        rest = [(size, step // width if step >= apart else step) for size, step in digits[1:]]
        whole = all(step < apart or step % (width * apart) == 0 for _, step in digits[1:])
    sizes, strides = zip(*reversed(rest), strict=True) if rest else ((1,), (1,))
    return Order(tokens, width, apart, tuple(sizes), tuple(strides), run) if whole else None
