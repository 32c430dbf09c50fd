"""The probe: finds where the engine keeps K and V, by writing known tokens and reading the cache.

vLLM's attention backends have one thing in common: `impl.do_kv_cache_update(layer, key, value, cache, slots)`
writes token-major K and V, or for MLA (multi-head latent attention: DeepSeek-AI 2024, "DeepSeek-V2", section 2.1)
its one vector, the latent and the key's rotary part. `probe` writes zeros and ones through it into unused blocks,
in as many rounds as an element's number has bits, and so learns which element lies at every address. The result
must be a bijection, the same in every layer and in another block; otherwise the layout is refused.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ragkv.connectors.vllm.layers import LayerCache, Layers
from ragkv.connectors.vllm.tiles import RAW
from ragkv.errors import LayoutError


@dataclass(frozen=True, slots=True)
class Geometry:
    """One worker's share of the KV: layers, its KV heads, head size, bytes an element, tokens a block. `kinds`: 2
    where a token has K and V, 1 where it has one vector (MLA)."""

    layers: int
    heads: int
    head_dim: int
    itemsize: int
    block_tokens: int
    kinds: int = 2

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers, this worker's heads."""
        return self.kinds * self.layers * self.heads * self.head_dim * self.itemsize


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
    elements = geometry.kinds * tokens * geometry.heads * geometry.head_dim
    if rest or cache[0].numel() != elements:
        raise LayoutError(f"a block has {cache[0].numel()} elements, not {elements}")
    return tokens


def _learn(
    layer: Any, cache: torch.Tensor, block: int, geometry: Geometry, tokens: int, dtype: torch.dtype
) -> torch.Tensor:
    """Storage offset of every element of block 0, as `block` tells it: int64 [tokens, kinds, heads, head_dim]."""
    shape = (tokens, geometry.kinds, geometry.heads, geometry.head_dim)
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
    """Write noise into `blocks`, read it back through `found`; write that back and compare the blocks. Backwards
    too: then no token is in a whole tile, and all are found one by one."""
    tokens, device, raw = found.kernel_tokens, cache.device, RAW[cache.element_size()]
    slots = torch.cat([torch.arange(tokens) + block * tokens for block in blocks])
    layers, saved = Layers([found]), cache[blocks].clone()
    try:
        noise = torch.randn(
            len(slots),
            geometry.kinds,
            geometry.heads,
            geometry.head_dim,
            generator=torch.Generator().manual_seed(7),
        ).to(device, dtype)
        for number, block in enumerate(blocks):
            _update(layer, cache, noise[number * tokens :][:tokens], block, tokens)
        written = cache[blocks].view(raw).clone()
        for order in (torch.arange(len(slots)), torch.arange(len(slots)).flip(0)):
            there = layers.find(slots[order].to(device))
            read = [layers.read(there, kind, range(1))[0].clone() for kind in range(geometry.kinds)]
            given = noise[order.to(device)].view(raw) if cache.dtype == dtype else None
            if given is not None and not all(
                torch.equal(read[kind], given[:, kind]) for kind in range(geometry.kinds)
            ):
                raise LayoutError(f"layer {name} does not give back what was written")
            cache[blocks] = 0
            for kind in range(geometry.kinds):
                layers.write(there, kind, read[kind][None], range(1))
            if not torch.equal(cache[blocks].view(raw), written):
                raise LayoutError(f"layer {name} cannot be written back")
    finally:
        cache[blocks] = saved


def _update(layer: Any, cache: torch.Tensor, values: torch.Tensor, block: int, tokens: int) -> None:
    slots = torch.arange(tokens, dtype=torch.int64, device=cache.device) + block * tokens
    if values.shape[1] == 1:
        rope = int(layer.impl.qk_rope_head_dim)
        latent, rotary = values[:, 0, 0, :-rope].contiguous(), values[:, 0, :, -rope:].contiguous()
        scale = torch.ones((), dtype=torch.float32, device=cache.device)
        layer.impl.do_kv_cache_update(latent, rotary, cache, slots, "auto", scale)
    else:
        key, value = values[:, 0].contiguous(), values[:, 1].contiguous()
        layer.impl.do_kv_cache_update(layer, key, value, cache, slots)
