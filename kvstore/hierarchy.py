"""Memory as the engine's scheduler sees it: match a prompt, reserve room, commit, evict, expire, reset.

One writer: everything here runs on the scheduler's thread. `match` answers from memory alone; what lower tiers
hold is brought here first (`ragkv.kvstore.placement`).
"""

import bisect
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from ragkv.kvstore import metrics as m
from ragkv.kvstore.catalogue import Catalogue, Chunk, LooseRoot, Match, descendants, is_loose, longest_shared
from ragkv.kvstore.chunking import TokenChain
from ragkv.kvstore.contents import Contents
from ragkv.kvstore.holds import NEVER, Holds
from ragkv.kvstore.keys import TOKEN_BYTES, chain_key
from ragkv.kvstore.memory import DeviceTier, MemoryTier
from ragkv.kvstore.metrics import Metrics
from ragkv.policies.admission import AdmissionPolicy, Always


class Hierarchy:
    """Catalogue and paged tiers, kept in step. `page_tokens`: tokens a page; `page_bytes`: bytes a page;
    `attention_tokens`: at this position a token's attention costs as much as its other work (infinity: never).

    `evicting` is called with every chunk that memory evicts for room, while its pages still hold its bytes.
    """

    def __init__(
        self,
        memory: MemoryTier,
        page_tokens: int,
        page_bytes: int,
        metrics: Metrics,
        admission: AdmissionPolicy | None = None,
        device: DeviceTier | None = None,
        attention_tokens: float = float("inf"),
    ) -> None:
        self.page_tokens, self.page_bytes = page_tokens, page_bytes
        self.device = device
        self.classes = memory.classes
        self.evicting: Callable[[Chunk], None] | None = None
        self.contents: Contents | None = None  # of all ready chunks, from `index_contents` on
        self._catalogue = Catalogue()
        self._memory = memory
        self._metrics = metrics
        self._admission = admission or Always()
        self._choosy = not isinstance(self._admission, Always)
        self._attention_tokens = attention_tokens
        self.version = 0  # of what `match` would answer
        self._pins = 0
        self._doomed: list[Chunk] = []  # dropped while pinned, parents first: each goes once nothing holds it
        self.holds = Holds(memory.pages, self._hold, self._let_go)
        self._report()

    @property
    def pages(self) -> int:
        """Pages of memory, used or not."""
        return self._memory.pages

    def __len__(self) -> int:
        return len(self._catalogue)

    def __contains__(self, chunk: Chunk) -> bool:
        return chunk in self._catalogue

    def root(self, namespace: bytes) -> Chunk:
        """The root of a namespace; it is kept as long as a chunk stands behind it."""
        return self._catalogue.root(namespace)

    def get(self, key: bytes, parent: Chunk, tokens: bytes) -> Chunk | None:
        """The chunk of that key, ready or not, if it stands behind `parent` and holds just these tokens."""
        return self._catalogue.get(key, parent, tokens)

    def get_loose(self, holder: bytes) -> Chunk | None:
        """The loose copy of the chunk of that key, ready or not."""
        return self._catalogue.get_loose(holder)

    def match(self, namespace: bytes, chain: TokenChain, limit: int) -> Match:
        """The longest prefix of `chain`, at most `limit` tokens, that can be read from memory now."""
        found = self._catalogue.match(self._catalogue.root(namespace), chain, limit)
        return self._in_time(found) if self.holds.late else found

    def reserve(
        self,
        namespace: bytes,
        chain: TokenChain,
        upto: int,
        *,
        asked: int = 0,
        priority: int = 0,
        until: float = NEVER,
    ) -> list[tuple[int, Chunk]]:
        """Room for the chunks of the first `upto` tokens that are not stored yet, with their first positions.

        The last may be an open tail. They come pinned and not ready: write their bytes, then `commit` or
        `abandon` each. Where memory has no room the rest is left out, and counted. Up to token `asked` admission
        was asked before for this request, and is not asked again: once seen is not twice. `until`: when all of
        them may go; one that is there already, and would have to go earlier, is kept until then.
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
            if chunk is not None and chunk.open and index < whole:
                chunk.open, chunk.below = False, 0  # a tail no more: a lower tier has it elsewhere now
            if chunk is not None and self.holds.outlive(chunk, until):
                chunk.below = 0  # what lower tiers have goes when they were told first
            if chunk is None:
                if index == whole and self._has_tail(parent, tokens):
                    break
                if (start < asked and self._choosy) or not self._admits(key, tokens, start):
                    self._see(cuts[index + 1 :], raw, max(asked, end))
                    break
                chunk = self.reserve_chunk(key, parent, tokens, start, priority)
                if chunk is None:
                    break
                chunk.open = index == whole
                self.holds.expire(chunk, until)
                new.append((start, chunk))
            elif not chunk.ready and not chunk.pins:  # its writer gave up: write it anew
                self.pin([chunk])
                new.append((start, chunk))
            parent, start = chunk, end
        self._report()
        return new

    def reserve_chunk(
        self, key: bytes, parent: Chunk, tokens: bytes, position: int, priority: int = 0
    ) -> Chunk | None:
        """Room for one chunk behind `parent`, pinned and not ready; None, and counted, where there is none.
        `position`: of its first token."""
        chunk = self._catalogue.insert(key, parent, tokens)
        if chunk is None:
            self._metrics.count(m.REFUSED_CHUNKS, reason=m.COLLISION)
            return None
        pages = self._pages(tokens)
        behind = [parent] if parent.pages else []
        self.pin(behind)  # the victims must not be what the new chunk stands on
        victims = self._memory.make_room(pages)
        for victim in victims or ():
            if self.evicting is not None and victim.ready:
                self.evicting(victim)
            self._catalogue.remove(victim)
            if self.contents is not None:
                self.contents.remove(victim)
            self._left(victim)
        if victims:
            self.version += 1
            self._metrics.count(m.EVICTED_CHUNKS, len(victims), tier=m.MEMORY, reason=m.CAPACITY)
        if victims is None:
            self._catalogue.remove(chunk)
            self._metrics.count(m.REFUSED_CHUNKS, reason=m.NO_ROOM)
            chunk = None
        else:
            chunk.pages = self._memory.take(pages)
            self._memory.add(chunk, self.cost(tokens, position), priority)
            self.pin([chunk])
        self.unpin(behind)
        return chunk

    def reserve_loose(self, namespace: bytes, holder: bytes, tokens: bytes, position: int) -> Chunk | None:
        """As `reserve_chunk`, for a copy of the chunk of key `holder`, which began at token `position` of a prompt
        of `namespace`. What stood before it is not there: it is in `contents` alone, and never matches."""
        root = LooseRoot(namespace, holder, position)
        return self.reserve_chunk(root.key, root, tokens, position)

    def commit(self, chunk: Chunk) -> None:
        """The bytes of a reserved chunk are written: from now on it matches."""
        if self.contents is not None and not chunk.ready and chunk in self._catalogue:
            self.contents.add(chunk)
        chunk.ready = True
        self.version += 1
        self.unpin([chunk])

    def abandon(self, chunk: Chunk) -> None:
        """The bytes of a reserved chunk will not come. Where others stand behind it, it stays, unready, until
        they are abandoned too, or the next `reserve` of the same tokens writes it."""
        self.unpin([chunk])
        each: Chunk | None = chunk
        while each is not None and not each.ready and self._drop_leaf(each, m.ABANDONED):
            each = each.parent

    def discard(self, chunk: Chunk) -> None:
        """Drop a chunk whose tokens others hold now; no matter if it is gone, in use, or has children."""
        self._drop_leaf(chunk, m.SUPERSEDED)

    def pin(self, chunks: Iterable[Chunk]) -> None:
        """Keep chunks (and so their ancestors) until `unpin`."""
        for chunk in chunks:
            self._memory.pin(chunk)
            self._pins += 1

    def unpin(self, chunks: Sequence[Chunk]) -> None:
        """Take back one `pin` of each."""
        for chunk in chunks:
            self._memory.unpin(chunk)
            self._pins -= 1
        if self._doomed and any(chunk not in self._catalogue for chunk in chunks):
            self._drop_doomed()
            self._report()

    def index_contents(self) -> Contents:
        """From now on know which chunks hold some tokens; the first call looks at all."""
        if self.contents is None:
            self.contents = Contents()
            for chunk in self.everything():
                self.contents.add(chunk)
        return self.contents

    def touch(self, match: Match, priority: int = 0) -> list[Chunk]:
        """Note that a match was used, by a request of that priority; the chunks that are to be copied to the
        device tier now."""
        self.used(match.chunks, priority)
        if self.device is None or any(map(is_loose, match.chunks)):
            return []
        whole = sum(map(len, match.chunks)) == match.length  # else the engine holds only some of the last
        due = self.device.used_now(match.chunks if whole else match.chunks[:-1])
        self._report()
        return due

    def used(self, chunks: Sequence[Chunk], priority: int = 0) -> None:
        """Note a use of chunks, by a request of that priority."""
        self._memory.touch(chunks, priority)
        for chunk in chunks:
            chunk.hits += 1

    def tick(self, now: float) -> None:
        """Let go of pins whose time is over, and of chunks that must be kept no longer, with all behind them."""
        self.forget(self.holds.due(now), m.EXPIRED)

    def forget(self, chunks: Sequence[Chunk], reason: str) -> None:
        """Drop chunks and all that stands behind them. What is pinned keeps its pages until it is unpinned, but
        never matches, and no owner keeps it."""
        gone: deque[Chunk] = deque()  # parents before their children, whichever was named first
        for chunk in chunks:
            for each in reversed(descendants(chunk) if chunk in self._catalogue else []):
                self._catalogue.remove(each)
                gone.appendleft(each)
        if gone:
            self._doom(list(gone), reason)
            self.holds.drop(set(gone))

    def reset(self) -> None:
        """Forget everything, as `forget` does."""
        gone = self._catalogue.everything()
        self._catalogue.clear()
        self._doom(gone, m.RESET)
        self.holds.forget()

    def everything(self) -> list[Chunk]:
        """All chunks that can be read, loose ones too, parents before their children."""
        return [chunk for chunk in self._catalogue.everything() if chunk.ready]

    def check_integrity(self) -> None:
        """Raise AssertionError where catalogue and tiers disagree."""
        self._memory.check_integrity()
        self.holds.check_integrity()
        chunks = self._catalogue.everything() + self._doomed
        if self.contents is not None:
            self.contents.check_integrity(self.everything())
        owned = [page for chunk in chunks for page in memoryview(chunk.pages).cast("i")]
        assert len(owned) == len(set(owned)) == self._memory.used, "pages and chunks disagree"
        assert self._pins == sum(chunk.pins for chunk in chunks), "pins and chunks disagree"
        if self.device is not None:
            self.device.check_integrity()
            copied = [page for chunk in chunks for page in memoryview(chunk.device).cast("i")]
            assert len(copied) == len(set(copied)) == self.device.used, "device pages and chunks disagree"

    def _has_tail(self, parent: Chunk, tokens: bytes) -> bool:
        """Whether a longer child of `parent` holds an open tail, and need not go before it."""
        child, shared = longest_shared(parent, tokens)
        return child is not None and shared == len(tokens) // TOKEN_BYTES and not self.holds.expiry(child)

    def _in_time(self, match: Match) -> Match:
        """A match, up to the first chunk whose time is over and which `tick` has not come to yet."""
        length = 0
        for number, chunk in enumerate(match.chunks):
            if self.holds.over(chunk):
                return Match(match.chunks[:number], length)
            length += len(chunk)
        return match

    def _hold(self, chunks: list[Chunk]) -> None:
        self.pin(chunks)
        self._metrics.gauge(m.PINNED_BYTES, self.holds.pages * self.page_bytes)

    def _let_go(self, chunks: list[Chunk]) -> None:
        self.unpin(chunks)
        self._metrics.gauge(m.PINNED_BYTES, self.holds.pages * self.page_bytes)

    def _pages(self, tokens: bytes) -> int:
        return -(-len(tokens) // (TOKEN_BYTES * self.page_tokens))

    def cost(self, tokens: bytes, position: int) -> float:
        """Work to compute a chunk: of a token, 1 and what it attends to (Kaplan et al. 2020, "Scaling Laws for
        Neural Language Models", section 2.1)."""
        return len(tokens) / TOKEN_BYTES * (1.0 + position / self._attention_tokens)

    def _admits(self, key: bytes, tokens: bytes, position: int) -> bool:
        admitted = self._admission.admit(key, self._pages(tokens), self.cost(tokens, position))
        if not admitted:
            self._metrics.count(m.REFUSED_CHUNKS, reason=m.ADMISSION)
        return admitted

    def _see(self, cuts: list[tuple[int, bytes]], raw: bytes, start: int) -> None:
        """Let admission see what stands behind a chunk that it declined, from token `start` on: it cannot be kept
        now, and else a chain would be seen one chunk deeper each time."""
        for end, key in cuts:
            if end > start:
                self._admits(key, raw[TOKEN_BYTES * start : TOKEN_BYTES * end], start)
                start = end

    def _doom(self, gone: list[Chunk], reason: str) -> None:
        if self.contents is not None:
            for chunk in gone:
                self.contents.remove(chunk)
        if gone:
            self._metrics.count(m.EVICTED_CHUNKS, len(gone), tier=m.MEMORY, reason=reason)
        self._doomed = gone + self._doomed  # before what may have stood behind them
        self.version += 1
        self._drop_doomed()
        self._report()

    def lose_copies(self, chunks: Iterable[Chunk]) -> None:
        """Their copies in the device tier could not be read: they are in memory only."""
        for chunk in chunks:
            if self.device is not None and self.device.drop(chunk):
                self._metrics.count(m.EVICTED_CHUNKS, tier=m.DEVICE, reason=m.ABANDONED)
        self._report()

    def _left(self, chunk: Chunk) -> None:
        """A chunk's pages are not its own any more."""
        self.holds.left(chunk)
        if self.device is not None and self.device.drop(chunk):
            self._metrics.count(m.EVICTED_CHUNKS, tier=m.DEVICE, reason=m.SUPERSEDED)

    def _drop_doomed(self) -> None:
        """Let go of what was dropped while pinned, where no pin holds it or a chunk behind it any more."""
        kept: list[Chunk] = []
        held: set[Chunk | None] = set()
        for chunk in reversed(self._doomed):
            if chunk.pins or chunk in held:
                held.add(chunk.parent)
                kept.append(chunk)
            else:
                self._memory.drop(chunk)
                self._left(chunk)
        self._doomed = kept[::-1]

    def _drop_leaf(self, chunk: Chunk, reason: str) -> bool:
        if chunk not in self._catalogue or chunk.pins or chunk.children:
            return False
        self._catalogue.remove(chunk)
        self._doom([chunk], reason)  # what was dropped while pinned may still stand behind it
        return True

    def _report(self) -> None:
        used = self._memory.used
        self._metrics.gauge(m.USED_PAGES, used, tier=m.MEMORY)
        self._metrics.gauge(m.USED_BYTES, used * self.page_bytes, tier=m.MEMORY)
        self._metrics.gauge(m.CAPACITY_BYTES, self._memory.pages * self.page_bytes, tier=m.MEMORY)
        self._metrics.gauge(m.CHUNKS, len(self._catalogue), tier=m.MEMORY)
        self._metrics.gauge(m.PINNED_BYTES, self.holds.pages * self.page_bytes)
        if self.device is not None:
            self._metrics.gauge(m.USED_PAGES, self.device.used, tier=m.DEVICE)
            self._metrics.gauge(m.USED_BYTES, self.device.used * self.page_bytes, tier=m.DEVICE)
            self._metrics.gauge(m.CAPACITY_BYTES, self.device.pages * self.page_bytes, tier=m.DEVICE)
            self._metrics.gauge(m.CHUNKS, len(self.device), tier=m.DEVICE)
