"""Copies between the engine's paged cache and the memory tier.

The tier is one array of pages `[pages, ranks, layers, 2, page_tokens, heads / ranks, head_dim]`, so that a
tensor-parallel rank owns one unbroken stretch of every page. On the CPU, elements go straight from one to the
other. On an accelerator they pass through a staging buffer: whole pages by DMA, elements by indexing, both on a
stream beside the forwards. A load waits for the forwards that were launched before it, which may still use its
blocks, and no forward waits for a load: its request runs once the ticket is done. A store waits for the forwards
that were launched before it, which compute what it copies, and no forward waits for a store: its blocks are kept
until the ticket is done, or fenced.
"""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ragkv.connectors.vllm.layers import Layers
from ragkv.connectors.vllm.layout import RAW, Geometry, LayerCache, widened
from ragkv.connectors.vllm.pinning import piece_pages
from ragkv.connectors.vllm.streams import (
    CudaStream,
    DirectEvent,
    DirectStream,
    Event,
    Packed,
    Stream,
    Streams,
    make_streams,
)
from ragkv.connectors.vllm.tiles import Scratch
from ragkv.errors import FusionError

Indices = npt.NDArray[np.int64]
Turn = Callable[[range, torch.Tensor], torch.Tensor]  # layers, their raw keys [layers, tokens, ...]: rotated
Prepare = Callable[[torch.Tensor], Turn]  # int64 [tokens] on the CPU, how far each moves: what turns their keys
Kind = Literal["load", "store"]

LEAST_PAGES = 4  # of half the staging buffer: smaller copies do not run at the bus's speed
DIRECT_BYTES = 32 << 20  # that a copy within one device moves at once: what it needs beside them is as large


class Ticket(Protocol):
    """Says when a copy has ended."""

    def query(self) -> bool:
        """True once the copy has ended. Never waits; raises what the device has to report."""

    def seconds(self) -> float | None:
        """How long the device was at it; None: it has not ended, or that is not known."""


class Done:
    """The ticket of a copy that has ended already, after so many seconds."""

    def __init__(self, seconds: float | None = None) -> None:
        self._seconds = seconds

    def query(self) -> bool:
        """Always true."""
        return True

    def seconds(self) -> float | None:
        """As it was told."""
        return self._seconds


class Ordered:
    """The ticket of what was ordered up to an event, from `start` on (an event of the same stream); keeps what the
    copies read until they are over."""

    def __init__(self, event: Event, kept: Sequence[object] = (), start: Event | None = None) -> None:
        self._event, self._kept, self._start = event, kept, start

    def query(self) -> bool:
        """Whether the event is over."""
        if not self._event.query():
            return False
        self._kept = ()
        return True

    def seconds(self) -> float | None:
        """By the device's clock; what came before it in its stream does not count."""
        return self._event.since(self._start) if self._start is not None and self.query() else None


class Mover(Protocol):
    """Copies between the engine's cache and one tier.

    `most_tokens`: that one call should move; see `pieces`. `device_bytes`: the accelerator's memory that it takes
    at most, beside caches and tier, and beside `mending.TURN_DEVICE_BYTES` where moved keys are rotated. `turn`:
    what prepares their rotation; None where there is none.
    """

    most_tokens: int
    device_bytes: int
    turn: Prepare | None

    def load(self, rows: torch.Tensor, slots: torch.Tensor, shifts: torch.Tensor | None = None) -> Ticket:
        """Tier to cache. All int64 [tokens] on the CPU; keys are rotated by `shifts` positions. The rows' pages
        and the slots' blocks must be left alone until the ticket is done, and after an exception until
        `ordered("load")` is."""

    def store(self, rows: torch.Tensor, slots: torch.Tensor) -> Ticket:
        """Cache to tier, as it is after all forwards that were launched. Of each page the rows are all that it
        holds: its other rows may be overwritten. The same must be left alone."""

    def fence_stores(self) -> None:
        """Forwards from now on wait for the stores ordered so far: they may overwrite the stores' blocks."""

    def ordered(self, kind: Kind) -> Ticket:
        """Done when all loads, or all stores, that were ordered so far are, those that raised half-way too."""

    def close(self) -> None:
        """Wait for all copies. Nothing may be ordered any more. Safe to call twice."""


