"""What lies where: memory with the tiers below it. Chunks are written down as soon as they are stored ("through")
or when memory evicts them ("back"), and brought up again by `ragkv.kvstore.promotion`.

One thread drives all of it; what the lanes have done meanwhile takes effect in `tick`. From `index_contents` on,
what is written down can be found by its tokens too (`ragkv.kvstore.aliases`, `ragkv.kvstore.gathering`).
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from ragkv.kvstore.aliases import Aliases
from ragkv.kvstore.catalogue import Chunk, Match, is_loose, origin
from ragkv.kvstore.chunking import TokenChain
from ragkv.kvstore.gate import Gate
from ragkv.kvstore.gathering import Gather, Gathering
from ragkv.kvstore.hierarchy import Hierarchy
from ragkv.kvstore.keys import content_key
from ragkv.kvstore.metrics import RESET, Metrics
from ragkv.kvstore.pages import Pages
from ragkv.kvstore.payloads import Payloads, address
from ragkv.kvstore.promotion import Fetch, Promotion
from ragkv.kvstore.tier import StoreTier
from ragkv.kvstore.tier_jobs import Write
from ragkv.kvstore.unconfirmed import Unconfirmed
from ragkv.kvstore.work import Completions


class Placement:
    """`tiers`: from the quickest to the slowest. `deadline`: seconds that a request may wait for them."""

    def __init__(
        self,
        hierarchy: Hierarchy,
        pages: Pages,
        tiers: Sequence[StoreTier],
        gate: Gate,
        completions: Completions,
        metrics: Metrics,
        *,
        deadline: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.hierarchy, self.gate = hierarchy, gate
        self._tiers, self._completions, self._clock = tuple(tiers), completions, clock
        self._payloads = Payloads(pages, wall)
        self._up = Promotion(hierarchy, self._payloads, self._tiers, gate, metrics, clock, deadline)
        self._loose = Gathering(hierarchy, self._payloads, self._tiers, gate, metrics, clock, deadline)
        self.aliases: Aliases | None = None  # from `index_contents` on
        self._unconfirmed = Unconfirmed()
        hierarchy.evicting = self._demote
        for number, tier in enumerate(self._tiers):
            tier.bit = 1 << number
            tier.start()

    @property
    def tiers(self) -> tuple[StoreTier, ...]:
        """From the quickest to the slowest."""
        return self._tiers

    def tick(self) -> None:
        """Do what is due: outcomes of the lanes, trials of tiers at rest, pins and chunks whose time is over."""
        self._completions.drain()
        for tier in self._tiers:
            tier.tick()
        self.hierarchy.tick(self._clock())
        if self.aliases is not None:
            self.aliases.order()

    def index_contents(self) -> None:
        """From now on know which chunks in memory hold some tokens, and leave an alias with every chunk that is
        written down. What was written down before gets its alias when it is used again, in a tier with an index;
        elsewhere (Redis) only when it is written again."""
        self.hierarchy.index_contents()
        if self.aliases is None:
            self.aliases = Aliases(self._payloads, self.hierarchy.cost)

    def fetch(self, namespace: bytes, chain: TokenChain, match: Match, computed: int, limit: int) -> Fetch | None:
        """As `Promotion.fetch`."""
        return self._up.fetch(namespace, chain, match, computed, limit)

    def gather(self, namespace: bytes, wanted: Sequence[bytes]) -> Gather | None:
        """As `Gathering.gather`; None before `index_contents`."""
        return self._loose.gather(namespace, wanted) if self._tiers and self.aliases is not None else None

    def waits(self, fetch: Fetch | Gather, answer_seconds: float = 0.0, load_seconds: float = 0.0) -> bool:
        """Whether a request should go on waiting for a fetch. Stands still for at most `answer_seconds` where the
        tiers have not yet said what they hold (mostly nothing, and an answer now saves the engine a step), and for
        at most `load_seconds` while they load (for an engine that has nothing else to do but ask again)."""
        begun = self._clock()
        while not fetch.over:
            seconds = max(load_seconds, answer_seconds if fetch.asking else 0.0)
            left = min(begun + seconds, fetch.deadline) - self._clock()
            if left <= 0 or not self._completions.drain(left):
                break
        return self._loose.waits(fetch) if isinstance(fetch, Gather) else self._up.waits(fetch)

    def let_go(self, *lifts: Fetch | Gather | None) -> None:
        """What was brought up for a request is used, or not wanted any more: it may be evicted."""
        for lift in lifts:
            if isinstance(lift, Gather):
                self._loose.let_go(lift)
            elif lift is not None:
                self._up.let_go(lift)

    @property
    def unconfirmed(self) -> int:
        """Chunks in memory that wait to be confirmed."""
        return len(self._unconfirmed)

    def confirm(self, number: int) -> None:
        """What was stored to be written `after` this number, or less, is what its namespace says."""
        for namespace, chunks in self._unconfirmed.confirm(number):
            self.stored(namespace, chunks)

    def outdate(self) -> None:
        """Nothing that is unconfirmed is what its namespace says: drop it, with all behind it."""
        self.hierarchy.forget(self._unconfirmed.drop(), RESET)

    def stored(self, namespace: bytes, chunks: Iterable[tuple[int, Chunk]], after: int = 0) -> None:
        """Chunks, each with its position, have been computed and stored: write them through, once `after` is
        confirmed; until then no lower tier gets them. So is what stands before them, where a tier lacks it: it
        was a tail until now, or could not be written."""
        chunks = [(position, chunk) for position, chunk in chunks if chunk.ready and chunk in self.hierarchy]
        if self._unconfirmed.hold(after, namespace, chunks):
            return
        through = [tier for tier in self._tiers if tier.through]
        wanted: list[tuple[int, Chunk]] = []
        for position, chunk in chunks if through else ():
            above = chunk.parent
            if above is not None and above.parent is not None and not (wanted and wanted[-1][1] is above):
                wanted.append((position - len(above), above))
            wanted.append((position, chunk))
        for position, chunk in wanted:
            for tier in through:
                if chunk.ready and chunk in self.hierarchy and not chunk.below & tier.bit:
                    self._write(chunk, tier, namespace, position, copy=chunk.open)
        if self.aliases is not None:
            self.aliases.order()

    def used(self, chunks: Sequence[Chunk]) -> None:
        """A chain was used, root first, or loose chunks: the tiers that hold them note that too."""
        for tier in self._tiers:
            held = [chunk for chunk in chunks if chunk.below & tier.bit]
            keys = [address(chunk) for chunk in held]
            if self.aliases is not None:
                keys = [key for pair in zip(keys, self._aliased(held, tier), strict=True) for key in pair]
            if keys:
                tier.touch(keys)
        if self.aliases is not None:
            self.aliases.order(compare=False)  # what an index does not know may be there: kept, and then known

    def write_down(self, chunks: deque[Chunk], most: int = 256) -> bool:
        """Order to be written what no lower tier has of the first `most` chunks, as far as the tiers have room and
        chunks are confirmed, and take them out. Whether `chunks` is at its end."""
        for _ in range(most):
            if not chunks:
                return True
            if any(tier.busy for tier in self._tiers) or chunks[0] in self._unconfirmed:
                return False
            chunk = chunks.popleft()
            for tier in self._tiers if chunk in self.hierarchy and chunk.ready and not is_loose(chunk) else ():
                lacks = not chunk.below & tier.bit if tier.through else not chunk.below
                if lacks and _may_take(tier, chunk):
                    self._write(chunk, tier, *origin(chunk), copy=False)
        return False

    def close(self, seconds: float) -> bool:
        """Write down what no lower tier has, within a bound, and let the tiers go. Whether all was written."""
        end = self._clock() + seconds
        ended = True
        for tier in self._tiers:
            for chunk in self.hierarchy.everything():
                while tier.busy and self._completions.drain(max(0.0, end - self._clock())):
                    pass
                lacks = not chunk.below & tier.bit if tier.through else not chunk.below
                if lacks and _may_take(tier, chunk) and not is_loose(chunk) and self._clock() < end:
                    self._write(chunk, tier, *origin(chunk), copy=False)
            if self.aliases is not None:
                self.aliases.finish()
            ended &= tier.close(max(0.0, end - self._clock()))
            self._completions.drain()  # what this tier has, the next need not take
        self._payloads.pages.close()
        written = any(tier.may_write for tier in self._tiers)
        return ended and not (written and any(not chunk.below for chunk in self.hierarchy.everything()))

    def _demote(self, chunk: Chunk) -> None:
        """Memory evicts a chunk: give it to the tiers that should have it and could not take it when it was
        stored, and else, unless one has it, to the first that takes it."""
        if is_loose(chunk):
            return  # it came from there
        lack = [t for t in self._tiers if not (chunk.below & t.bit and t.keeps(address(chunk)))]
        lost = len(lack) == len(self._tiers)
        for tier in lack:
            if (tier.through or lost) and _may_take(tier, chunk):
                written = self._write(chunk, tier, *origin(chunk), copy=True)
                lost = lost and not written

    def _write(self, chunk: Chunk, tier: StoreTier, namespace: bytes, position: int, *, copy: bool) -> bool:
        """Order a chunk to be written, unless it is unconfirmed; its bytes are copied now, or it is pinned until
        it is done. (An open tail is copied: it may have to make room for a longer one.)"""
        parent = chunk.parent
        assert parent is not None
        if chunk in self._unconfirmed:
            return False
        tail, renewed = chunk.open, self.hierarchy.holds.renewed(chunk)
        if not tail and not renewed and tier.knows(chunk.key):
            chunk.below |= tier.bit
            self._alias(chunk, tier, namespace, position)
            return True
        expires = self._expires(chunk)

        def parts() -> Callable[[], Sequence[bytes | bytearray | memoryview]]:
            return self._payloads.writer(chunk, namespace, position, expires=expires, copy=copy)

        write = Write(
            key=address(chunk),
            parent=None if parent.parent is None else parent.key,
            size=self._payloads.size(chunk),
            cost=self.hierarchy.cost(chunk.tokens, position),
            make=parts,
            replaces=tail or renewed,
        )

        def done(well: bool) -> None:
            if chunk.open == tail:  # else it was a tail, which lies elsewhere
                chunk.below = chunk.below | tier.bit if well else chunk.below & ~tier.bit
            if not copy:
                self.hierarchy.unpin([chunk])

        if not tier.write(write, done):
            return False
        if not copy:
            self.hierarchy.pin([chunk])
        self._alias(chunk, tier, namespace, position)
        return True

    def _expires(self, chunk: Chunk) -> float:
        """Seconds since the epoch, 0.0: never."""
        expiry = self.hierarchy.holds.expiry(chunk)
        return self._payloads.wall() + expiry - self._clock() if expiry else 0.0

    def _alias(self, chunk: Chunk, tier: StoreTier, namespace: bytes, position: int) -> None:
        """Let a chunk be found by its tokens in a tier that has it. (Not an open tail: what lies in its place
        changes, and the same tokens are seldom cut again in the same place.)"""
        if self.aliases is not None and not chunk.open:
            self.aliases.offer(tier, chunk, namespace, position, self._expires(chunk))

    def _aliased(self, chunks: Sequence[Chunk], tier: StoreTier) -> Iterator[bytes]:
        """Where the aliases of chunks lie that were used; those that an index has not are offered."""
        namespace, position, before = b"", 0, None
        for chunk in chunks:
            if before is not None and chunk.parent is before:
                position += len(before)
            else:
                namespace, position = origin(chunk)
            before, key = chunk, content_key(namespace, chunk.tokens)
            if tier.index is not None and key not in tier.index and not is_loose(chunk):
                self._alias(chunk, tier, namespace, position)
            yield key


def _may_take(tier: StoreTier, chunk: Chunk) -> bool:
    """A tier that has judged a chunk when it was stored is asked again only if it was used since."""
    return chunk.hits > 0 or not (tier.through and tier.choosy)
