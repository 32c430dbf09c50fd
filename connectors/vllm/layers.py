"""The layers' paged caches, read and written by slot (block * tokens a block + offset) as raw elements.

Most layouts are strided, and K and V are views of the cache. Others (AMX tiles) are a permutation inside a block:
elements, or runs of them that stay together, are found by a table of addresses; whole tiles of tokens, by `tiles`.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ragkv.connectors.vllm.tiles import RAW, WIDEST, Scratch, find_tiles
from ragkv.errors import LayoutError

Views = list[torch.Tensor]  # of K and V; of MLA's one vector
Part = slice | torch.Tensor  # of some tokens; a slice where they follow one another


class LayerCache:
    """One layer's cache. `views`: K and V (for MLA one) as [blocks, tokens, heads, head_dim], if the layout is
    strided; else `tables`: of K and V, and `tiles`: the same, or None. `slots`: how many there are."""

    def __init__(self, cache: torch.Tensor, kernel_tokens: int, places: torch.Tensor) -> None:
        """`places` int64 [kernel_tokens, kinds, heads, head_dim]: storage offset of every element in block 0."""
        raw = cache.view(RAW[cache.element_size()])
        first, stride = int(raw.storage_offset()), raw.stride(0)
        reach = 1 + sum((extent - 1) * step for extent, step in zip(raw.shape, raw.stride(), strict=True))
        storage = raw.as_strided((reach,), (1,), first)
        self.raw, self.kernel_tokens, self.slots = raw.dtype, kernel_tokens, raw.shape[0] * kernel_tokens
        self.places = places - first
        self.views = _strided(storage, self.places, stride, raw.shape[0])
        self.tables: list[_Table] = []
        self.tiles = None
        if self.views is None:  # made once: a copy to the device at each use would be waited for
            self.tables = [_table(storage, one, stride) for one in self.places.unbind(1)]
            self.tiles = find_tiles(storage, self.places, stride)

    def same_addresses(self, other: "LayerCache") -> bool:
        """Whether what a `Slots` of one holds serves both."""
        mine, others = (
            [*((t.storage.dtype, t.stride) for t in each.tables), *(t.order for t in each.tiles or ())]
            for each in (self, other)
        )
        return mine == others and torch.equal(self.places, other.places)


def _strided(storage: torch.Tensor, places: torch.Tensor, stride: int, blocks: int) -> Views | None:
    """K and V as views, if the layout is strided."""
    views = []
    for one in places.unbind(1):
        first = int(one.flatten()[0])
        steps = [int(one.select(d, 1).flatten()[0]) - first if one.shape[d] > 1 else 0 for d in range(3)]
        token, head, dim = (torch.arange(size) * step for size, step in zip(one.shape, steps, strict=True))
        if not torch.equal(first + token[:, None, None] + head[:, None] + dim, one):
            return None
        shape, strides = (blocks, *one.shape), (stride, *steps)
        views.append(widened(storage.as_strided(shape, strides, storage.storage_offset() + first)))
    return views


def widened(raw: torch.Tensor) -> torch.Tensor:
    """The same memory in elements of 8 bytes, where the last dimension allows it: far fewer to copy."""
    try:
        return raw.view(torch.int64)
    except RuntimeError:
        return raw


@dataclass(frozen=True)
class _Table:
    """K's or V's places in a layout that is not strided, in runs of elements that stay together in every slot.

    `storage`: one-dimensional, an element a run; `places` int64 [kernel_tokens, runs]: of the runs of a slot of
    block 0; `stride`: from block to block. Places and stride count runs.
    """

    storage: torch.Tensor
    places: torch.Tensor
    stride: int

    def addresses(self, blocks: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Where the runs of some slots lie in `storage`: int64, one-dimensional."""
        return (self.places[offsets] + (blocks * self.stride)[:, None]).flatten()


