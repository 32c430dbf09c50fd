"""`KVCache`: the one door of `ragkv.kvstore`. An engine's connector calls only this module.

Principles:

* One thread makes all calls, the engine's scheduler. Other threads only do I/O; their results take effect in
  `tick`, and while a lookup waits. So no lock is needed, and no call but `close` blocks for more than a few ms.
* The cache decides and does I/O; it never touches the engine's memory. It says which rows of the paged tiers to
  copy; the connector has them copied and reports the result. Each `prepare_` call needs its `complete_` call.
* An engine only gets verified pages of memory. Chunks of lower tiers are first promoted into memory, while the
  request waits: a failing disk or server is a miss, never a failed request.
* From a HIT until `release`, its chunks are not evicted. From `prepare_` until `complete_`, the pages are not
  reused, even if their chunks are evicted, expire or are reset in between.
* Misses and waiting are results. Exceptions are bugs of ragkv.

The calls of a request: `lookup` (again while PENDING); `prepare_load` and `touch` if the hit is used; `release` in
any case; `prepare_store` as its KV is computed. Lengths and positions are in tokens, times in seconds.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from ragkv.kvstore import metrics as m
from ragkv.kvstore.codec import ChunkCodec
from ragkv.kvstore.content_lookup import ContentLookup, cuts
from ragkv.kvstore.device_tier import DeviceTier
from ragkv.kvstore.fusion.matching import Piece, find_moved
from ragkv.kvstore.gate import Gate
from ragkv.kvstore.io_pool import ANSWER_SECONDS, IDLE_SECONDS, Completions
from ragkv.kvstore.memory_tier import MemoryTier
from ragkv.kvstore.metrics import Metrics
from ragkv.kvstore.ordering import Ordering
from ragkv.kvstore.pages import Pages, rows
from ragkv.kvstore.pins import NEVER
from ragkv.kvstore.planes import Plane
from ragkv.kvstore.prefix_lookup import PrefixLookup
from ragkv.kvstore.prefix_tree import Chunk, Match
from ragkv.kvstore.promotion import Promotion
from ragkv.kvstore.prompt import NO_MATCH, Indices, Load, Lookup, Prompt, Result, Store
from ragkv.kvstore.storage_tier import StorageTier
from ragkv.kvstore.tiering import Tiering
from ragkv.kvstore.windows import Windows, positions_of
from ragkv.policies import EvictionPolicy
from ragkv.policies.admission import AdmissionPolicy

WAITING_SHARE = 0.5  # of memory, at most, is kept for requests that wait for lower tiers
PINNED_ALL = "ragkv.pin: a tenant's owners, or all, have pinned all that they may of the memory tier"


class KVCache:
    """The memory tier, optionally a device tier above it, and the storage `tiers` below, the fastest first.

    `pages`: the memory tier's bytes. `attention_tokens`: the position at which a token's attention costs as much
    as its other work. `planes`: those beside plane 0. `deadline`: how long a request may wait for lower tiers, in
    seconds. `by_content`: whether `lookup_content` may be called. `note` is called with the kind and the cause of
    a fault. `clock`: monotonic seconds; `wall`: seconds since the epoch. `ordering`: orders passages.
    """

    def __init__(
        self,
        pages: Pages,
        policy: EvictionPolicy[Chunk],
        tiers: Sequence[StorageTier],
        gate: Gate,
        completions: Completions,
        metrics: Metrics,
        *,
        planes: Sequence[Plane] = (),
        admission: AdmissionPolicy | None = None,
        device: DeviceTier | None = None,
        attention_tokens: float = float("inf"),
        deadline: float = 2.0,
        by_content: bool = False,
        note: Callable[[str, str], object] = lambda kind, cause: None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.gate, self.tiers, self.metrics = gate, tuple(tiers), metrics
        self._completions, self._note, self._clock, self._pages = completions, note, clock, pages
        self.memory = MemoryTier(
            len(pages),
            policy,
            pages.shape.page_tokens,
            pages.frame_bytes,
            metrics,
            admission,
            device,
            attention_tokens,
            evicting=lambda chunk: self.tiering.demote(chunk),
            by_content=by_content,
            planes=planes,
        )
        self.windows = Windows(self.memory)
        self.capacity = len(pages) * pages.shape.page_tokens  # of memory, in tokens
        self.token_bytes, self.priority_classes = pages.token_bytes, self.memory.classes  # 1: all chunks are alike
        self.ordering = Ordering(self.memory, self.tiers, completions, deadline, clock)
        codec = ChunkCodec(pages, wall)
        self.tiering = Tiering(self.memory, codec, self.tiers, completions, clock)
        self.promotion = Promotion(self.memory, codec, self.tiers, gate, completions, metrics, clock, deadline)
        self.prefix = PrefixLookup(self.memory, codec, self.promotion)
        self.content = ContentLookup(self.memory, codec, self.promotion) if by_content else None
        self._waiting: dict[Prompt, int] = {}  # prompts that wait for lower tiers: pages that are kept for them
        self._flushing: deque[Chunk] | None = None  # what the flush under way has still to look at
        for tier in self.tiers:
            tier.start()

    def __len__(self) -> int:
        """Chunks in memory."""
        return len(self.memory)

    @property
    def expiring(self) -> bool:
        """Whether expired chunks are left that one `tick` could not drop: a lookup may still find them."""
        return self.memory.pins.late

    # --- lookup ---

    def lookup(self, prompt: Prompt, computed: int, limit: int, *, idle: bool = False) -> Lookup:
        """How many tokens up to position `limit` can be loaded after the first `computed`, which the engine has.
        Chunks of lower tiers are promoted into memory, once for a prompt; PENDING while that goes on. A HIT stays
        in memory until `release`. `idle`: the engine has no other work, so this may block for `IDLE_SECONDS`."""
        self._waiting.pop(prompt, None)
        if prompt.fetch is not None:
            if self.promotion.waits(prompt.fetch, 0.0, IDLE_SECONDS if idle else 0.0):
                return self._pending(prompt)
        elif not prompt.fetched:
            match = self._match(prompt, limit, computed)
            prompt.fetched = True
            if self.tiers:
                prompt.fetch = self.prefix.fetch(prompt.namespace, prompt.chain, match, computed, limit)
            if prompt.fetch is not None and self.promotion.waits(prompt.fetch, ANSWER_SECONDS):
                return self._pending(prompt)
        tokens = self._match(prompt, limit, computed).length - computed
        hit = tokens > 0 and self._worth(prompt, tokens, computed)
        return Lookup(Result.HIT, tokens) if hit else Lookup(Result.MISS)

    def lookup_content(self, prompt: Prompt, start: int, limit: int, *, idle: bool = False) -> Lookup:
        """Which tokens of the prompt between positions `start` and `limit` are stored at any position: a HIT's are
        in `prompt.passages`, and stay in memory until `release`. Chunks of lower tiers are promoted, once for a
        prompt; PENDING while that goes on. Call it after `lookup`, and only with `by_content`."""
        contents = self.memory.tree.contents
        assert contents is not None and self.content is not None
        self._waiting.pop(prompt, None)
        answer = 0.0
        if not prompt.content_fetched:
            prompt.content_fetched, answer = True, ANSWER_SECONDS
            if self.tiers:
                prompt.content_fetch = self.content.fetch(prompt.namespace, cuts(prompt.chain, start))
        fetch = prompt.content_fetch
        if fetch is not None and self.promotion.waits(fetch, answer, IDLE_SECONDS if idle else 0.0):
            return self._pending(prompt)
        seen = len(prompt.chain.tokens), start
        if prompt.searched != seen or not all(piece.chunk in self.memory for piece in prompt.passages):
            shared = prompt.match.chunks
            prompt.passages = find_moved(contents, prompt.namespace, prompt.chain, start, limit, shared)
            prompt.searched = seen
        self._keep(prompt, [*prompt.match.chunks[-1:], *dict.fromkeys(each.chunk for each in prompt.passages)])
        return Lookup(Result.HIT, sum(map(len, prompt.passages))) if prompt.passages else Lookup(Result.MISS)

    def release(self, prompt: Prompt) -> None:
        """End a lookup: its chunks may be evicted again, but for those that a `prepare_` call has pinned."""
        self._waiting.pop(prompt, None)
        self._keep(prompt, ())
        for fetch in (prompt.fetch, prompt.content_fetch):
            if fetch is not None:
                self.promotion.let_go(fetch)

    def skip(self, prompt: Prompt) -> None:
        """Forget what was found for a prompt, which the engine will not load."""
        prompt.match, prompt.matched = NO_MATCH, ()
        self.release(prompt)

    def stored_tokens(self, prompt: Prompt, upto: int) -> int:
        """How many of a prompt's first `upto` tokens are in memory now, without a gap."""
        return self.memory.match(prompt.namespace, prompt.chain, upto).length

    # --- load ---

    def prepare_load(self, prompt: Prompt, start: int, end: int) -> list[Load]:
        """The copies of tokens `start` to `end` of the last HIT, one a paged tier. ValueError: not found."""
        match, device = prompt.match, self.memory.device
        if not start <= end <= max(start, match.length) or (
            self.memory.planes and end not in (start, match.length)
        ):
            raise ValueError(f"{end - start} tokens were promised from token {start} on, and are not to be had")
        brought = prompt.fetch.sources if prompt.fetch is not None else {}
        parts: dict[bool, list[Chunk]] = {}
        for chunk in match.chunks:
            if chunk.position < end and chunk.end > start:
                parts.setdefault(device is not None and chunk in device, []).append(chunk)
        loads = []
        for copied, chunks in parts.items():
            where, positions = self._places(chunks, device=copied)
            wanted = (positions >= start) & (positions < end)
            load = Load(where[wanted], positions[wanted], chunks, chunks[-1:], copied)
            for chunk in chunks:
                tier = brought.get(chunk, m.DEVICE if copied else m.MEMORY)
                size = min(end, chunk.end) - max(start, chunk.position)
                load.sources[tier] = load.sources.get(tier, 0) + size
            self.memory.pin(load.pinned)
            loads.append(load)
        return loads + self.windows.prepare_loads(match, start, end)

    def prepare_moved_load(self, pieces: Sequence[Piece]) -> Load:
        """The copy of `pieces`, some of `prompt.passages`. The policies of all tiers are told of their use."""
        chunks = list(dict.fromkeys(each.chunk for each in pieces))
        row_of = {chunk: rows([chunk], self.memory.page_tokens) for chunk in chunks}
        load = Load(
            np.concatenate([row_of[each.chunk][each.first : each.first + len(each)] for each in pieces]),
            np.concatenate([np.arange(each.start, each.end) for each in pieces]),
            chunks,
            chunks,
            shifts=np.repeat(np.array([each.shift for each in pieces]), [len(each) for each in pieces]),
        )
        self.memory.pin(chunks)
        self.memory.used_by(chunks)
        self.tiering.touch(chunks)
        return load

    def complete_load(self, load: Load, *, ok: bool) -> None:
        """A load has ended. If one from the device tier failed (not `ok`), the copies there are dropped."""
        self.memory.unpin(load.pinned)
        if load.device and not ok:
            self.memory.lose_copies(load.chunks)

    def touch(self, prompt: Prompt, *, exact: bool = True) -> Store | None:
        """The last HIT is used: tell the policies of all tiers. `exact`: the engine will hold the match unchanged,
        so that hot chunks can be copied from there. Returns the store into the device tier that is due, if any."""
        prompt.tail = prompt.match.whole_tail
        hot = self.memory.touch(prompt.match, prompt.priority, copy=exact)
        self.tiering.touch((*prompt.match.chunks, *prompt.match.windows))
        return self._store(prompt, hot, device=True) if hot else None

    # --- store ---

    def prepare_store(self, prompt: Prompt, upto: int, number: int = 0) -> Store | None:
        """Reserve memory for those of a prompt's first `upto` tokens that are not stored; None: there are none, or
        no room. `number`: the chunks are written to lower tiers after `confirm` with this number or a higher."""
        until = NEVER if prompt.ttl is None else self._clock() + prompt.ttl
        new = self.memory.reserve(
            *(prompt.namespace, prompt.chain, upto),
            asked=prompt.admitted,
            priority=prompt.priority,
            until=until,
        )
        prompt.admitted = max((end for end in prompt.chain.ends if end <= upto), default=0)
        if not new:
            return None
        tail = prompt.tail
        covers = tail is not None and any(chunk.parent is tail.parent for chunk in new)
        store = self._store(prompt, new)
        store.superseded, store.number = tail if covers else None, number
        if new[-1].open:
            prompt.tail = new[-1]
        elif covers:
            prompt.tail = None
        return store

    def complete_store(self, store: Store, *, ok: bool) -> None:
        """A store has ended: its chunks can be found (`ok`), or are dropped."""
        if store.device:
            assert self.memory.device is not None
            for chunk, pages in zip(store.chunks, store.pages, strict=True):
                self.memory.device.made(chunk, pages, ok=ok)
        elif not ok:
            for chunk in reversed(store.chunks):
                self.memory.abandon(chunk)
        else:
            self._stored(store)

    def pin(self, prompt: Prompt, limit: int) -> None:
        """Pin what memory holds of a prompt's first `limit` tokens; what is stored later is pinned then."""
        match = self._match(prompt, limit, 0)
        self._pin(prompt, (*match.chunks, *match.windows))

    def unpin(self, tenant: bytes, owner: str) -> None:
        """Release all pins of a tenant's owner."""
        self.memory.pins.release(owner, tenant)

    # --- all of it ---

    def tick(self) -> None:
        """Take in the results of I/O, retry paused tiers, drop expired chunks, and update the gauges. Call it
        before lookups, and once in each step."""
        self._completions.drain()
        for tier in self.tiers:
            tier.tick()
        self.memory.tick(self._clock())
        if self.tiering.aliases is not None:
            self.tiering.aliases.order()
        self.memory.report()

    @property
    def unconfirmed(self) -> int:
        """The number of chunks in memory that wait for `confirm`."""
        return self.tiering.unconfirmed

    def confirm(self, number: int) -> None:
        """The chunks stored under this number or a lower one were computed with the weights of their namespace."""
        self.tiering.confirm(number)

    def invalidate(self) -> None:
        """Drop the chunks that wait for `confirm`, with their descendants: the weights had changed."""
        self.tiering.invalidate()

    def reset(self) -> None:
        """Drop all chunks in memory. Lower tiers keep theirs."""
        self.tiering.invalidate()
        self.memory.reset()

    def flush(self) -> bool:
        """Write some of the chunks that only memory held at the first call. Whether all are written."""
        if self._flushing is None:
            self._flushing = deque(self.memory.everything())
        return self.tiering.flush(self._flushing) and not any(tier.queued for tier in self.tiers)

    def end_flush(self) -> None:
        """End a flush, complete or not."""
        self._flushing = None

    def close(self, seconds: float) -> bool:
        """Write what no lower tier has, for at most `seconds`, and release all. Whether all was written."""
        written = self.tiering.close(seconds)
        self._pages.close()
        return written

    def _match(self, prompt: Prompt, limit: int, computed: int) -> Match:
        """Match in memory, and keep it; an engine asks again in every step while a request waits."""
        seen = limit, computed, self.memory.version
        if prompt.matched != seen:
            prompt.match = self.memory.match(prompt.namespace, prompt.chain, limit, computed)
            prompt.matched = seen
        self._keep(prompt, (*prompt.match.chunks[-1:], *prompt.match.windows))
        return prompt.match

    def _keep(self, prompt: Prompt, chunks: Sequence[Chunk]) -> None:
        """Keep these chunks for a prompt, with their ancestors, and nothing else."""
        if tuple(chunks) != prompt.kept:
            self.memory.pin(chunks)
            self.memory.unpin(prompt.kept)
            prompt.kept = tuple(chunks)

    def _pending(self, prompt: Prompt) -> Lookup:
        """A prompt waits. Where too many do, what is evicted meanwhile is looked up again."""
        pages = sum(chunk.page_count for chunk in prompt.match.chunks)
        if sum(self._waiting.values()) + pages <= WAITING_SHARE * self.memory.pages:
            self._waiting[prompt] = pages
        else:
            self.release(prompt)
        return Lookup(Result.PENDING)

    def _worth(self, prompt: Prompt, tokens: int, start: int) -> bool:
        """What the gate says of loading from memory, once a prompt; what is too small may grow, though."""
        decision = None
        small = self.gate.small(tokens)
        if small:
            decision, prompt.small = None if prompt.small else "small", True
        elif prompt.declined is None:
            prompt.declined = not self.gate.allows(tokens, m.MEMORY, start=start)
            decision = "decline" if prompt.declined else "load"
        if decision is not None:
            self.metrics.count(m.GATE_DECISIONS, tier=m.MEMORY, decision=decision)
        return not small and not prompt.declined

    def _store(self, prompt: Prompt, chunks: list[Chunk], *, device: bool = False) -> Store:
        pages = [chunk.device for chunk in chunks if device]
        return Store(prompt, *self._places(chunks, device=device), chunks, device, pages)

    def _places(self, chunks: Sequence[Chunk], *, device: bool) -> tuple[Indices, Indices]:
        """Rows in a paged tier, and positions in the prompt, of all tokens of chunks of one chain."""
        return rows(chunks, self.memory.page_tokens, device=device), positions_of(chunks)

    def _stored(self, store: Store) -> None:
        prompt = store.prompt
        for chunk in store.chunks:
            self.memory.commit(chunk)
            if not store.plane:
                self.metrics.count(m.STORED_TOKENS, len(chunk))
            if prompt.ttl is not None and chunk in self.memory:
                self.memory.pins.expire(chunk, self._clock() + prompt.ttl)
        self._pin(prompt, store.chunks)
        self.tiering.stored(store.chunks, store.number)
        if store.superseded is not None:
            self.memory.discard(store.superseded)

    def _pin(self, prompt: Prompt, chunks: Sequence[Chunk]) -> None:
        """Pin chunks for the prompt's owner, as far as they are wanted and allowed."""
        if (pin := prompt.pin) is None:
            return
        for chunk in chunks:
            if (pin.end is not None and chunk.position >= pin.end) or chunk not in self.memory:
                continue
            if not self.memory.pins.hold(pin.owner, chunk, self._clock() + pin.seconds, prompt.tenant):
                prompt.pins_refused = True
                self._note("pins", PINNED_ALL)
                return
