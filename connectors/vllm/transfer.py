"""Copies between the engine's paged cache and the memory tier.

The tier is one array of pages `[pages, ranks, layers, kinds, page_tokens, heads / ranks, head_dim]` (kinds: K and
V), so that a tensor-parallel rank owns one unbroken stretch of every page. On the CPU, elements go straight from
one to the other. On an accelerator they pass through a staging buffer: whole pages by DMA, elements by indexing,
both on a stream beside the forwards. A load waits for the forwards that were launched before it, which may still
use its blocks, and no forward waits for a load: its request runs once the ticket is done. A store waits for the
forwards that were launched before it, which compute what it copies, and no forward waits for a store: its blocks
are kept until the ticket is done, or fenced.
"""

import functools
import itertools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ragkv.connectors.vllm.layers import LayerCache, Layers, widened
from ragkv.connectors.vllm.layout import Geometry
from ragkv.connectors.vllm.pinning import piece_pages
from ragkv.connectors.vllm.streams import Event, Packed, Streams, Ticket, compute_stream, make_streams
from ragkv.connectors.vllm.tiles import Scratch
from ragkv.errors import FusionError

Indices = npt.NDArray[np.int64]
# Rotates raw keys [layers, tokens, ...] of some layers; and what prepares that for int64 [tokens] shifts:
Rotate = Callable[[range, torch.Tensor], torch.Tensor]
PrepareRotation = Callable[[torch.Tensor], Rotate]
Kind = Literal["load", "store"]

LEAST_PAGES = 4  # of half the staging buffer: smaller copies do not run at the bus's speed
DIRECT_BYTES = 32 << 20  # that a copy within one device moves at once: what it needs beside them is as large


class PagePart(NamedTuple):
    """Where some layers' rows lie in a page: rows of a whole page and of a rank's share, and the first of theirs
    in a share."""

    page_rows: int
    rank_rows: int
    first_row: int


class Tier:
    """One rank's view of the memory tier, as rows of one token's elements in one layer, K or V."""

    def __init__(
        self,
        elements: torch.Tensor,
        geometry: Geometry,
        page_tokens: int,
        ranks: int,
        rank: int,
        part: PagePart | None = None,
    ) -> None:
        """`elements`: the whole segment, raw, one-dimensional, a whole number of pages. `part`: where in a page
        the layers' rows lie, if they are not all of it."""
        self.geometry, self.page_tokens = geometry, page_tokens
        self.page_rows = geometry.kinds * geometry.layers * page_tokens
        rows = elements.view(-1, geometry.heads * geometry.head_dim)
        self.rows = widened(rows)  # the wider the elements, the fewer there are to copy
        whole = PagePart(self.page_rows * ranks, self.page_rows, 0)
        self._part, self._whole = part or whole, part in (None, whole) and ranks == 1
        self._first = rank * self._part.rank_rows + self._part.first_row
        self.page_bytes = self._part.page_rows * geometry.heads * geometry.head_dim * geometry.itemsize
        self.tokens = len(rows) // self._part.page_rows * page_tokens  # that it has rows for

    def first_rows(self, rows: Indices) -> Indices:
        """Where the first layer's K of each row stands in `self.rows`."""
        pages, offsets = rows // self.page_tokens, rows % self.page_tokens
        return pages * self._part.page_rows + self._first + offsets

    def stretch(self, page: int, count: int = 1) -> torch.Tensor:
        """This rank's part of some consecutive pages, unbroken: [count * page_rows, heads * head_dim]."""
        first = page * self._part.page_rows + self._first
        return self.rows[first : first + count * self.page_rows]

    def stretches(self, pages: Indices) -> Iterator[tuple[int, int, int]]:
        """Ascending pages in unbroken stretches, each to be copied at once: (place among `pages`, page, count)."""
        edge = piece_pages(self.page_bytes) if self._whole else 1
        cuts = np.flatnonzero((np.diff(pages) != 1) | (pages[1:] % edge == 0)) + 1
        places = [0, *cuts.tolist(), len(pages)]
        for place, end in itertools.pairwise(places):
            if end > place:
                yield place, int(pages[place]), end - place


