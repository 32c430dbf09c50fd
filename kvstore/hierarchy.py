"""The store as the engine's scheduler sees it: match a prompt, reserve room, commit, evict, reset.

One writer: everything here runs on the scheduler's thread. Today there is one tier, memory. The others will
stand behind it, and `match` will still answer from memory alone.
"""

import bisect
from collections.abc import Iterable

from ragkv.kvstore import metrics as m
from ragkv.kvstore.catalogue import Catalogue, Chunk, Match
from ragkv.kvstore.chunking import TokenChain
from ragkv.kvstore.keys import TOKEN_BYTES, chain_key
from ragkv.kvstore.memory import MemoryTier
from ragkv.kvstore.metrics import Metrics


class Hierarchy:
    """Catalogue and tiers, kept in step. `page_tokens`: tokens a page; `page_bytes`: bytes a page."""

    def __init__(self, memory: MemoryTier, page_tokens: int, page_bytes: int, metrics: Metrics) -> None:
        self.page_tokens, self.page_bytes = page_tokens, page_bytes
        self._catalogue = Catalogue()
        self._memory = memory
        self._metrics = metrics
        self.version = 0  # of what `match` would answer
        self._pins = 0
        self._doomed: list[Chunk] = []  # reset while pinned, parents first: each goes once nothing holds it
        self._report()

    def __len__(self) -> int:
        return len(self._catalogue)

    def match(self, namespace: bytes, chain: TokenChain, limit: int) -> Match:
        """The longest prefix of `chain`, at most `limit` tokens, that can be read from memory now."""
        return self._catalogue.match(self._catalogue.root(namespace), chain, limit)

    def reserve(self, namespace: bytes, chain: TokenChain, upto: int) -> list[tuple[int, Chunk]]:
        """Room for the chunks of the first `upto` tokens that are not stored yet, with their first positions.

        The last may be an open tail. They come pinned and not ready: write their bytes, then `commit` or
        `abandon` each. Where memory has no room the rest is left out, and counted.
        """
        raw = chain.tokens[:upto].tobytes()
        whole = bisect.bisect_right(chain.ends, len(raw) // TOKEN_BYTES)
        cuts = list(zip(chain.ends[:whole], chain.keys[:whole], strict=True))
        end, key = cuts[-1] if cuts else (0, namespace)
        if tail := raw[TOKEN_BYTES * end :]:
            cuts.append((len(raw) // TOKEN_BYTES, chain_key(key, tail)))
        parent, start = self._catalogue.root(namespace), 0
        new: list[tuple[int, Chunk]] = []
        for index, (end, key) in enumerate(cuts):
            tokens = raw[TOKEN_BYTES * start : TOKEN_BYTES * end]
            chunk = self._catalogue.get(key, parent, tokens)
            if chunk is None:
                if index == whole and self._catalogue.longest_shared(parent, tokens)[1] == end - start:
                    break  # a longer child holds the open tail
                chunk = self._reserve_chunk(key, parent, tokens)
                if chunk is None:
                    break
                new.append((start, chunk))
            elif not chunk.ready and not chunk.pins:  # its writer gave up: write it anew
                self.pin([chunk])
                new.append((start, chunk))
            parent, start = chunk, end
        self._report()
        return new

    def commit(self, chunk: Chunk) -> None:
        """The bytes of a reserved chunk are written: from now on it matches."""
        chunk.ready = True
        self.version += 1
        self._metrics.count(m.STORED_TOKENS, len(chunk))
        self.unpin([chunk])

    def abandon(self, chunk: Chunk) -> None:
        """The bytes of a reserved chunk will not come. Where others stand behind it, it stays, unready, until
        the next `reserve` of the same tokens writes it. Abandon a chain from its tail on."""
        self.unpin([chunk])
        self._drop_leaf(chunk, m.ABANDONED)

    def discard(self, chunk: Chunk) -> None:
        """Drop a chunk whose tokens others hold now; no matter if it is gone, in use, or has children."""
        self._drop_leaf(chunk, m.SUPERSEDED)

    def pin(self, chunks: Iterable[Chunk]) -> None:
        """Keep chunks (and so their ancestors) until `unpin`."""
        for chunk in chunks:
            self._memory.pin(chunk)
            self._pins += 1

    def unpin(self, chunks: Iterable[Chunk]) -> None:
        """Take back one `pin` of each."""
        for chunk in chunks:
            self._memory.unpin(chunk)
            self._pins -= 1
        if self._doomed:
            self._drop_doomed()
            self._report()

    def touch(self, match: Match) -> None:
        """Note that a match was used."""
        self._memory.touch(match.chunks)

    def reset(self) -> None:
        """Forget everything. What is pinned keeps its pages until it is unpinned, but never matches."""
        self._doomed += self._catalogue.everything()
        self._catalogue.clear()
        self.version += 1
        self._drop_doomed()
        self._report()

    def check_integrity(self) -> None:
        """Raise AssertionError where catalogue and tier disagree."""
        self._memory.check_integrity()
        chunks = self._catalogue.everything() + self._doomed
        owned = [page for chunk in chunks for page in memoryview(chunk.pages).cast("i")]
        assert len(owned) == len(set(owned)) == self._memory.used, "pages and chunks disagree"
        assert self._pins == sum(chunk.pins for chunk in chunks), "pins and chunks disagree"

    def _reserve_chunk(self, key: bytes, parent: Chunk, tokens: bytes) -> Chunk | None:
        chunk = self._catalogue.insert(key, parent, tokens)
        if chunk is None:
            self._metrics.count(m.REFUSED_CHUNKS, reason=m.COLLISION)
            return None
        pages = -(-len(tokens) // (TOKEN_BYTES * self.page_tokens))
        behind = [parent] if parent.pages else []
        self.pin(behind)  # the victims must not be what the new chunk stands on
        victims = self._memory.make_room(pages)
        for victim in victims or ():
            self._catalogue.remove(victim)
        if victims:
            self.version += 1
            self._metrics.count(m.EVICTED_CHUNKS, len(victims), reason=m.CAPACITY)
        if victims is None:
            self._catalogue.remove(chunk)
            self._metrics.count(m.REFUSED_CHUNKS, reason=m.NO_ROOM)
            chunk = None
        else:
            chunk.pages = self._memory.take(pages)
            self._memory.add(chunk)
            self.pin([chunk])
        self.unpin(behind)
        return chunk

    def _drop_doomed(self) -> None:
        """Let go of what a reset left, where no pin holds it or a chunk behind it."""
        kept: list[Chunk] = []
        held: set[Chunk | None] = set()
        for chunk in reversed(self._doomed):
            if chunk.pins or chunk in held:
                held.add(chunk.parent)
                kept.append(chunk)
            else:
                self._memory.drop(chunk)
        if len(kept) < len(self._doomed):
            self._metrics.count(m.EVICTED_CHUNKS, len(self._doomed) - len(kept), reason=m.RESET)
        self._doomed = kept[::-1]

    def _drop_leaf(self, chunk: Chunk, reason: str) -> None:
        if chunk in self._catalogue and not chunk.pins and not chunk.children:
            self._catalogue.remove(chunk)
            self._memory.drop(chunk)
            self.version += 1
            self._metrics.count(m.EVICTED_CHUNKS, reason=reason)
            self._report()

    def _report(self) -> None:
        used = self._memory.used
        self._metrics.gauge(m.USED_PAGES, used, tier=m.MEMORY)
        self._metrics.gauge(m.USED_BYTES, used * self.page_bytes, tier=m.MEMORY)
        self._metrics.gauge(m.CAPACITY_BYTES, self._memory.pages * self.page_bytes, tier=m.MEMORY)
        self._metrics.gauge(m.CHUNKS, len(self._catalogue), tier=m.MEMORY)
