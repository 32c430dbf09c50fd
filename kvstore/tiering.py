"""Tiering: chunks from memory into the lower tiers, as soon as they are stored ("through") or when memory evicts
them ("back"). The way up is `ragkv.kvstore.promotion`.

A chunk may wait to be confirmed: an engine looks at its weights now and then, and only after the fact. Until then
no lower tier gets it.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from ragkv.kvstore.codec import ChunkCodec, address
from ragkv.kvstore.content_lookup import Aliases
from ragkv.kvstore.io_pool import Completions, Write
from ragkv.kvstore.keys import content_key
from ragkv.kvstore.memory_tier import MemoryTier
from ragkv.kvstore.metrics import RESET
from ragkv.kvstore.planes import is_longest
from ragkv.kvstore.prefix_tree import Chunk, is_detached, origin
from ragkv.kvstore.storage_tier import StorageTier


class Tiering:
    """`tiers`: from the quickest to the slowest. Where memory indexes contents, every chunk that is written gets
    an alias; what was written before gets it when it is used again, in a tier with an index; elsewhere (Redis)
    only when it is written again."""

    def __init__(
        self,
        memory: MemoryTier,
        codec: ChunkCodec,
        tiers: Sequence[StorageTier],
        completions: Completions,
        clock: Callable[[], float],
    ) -> None:
        self._memory, self._codec, self._tiers = memory, codec, tuple(tiers)
        self._completions, self._clock = completions, clock
        self.aliases = Aliases(codec, memory.cost) if memory.tree.contents is not None else None
        self._unconfirmed: dict[Chunk, int] = {}  # with the number that confirms each, ascending
        self._confirmed = 0

    @property
    def unconfirmed(self) -> int:
        """Chunks that wait to be confirmed."""
        return len(self._unconfirmed)

    def stored(self, chunks: Sequence[Chunk], number: int = 0) -> None:
        """Chunks have been computed and stored: write them through, once `number` is confirmed. So is the parent
        of each, where a tier lacks it: it was a tail until now, or could not be written."""
        chunks = [chunk for chunk in chunks if chunk.ready and chunk in self._memory]
        if number > self._confirmed:
            self._unconfirmed |= dict.fromkeys(chunks, number)
            return
        wanted: dict[Chunk, None] = {}
        for chunk in chunks:
            if chunk.parent is not None and chunk.parent.parent is not None:
                wanted[chunk.parent] = None
            wanted[chunk] = None
        for chunk in wanted:
            for tier in self._tiers:
                if tier.through and chunk.ready and chunk in self._memory and not chunk.stored_in & tier.bit:
                    self._write(chunk, tier, copy=chunk.open)
        if self.aliases is not None:
            self.aliases.order()

    def confirm(self, number: int) -> None:
        """All that was stored under this number, or less, is what its namespace says."""
        self._confirmed = max(self._confirmed, number)
        due = [chunk for chunk, theirs in self._unconfirmed.items() if theirs <= self._confirmed]
        for chunk in due:
            del self._unconfirmed[chunk]
        if due:
            self.stored(due)

    def invalidate(self) -> None:
        """Nothing that is unconfirmed is what its namespace says: drop it, with its descendants."""
        dropped, self._unconfirmed = list(self._unconfirmed), {}
        self._memory.forget(dropped, RESET)

    def touch(self, chunks: Sequence[Chunk]) -> None:
        """A chain was used, root first, or detached chunks, then windows: tiers that hold them note that too."""
        for tier in self._tiers:
            held = [chunk for chunk in chunks if chunk.stored_in & tier.bit]
            keys = [address(chunk) for chunk in held]
            if self.aliases is not None:
                whole = [chunk for chunk in held if not chunk.plane]
                pairs = zip(keys, self._aliased(whole, tier), strict=False)
                keys = [key for pair in pairs for key in pair] + keys[len(whole) :]
            if keys:
                tier.touch(keys)
        if self.aliases is not None:
            self.aliases.order(compare=False)  # what an index does not know may be there: kept, and then known

    def flush(self, chunks: deque[Chunk], most: int = 256) -> bool:
        """Order to be written what no lower tier has of the first `most` chunks, as far as the tiers have room and
        chunks are confirmed, and take them out. Whether `chunks` is at its end."""
        for _ in range(most):
            if not chunks:
                return True
            if any(tier.busy for tier in self._tiers) or chunks[0] in self._unconfirmed:
                return False
            chunk = chunks.popleft()
            for tier in self._tiers if chunk in self._memory and chunk.ready else ():
                if _lacks(tier, chunk):
                    self._write(chunk, tier, copy=False)
        return False

    def close(self, seconds: float) -> bool:
        """Write what no lower tier has, within a bound, and let the tiers go. Whether all was written."""
        end = self._clock() + seconds
        ended = True
        for tier in self._tiers:
            for chunk in self._memory.everything():
                while tier.busy and self._completions.drain(max(0.0, end - self._clock())):
                    pass
                if _lacks(tier, chunk) and self._clock() < end:
                    self._write(chunk, tier, copy=False)
            if self.aliases is not None:
                self.aliases.finish()
            ended &= tier.close(max(0.0, end - self._clock()))
            self._completions.drain()  # what this tier has, the next need not take
        written = any(tier.may_write for tier in self._tiers)
        return ended and not (written and any(not chunk.stored_in for chunk in self._memory.everything()))

    def demote(self, chunk: Chunk) -> None:
        """Memory evicts a chunk: give it to the tiers that should have it and could not take it when it was
        stored, and else, unless one has it, to the first that takes it."""
        if is_detached(chunk):
            return  # it came from there
        lack = [t for t in self._tiers if not (chunk.stored_in & t.bit and t.keeps(address(chunk)))]
        lost = len(lack) == len(self._tiers)
        for tier in lack:
            if (tier.through or lost) and _may_take(tier, chunk):
                written = self._write(chunk, tier, copy=True)
                lost = lost and not written

    def _write(self, chunk: Chunk, tier: StorageTier, *, copy: bool) -> bool:
        """Order a chunk to be written, unless it is unconfirmed; its bytes are copied now, or it is pinned until
        it is done. (An open tail is copied: it may have to make room for a longer one.)"""
        parent = chunk.parent
        assert parent is not None
        if chunk in self._unconfirmed:
            return False
        tail, renewed = chunk.open, self._memory.pins.renewed(chunk)
        again = (
            tail or renewed or (chunk.plane > 0 and is_longest(chunk, self._memory.planes))
        )  # else what lies there is as good
        if not again and tier.knows(chunk.key):
            chunk.stored_in |= tier.bit
            self._alias(chunk, tier)
            return True
        expires = self._expires(chunk)
        write = Write(
            key=address(chunk),
            parent=None if parent.parent is None or parent.open else parent.key,  # what a tail holds may change
            size=self._codec.size(chunk),
            cost=self._memory.cost(chunk),
            make=lambda: self._codec.writer(chunk, expires=expires, copy=copy),
            replaces=again,
        )

        def done(ok: bool) -> None:
            if chunk.open == tail:  # else it was a tail, which lies elsewhere
                chunk.stored_in = chunk.stored_in | tier.bit if ok else chunk.stored_in & ~tier.bit
            if not copy:
                self._memory.unpin([chunk])

        if not tier.write(write, done):
            return False
        if not copy:
            self._memory.pin([chunk])
        self._alias(chunk, tier)
        return True

    def _expires(self, chunk: Chunk) -> float:
        """Seconds since the epoch, 0.0: never."""
        expiry = self._memory.pins.expiry(chunk)
        return self._codec.wall() + expiry - self._clock() if expiry else 0.0

    def _alias(self, chunk: Chunk, tier: StorageTier) -> None:
        """Let a chunk be found by its tokens in a tier that has it. (Not an open tail: what lies in its place
        changes, and the same tokens are seldom cut again in the same place.)"""
        if self.aliases is not None and not (chunk.open or chunk.plane):
            self.aliases.offer(tier, chunk, self._expires(chunk))

    def _aliased(self, chunks: Sequence[Chunk], tier: StorageTier) -> Iterator[bytes]:
        """Keys of the aliases of chunks that were used; those that an index has not are offered."""
        for chunk in chunks:
            key = content_key(origin(chunk)[0], chunk.tokens)
            if tier.index is not None and key not in tier.index and not is_detached(chunk):
                self._alias(chunk, tier)
            yield key


def _lacks(tier: StorageTier, chunk: Chunk) -> bool:
    """Whether a tier should have a chunk, and has not."""
    lacks = not chunk.stored_in & tier.bit if tier.through else not chunk.stored_in
    return lacks and _may_take(tier, chunk) and not is_detached(chunk)


def _may_take(tier: StorageTier, chunk: Chunk) -> bool:
    """A tier that has judged a chunk when it was stored is asked again only if it was used since."""
    return chunk.hits > 0 or not (tier.through and tier.has_admission)