class Mover(ABC):
    """Copies between the engine's cache, whose layers are `layers`, and one `tier`.

    `most_tokens`: that one call should move; see `job_slices`. `device_bytes`: the accelerator's memory that it
    takes at most, beside caches and tier, and beside `fusion_worker.TURN_DEVICE_BYTES` where keys are rotated.
    """

    most_tokens: int
    device_bytes: int

    def __init__(
        self, caches: Sequence[LayerCache], tier: Tier, device: torch.device, prepare: PrepareRotation | None
    ) -> None:
        """`prepare`: what prepares the rotation of keys that move; None where there is none."""
        self.layers, self.tier, self._device, self._prepare = Layers(caches), tier, device, prepare
        self._scratch = Scratch() if device.type == "cpu" else None
        layers, kinds = tier.geometry.layers, tier.geometry.kinds
        steps = torch.arange(kinds * layers, dtype=torch.int64) * tier.page_tokens
        self._steps = steps.view(layers, kinds, 1).to(device)  # from a token's first row on

    @abstractmethod
    def load(self, rows: torch.Tensor, slots: torch.Tensor, shifts: torch.Tensor | None = None) -> Ticket:
        """Tier to cache. All int64 [tokens] on the CPU; keys are rotated by `shifts` positions. The rows' pages
        and the slots' blocks must be left alone until the ticket is done, and after an exception until
        `ordered("load")` is. IndexError: rows or slots that do not exist."""

    @abstractmethod
    def store(self, rows: torch.Tensor, slots: torch.Tensor) -> Ticket:
        """Cache to tier, as it is after all forwards that were launched. Of each page the rows are all that it
        holds: its other rows may be overwritten. The same must be left alone."""

    @abstractmethod
    def fence_stores(self) -> None:
        """Forwards from now on wait for the stores ordered so far: they may overwrite the stores' blocks."""

    @abstractmethod
    def ordered(self, kind: Kind) -> Ticket:
        """Done when all loads, or all stores, that were ordered so far are, those that raised half-way too."""

    @abstractmethod
    def close(self) -> None:
        """Wait for all copies. Nothing may be ordered any more. Safe to call twice."""

    def _check(self, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """Refuse addresses outside of tier or cache, which a device would not survive."""
        for name, given, most in (("rows", rows, self.tier.tokens), ("slots", slots, self.layers.slots)):
            if len(given) and not 0 <= int(given.min()) <= int(given.max()) < most:
                raise IndexError(f"{name} from {given.min()} to {given.max()}; there are {most}")

    def _rotate(self, shifts: torch.Tensor | None, part: slice | torch.Tensor) -> Rotate | None:
        """What rotates the keys of some tokens; None where they do not move."""
        if shifts is None:
            return None
        if self._prepare is None:
            raise FusionError("moved tokens, and no way to rotate their keys")
        return self._prepare(shifts[part])

    @torch.inference_mode()  # as vLLM's steps are, in which its caches may have been made
    def _scatter(self, source: torch.Tensor, packed: Packed, turn: Rotate | None) -> None:
        """Write all layers of some tokens from their first rows in `source` on to their slots."""
        first, slots = packed.on_device()
        geometry, found = self.tier.geometry, self.layers.find(slots)
        for layers in self.layers.groups:
            steps = self._steps[layers.start : layers.stop]
            raw = self._rows(source, (first + steps).flatten()).view(self.layers.raw)
            raw = raw.view(len(layers), geometry.kinds, -1, geometry.heads, geometry.head_dim)
            keys = raw[:, 0] if turn is None else turn(layers, raw[:, 0])
            self.layers.write(found, 0, keys, layers)
            for kind in range(1, geometry.kinds):
                self.layers.write(found, kind, raw[:, kind], layers)

    def _rows(self, source: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        """Some rows; until the next call."""
        if self._scratch is None:
            return source.index_select(0, which)
        rows = self._scratch.get("rows", (len(which), source.shape[1]), source.dtype)
        return torch.index_select(source, 0, which, out=rows)

    @torch.inference_mode()
    def _gather(self, target: torch.Tensor, packed: Packed) -> None:
        """Write all layers of some tokens from their slots to `target`, from their first rows on."""
        first, slots = packed.on_device()
        found = self.layers.find(slots)
        for layers, kind in itertools.product(self.layers.groups, range(self.tier.geometry.kinds)):
            raw = self.layers.read(found, kind, layers)
            places = (first + self._steps[layers.start : layers.stop, kind]).flatten()
            target.index_copy_(0, places, raw.flatten(2).flatten(0, 1).view(target.dtype))


class DirectMover(Mover):
    """Copies within one device, in the order of its compute stream: between CPU tensors, or to a pool in the
    accelerator's own memory. So a copy is over for whatever is launched after it, and its ticket is done."""

    def __init__(self, caches: Sequence[LayerCache], tier: Tier, prepare: PrepareRotation | None = None) -> None:
        super().__init__(caches, tier, tier.rows.device, prepare)
        self._stream = compute_stream(self._device)
        self._chunk = max(1, DIRECT_BYTES * len(self.layers.groups) // tier.geometry.token_bytes)
        self.most_tokens = sys.maxsize
        self.device_bytes = 0 if self._device.type == "cpu" else 2 * self._chunk * tier.geometry.token_bytes

    def load(self, rows: torch.Tensor, slots: torch.Tensor, shifts: torch.Tensor | None = None) -> Ticket:
        start = Event()
        for part, packed in self._parts(rows, slots):
            turn = self._rotate(shifts, part)
            self._stream.submit(functools.partial(self._scatter, self.tier.rows, packed, turn))
        return self._done(start)

    def store(self, rows: torch.Tensor, slots: torch.Tensor) -> Ticket:
        start = Event()
        for _, packed in self._parts(rows, slots):
            self._stream.submit(functools.partial(self._gather, self.tier.rows, packed))
        return self._done(start)

    def fence_stores(self) -> None:
        """The compute stream carries out stores itself."""

    def ordered(self, kind: Kind) -> Ticket:
        return Ticket(Event())

    def close(self) -> None:
        self._stream.synchronize()

    def _done(self, start: Event) -> Ticket:
        """Of a copy since `start`; how long an accelerator takes for it is not known."""
        return Ticket(Event(), start if self._device.type == "cpu" else None)

    def _parts(self, rows: torch.Tensor, slots: torch.Tensor) -> Iterator[tuple[slice, Packed]]:
        """What is moved at once, and its first rows and slots."""
        self._check(rows, slots)
        for start in range(0, len(rows), self._chunk):
            part = slice(start, start + self._chunk)
            first = self.tier.first_rows(rows[part].numpy())
            yield part, Packed([first, slots[part].numpy()], self._device)


@dataclass(frozen=True, slots=True)
class _Batch:
    """What half the staging buffer holds at once."""

    pages: Indices  # ascending
    part: torch.Tensor  # which tokens
    packed: Packed


class StagedMover(Mover):
    """Copies between an accelerator's cache and a pinned tier, on two streams beside the forwards, each with half
    the `staging` buffer [2, rows, elements]. What is ordered of one kind is carried out in that order, so a half
    needs no guard."""

    def __init__(
        self,
        caches: Sequence[LayerCache],
        tier: Tier,
        staging_bytes: int,
        device: torch.device,
        streams: Streams,
        prepare: PrepareRotation | None = None,
    ) -> None:
        super().__init__(caches, tier, device, prepare)
        self._streams, self._closed = streams, False
        page_bytes = tier.geometry.token_bytes * tier.page_tokens
        self._batch = max(1, staging_bytes // 2 // page_bytes)
        shape = (2, self._batch * tier.page_rows, tier.rows.shape[1])
        self.staging = torch.empty(shape, dtype=tier.rows.dtype, device=device)
        self.most_tokens = self._batch * tier.page_tokens
        half = self._batch * page_bytes  # elements on their way between staging and cache are there once more
        self.device_bytes = 2 * half + half + half // 2

    def load(self, rows: torch.Tensor, slots: torch.Tensor, shifts: torch.Tensor | None = None) -> Ticket:
        stream = self._streams.load
        batches = self._batches(rows, slots)
        stream.wait(self._streams.compute.record())  # forwards under way may still use these blocks
        start = stream.record()
        for batch in batches:
            turn = self._rotate(shifts, batch.part)
            stream.submit(functools.partial(self._fetch, batch))
            stream.submit(functools.partial(self._scatter, self.staging[0], batch.packed, turn))
        return Ticket(stream.record(), start, batches)

    def store(self, rows: torch.Tensor, slots: torch.Tensor) -> Ticket:
        stream = self._streams.store
        batches = self._batches(rows, slots)
        stream.wait(self._streams.compute.record())  # forwards under way compute what is to be stored
        start = stream.record()
        for batch in batches:
            stream.submit(functools.partial(self._gather, self.staging[1], batch.packed))
            stream.submit(functools.partial(self._send, batch))
        return Ticket(stream.record(), start, batches)

    def fence_stores(self) -> None:
        self._streams.compute.wait(self._streams.store.record())

    def ordered(self, kind: Kind) -> Ticket:
        return Ticket((self._streams.load if kind == "load" else self._streams.store).record())

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            for stream in (self._streams.load, self._streams.store, self._streams.compute):
                stream.synchronize()

    def _batches(self, rows: torch.Tensor, slots: torch.Tensor) -> list[_Batch]:
        """As many as it takes; one, where the call is one of `job_slices` whose pages are full."""
        self._check(rows, slots)
        tier, made, where = self.tier, [], rows.numpy()
        pages, places = np.unique(where // tier.page_tokens, return_inverse=True)
        for start in range(0, len(pages), self._batch):
            part = np.flatnonzero((places >= start) & (places < start + self._batch))
            first = (places[part] - start) * tier.page_rows + where[part] % tier.page_tokens
            packed = Packed([first, slots.numpy()[part]], self._device)
            made.append(_Batch(pages[start : start + self._batch], torch.from_numpy(part), packed))
        return made

    def _fetch(self, batch: _Batch) -> None:
        for place, page, count in self.tier.stretches(batch.pages):
            self._part(0, place, count).copy_(self.tier.stretch(page, count), non_blocking=True)

    def _send(self, batch: _Batch) -> None:
        for place, page, count in self.tier.stretches(batch.pages):
            self.tier.stretch(page, count).copy_(self._part(1, place, count), non_blocking=True)

    def _part(self, half: int, place: int, count: int) -> torch.Tensor:
        """Some pages of half the staging buffer."""
        rows = self.tier.page_rows
        return self.staging[half, place * rows : (place + count) * rows]


def make_mover(
    caches: Sequence[LayerCache],
    tier: Tier,
    staging_bytes: int,
    device: torch.device,
    prepare: PrepareRotation | None,
) -> Mover:
    """The mover for the device that the cache lives on."""
    if device.type == "cpu":
        return DirectMover(caches, tier, prepare)
    least = 2 * LEAST_PAGES * tier.geometry.token_bytes * tier.page_tokens
    return StagedMover(caches, tier, max(staging_bytes, least), device, make_streams(device), prepare)


def job_slices(rows: Indices, page_tokens: int, most: int) -> list[slice]:
    """Consecutive slices of at most `most` tokens, cut only where the page changes; together they are all of
    `rows`. A page with more tokens than that is one slice."""
    edges = [0, *(np.flatnonzero(np.diff(rows // page_tokens)) + 1).tolist(), len(rows)]
    found, start = [], 0
    for end, after in zip(edges[1:], [*edges[2:], None], strict=True):
        if end > start and (after is None or after - start > most):
            found.append(slice(start, end))
            start = end
    return found
