"""Copies between the engine's paged cache and the memory tier.

The tier is one array of pages `[pages, ranks, layers, 2, page_tokens, heads / ranks, head_dim]`, so that a
tensor-parallel rank owns one unbroken stretch of every page. On the CPU, elements go straight from one to the
other. On an accelerator they pass through a staging buffer: whole pages by DMA on a side stream, elements by
indexing on the compute stream, which orders them against the forward without waiting for anything.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch

from ragkv.connectors.vllm.layout import RAW, Geometry, LayerCache, Views, widened
from ragkv.errors import FusionError

Turn = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]  # layer, raw keys, shifts: the keys, rotated


class Ticket(Protocol):
    """Says when a copy has ended; torch's CUDA events do."""

    def query(self) -> bool:
        """True once the copy has ended."""

    def seconds(self) -> float | None:
        """How long it took, once it has ended; None: nobody knows."""


class Done:
    """The ticket of a copy that has ended already."""

    def __init__(self, seconds: float | None = None) -> None:
        self._seconds = seconds

    def query(self) -> bool:
        """Always true."""
        return True

    def seconds(self) -> float | None:
        """What it was made with."""
        return self._seconds


class Tier:
    """One rank's view of the memory tier, as rows of one token's elements in one layer, K or V."""

    def __init__(
        self, elements: torch.Tensor, geometry: Geometry, page_tokens: int, ranks: int, rank: int
    ) -> None:
        """`elements`: the whole segment, raw, one-dimensional, a whole number of pages."""
        self.geometry, self.page_tokens = geometry, page_tokens
        self.page_rows = 2 * geometry.layers * page_tokens
        self._ranks, self._rank = ranks, rank
        rows = elements.view(-1, geometry.heads * geometry.head_dim)
        self.rows = widened(rows)  # the wider the elements, the fewer there are to copy

    def first_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Where the first layer's K of each row stands in `self.rows`."""
        pages, offsets = rows // self.page_tokens, rows % self.page_tokens
        return (pages * self._ranks + self._rank) * self.page_rows + offsets

    def page(self, page: int) -> torch.Tensor:
        """This rank's stretch of a page, [page_rows, heads * head_dim]."""
        first = (page * self._ranks + self._rank) * self.page_rows
        return self.rows[first : first + self.page_rows]


class DirectMover:
    """Copies within one device, in the order of its stream: between CPU tensors, or to a pool in the accelerator's
    own memory."""

    def __init__(self, caches: Sequence[LayerCache], tier: Tier) -> None:
        self._caches, self._tier, self._device = caches, tier, tier.rows.device
        self.turn: Turn | None = None
        self.most_tokens = 1 << 40

    def load(self, rows: torch.Tensor, slots: torch.Tensor, shifts: torch.Tensor | None = None) -> Ticket:
        """Tier to cache. `rows` and `slots`: int64 [tokens] on the CPU; `shifts` likewise: keys are rotated by so
        many positions."""
        first, slots = self._tier.first_rows(rows).to(self._device), slots.to(self._device)
        began = time.perf_counter()
        scatter(self._caches, self._tier, self._tier.rows, first, slots, _turning(self.turn, shifts))
        return Done(time.perf_counter() - began)

    def store(self, rows: torch.Tensor, slots: torch.Tensor) -> Ticket:
        """Cache to tier."""
        first, slots = self._tier.first_rows(rows).to(self._device), slots.to(self._device)
        began = time.perf_counter()
        gather(self._caches, self._tier, self._tier.rows, first, slots)
        return Done(time.perf_counter() - began)

    def fence_stores(self) -> None:
        """Nothing runs late."""

    def ordered(self, kind: str) -> Ticket:
        """Nothing runs late."""
        return Done()

    def close(self) -> None:
        """Nothing runs late."""


