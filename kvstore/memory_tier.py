"""The memory tier: which chunks are in memory, in which pages, and which must leave.

It owns the prefix tree, the pages, the eviction policy, pins and expiry; others may read `tree`, only this module
changes it. One thread uses it, the engine's scheduler. It moves no bytes.
"""

import bisect
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

from ragkv.kvstore import metrics as m
from ragkv.kvstore.admitting import Admitting, Costs
from ragkv.kvstore.chunking import TokenChain
from ragkv.kvstore.device_tier import DeviceTier
from ragkv.kvstore.gauges import Gauges
from ragkv.kvstore.keys import TOKEN_BYTES
from ragkv.kvstore.metrics import Metrics
from ragkv.kvstore.pages import PagePool
from ragkv.kvstore.pins import NEVER, Pins
from ragkv.kvstore.planes import Plane, Window, window_of
from ragkv.kvstore.prefix_tree import (
    PAGE_NUMBER_BYTES,
    Chunk,
    DetachedRoot,
    Match,
    PrefixTree,
    descendants,
    is_detached,
    longest_shared,
)
from ragkv.kvstore.ways import furthest, longer
from ragkv.policies import EvictionPolicy, Prioritized
from ragkv.policies.admission import AdmissionPolicy, Always


class MemoryTier:
    """`pages` pages of `page_tokens` tokens and `page_bytes` bytes; a chunk owns whole pages alone, and leaves
    before its parent does. `attention_tokens`: the position at which a token's attention costs as much as its
    other work (infinity: never). `evicting` is called with every chunk that is evicted for room, while its pages
    still hold its bytes. `by_content`: whether chunks can be found by their tokens alone (`tree.contents`).
    `planes`: those beside plane 0; what one has of a chunk is a child of it.
    """

    def __init__(
        self,
        pages: int,
        policy: EvictionPolicy[Chunk],
        page_tokens: int,
        page_bytes: int,
        metrics: Metrics,
        admission: AdmissionPolicy | None = None,
        device: DeviceTier | None = None,
        attention_tokens: float = float("inf"),
        *,
        evicting: Callable[[Chunk], object] = lambda chunk: None,
        by_content: bool = False,
        planes: Sequence[Plane] = (),
    ) -> None:
        self.planes = tuple(planes)
        self.page_tokens, self.page_bytes, self.device = page_tokens, page_bytes, device
        self.version = 0  # of what `match` would answer
        self.tree = PrefixTree(by_content=by_content)
        self.pins = Pins(pages, self.pin, self.unpin)
        self._pool, self._policy = PagePool(pages), policy
        self._classes = policy if isinstance(policy, Prioritized) else None
        self._metrics, self._evicting = metrics, evicting
        self._costs, self._page = Costs(page_tokens, attention_tokens), TOKEN_BYTES * page_tokens
        self._admitting = Admitting(admission or Always(), metrics, self._costs)
        self._gauges = Gauges(metrics, page_bytes, ["full", *(plane.name for plane in self.planes)])
        self._doomed: list[Chunk] = []  # removed while pinned, parents first: each leaves once nothing pins it

    @property
    def pages(self) -> int:
        """Pages of memory, used or not."""
        return self._pool.pages

    @property
    def used(self) -> int:
        """Pages in use."""
        return self._pool.used

    @property
    def leaving(self) -> int:
        """Chunks that were removed while pinned, and keep their pages until they are unpinned."""
        return len(self._doomed)

    @property
    def classes(self) -> int:
        """Classes of priority; 1: all chunks are alike."""
        return 1 if self._classes is None else self._classes.highest + 1

    def __len__(self) -> int:
        return len(self.tree)

    def __contains__(self, chunk: Chunk) -> bool:
        return chunk in self.tree

    def match(self, namespace: bytes, chain: TokenChain, limit: int, have: int = 0) -> Match:
        """The longest prefix of `chain` up to `limit` that can be read now; the engine has `have` tokens."""
        found = longer(self.tree.match(self.tree.root(namespace), chain, limit), chain, limit)
        late = next(filter(self.pins.over, found.chunks), None) if self.pins.late else None
        if late is not None:  # its time is over, and `tick` has not come to it yet
            found = Match(found.chunks[: found.chunks.index(late)], late.position, shared=late.position)
        if self.planes:
            root, over = self.tree.root(namespace), self.pins.over if self.pins.late else None
            found = furthest(found, root, chain, limit, self.planes, have, over)
            if self.pins.late and any(map(self.pins.over, found.windows)):
                return Match((), 0, shared=found.shared)
        return found

    def reserve(
        self,
        namespace: bytes,
        chain: TokenChain,
        upto: int,
        *,
        asked: int = 0,
        priority: int = 0,
        until: float = NEVER,
    ) -> list[Chunk]:
        """Room for the chunks of the first `upto` tokens that are not stored yet.

        The last may be an open tail. They come pinned and not ready: write their bytes, then `commit` or
        `abandon` each. Where memory has no room the rest is left out, and counted. Admission has seen this request
        up to token `asked`, and is not asked again: once seen is not twice. `until`: when all of them may go; one
        that is there already, and would have to go earlier, is kept until then.
        """
        raw, cuts, whole = chain.tokens.tobytes(), chain.cuts(upto), bisect.bisect_right(chain.ends, upto)
        parent, start = self.tree.root(namespace), 0
        new: list[Chunk] = []
        for index, (end, key) in enumerate(cuts):
            tokens = raw[TOKEN_BYTES * start : TOKEN_BYTES * end]
            chunk = self.tree.get(key, parent, tokens)
            closed = index < whole and end not in chain.loose
            if chunk is not None and chunk.open and closed:
                chunk.open, chunk.stored_in = False, 0  # no tail any more: lower tiers have it elsewhere now
            if chunk is not None and self.pins.outlive(chunk, until):
                chunk.stored_in = 0  # lower tiers were told the earlier expiry
            if chunk is None:
                if index == whole and self._has_tail(parent, tokens):
                    break
                if (start < asked and self._admitting.guarded) or not self._admitting.admits(key, tokens, start):
                    self._admitting.see(cuts[index + 1 :], raw, max(asked, end))
                    break
                chunk = self.reserve_chunk(key, parent, tokens, priority)
                if chunk is None:
                    break
                chunk.open = not closed
                self.pins.expire(chunk, until)
                new.append(chunk)
            elif not chunk.ready and not chunk.pins:  # its writer gave up: write it again
                self.pin([chunk])
                new.append(chunk)
            parent, start = chunk, end
        return new

    def reserve_chunk(self, key: bytes, parent: Chunk, tokens: bytes, priority: int = 0) -> Chunk | None:
        """As `reserve_chain`, for one chunk; None where there is no room."""
        return next(iter(self.reserve_chain(parent, [(key, tokens)], priority)), None)

    def reserve_chain(self, parent: Chunk, chain: Sequence[tuple[bytes, bytes]], priority: int = 0) -> list[Chunk]:
        """Room for chunks of these keys and tokens, the first behind `parent`, each other behind the one before;
        pinned and not ready. As many as there is room for: that one is left out is counted. `priority` counts
        where the policy has classes."""
        above = [parent] if parent.pages else []
        self.pin(above)  # the victims must not be the new chunks' ancestors
        pages, free = [-(-len(tokens) // self._page) for _, tokens in chain], self._pool.free
        fit = bisect.bisect_right(list(accumulate(pages)), free + self._policy.evictable)
        new = self.tree.insert(parent, chain[:fit])
        if len(new) < len(chain):
            self._metrics.count(m.REFUSED_CHUNKS, reason=m.COLLISION if len(new) < fit else m.NO_ROOM)
        victims = self._policy.evict(sum(pages[: len(new)]) - free)
        assert victims is not None, "the policy said that so much may go"
        self._evict(victims)
        self._give_pages(new, pages, above[0] if above else None, priority)
        self.pin(new)
        self.unpin(above)
        return new

    def reserve_window(self, chunk: Chunk, plane: int, position: int) -> Chunk | None:
        """Room for what a plane has of a chunk from a position on, in place of what it had; pinned and not ready.
        None: there is no room, or what it had is in use."""
        self._drop_window(chunk, plane)
        pages = self.planes[plane - 1].shape.pages(chunk.end - position)
        self.pin([chunk])
        victims = None if window_of(chunk, plane) else self._policy.evict(pages - self._pool.free)
        new = Window(chunk, plane, position) if victims is not None else None
        if new is None:
            self._metrics.count(m.REFUSED_CHUNKS, reason=m.NO_ROOM)
        else:
            self._evict(victims or [])
            self.tree.add(new, chunk)
            self._give_pages([new], [pages], chunk, 0)
            self.pin([new])
        self.unpin([chunk])
        return new

    def shorten(self, window: Window, position: int) -> None:
        """A reserved window begins later than was thought: give back what it needs no more."""
        window.position = position
        pages = PAGE_NUMBER_BYTES * self.planes[window.plane - 1].shape.pages(len(window))
        if pages < len(window.pages):
            self._pool.give_back(window.pages[pages:], window.plane)
            window.pages = window.pages[:pages]
            self._policy.unpin(window)
            self._policy.remove(window)
            self._weigh(window, window.parent, 0)
            self._policy.pin(window)

    def reserve_detached(self, namespace: bytes, source: bytes, tokens: bytes, position: int) -> Chunk | None:
        """As `reserve_chunk`, for a copy of the chunk of key `source`, which began at token `position` of a prompt
        of `namespace`. Its ancestors are not there: it is in `tree.contents` alone, and never matches."""
        root = DetachedRoot(namespace, source, position)
        return self.reserve_chunk(root.key, root, tokens)

    def commit(self, *chunks: Chunk) -> None:
        """The bytes of reserved chunks are written: from now on they match."""
        self.tree.mark_ready(*chunks)
        self.version += 1
        self.unpin(chunks)

    def abandon(self, chunk: Chunk) -> None:
        """The bytes of a reserved chunk will not come. Where it has children, it stays, unready, until they are
        abandoned too, or the next `reserve` of the same tokens writes it."""
        self.unpin([chunk])
        each: Chunk | None = chunk
        while each is not None and not each.ready and self._drop_leaf(each, m.ABANDONED):
            each = each.parent

    def discard(self, chunk: Chunk) -> None:
        """Drop a chunk whose tokens others hold now, with what other planes have of it (but a state, which nothing
        holds anew); no error if it is gone, in use, or has children."""
        for plane in [number for number, plane in enumerate(self.planes, 1) if not plane.state]:
            self._drop_window(chunk, plane)
        self._drop_leaf(chunk, m.SUPERSEDED)

    def pin(self, chunks: Iterable[Chunk]) -> None:
        """Keep chunks (and so their ancestors) until `unpin`."""
        for chunk in chunks:
            if not chunk.pins:
                self._policy.pin(chunk)
            chunk.pins += 1

    def unpin(self, chunks: Sequence[Chunk]) -> None:
        """Take back one `pin` of each."""
        for chunk in chunks:
            chunk.pins -= 1
            if not chunk.pins:
                self._policy.unpin(chunk)
        if self._doomed and any(chunk not in self.tree for chunk in chunks):
            self._drop_doomed()

    def touch(self, match: Match, priority: int = 0, *, copy: bool = True) -> list[Chunk]:
        """Note that a match was used, by a request of that priority; if `copy`, the chunks that are due to
        be copied to the device tier."""
        self.used_by(match.chunks, priority)
        self.used_by(match.windows)
        if self.device is None or not copy or any(map(is_detached, match.chunks)):
            return []
        part = sum(map(len, match.chunks)) > match.length  # of the last is all that the engine holds
        return self.device.used_now(match.chunks[:-1] if part else match.chunks)

    def used_by(self, chunks: Sequence[Chunk], priority: int = 0) -> None:
        """Note a use of chunks, root first, by a request of that priority; their priority can only rise."""
        for chunk in chunks:
            self._policy.touch(chunk)
            chunk.hits += 1
        if self._classes is not None and priority and chunks:
            self._classes.raise_priority(chunks[-1], min(priority, self._classes.highest))

    def tick(self, now: float) -> None:
        """Unpin what has expired, and drop chunks whose time is over, with their descendants."""
        self.forget(self.pins.due(now), m.EXPIRED)

    def forget(self, chunks: Sequence[Chunk], reason: str) -> None:
        """Drop chunks with their descendants. A pinned chunk keeps its pages until it is unpinned, but never
        matches, and no owner keeps it."""
        gone: deque[Chunk] = deque()  # parents before their children, whichever was named first
        for chunk in chunks:
            for each in reversed(descendants(chunk) if chunk in self.tree else []):
                self.tree.remove(each)
                gone.appendleft(each)
        if gone:
            self._doom(list(gone), reason)
            self.pins.drop(set(gone))

    def reset(self) -> None:
        """Forget everything, as `forget` does."""
        gone = list(self.tree)
        self.tree.clear()
        self._doom(gone, m.RESET)
        self.pins.forget()

    def everything(self) -> list[Chunk]:
        """All that can be read, detached chunks and other planes' too, parents before their children."""
        return [chunk for chunk in self.tree if chunk.ready]

    def cost(self, chunk: Chunk) -> float:
        """Work to compute a chunk, in tokens at the beginning of a prompt."""
        return self._costs.work(chunk.end - chunk.position, chunk.position)

    def lose_copies(self, chunks: Iterable[Chunk]) -> None:
        """Their copies in the device tier could not be read: they are in memory only."""
        for chunk in chunks:
            self._drop_copy(chunk, m.ABANDONED)

    def report(self) -> None:
        """Set the gauges of the memory and the device tier, where anything has changed."""
        self._gauges.report(self.pins.pages, self._pool, len(self.tree), self.device)

    def check_integrity(self) -> None:
        """Raise AssertionError where tree, pages and policy disagree."""
        self._policy.check_integrity()
        self._pool.check_integrity()
        self.pins.check_integrity()
        chunks = [*self.tree, *self._doomed]
        if self.tree.contents is not None:
            self.tree.contents.check_integrity([chunk for chunk in self.everything() if not chunk.plane])
        owned = [page for chunk in chunks for page in memoryview(chunk.pages).cast("i")]
        assert len(owned) == len(set(owned)) == self._pool.used, "pages and chunks disagree"
        assert all(chunk.pins >= 0 for chunk in chunks)
        if self.device is not None:
            self.device.check_integrity()
            copied = [page for chunk in chunks for page in memoryview(chunk.device).cast("i")]
            assert len(copied) == len(set(copied)) == self.device.used, "device pages and chunks disagree"

    def _give_pages(
        self, chain: Sequence[Chunk], pages: Sequence[int], parent: Chunk | None, priority: int
    ) -> None:
        """Give so many free pages to each chunk of a chain, and the chunks to the policy."""
        taken, start = self._pool.take(sum(pages[: len(chain)]), chain[0].plane if chain else 0), 0
        priority = min(priority, self.classes - 1)
        for chunk, count in zip(chain, pages, strict=False):
            end = start + count * PAGE_NUMBER_BYTES
            chunk.pages, start = taken[start:end], end
            self._weigh(chunk, parent, priority)
            parent = chunk

    def _weigh(self, chunk: Chunk, parent: Chunk | None, priority: int) -> None:
        of_class = () if self._classes is None else (priority,)
        self._policy.insert(chunk, parent, chunk.page_count, self.cost(chunk), *of_class)

    def _evict(self, victims: list[Chunk]) -> None:
        """Let victims of the policy go; what their pages hold is lost with the next `take`."""
        for victim in victims:
            if victim.ready:
                self._evicting(victim)
            self.tree.remove(victim)
            self._free(victim)
        if victims:
            self.version += 1
            self._metrics.count(m.EVICTED_CHUNKS, len(victims), tier=m.MEMORY, reason=m.CAPACITY)

    def _has_tail(self, parent: Chunk, tokens: bytes) -> bool:
        """Whether a longer child of `parent` holds an open tail, and need not go before it."""
        child, shared = longest_shared(parent, tokens)
        return child is not None and shared == len(tokens) // TOKEN_BYTES and not self.pins.expiry(child)

    def _doom(self, gone: list[Chunk], reason: str) -> None:
        if gone:
            self._metrics.count(m.EVICTED_CHUNKS, len(gone), tier=m.MEMORY, reason=reason)
        self._doomed = gone + self._doomed  # before what may be their descendants
        self.version += 1
        self._drop_doomed()

    def _drop_doomed(self) -> None:
        """Free what was removed while pinned, where no pin holds it or a descendant any more."""
        kept: list[Chunk] = []
        held: set[Chunk | None] = set()
        for chunk in reversed(self._doomed):
            if chunk.pins or chunk in held:
                held.add(chunk.parent)
                kept.append(chunk)
            else:
                self._policy.remove(chunk)
                self._free(chunk)
        self._doomed = kept[::-1]

    def _free(self, chunk: Chunk) -> None:
        """A chunk's pages are not its own any more."""
        self._pool.give_back(chunk.pages, chunk.plane)
        self.pins.left(chunk)
        self._drop_copy(chunk, m.SUPERSEDED)

    def _drop_copy(self, chunk: Chunk, reason: str) -> None:
        if self.device is not None and self.device.drop(chunk):
            self._metrics.count(m.EVICTED_CHUNKS, tier=m.DEVICE, reason=reason)

    def _drop_window(self, chunk: Chunk, plane: int) -> None:
        window = window_of(chunk, plane)
        if window is not None and window not in self.pins.pinned and (window.ready or not window.pins):
            self.forget([window], m.SUPERSEDED)  # whoever reads it keeps its pages

    def _drop_leaf(self, chunk: Chunk, reason: str) -> bool:
        if chunk not in self.tree or chunk.pins or chunk.children:
            return False
        self.tree.remove(chunk)
        self._doom([chunk], reason)  # descendants that were removed while pinned may be left
        return True
