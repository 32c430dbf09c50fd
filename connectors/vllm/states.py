"""States: what layers of linear attention, Mamba and convolutions have taken in of all tokens so far. vLLM keeps a
request's state in the block of its last token, and changes it there with each token. So it is copied whole, in the
step that leaves it; nothing of it is looked into.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from vllm.v1.kv_cache_interface import MambaSpec

from ragkv.connectors.vllm.streams import Stream, Streams, Ticket
from ragkv.connectors.vllm.transfer import Indices, Kind, Mover
from ragkv.errors import FusionError, LayoutError


def describe_state(spec: Any) -> str:
    """What a state is, as far as its bytes tell: kind, shapes, dtypes, and in which order convolutions lie. Equal
    for layers of one plane. LayoutError: a state that is not served."""
    if spec.mamba_cache_mode != "align":
        raise LayoutError(f"states without a prefix cache (mode {spec.mamba_cache_mode}); supported: align")
    if spec.num_speculative_blocks:
        raise LayoutError("speculative decoding beside states; supported: none")
    order = os.environ.get("VLLM_SSM_CONV_STATE_LAYOUT", "SD")
    kind = getattr(spec.mamba_type, "name", spec.mamba_type)
    return f"{kind} {[list(shape) for shape in spec.shapes]} {[str(dtype) for dtype in spec.dtypes]} {order}"


def state_caches(caches: Mapping[str, torch.Tensor], kv_cache_config: Any) -> dict[int, list[torch.Tensor]]:
    """The states of each layer that has any, int8 [blocks, bytes], by group. LayoutError: they are not as vLLM
    says."""
    found: dict[int, list[torch.Tensor]] = {}
    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        spec = group.kv_cache_spec
        for name in group.layer_names if isinstance(spec, MambaSpec) else ():
            cache, expected = caches[name], (kv_cache_config.num_blocks, 1, 1, spec.state_content_size_bytes)
            if tuple(cache.shape) != expected or cache.element_size() != 1 or cache.stride(-1) != 1:
                raise LayoutError(
                    f"layer {name}: states of {cache.dtype} {tuple(cache.shape)}; expected {expected}"
                )
            found.setdefault(number, []).append(cache[:, 0, 0].view(torch.uint8))
    return found


class StateMover(Mover):
    """Copies states of some layers between their blocks and pages of the memory tier.

    `layers`: their states, uint8 [blocks, bytes]. `pages`: the tier's bytes, [pages, bytes of a page]. `size`:
    bytes of a page that are used. `places`: which of the pages that a state takes are this rank's (`rows[i]`: page
    * pages of a state + place). `start`: where the layers' bytes begin in the rank's share. `block_tokens`: tokens
    a block.
    """

    def __init__(
        self,
        layers: Sequence[torch.Tensor],
        pages: torch.Tensor,
        size: int,
        places: range,
        start: int,
        block_tokens: int,
        streams: Streams,
    ) -> None:
        self._states, self._pages, self._size, self._places = layers, pages, size, places
        self._start, self._block_tokens, self._streams = start, block_tokens, streams
        self._sizes, self._device = [each.shape[1] for each in layers], layers[0].device
        self.most_tokens = 1 << 62  # all pages of a state at once
        self.device_bytes = 0 if self._device.type == "cpu" else 2 * sum(self._sizes)

    def load(self, rows: torch.Tensor, slots: torch.Tensor, shifts: torch.Tensor | None = None) -> Ticket:
        if shifts is not None:
            raise FusionError("states cannot be fused: they depend on all tokens before; supported: exact reuse")
        return self._order(self._streams.load, self._fetch, rows, slots)

    def store(self, rows: torch.Tensor, slots: torch.Tensor) -> Ticket:
        return self._order(self._streams.store, self._send, rows, slots)

    def fence_stores(self) -> None:
        self._streams.compute.wait(self._streams.store.record())

    def ordered(self, kind: Kind) -> Ticket:
        return Ticket((self._streams.load if kind == "load" else self._streams.store).record())

    def close(self) -> None:
        for stream in (self._streams.load, self._streams.store):
            stream.synchronize()

    def _order(
        self, stream: Stream, copy: Callable[[list[int], int], None], rows: torch.Tensor, slots: torch.Tensor
    ) -> Ticket:
        """Copy after all forwards that were launched."""
        pages, block = self._find(rows, slots)
        stream.wait(self._streams.compute.record())
        start = stream.record()
        stream.submit(functools.partial(copy, pages, block))
        return Ticket(stream.record(), start)

    def _find(self, rows: torch.Tensor, slots: torch.Tensor) -> tuple[list[int], int]:
        """This rank's pages of a state, and the block. IndexError: they do not exist."""
        numbers: Indices = rows.numpy()
        pages = (numbers // len(numbers))[self._places.start : self._places.stop].tolist()
        (block,) = set((slots // self._block_tokens).tolist())
        if not (0 < block < len(self._states[0]) and all(0 <= page < len(self._pages) for page in pages)):
            raise IndexError(f"a state in block {block}, pages {pages}: there are no such")
        return pages, block

    def _pieces(self, pages: Sequence[int], flat: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The layers' bytes in the tier, and in `flat`, piece by piece."""
        found, end = [], self._start + len(flat)
        for place, page in enumerate(pages):
            first, last = max(self._start, place * self._size), min(end, (place + 1) * self._size)
            if first < last:
                there = self._pages[page, first - place * self._size : last - place * self._size]
                found.append((there, flat[first - self._start : last - self._start]))
        return found

    @torch.inference_mode()  # as vLLM's steps are, in which its caches may have been made
    def _fetch(self, pages: Sequence[int], block: int) -> None:
        flat = torch.empty(sum(self._sizes), dtype=torch.uint8, device=self._device)
        for there, here in self._pieces(pages, flat):
            here.copy_(there, non_blocking=True)
        for states, part in zip(self._states, torch.split(flat, self._sizes), strict=True):
            states[block].copy_(part)

    @torch.inference_mode()
    def _send(self, pages: Sequence[int], block: int) -> None:
        flat = torch.cat([states[block] for states in self._states])
        for there, here in self._pieces(pages, flat):
            there.copy_(here, non_blocking=True)