class StagedMover:
    """Copies between an accelerator's cache and a pinned tier, in batches that fit half the staging buffer.

    A load is ordered before whatever the compute stream does next, a store after what it did before; neither
    blocks the host. The device may be the CPU (for tests): then streams and events do nothing.
    """

    def __init__(self, caches: Sequence[LayerCache], tier: Tier, staging_bytes: int, device: torch.device) -> None:
        self._caches, self._tier, self._device = caches, tier, device
        self._cuda = device.type == "cuda"
        page_bytes = tier.geometry.token_bytes * tier.page_tokens
        self._batch = max(1, staging_bytes // 2 // page_bytes)
        shape = (2, self._batch * tier.page_rows, tier.rows.shape[1])
        self._staging = torch.empty(shape, dtype=tier.rows.dtype, device=device)
        self._side: Any = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]
        self._free: list[Any] = [None, None]  # when each half of the buffer may be written again
        self._half = 0
        self.turn: Turn | None = None

    def load(self, rows: torch.Tensor, slots: torch.Tensor, shifts: torch.Tensor | None = None) -> Ticket:
        """Tier to cache. `rows` and `slots`: int64 [tokens] on the CPU; `shifts` likewise: keys are rotated by so
        many positions."""
        last: Ticket = Done()
        for pages, first, part in self._batches(rows):
            half, buffer = self._next_half()
            with self._on_side():
                self._wait(self._side, self._free[half])
                for number, page in enumerate(pages):
                    self._half_page(buffer, number).copy_(self._tier.page(page), non_blocking=True)
                copied = self._event(self._side)
            self._wait(None, copied)
            turn = _turning(self.turn, None if shifts is None else shifts[part])
            scatter(self._caches, self._tier, buffer, self._to_device(first), self._to_device(slots[part]), turn)
            self._free[half] = last = self._event(None)
        return last

    def store(self, rows: torch.Tensor, slots: torch.Tensor) -> Ticket:
        """Cache to tier."""
        last: Ticket = Done()
        for pages, first, part in self._batches(rows):
            half, buffer = self._next_half()
            self._wait(None, self._free[half])
            gather(self._caches, self._tier, buffer, self._to_device(first), self._to_device(slots[part]))
            filled = self._event(None)
            with self._on_side():
                self._wait(self._side, filled)
                for number, page in enumerate(pages):
                    self._tier.page(page).copy_(self._half_page(buffer, number), non_blocking=True)
                self._free[half] = last = self._event(self._side)
        return last

    def _batches(self, rows: torch.Tensor) -> Any:
        """For each batch: its pages, where each token's first row stands in the buffer, which tokens."""
        pages, places = torch.unique(rows // self._tier.page_tokens, return_inverse=True)
        for start in range(0, len(pages), self._batch):
            part = ((places >= start) & (places < start + self._batch)).nonzero().flatten()
            first = (places[part] - start) * self._tier.page_rows + rows[part] % self._tier.page_tokens
            yield pages[start : start + self._batch].tolist(), first, part

    def _next_half(self) -> tuple[int, torch.Tensor]:
        self._half ^= 1
        return self._half, self._staging[self._half]

    def _half_page(self, buffer: torch.Tensor, number: int) -> torch.Tensor:
        return buffer[number * self._tier.page_rows : (number + 1) * self._tier.page_rows]

    def _to_device(self, index: torch.Tensor) -> torch.Tensor:
        return index.to(self._device, non_blocking=True)

    def _on_side(self) -> Any:
        return torch.cuda.stream(self._side) if self._side is not None else contextlib.nullcontext()

    def _event(self, stream: Any) -> Ticket:
        if not self._cuda:
            return Done()
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream if stream is not None else torch.cuda.current_stream(self._device))
        return cast(Ticket, event)

    def _wait(self, stream: Any, event: Any) -> None:
        """Let `stream` (None: the compute stream) wait for an event."""
        if self._cuda and event is not None:
            (stream if stream is not None else torch.cuda.current_stream(self._device)).wait_event(event)


Mover = DirectMover | StagedMover


def make_mover(caches: Sequence[LayerCache], tier: Tier, staging_bytes: int, device: torch.device) -> Mover:
    """The mover for the device that the cache lives on."""
    if device.type == "cpu":
        return DirectMover(caches, tier)
    return StagedMover(caches, tier, staging_bytes, device)


def pin_memory(elements: torch.Tensor) -> bool:
    """Register the segment's memory for DMA; False where CUDA declines (copies are slower, not wrong)."""
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    size = elements.numel() * elements.element_size()
    return int(cudart.cudaHostRegister(elements.data_ptr(), size, 0)) == 0


def scatter(
    caches: Sequence[LayerCache],
    tier: Tier,
    source: torch.Tensor,
    first: torch.Tensor,
    slots: torch.Tensor,
    turn: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Write all layers of the tokens at `first` in `source` [rows, elements] to `slots`; `turn(layer, keys)`: what
    to do with raw keys [tokens, heads, head_dim] on the way."""
    for number, found, kind, index in _steps(caches, tier, first, slots):
        raw = source.index_select(0, index).view(RAW[tier.geometry.itemsize])
        raw = raw.view(-1, tier.geometry.heads, tier.geometry.head_dim)
        caches[number].write(found, kind, raw if kind or turn is None else turn(number, raw))


def gather(
    caches: Sequence[LayerCache], tier: Tier, target: torch.Tensor, first: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write all layers of the tokens in `slots` to `target` [rows, elements], from `first` on."""
    for number, found, kind, index in _steps(caches, tier, first, slots):
        target.index_copy_(0, index, caches[number].read(found, kind).flatten(1).view(target.dtype))


def _turning(turn: Turn | None, shifts: torch.Tensor | None) -> Any:
    """`turn` of the tokens with these shifts; None for tokens that stay where they were."""
    if shifts is None:
        return None
    if turn is None:
        raise FusionError("moved tokens, and no way to rotate their keys")
    return lambda number, raw: turn(number, raw, shifts)


def _steps(caches: Sequence[LayerCache], tier: Tier, first: torch.Tensor, slots: torch.Tensor) -> Any:
    """For every layer, K and V: (layer, found slots, kind, rows), in the order of a page; nothing for no slots."""
    if not len(slots):
        return
    found: Views = caches[0].find(slots)
    for number in range(len(caches)):
        for kind in (0, 1):
            yield number, found, kind, first + (2 * number + kind) * tier.page_tokens


def pieces(rows: Any, page_tokens: int, most: int) -> list[slice]:
    """Consecutive parts of `rows`, of at most `most` tokens, cut where the page changes; a larger page is one."""
    cuts = [0, *(np.flatnonzero(np.diff(rows // page_tokens)) + 1).tolist(), len(rows)]
    parts, start = [], 0
    for before, end in itertools.pairwise(cuts):
        if end - start > most and before > start:
            parts.append(slice(start, before))
            start = before
    return [*parts, slice(start, len(rows))]