class Tier:
    """One rank's view of the memory tier, as rows of one token's elements in one layer, K or V."""

    def __init__(
        self, elements: torch.Tensor, geometry: Geometry, page_tokens: int, ranks: int, rank: int
    ) -> None:
        """`elements`: the whole segment, raw, one-dimensional, a whole number of pages."""
        self.geometry, self.page_tokens = geometry, page_tokens
        self.page_rows = 2 * geometry.layers * page_tokens
        self.page_bytes = geometry.token_bytes * page_tokens * ranks
        self._ranks, self._rank = ranks, rank
        rows = elements.view(-1, geometry.heads * geometry.head_dim)
        self.rows = widened(rows)  # the wider the elements, the fewer there are to copy
        self.tokens = len(rows) // (self.page_rows * ranks) * page_tokens  # that it has rows for

    def first_rows(self, rows: Indices) -> Indices:
        """Where the first layer's K of each row stands in `self.rows`."""
        pages, offsets = rows // self.page_tokens, rows % self.page_tokens
        return (pages * self._ranks + self._rank) * self.page_rows + offsets

    def stretch(self, page: int, count: int = 1) -> torch.Tensor:
        """This rank's part of some consecutive pages, unbroken: [count * page_rows, heads * head_dim]."""
        first = (page * self._ranks + self._rank) * self.page_rows
        return self.rows[first : first + count * self.page_rows]

    def stretches(self, pages: Indices) -> Iterator[tuple[int, int, int]]:
        """Ascending pages in unbroken stretches, each to be copied at once: (place among `pages`, page, count)."""
        edge = piece_pages(self.page_bytes) if self._ranks == 1 else 1
        cuts = np.flatnonzero((np.diff(pages) != 1) | (pages[1:] % edge == 0)) + 1
        places = [0, *cuts.tolist(), len(pages)]
        for place, end in itertools.pairwise(places):
            if end > place:
                yield place, int(pages[place]), end - place


