"""Where the engine keeps K and V: found by writing known tokens and looking where they went.

vLLM's attention backends agree on one thing only: `impl.do_kv_cache_update(layer, key, value, cache, slots)`
writes token-major K and V. `probe` writes zeros and ones through it into blocks that nobody uses yet, in as
many rounds as an element's number has bits, and so learns the number of the element behind every address.
What it learns must be a bijection, the same in every layer and in another block, or the layout is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ragkv.connectors.vllm.tiles import WIDE, WIDEST, Scratch, Tiles, find_tiles
from ragkv.errors import LayoutError

RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
Views = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Geometry:
    """One worker's share of the KV: layers, its KV heads, head size, bytes an element, tokens a block."""

    layers: int
    heads: int
    head_dim: int
    itemsize: int
    block_tokens: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K and V in all layers, this worker's heads."""
        return 2 * self.layers * self.heads * self.head_dim * self.itemsize


class LayerCache:
    """One layer's paged cache, read and written by slot as raw elements [tokens, 2, heads, head_dim].

    Most layouts are strided, and K and V are views; some (AMX tiles) are a permutation inside the block, and
    elements, or runs of them that stay together, are found through a table of addresses, or whole tiles of tokens
    by `tiles`.
    """

    def __init__(self, cache: torch.Tensor, kernel_tokens: int, places: torch.Tensor) -> None:
        """`places` int64 [kernel_tokens, 2, heads, head_dim]: storage offset of every element in block 0."""
        self.kernel_tokens = kernel_tokens
        raw = cache.view(RAW[cache.element_size()])
        self._stride = raw.stride(0)
        self._blocks = raw.shape[0]
        self.slots = self._blocks * kernel_tokens  # how many there are
        self._first = int(raw.storage_offset())
        self._storage = raw.as_strided((_reach(raw),), (1,), self._first)
        self._places = places - self._first
        self.views = self._strided()
        # Made once: a copy to the device at each use would be waited for.
        self._tables = [_table(self._storage, self._places[:, kind], self._stride) for kind in (0, 1)]
        self.tiles = None if self.views is not None else find_tiles(self._storage, self._places, self._stride)

    def _strided(self) -> Views | None:
        """K and V as [blocks, tokens, heads, head_dim] views, if the layout is strided."""
        views = []
        for kind in (0, 1):
            places = self._places[:, kind]
            steps = [
                int(places.select(dim, 1).flatten()[0] - places.flatten()[0]) if places.shape[dim] > 1 else 0
                for dim in range(3)
            ]
            grid = places.flatten()[0] + sum(
                torch.arange(size).reshape([-1 if d == dim else 1 for d in range(3)]) * step
                for dim, (size, step) in enumerate(zip(places.shape, steps, strict=True))
            )
            if not torch.equal(grid, places):
                return None
            view = self._storage.as_strided(
                (self._blocks, *places.shape),
                (self._stride, *steps),
                self._first + int(places.flatten()[0]),
            )
            views.append(widened(view))
        return views[0], views[1]

    def find(self, slots: torch.Tensor) -> Views:
        """Blocks and offsets of `slots`, as `read` and `write` take them; the same for every layer."""
        return slots // self.kernel_tokens, slots % self.kernel_tokens

    def read(self, found: Views, kind: int) -> torch.Tensor:
        """K (`kind` 0) or V (1) of the found slots, raw [tokens, heads, head_dim], on the cache's device."""
        if self.views is not None:
            return self.views[kind][found].view(self._storage.dtype)
        return self.read_at(self.addresses(found, kind), kind)

    def write(self, found: Views, kind: int, raw: torch.Tensor) -> None:
        """Put `raw` [tokens, heads, head_dim] into the found slots."""
        if self.views is not None:
            self.views[kind][found] = raw.view(self.views[kind].dtype)
        else:
            self.write_at(self.addresses(found, kind), kind, raw)

    def addresses(self, found: Views, kind: int) -> torch.Tensor:
        """Where the runs of the found slots begin, for `read_at` and `write_at`: int64, one-dimensional."""
        (blocks, offsets), table = found, self._tables[kind]
        return (table.places[offsets] + (blocks * table.stride)[:, None]).flatten()

    def read_at(self, addresses: torch.Tensor, kind: int) -> torch.Tensor:
        """As `read`."""
        found = self._tables[kind].storage.gather(0, addresses)
        return found.view(self._storage.dtype).view(-1, *self._places.shape[2:])

    def write_at(self, addresses: torch.Tensor, kind: int, raw: torch.Tensor) -> None:
        """As `write`."""
        storage = self._tables[kind].storage
        storage.scatter_(0, addresses, raw.reshape(-1).view(storage.dtype))

    def same_addresses(self, other: "LayerCache") -> bool:
        """Whether what `addresses` gives, and tiles' rows, serve both."""
        mine, others = ([*each._tables, *(each.tiles or ())] for each in (self, other))
        return len(mine) == len(others) and all(one.same(two) for one, two in zip(mine, others, strict=True))


