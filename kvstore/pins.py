"""Pins, each with an owner and an expiry; and chunks that must not be kept beyond a time.

Owners belong to a tenant: another tenant's owner of the same name is another. How much a tenant and all of them
may pin is bounded in pages, and in entries (an owner with a chunk), since several owners may pin the same chunk.
However many pins or chunks are due at the same time, no call lets go of more than `AT_ONCE`; the next one goes on.
"""

import heapq
import math
from collections import Counter, deque
from collections.abc import Callable, Set
from dataclasses import dataclass

from ragkv.kvstore.prefix_tree import Chunk

SHARE = 0.5  # of the budget, at most, may be pinned by owners: the rest stays for everyone
TENANT_SHARE = 0.25  # of the budget, at most, by one tenant's
ENTRIES = 4  # for each page that may be pinned: so many owners may share it
LEAST_ENTRIES, MOST_ENTRIES = 1024, 16_384
AT_ONCE = 1024  # pins, and chunks, that one call lets go of
NEVER = math.inf


@dataclass(frozen=True, slots=True)
class Pin:
    """What a request wants pinned: for an owner and so many seconds, its prompt up to token `end`, or all."""

    owner: str
    seconds: float
    end: int | None = None


Owner = tuple[bytes, str]  # a tenant, and what it calls the owner


class _Book:
    """What a tenant, or all of them, have pinned: `pages`, a chunk that several owners pin once, and `entries`."""

    __slots__ = ("entries", "most_entries", "most_pages", "owners", "pages")

    def __init__(self, pages: int, most: int) -> None:
        self.most_pages, self.most_entries = pages, min(most, max(LEAST_ENTRIES, ENTRIES * pages))
        self.owners: Counter[Chunk] = Counter()
        self.pages = self.entries = 0

    def takes(self, chunk: Chunk) -> bool:
        """Whether one more owner of a chunk fits."""
        size = 0 if chunk in self.owners else chunk.page_count
        return self.pages + size <= self.most_pages and self.entries < self.most_entries

    def add(self, chunk: Chunk) -> bool:
        """Note one more owner; whether it is the chunk's first."""
        self.owners[chunk] += 1
        self.entries += 1
        first = self.owners[chunk] == 1
        self.pages += chunk.page_count if first else 0
        return first

    def remove(self, chunk: Chunk) -> bool:
        """Note one less; whether it was the chunk's last."""
        self.owners[chunk] -= 1
        self.entries -= 1
        last = not self.owners[chunk]
        if last:
            del self.owners[chunk]
            self.pages -= chunk.page_count
        return last