class _Copier:
    """What both movers share: gather and scatter between caches and rows, for all layers at once."""

    def __init__(self, caches: Sequence[LayerCache], tier: Tier, device: torch.device) -> None:
        self.layers, self.tier, self.device = Layers(caches), tier, device
        geometry = tier.geometry
        self._raw = RAW[geometry.itemsize]
        self._scratch = Scratch() if device.type == "cpu" else None
        steps = torch.arange(2 * geometry.layers, dtype=torch.int64) * tier.page_tokens
        self._steps = steps.view(geometry.layers, 2, 1).to(device)  # from a token's first row on

    def check(self, rows: Indices, slots: Indices) -> None:
        """IndexError: addresses outside of tier or cache, which a device would not survive."""
        for name, given, most in (("rows", rows, self.tier.tokens), ("slots", slots, self.layers.slots)):
            if len(given) and not 0 <= int(given.min()) <= int(given.max()) < most:
                raise IndexError(f"{name} from {given.min()} to {given.max()}; there are {most}")

    def pack(self, first: Indices, slots: Indices) -> Packed:
        """What `scatter` and `gather` take."""
        tokens = self.layers.kernel_tokens
        return Packed([first, slots // tokens, slots % tokens], self.device)

    @torch.inference_mode()  # as vLLM's steps are, in which its caches may have been made
    def scatter(self, source: torch.Tensor, packed: Packed, turn: Turn | None) -> None:
        """Write all layers of some tokens from their first rows in `source` on to their slots."""
        first, blocks, offsets = packed.on_device()
        geometry, found = self.tier.geometry, self.layers.find(blocks, offsets)
        for layers in self.layers.groups:
            steps = self._steps[layers.start : layers.stop]
            raw = self._rows(source, (first + steps).flatten()).view(self._raw)
            raw = raw.view(len(layers), 2, -1, geometry.heads, geometry.head_dim)
            keys = raw[:, 0] if turn is None else turn(layers, raw[:, 0])
            self.layers.write(found, 0, keys, layers)
            self.layers.write(found, 1, raw[:, 1], layers)

    def _rows(self, source: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        """Some rows; until the next call."""
        if self._scratch is None:
            return source.index_select(0, which)
        rows = self._scratch.get("rows", (len(which), source.shape[1]), source.dtype)
        return torch.index_select(source, 0, which, out=rows)

    @torch.inference_mode()
    def gather(self, target: torch.Tensor, packed: Packed) -> None:
        """Write all layers of some tokens from their slots to `target`, from their first rows on."""
        first, blocks, offsets = packed.on_device()
        found = self.layers.find(blocks, offsets)
        for layers, kind in itertools.product(self.layers.groups, (0, 1)):
            raw = self.layers.read(found, kind, self._raw, layers)
            places = (first + self._steps[layers.start : layers.stop, kind]).flatten()
            target.index_copy_(0, places, raw.flatten(2).flatten(0, 1).view(target.dtype))


class DirectMover:
    """Copies within one device, in the order of its compute stream: between CPU tensors, or to a pool in the
    accelerator's own memory. So a copy is over for whatever is launched after it, and its ticket is done."""

    def __init__(self, caches: Sequence[LayerCache], tier: Tier) -> None:
        device = tier.rows.device
        self._copier, self._tier = _Copier(caches, tier, device), tier
        self._stream: Stream = CudaStream(device) if device.type == "cuda" else DirectStream()
        self._chunk = max(1, DIRECT_BYTES * len(self._copier.layers.groups) // tier.geometry.token_bytes)
        self.most_tokens, self.turn = sys.maxsize, None
        self.device_bytes = 0 if device.type == "cpu" else 2 * self._chunk * tier.geometry.token_bytes

    most_tokens: int
    device_bytes: int
    turn: Prepare | None

    def load(self, rows: torch.Tensor, slots: torch.Tensor, shifts: torch.Tensor | None = None) -> Ticket:
        """Tier to cache."""
        turns, start = _prepare(self.turn, shifts), self._stream.record()
        for part in self._parts(rows, slots):
            packed = self._pack(rows, slots, part)
            turn = None if turns is None or shifts is None else turns(shifts[part])
            self._stream.submit(functools.partial(self._copier.scatter, self._tier.rows, packed, turn))
        return self._done(start)

    def store(self, rows: torch.Tensor, slots: torch.Tensor) -> Ticket:
        """Cache to tier."""
        start = self._stream.record()
        for part in self._parts(rows, slots):
            packed = self._pack(rows, slots, part)
            self._stream.submit(functools.partial(self._copier.gather, self._tier.rows, packed))
        return self._done(start)

    def fence_stores(self) -> None:
        """The compute stream carries out stores itself."""

    def ordered(self, kind: Kind) -> Ticket:
        """All of it is done for whatever is launched from now on."""
        return Done()

    def close(self) -> None:
        """Wait for the compute stream."""
        self._stream.synchronize()

    def _done(self, start: Event) -> Ticket:
        end = self._stream.record()
        return Done(end.since(start) if isinstance(end, DirectEvent) else None)

    def _parts(self, rows: torch.Tensor, slots: torch.Tensor) -> Iterator[slice]:
        self._copier.check(rows.numpy(), slots.numpy())
        return (slice(start, start + self._chunk) for start in range(0, len(rows), self._chunk))

    def _pack(self, rows: torch.Tensor, slots: torch.Tensor, part: slice) -> Packed:
        return self._copier.pack(self._tier.first_rows(rows[part].numpy()), slots[part].numpy())


@dataclass(frozen=True, slots=True)
class _Batch:
    """What half the staging buffer holds at once."""

    pages: Indices  # ascending
    part: Indices  # which tokens
    packed: Packed


class StagedMover:
    """Copies between an accelerator's cache and a pinned tier, on two streams beside the forwards, each with half
    the staging buffer. What is ordered of one kind is carried out in that order, so a half needs no guard."""

    def __init__(
        self, caches: Sequence[LayerCache], tier: Tier, staging_bytes: int, device: torch.device, streams: Streams
    ) -> None:
        self._copier, self._tier, self._streams = _Copier(caches, tier, device), tier, streams
        page_bytes = tier.geometry.token_bytes * tier.page_tokens
        self._batch = max(1, staging_bytes // 2 // page_bytes)
        shape = (2, self._batch * tier.page_rows, tier.rows.shape[1])
        self._staging = torch.empty(shape, dtype=tier.rows.dtype, device=device)
        self._closed = False
        self.most_tokens = self._batch * tier.page_tokens
        half = self._batch * page_bytes  # elements on their way between staging and cache are there once more
        self.device_bytes = 2 * half + half + half // 2
        self.turn = None

    most_tokens: int
    device_bytes: int
    turn: Prepare | None

    def load(self, rows: torch.Tensor, slots: torch.Tensor, shifts: torch.Tensor | None = None) -> Ticket:
        """Tier to cache, on the load stream."""
        turns, stream = _prepare(self.turn, shifts), self._streams.load
        batches = self._batches(rows.numpy(), slots.numpy())
        stream.wait(self._streams.compute.record())  # forwards under way may still use these blocks
        start = stream.record()
        for batch in batches:
            turn = None if turns is None or shifts is None else turns(shifts[torch.from_numpy(batch.part)])
            stream.submit(functools.partial(self._fetch, batch))
            stream.submit(functools.partial(self._copier.scatter, self._staging[0], batch.packed, turn))
        return Ordered(stream.record(), batches, start)

    def store(self, rows: torch.Tensor, slots: torch.Tensor) -> Ticket:
        """Cache to tier, on the store stream."""
        stream = self._streams.store
        batches = self._batches(rows.numpy(), slots.numpy())
        stream.wait(self._streams.compute.record())  # forwards under way compute what is to be stored
        start = stream.record()
        for batch in batches:
            stream.submit(functools.partial(self._copier.gather, self._staging[1], batch.packed))
            stream.submit(functools.partial(self._send, batch))
        return Ordered(stream.record(), batches, start)

    def fence_stores(self) -> None:
        """Let the compute stream wait for the store stream."""
        self._streams.compute.wait(self._streams.store.record())

    def ordered(self, kind: Kind) -> Ticket:
        """All that its stream was given."""
        return Ordered((self._streams.load if kind == "load" else self._streams.store).record())

    def close(self) -> None:
        """Wait for all streams: what they still read and write is about to go."""
        if not self._closed:
            self._closed = True
            for stream in (self._streams.load, self._streams.store, self._streams.compute):
                stream.synchronize()

    def _batches(self, rows: Indices, slots: Indices) -> list[_Batch]:
        """As many as it takes; one, where the call is one of `pieces` whose pages are full."""
        self._copier.check(rows, slots)
        tier, made = self._tier, []
        pages, places = np.unique(rows // tier.page_tokens, return_inverse=True)
        for start in range(0, len(pages), self._batch):
            part = np.flatnonzero((places >= start) & (places < start + self._batch))
            first = (places[part] - start) * tier.page_rows + rows[part] % tier.page_tokens
            packed = self._copier.pack(first, slots[part])
            made.append(_Batch(pages[start : start + self._batch], part, packed))
        return made

    def _fetch(self, batch: _Batch) -> None:
        for place, page, count in self._tier.stretches(batch.pages):
            self._part(0, place, count).copy_(self._tier.stretch(page, count), non_blocking=True)

    def _send(self, batch: _Batch) -> None:
        for place, page, count in self._tier.stretches(batch.pages):
            self._tier.stretch(page, count).copy_(self._part(1, place, count), non_blocking=True)

    def _part(self, half: int, place: int, count: int) -> torch.Tensor:
        """Some pages of half the staging buffer."""
        rows = self._tier.page_rows
        return self._staging[half, place * rows : (place + count) * rows]


def make_mover(caches: Sequence[LayerCache], tier: Tier, staging_bytes: int, device: torch.device) -> Mover:
    """The mover for the device that the cache lives on."""
    if device.type == "cpu":
        return DirectMover(caches, tier)
    least = 2 * LEAST_PAGES * tier.geometry.token_bytes * tier.page_tokens
    return StagedMover(caches, tier, max(staging_bytes, least), device, make_streams(device))


def pieces(rows: Indices, page_tokens: int, most: int) -> list[slice]:
    """Consecutive slices of at most `most` tokens, cut only where the page changes; together they are all of
    `rows`. A page with more tokens than that is one slice."""
    edges = [0, *(np.flatnonzero(np.diff(rows // page_tokens)) + 1).tolist(), len(rows)]
    found, start = [], 0
    for end, after in zip(edges[1:], [*edges[2:], None], strict=True):
        if end > start and (after is None or after - start > most):
            found.append(slice(start, end))
            start = end
    return found


def _prepare(turn: Prepare | None, shifts: torch.Tensor | None) -> Any:
    """What prepares the rotation of tokens that moved; None where none did."""
    if shifts is not None and turn is None:
        raise FusionError("moved tokens, and no way to rotate their keys")
    return None if shifts is None else turn