@dataclass(frozen=True)
class _Table:
    """K's or V's places in a layout that is not strided, in runs of elements that stay together in every slot.

    `storage`: one-dimensional, an element a run; `places` int64 [kernel_tokens, runs]: of the runs of a slot of
    block 0; `stride`: from block to block. Places and stride count runs.
    """

    storage: torch.Tensor
    places: torch.Tensor
    stride: int

    def same(self, other: "_Table") -> bool:
        """Whether places are the same."""
        alike = (self.stride, self.storage.dtype) == (other.stride, other.storage.dtype)
        return alike and torch.equal(self.places, other.places)


def _table(storage: torch.Tensor, places: torch.Tensor, stride: int) -> _Table:
    """`places` int64 [kernel_tokens, heads, head_dim] and `stride` count elements of `storage`. Takes the longest
    runs that fit an integer."""
    flat, run = places.flatten(1), WIDEST // storage.element_size()
    while run > 1:
        runs = flat.reshape(len(flat), -1, run) if flat.shape[1] % run == 0 else None
        if runs is not None and _stay_together(runs, storage, stride):
            wide = WIDE[storage.element_size() * run]
            whole = storage[: len(storage) // run * run]
            return _Table(whole.view(wide), (runs[..., 0] // run).to(storage.device), stride // run)
        run //= 2
    return _Table(storage, flat.to(storage.device), stride)


def _stay_together(runs: torch.Tensor, storage: torch.Tensor, stride: int) -> bool:
    """Whether `runs` [kernel_tokens, runs, run] are each unbroken, and can be addressed as one element each."""
    run = runs.shape[-1]
    aligned = storage.storage_offset() % run == 0 and stride % run == 0 and not bool((runs[..., 0] % run).any())
    return aligned and torch.equal(runs, runs[..., :1] + torch.arange(run))


def widened(raw: torch.Tensor) -> torch.Tensor:
    """The same memory in elements of 8 bytes, where the last dimension allows it: far fewer to copy."""
    try:
        return raw.view(torch.int64)
    except RuntimeError:
        return raw


def probe(
    layers: dict[str, Any],
    caches: dict[str, torch.Tensor],
    geometry: Geometry,
    blocks: int,
    dtype: torch.dtype,
) -> list[LayerCache]:
    """A `LayerCache` a layer, in the order of `caches`. LayoutError: the layout cannot be proven.

    `layers`: attention layers by name; `blocks`: vLLM's number of blocks; `dtype`: of the layers' K and V.
    Must run before the first request; the blocks it uses are restored.
    """
    first = next(iter(caches))
    kernel_tokens = _kernel_tokens(caches[first], blocks, geometry)
    used = sorted({1, caches[first].shape[0] - 1})
    places = _learn(layers[first], caches[first], used[-1], geometry, kernel_tokens, dtype)
    found = []
    for name, cache in caches.items():
        if cache.shape != caches[first].shape or cache.stride() != caches[first].stride():
            raise LayoutError(f"layer {name} is laid out unlike layer {first}")
        moved = places + int(cache.storage_offset() - caches[first].storage_offset())
        if cache.dtype != dtype:  # no value tells which element it was, so each layer and block is learnt
            for block in used:
                if not torch.equal(_learn(layers[name], cache, block, geometry, kernel_tokens, dtype), moved):
                    raise LayoutError(f"layer {name} is laid out unlike layer {first}")
        layer = LayerCache(cache, kernel_tokens, moved)
        _verify(name, layers[name], cache, used, layer, geometry, dtype)
        found.append(layer)
    return found


def _kernel_tokens(cache: torch.Tensor, blocks: int, geometry: Geometry) -> int:
    """Tokens a block of the tensor; vLLM may split one of its blocks into several of the kernel's."""
    if cache.element_size() != geometry.itemsize or cache.element_size() not in RAW:
        raise LayoutError(f"the cache has {cache.element_size()} bytes an element, not {geometry.itemsize}")
    if blocks < 2 or cache.shape[0] % blocks:
        raise LayoutError(f"the cache's first dimension is {cache.shape[0]}, with {blocks} blocks")
    split = cache.shape[0] // blocks
    tokens, rest = divmod(geometry.block_tokens, split)
    elements = 2 * tokens * geometry.heads * geometry.head_dim
    if rest or cache[0].numel() != elements:
        raise LayoutError(f"a block has {cache[0].numel()} elements, not {elements}")
    return tokens


def _learn(
    layer: Any, cache: torch.Tensor, block: int, geometry: Geometry, tokens: int, dtype: torch.dtype
) -> torch.Tensor:
    """Storage offset of every element of block 0, as `block` tells it: int64 [tokens, 2, heads, head_dim]."""
    shape = (tokens, 2, geometry.heads, geometry.head_dim)
    size = cache[block].numel()
    numbers = torch.arange(size).reshape(shape)
    seen = torch.zeros(size, dtype=torch.int64)
    saved = cache[block].clone()
    try:
        for bit in range((size - 1).bit_length() + 1):  # the last round writes ones everywhere
            last = 1 << bit >= size
            values = torch.ones(shape) if last else (numbers >> bit & 1).float()
            _update(layer, cache, values.to(cache.device, dtype), block, tokens)
            ones = (cache[block].view(RAW[cache.element_size()]).reshape(-1) != 0).cpu().to(torch.int64)
            if last and not bool(ones.all()):
                raise LayoutError("a write does not reach every element of its block")
            seen += 0 if last else ones << bit
    finally:
        cache[block].copy_(saved)
    order = torch.argsort(seen)
    if not torch.equal(seen[order], torch.arange(size)):
        raise LayoutError("elements and addresses do not match one to one")
    inside = torch.zeros(cache.shape[1:], dtype=torch.int64)
    for dim, (extent, step) in enumerate(zip(cache.shape[1:], cache.stride()[1:], strict=True)):
        inside += (torch.arange(extent) * step).reshape([-1 if d == dim else 1 for d in range(inside.dim())])
    return inside.reshape(-1)[order].reshape(shape) + int(cache.storage_offset())


def _verify(
    name: str,
    layer: Any,
    cache: torch.Tensor,
    blocks: list[int],
    found: LayerCache,
    geometry: Geometry,
    dtype: torch.dtype,
) -> None:
    """Write noise into `blocks`, read it back through `found`; write that back and compare the blocks."""
    tokens, device = found.kernel_tokens, cache.device
    saved = cache[blocks].clone()
    try:
        noise = torch.randn(
            tokens, 2, geometry.heads, geometry.head_dim, generator=torch.Generator().manual_seed(7)
        )
        for number, block in enumerate(blocks):
            _update(layer, cache, (noise + number).to(device, dtype), block, tokens)
        slots = torch.cat([torch.arange(tokens) + block * tokens for block in blocks])
        there = found.find(slots.to(device))
        written = cache[blocks].clone()
        read = [found.read(there, kind).clone() for kind in (0, 1)]
        if cache.dtype == dtype:
            want = (
                torch.cat([noise + number for number in range(len(blocks))])
                .to(device, dtype)
                .view(RAW[cache.element_size()])
            )
            if not all(torch.equal(read[kind], want[:, kind]) for kind in (0, 1)):
                raise LayoutError(f"layer {name} does not give back what was written")
        _write_back(name, cache, blocks, written, lambda kind: found.write(there, kind, read[kind]))
        if found.tiles is not None:
            _verify_tiles(name, cache, blocks, written, found.tiles, there, read)
    finally:
        cache[blocks] = saved


def _write_back(
    name: str, cache: torch.Tensor, blocks: list[int], written: torch.Tensor, write: Callable[[int], None]
) -> None:
    """Empty some blocks and write them again, K and V: they must be as they were."""
    cache[blocks] = 0
    for kind in (0, 1):
        write(kind)
    raw = RAW[cache.element_size()]
    if not torch.equal(cache[blocks].view(raw), written.view(raw)):
        raise LayoutError(f"layer {name} cannot be written back")


def _verify_tiles(
    name: str,
    cache: torch.Tensor,
    blocks: list[int],
    written: torch.Tensor,
    tiles: list[Tiles],
    there: Views,
    read: list[torch.Tensor],
) -> None:
    """Whole blocks, read and written by tiles, are the same."""
    rows, scratch = [each.rows(*(part[:: each.tokens] for part in there)) for each in tiles], Scratch()
    if not all(torch.equal(tiles[kind].read(rows[kind], scratch), read[kind]) for kind in (0, 1)):
        raise LayoutError(f"layer {name} does not give back what was written, tile by tile")
    _write_back(name, cache, blocks, written, lambda kind: tiles[kind].write(rows[kind], read[kind], scratch))


def _update(layer: Any, cache: torch.Tensor, values: torch.Tensor, block: int, tokens: int) -> None:
    slots = torch.arange(tokens, dtype=torch.int64, device=cache.device) + block * tokens
    key, value = values[:, 0].contiguous(), values[:, 1].contiguous()
    layer.impl.do_kv_cache_update(layer, key, value, cache, slots)


def _reach(raw: torch.Tensor) -> int:
    return 1 + sum((extent - 1) * step for extent, step in zip(raw.shape, raw.stride(), strict=True))
