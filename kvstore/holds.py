"""Pins, each with an owner and an expiry; and chunks that must not be kept beyond a time."""

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ragkv.kvstore.catalogue import Chunk

SHARE = 0.5  # of the budget, at most, may be pinned by owners: the rest stays for everyone


@dataclass(order=True, slots=True)
class _Pin:
    until: float
    chunk: Chunk = field(compare=False)
    owner: str = field(compare=False)


class Holds:
    """`pin` and `unpin` are the memory tier's. A chunk that several owners pin counts once in the budget of
    `pages` pages. Times are seconds of one clock, which the caller reads."""

    def __init__(
        self, pages: int, pin: Callable[[list[Chunk]], None], unpin: Callable[[list[Chunk]], None]
    ) -> None:
        self._budget = int(SHARE * pages)
        self._pin, self._unpin = pin, unpin
        self._pins: dict[tuple[str, Chunk], _Pin] = {}
        self._owners: dict[Chunk, int] = {}
        self._queue: list[_Pin] = []
        self._expiries: dict[Chunk, float] = {}
        self._expiring: list[tuple[float, int, Chunk]] = []
        self._count = 0
        self.pages = 0

    def hold(self, owner: str, chunk: Chunk, until: float) -> bool:
        """Pin a chunk of memory for an owner until then; a second call renews. False: the share is used up."""
        known = self._pins.get((owner, chunk))
        if known is None:
            size = chunk.page_count
            if chunk not in self._owners:
                if self.pages + size > self._budget:
                    return False
                self.pages += size
                self._pin([chunk])
            self._owners[chunk] = self._owners.get(chunk, 0) + 1
        pin = self._pins[owner, chunk] = _Pin(until, chunk, owner)
        heapq.heappush(self._queue, pin)
        if len(self._queue) > 2 * len(self._pins) + 16:  # renewals leave their old entries behind
            self._queue = sorted(self._pins.values())
        return True

    def release(self, owner: str, chunks: Iterable[Chunk] | None = None) -> int:
        """Take back an owner's pins, of some chunks or all; how many there were."""
        wanted = None if chunks is None else set(chunks)
        found = [key for key in self._pins if key[0] == owner and (wanted is None or key[1] in wanted)]
        for key in found:
            self._end(key)
        return len(found)

    def expire(self, chunk: Chunk, at: float) -> None:
        """Let a chunk be kept no longer than until then; of several times the latest counts."""
        if at > self._expiries.get(chunk, 0.0):
            self._expiries[chunk] = at
            self._count += 1
            heapq.heappush(self._expiring, (at, self._count, chunk))
            if len(self._expiring) > 2 * len(self._expiries) + 16:  # so do chunks that left
                self._expiring = [each for each in self._expiring if self._expiries.get(each[2]) == each[0]]
                heapq.heapify(self._expiring)

    def expiry(self, chunk: Chunk) -> float:
        """When a chunk must go; 0.0: never."""
        return self._expiries.get(chunk, 0.0)

    def left(self, chunk: Chunk) -> None:
        """A chunk left memory."""
        self._expiries.pop(chunk, None)

    def forget(self) -> None:
        """Let go of everything."""
        for key in list(self._pins):
            self._end(key)
        self._queue.clear()
        self._expiring.clear()
        self._expiries.clear()

    def due(self, now: float) -> list[Chunk]:
        """Let go of pins whose time is over; the chunks that must be kept no longer."""
        while self._queue and self._queue[0].until <= now:
            pin = heapq.heappop(self._queue)
            if self._pins.get((pin.owner, pin.chunk)) is pin:
                self._end((pin.owner, pin.chunk))
        over = []
        while self._expiring and self._expiring[0][0] <= now:
            at, _, chunk = heapq.heappop(self._expiring)
            if self._expiries.get(chunk) == at:
                del self._expiries[chunk]
                over.append(chunk)
        return over

    def check_integrity(self) -> None:
        """Raise AssertionError where the books contradict each other."""
        owners: dict[Chunk, int] = {}
        for _, chunk in self._pins:
            owners[chunk] = owners.get(chunk, 0) + 1
        assert owners == self._owners
        assert self.pages == sum(chunk.page_count for chunk in owners) <= self._budget
        assert len(self._queue) >= len(self._pins)

    def _end(self, key: tuple[str, Chunk]) -> None:
        chunk = key[1]
        del self._pins[key]
        self._owners[chunk] -= 1
        if not self._owners[chunk]:
            del self._owners[chunk]
            self.pages -= chunk.page_count
            self._unpin([chunk])