class Pins:
    """`pin` and `unpin` are the memory tier's, which has a budget of `pages` pages. Times are seconds of one
    clock, which the caller reads."""

    def __init__(
        self, pages: int, pin: Callable[[list[Chunk]], None], unpin: Callable[[list[Chunk]], None]
    ) -> None:
        self._budget = pages
        self._pin, self._unpin = pin, unpin
        self._all = _Book(int(SHARE * pages), MOST_ENTRIES)
        self._tenants: dict[bytes, _Book] = {}
        self._pins: dict[Owner, dict[Chunk, int]] = {}  # with the number of the entry in `_queue` that counts
        self._queue: list[tuple[float, int, Owner, Chunk]] = []
        self._leaving: deque[tuple[bytes, Chunk]] = deque()  # no owner's any more, still pinned
        self._expiries: dict[Chunk, float] = {}
        self._expiring: list[tuple[float, int, Chunk]] = []
        self._renewed: set[Chunk] = set()
        self._count = 0
        self._now = -math.inf

    @property
    def pages(self) -> int:
        """Pages that are pinned."""
        return self._all.pages

    @property
    def pinned(self) -> Set[Chunk]:
        """Chunks that are pinned; each has one pin in memory, whatever owners it has."""
        return self._all.owners.keys()

    @property
    def late(self) -> bool:
        """Whether `due` had more chunks than it could tell at once."""
        return bool(self._expiring) and self._expiring[0][0] <= self._now

    def hold(self, owner: str, chunk: Chunk, until: float, tenant: bytes = b"") -> bool:
        """Pin a chunk of memory for a tenant's owner until then; a second call renews. False: the share of the
        tenant, or of all, is used up."""
        name = tenant, owner
        if chunk not in self._pins.get(name, ()):
            book = self._tenants.get(tenant) or _Book(int(TENANT_SHARE * self._budget), MOST_ENTRIES // 2)
            if not (self._all.takes(chunk) and book.takes(chunk)):
                return False
            self._tenants[tenant] = book
            book.add(chunk)
            if self._all.add(chunk):
                self._pin([chunk])
        self._count += 1
        self._pins.setdefault(name, {})[chunk] = self._count
        heapq.heappush(self._queue, (until, self._count, name, chunk))
        if len(self._queue) > 2 * self._all.entries + 16:  # renewals leave their old entries behind
            self._queue = [each for each in self._queue if self._counts(each)]
            heapq.heapify(self._queue)
        return True

    def release(self, owner: str, tenant: bytes = b"") -> int:
        """Take back all pins of a tenant's owner; how many there were. Nobody else's are looked at."""
        chunks = self._pins.pop((tenant, owner), {})
        self._leaving.extend((tenant, chunk) for chunk in chunks)
        self._leave()
        return len(chunks)

    def drop(self, chunks: Set[Chunk]) -> None:
        """Chunks never match again: no owner keeps them."""
        if not self._all.owners.keys() & chunks:
            return
        for (tenant, owner), pins in list(self._pins.items()):
            for chunk in pins.keys() & chunks:
                del pins[chunk]
                self._leaving.append((tenant, chunk))
            if not pins:
                del self._pins[tenant, owner]
        self._leave()

    def expire(self, chunk: Chunk, at: float) -> None:
        """Let a chunk be kept no longer than until then (`NEVER`: as long as may be); of several times the latest
        counts."""
        unknown = NEVER if at == NEVER else 0.0  # which goes without saying
        if at > self._expiries.get(chunk, unknown):
            self._expiries[chunk] = at
            if at == NEVER:
                return
            self._count += 1
            heapq.heappush(self._expiring, (at, self._count, chunk))
            if len(self._expiring) > 2 * len(self._expiries) + 16:  # so do chunks that left
                self._expiring = [each for each in self._expiring if self._expiries.get(each[2]) == each[0]]
                heapq.heapify(self._expiring)

    def outlive(self, chunk: Chunk, at: float) -> bool:
        """Someone else wants a chunk too, until then: who came first does not say when it must go. Whether that
        changes anything that was told of it before."""
        changes = self._expiries.get(chunk, NEVER) < at
        if changes:
            self.expire(chunk, at)
            self._renewed.add(chunk)
        return changes

    def renewed(self, chunk: Chunk) -> bool:
        """Whether a chunk was to go earlier once; a lower tier may have been told so."""
        return chunk in self._renewed

    def expiry(self, chunk: Chunk) -> float:
        """When a chunk must go; 0.0: never."""
        at = self._expiries.get(chunk, 0.0)
        return 0.0 if at == NEVER else at

    def over(self, chunk: Chunk) -> bool:
        """Whether a chunk's time was over when `due` was asked last."""
        return self._expiries.get(chunk, NEVER) <= self._now

    def left(self, chunk: Chunk) -> None:
        """A chunk left memory."""
        self._expiries.pop(chunk, None)
        self._renewed.discard(chunk)

    def forget(self) -> None:
        """Let go of everything."""
        for tenant, owner in list(self._pins):
            self.release(owner, tenant)
        while self._leaving:
            self._leave()
        self._queue.clear()
        self._expiring.clear()
        self._expiries.clear()
        self._renewed.clear()

    def due(self, now: float) -> list[Chunk]:
        """Let go of pins whose time is over; the chunks that must be kept no longer (`late`: not all of them)."""
        self._now = now
        for _ in range(AT_ONCE):
            if not (self._queue and self._queue[0][0] <= now):
                break
            entry = heapq.heappop(self._queue)
            if self._counts(entry):
                (tenant, _), chunk = owner, _ = entry[2:]
                del self._pins[owner][chunk]
                if not self._pins[owner]:
                    del self._pins[owner]
                self._leaving.append((tenant, chunk))
        self._leave()
        over: list[Chunk] = []
        for _ in range(AT_ONCE):
            if not self.late:
                break
            at, _, chunk = heapq.heappop(self._expiring)
            if self._expiries.get(chunk) == at:
                del self._expiries[chunk]
                over.append(chunk)
        return over

    def check_integrity(self) -> None:
        """Raise AssertionError where the books contradict each other."""
        held = [(tenant, chunk) for (tenant, _), pins in self._pins.items() for chunk in pins]
        held += self._leaving
        tenants = {tenant for tenant, _ in held}
        assert self._tenants.keys() == tenants and all(self._pins.values())
        for book, chunks in (
            (self._all, [chunk for _, chunk in held]),
            *((self._tenants[name], [chunk for tenant, chunk in held if tenant == name]) for name in tenants),
        ):
            assert book.owners == Counter(chunks) and book.entries == len(chunks) <= book.most_entries
            assert book.pages == sum(chunk.page_count for chunk in set(chunks)) <= book.most_pages
        assert sum(map(self._counts, self._queue)) == len(held) - len(self._leaving)

    def _counts(self, entry: tuple[float, int, Owner, Chunk]) -> bool:
        """Whether an entry of the queue is its pin's last."""
        return self._pins.get(entry[2], {}).get(entry[3]) == entry[1]

    def _leave(self) -> None:
        """Unpin what is no owner's any more, some of it."""
        gone = []
        for _ in range(min(AT_ONCE, len(self._leaving))):
            tenant, chunk = self._leaving.popleft()
            book = self._tenants[tenant]
            book.remove(chunk)
            if not book.entries:
                del self._tenants[tenant]
            if self._all.remove(chunk):
                gone.append(chunk)
        if gone:
            self._unpin(gone)