def _table(storage: torch.Tensor, places: torch.Tensor, stride: int) -> _Table:
    """`places` int64 [kernel_tokens, heads, head_dim] and `stride` count elements of `storage`. Takes the longest
    runs that fit an integer."""
    flat, run = places.flatten(1), WIDEST // storage.element_size()
    while run > 1:
        runs = flat.reshape(len(flat), -1, run) if flat.shape[1] % run == 0 else None
        if runs is not None and _stay_together(runs, storage, stride):
            wide = RAW[storage.element_size() * run]
            whole = storage[: len(storage) // run * run]
            return _Table(whole.view(wide), (runs[..., 0] // run).to(storage.device), stride // run)
        run //= 2
    return _Table(storage, flat.to(storage.device), stride)


def _stay_together(runs: torch.Tensor, storage: torch.Tensor, stride: int) -> bool:
    """Whether `runs` [kernel_tokens, runs, run] are each unbroken, and can be addressed as one element each."""
    run = runs.shape[-1]
    aligned = storage.storage_offset() % run == 0 and stride % run == 0 and not bool((runs[..., 0] % run).any())
    return aligned and torch.equal(runs, runs[..., :1] + torch.arange(run))


class Slots:
    """Some slots, and where they lie in every layer that is laid out like `cache`. `blocks`, `offsets`: int64
    [slots], on the cache's device; `whole`: those in whole tiles, `in_tiles` of them; `rest`: the others."""

    def __init__(self, cache: LayerCache, slots: torch.Tensor) -> None:
        self.blocks, self.offsets = blocks, offsets = slots // cache.kernel_tokens, slots % cache.kernel_tokens
        self.in_tiles = 0
        self.whole: Part = slice(0, 0)
        self.rest: Part = slice(None)
        if cache.tiles is not None:  # on a CPU; an accelerator would be waited for
            tile = cache.tiles[0].tokens
            first = _first_of_tiles(blocks, offsets, tile)
            inside = torch.zeros(len(slots), dtype=torch.bool)
            inside[(first[:, None] + torch.arange(tile)).flatten()] = True
            self.in_tiles, self.whole, self.rest = len(first) * tile, _part(inside), _part(~inside)
            self.rows = [each.rows(blocks[first], offsets[first]) for each in cache.tiles]
        self.addresses = [each.addresses(blocks[self.rest], offsets[self.rest]) for each in cache.tables]


class Layers:
    """K or V of some slots, raw [layers, tokens, heads, head_dim].

    Where all layers are views of one storage, one kernel serves all; else each has its own, by addresses that are
    computed once, or by whole tiles of tokens. LayoutError: layers whose addresses are not the same.
    """

    def __init__(self, caches: Sequence[LayerCache]) -> None:
        first, everything = caches[0], range(len(caches))
        self._caches, self._scratch = caches, Scratch()
        self.raw, self.slots = first.raw, first.slots
        kinds = range(first.places.shape[1])
        stacked = [_stacked([cache.views[kind] if cache.views else None for cache in caches]) for kind in kinds]
        found = [each for each in stacked if each is not None]
        self.views: Views | None = found if len(found) == len(stacked) else None
        if self.views is None and not all(cache.same_addresses(first) for cache in caches):
            raise LayoutError("layers whose caches are not aligned alike")
        # What to copy at once: a CPU's own caches hold one layer; an accelerator is given few kernels.
        self.groups = [everything[n : n + 1] for n in everything] if first.tiles else [everything]

    def find(self, slots: torch.Tensor) -> Slots:
        """Slots, int64 on the caches' device, as `read` and `write` take them."""
        return Slots(self._caches[0], slots)

    def read(self, slots: Slots, kind: int, layers: range) -> torch.Tensor:
        """K (`kind` 0) or V (1) of some slots, in layers that follow one another; until the next call."""
        if self.views is not None:
            return self.views[kind][layers.start : layers.stop, slots.blocks, slots.offsets].view(self.raw)
        read = [self._read(slots, kind, self._caches[number]) for number in layers]
        return read[0][None] if len(read) == 1 else torch.stack(read)

    def write(self, slots: Slots, kind: int, raw: torch.Tensor, layers: range) -> None:
        """Put `raw` into some slots."""
        if self.views is not None:
            there = self.views[kind][layers.start : layers.stop]
            there[:, slots.blocks, slots.offsets] = raw.view(there.dtype)
            return
        for number, each in zip(layers, raw, strict=True):
            self._write(slots, kind, self._caches[number], each)

    def _read(self, slots: Slots, kind: int, cache: LayerCache) -> torch.Tensor:
        if cache.views is not None:
            return cache.views[kind][slots.blocks, slots.offsets].view(self.raw)
        whole = None
        if cache.tiles is not None and slots.in_tiles:
            whole = cache.tiles[kind].read(slots.rows[kind], self._scratch)
            if slots.in_tiles == len(slots.blocks):
                return whole
        rest = cache.tables[kind].storage.gather(0, slots.addresses[kind])
        rest = rest.view(self.raw).view(-1, *cache.places.shape[2:])
        if whole is None:
            return rest
        raw = self._scratch.get("all", (len(slots.blocks), *whole.shape[1:]), whole.dtype)
        raw[slots.whole], raw[slots.rest] = whole, rest
        return raw

    def _write(self, slots: Slots, kind: int, cache: LayerCache, raw: torch.Tensor) -> None:
        if cache.views is not None:
            cache.views[kind][slots.blocks, slots.offsets] = raw.view(cache.views[kind].dtype)
            return
        if slots.in_tiles < len(slots.blocks):
            storage = cache.tables[kind].storage
            storage.scatter_(0, slots.addresses[kind], raw[slots.rest].reshape(-1).view(storage.dtype))
        if cache.tiles is not None and slots.in_tiles:
            cache.tiles[kind].write(slots.rows[kind], raw[slots.whole], self._scratch)


def _first_of_tiles(blocks: torch.Tensor, offsets: torch.Tensor, tile: int) -> torch.Tensor:
    """The first token of each whole tile: of `tile` tokens in consecutive slots, from a multiple of it on."""
    follows = (torch.diff(blocks) == 0) & (torch.diff(offsets) == 1)
    steps = torch.cat([follows.new_zeros(1, dtype=torch.int64), follows.cumsum(0)])
    first = (offsets[: max(0, len(offsets) - tile + 1)] % tile == 0).nonzero().flatten()
    return first[steps[first + tile - 1] - steps[first] == tile - 1]


def _part(chosen: torch.Tensor) -> Part:
    places = chosen.nonzero().flatten()
    if not len(places):
        return slice(0, 0)
    begin, end = int(places[0]), int(places[-1]) + 1
    return slice(begin, end) if end - begin == len(places) else places


def _stacked(given: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Views that stand at a constant distance in one storage as one, [views, *shape]; None if they do not."""
    views = [view for view in given if view is not None]
    if len(views) < len(given):
        return None
    first, starts = views[0], [view.storage_offset() for view in views]
    steps = {after - before for before, after in itertools.pairwise(starts)} or {0}
    alike = all(
        (view.shape, view.stride(), view.dtype) == (first.shape, first.stride(), first.dtype)
        and view.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for view in views
    )
    if not alike or len(steps) > 1 or min(steps) < 0:
        return None
    return first.as_strided((len(views), *first.shape), (min(steps), *first.stride()), starts[0])
