"""All layers' caches, read and written together."""

import itertools
from collections.abc import Sequence

import torch

from ragkv.connectors.vllm.layout import LayerCache, Views
from ragkv.connectors.vllm.tiles import Scratch

Part = slice | torch.Tensor  # of some tokens; a slice where they follow one another


class Found:
    """Some slots, the same in all layers: `blocks` and `offsets`, on the caches' device."""

    def __init__(self, blocks: torch.Tensor, offsets: torch.Tensor, tile: int = 0) -> None:
        """`tile`: how many tokens, from a multiple of that on, can be copied at once; 0: none."""
        self.blocks, self.offsets = blocks, offsets
        self.in_tiles = 0  # how many tokens are in whole tiles
        self.whole, self.rest = slice(0, 0), slice(None)  # which are, and which are not
        self._computed: dict[tuple[str, int], torch.Tensor] = {}
        if tile:
            self._split(tile)

    in_tiles: int
    whole: Part
    rest: Part

    def _split(self, tile: int) -> None:
        """On a CPU, where tiles are: an accelerator would be waited for."""
        first = _first_of_tiles(self.blocks, self.offsets, tile)
        inside = torch.zeros(len(self.blocks), dtype=torch.bool)
        inside[(first[:, None] + torch.arange(tile)).flatten()] = True
        self._first = self.blocks[first], self.offsets[first]
        self.in_tiles, self.whole, self.rest = len(first) * tile, _part(inside), _part(~inside)

    def rows(self, cache: LayerCache, kind: int) -> torch.Tensor:
        """Where the whole tiles lie, in all layers alike."""
        if ("rows", kind) not in self._computed:
            assert cache.tiles is not None
            self._computed["rows", kind] = cache.tiles[kind].rows(*self._first)
        return self._computed["rows", kind]

    def addresses(self, cache: LayerCache, kind: int) -> torch.Tensor:
        """Where the other tokens lie, in all layers alike."""
        if ("addresses", kind) not in self._computed:
            others = self.blocks[self.rest], self.offsets[self.rest]
            self._computed["addresses", kind] = cache.addresses(others, kind)
        return self._computed["addresses", kind]


class Layers:
    """K or V of some slots, raw [layers, tokens, heads, head_dim].

    Where all are views of one storage, one kernel serves all layers; else each has its own, by addresses that are
    computed once where the layout is not strided, or by whole tiles of tokens.
    """

    def __init__(self, caches: Sequence[LayerCache]) -> None:
        self._caches = caches
        self.kernel_tokens, self.slots = caches[0].kernel_tokens, caches[0].slots
        keys, values = (_stacked([cache.views and cache.views[kind] for cache in caches]) for kind in (0, 1))
        self.views: Views | None = None if keys is None or values is None else (keys, values)
        self._addressed = all(cache.views is None and cache.same_addresses(caches[0]) for cache in caches)
        tiles = caches[0].tiles if self._addressed else None
        self._tile, self._scratch = 0 if tiles is None else tiles[0].tokens, Scratch()
        everything = range(len(caches))
        # What to copy at once: a CPU's own caches hold one layer; an accelerator is given few kernels.
        self.groups = [everything[n : n + 1] for n in everything] if self._tile else [everything]

    def find(self, blocks: torch.Tensor, offsets: torch.Tensor) -> Found:
        """Slots as `read` and `write` take them."""
        return Found(blocks, offsets, self._tile)

    def read(self, found: Found, kind: int, raw: torch.dtype, layers: range) -> torch.Tensor:
        """K (`kind` 0) or V (1) of the found slots, in layers that follow one another; until the next call."""
        if self.views is not None:
            return self.views[kind][layers.start : layers.stop, found.blocks, found.offsets].view(raw)
        read = [self._read(found, kind, self._caches[number]) for number in layers]
        return read[0][None] if len(read) == 1 else torch.stack(read)

    def write(self, found: Found, kind: int, raw: torch.Tensor, layers: range) -> None:
        """Put `raw` into the found slots."""
        if self.views is not None:
            there = self.views[kind][layers.start : layers.stop]
            there[:, found.blocks, found.offsets] = raw.view(there.dtype)
            return
        for number, each in zip(layers, raw, strict=True):
            self._write(found, kind, self._caches[number], each)

    def _read(self, found: Found, kind: int, cache: LayerCache) -> torch.Tensor:
        if not self._addressed:
            return cache.read((found.blocks, found.offsets), kind)
        if cache.tiles is None or not found.in_tiles:
            return cache.read_at(found.addresses(cache, kind), kind)
        whole = cache.tiles[kind].read(found.rows(cache, kind), self._scratch)
        if found.in_tiles == len(found.blocks):
            return whole
        raw = self._scratch.get("all", (len(found.blocks), *whole.shape[1:]), whole.dtype)
        raw[found.whole] = whole
        raw[found.rest] = cache.read_at(found.addresses(cache, kind), kind)
        return raw

    def _write(self, found: Found, kind: int, cache: LayerCache, raw: torch.Tensor) -> None:
        if not self._addressed:
            cache.write((found.blocks, found.offsets), kind, raw)
            return
        if found.in_tiles < len(found.blocks):
            cache.write_at(found.addresses(cache, kind), kind, raw[found.rest])
        if cache.tiles is not None and found.in_tiles:
            cache.tiles[kind].write(found.rows(cache, kind), raw[found.whole], self._scratch)


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
