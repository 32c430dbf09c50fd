"""The scheduler side: decides what to load and what to store, and keeps the books of what is under way."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ragkv.connectors.vllm.faults import Faults
from ragkv.connectors.vllm.hints import named_boundaries
from ragkv.connectors.vllm.protocol import Indices, Job, StepOrders, StepReport
from ragkv.kvstore import metrics as m
from ragkv.kvstore.catalogue import Chunk, Match, rows
from ragkv.kvstore.chunking import Chunker, TokenChain
from ragkv.kvstore.hierarchy import Hierarchy
from ragkv.kvstore.keys import as_tokens
from ragkv.kvstore.metrics import Metrics

NO_MATCH = Match((), 0)


@dataclass(slots=True)
class Tracked:
    """A request under way. `computed`: what vLLM had itself at the last lookup; `seen`: what that lookup was
    of; `stored`: first tokens that need no look any more; `tail`: the open tail stored or read last."""

    request: Any
    namespace: bytes
    chain: TokenChain
    blocks: list[int] = field(default_factory=list)
    match: Match = NO_MATCH
    computed: int = 0
    seen: tuple[int, int] = (-1, -1)
    stored: int = 0
    tail: Chunk | None = None


@dataclass(slots=True)
class UnderWay:
    """A job given out: what it fills (stores) or reads (loads), what it makes superfluous, who still works."""

    chunks: list[Chunk]
    workers: int
    is_store: bool
    superseded: Chunk | None = None
    failed: bool = False


class SchedulerSide:
    """One engine's head. `namespace_of` gives a request's namespace, or None to leave the request alone."""

    def __init__(
        self,
        hierarchy: Hierarchy,
        chunker: Chunker,
        namespace_of: Callable[[Any], bytes | None],
        block_tokens: int,
        workers: int,
        metrics: Metrics,
        faults: Faults,
    ) -> None:
        self._hierarchy, self._chunker, self._namespace_of = hierarchy, chunker, namespace_of
        self._block_tokens, self._workers = block_tokens, workers
        self._metrics, self._faults = metrics, faults
        self._tracked: dict[str, Tracked | None] = {}
        self._under_way: dict[int, UnderWay] = {}
        self._orders = StepOrders(block_tokens=block_tokens)
        self._jobs = 0

    def lookup(self, request: Any, computed: int) -> int:
        """Tokens beyond the first `computed` that can be loaded: at most all of the prompt but its last."""
        tracked = self._track(request)
        if tracked is None:
            return 0
        tracked.computed = computed
        seen = (request.num_tokens, self._hierarchy.version)
        if tracked.seen != seen:  # vLLM asks again in every step while a request waits for blocks
            self._extend(tracked)
            tracked.match = self._hierarchy.match(tracked.namespace, tracked.chain, request.num_tokens - 1)
            tracked.seen = seen
        return max(0, tracked.match.length - computed)

    def allocated(self, request: Any, blocks: list[int], external: int) -> None:
        """vLLM took a request up, with these blocks, and counts on `external` tokens of the last lookup."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return
        start, end = tracked.computed, tracked.computed + external
        self._metrics.count(m.LOOKUPS, result="hit" if external else "miss")
        self._metrics.count(m.LOOKED_UP_TOKENS, request.num_tokens - start)
        tracked.stored = 0
        if not external:
            return
        chunks, first = _overlapping(tracked.match.chunks, start, end)
        job = self._new_job(
            rows(chunks, self._hierarchy.page_tokens)[start - first : end - first],
            _slots(blocks, start, end, self._block_tokens),
        )
        self._hierarchy.touch(tracked.match)
        self._hierarchy.pin(chunks[-1:])  # and so all before it
        self._under_way[job.id] = UnderWay(chunks[-1:], self._workers, is_store=False)
        self._orders.loads.append(job)
        tracked.tail = tracked.match.whole_tail
        self._metrics.count(m.HIT_TOKENS, external, tier=m.MEMORY)

    def disappoint(self, request: Any, blocks: list[int], external: int) -> None:
        """Tell vLLM to compute what `allocated` failed to load. Must not fail itself."""
        tracked = self._tracked.get(request.request_id)
        start = tracked.computed if tracked is not None else 0
        self._orders.invalid_blocks.update(blocks[start // self._block_tokens :] if external else ())

    def orders(self, scheduler_output: Any) -> StepOrders:
        """What the workers shall do in this step."""
        for request_id, after in self._progress(scheduler_output):
            tracked = self._tracked.get(request_id)
            if tracked is not None:
                self._store_new(tracked, min(after, tracked.request.num_tokens))
        return self.take_orders()

    def take_orders(self) -> StepOrders:
        """What has been ordered so far."""
        orders, self._orders = self._orders, StepOrders(block_tokens=self._block_tokens)
        return orders

    def finished(self, request: Any, blocks: list[int]) -> bool:
        """A request ended. True: vLLM must keep its blocks until the store of its last tokens is done."""
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None:
            return False
        tracked.blocks = blocks
        # The last token was sampled, not computed; what runs ahead of the others was thrown away.
        upto = min(request.num_tokens - 1, request.num_computed_tokens)
        self._extend(tracked)
        return self._store(tracked, upto, finishes=request.request_id)

    def report(self, report: StepReport) -> None:
        """What the workers have done."""
        if report.tainted:
            self.distrust()
        for job, workers in report.done.items():
            under_way = self._under_way.get(job)
            if under_way is None:
                continue
            under_way.workers -= workers
            under_way.failed |= job in report.failed
            if under_way.workers <= 0:
                del self._under_way[job]
                try:
                    self._settle(under_way)
                except Exception as error:  # one job's trouble must not lose the others
                    self._faults.note("settle", error)

    def distrust(self) -> None:
        """Some KV was promised and never came, so what was computed since may be wrong: keep none of it.

        vLLM computes it anew, but other requests may share the blocks, so nothing under way is stored.
        """
        for under_way in self._under_way.values():
            under_way.failed |= under_way.is_store
        self._tracked = dict.fromkeys(self._tracked)

    def reset(self) -> None:
        """Forget all KV; what requests under way still compute is not stored (their prefix may be outdated)."""
        self._hierarchy.reset()
        self._tracked = dict.fromkeys(self._tracked)

    def _track(self, request: Any) -> Tracked | None:
        request_id = request.request_id
        if request_id not in self._tracked:
            namespace = self._namespace_of(request)
            if namespace is None:
                self._tracked[request_id] = None
                return None
            named, problem = named_boundaries(request.kv_transfer_params)
            if problem is not None:
                self._faults.note("hints", problem)
            self._tracked[request_id] = Tracked(request, namespace, TokenChain(namespace, self._chunker, named))
        return self._tracked[request_id]

    def _extend(self, tracked: Tracked) -> None:
        known = len(tracked.chain.tokens)
        if known < tracked.request.num_tokens:
            tracked.chain.extend(as_tokens(tracked.request.all_token_ids[known:]))

    def _progress(self, scheduler_output: Any) -> list[tuple[str, int]]:
        """(request, tokens computed after this step) of all that run in it; keeps the block tables."""
        scheduled = scheduler_output.num_scheduled_tokens
        after = []
        for new in scheduler_output.scheduled_new_reqs:
            self._set_blocks(new.req_id, new.block_ids, replace=True)
            after.append((new.req_id, new.num_computed_tokens + scheduled[new.req_id]))
        cached = scheduler_output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            replace = request_id in cached.resumed_req_ids
            self._set_blocks(request_id, cached.new_block_ids[index], replace=replace)
            after.append((request_id, cached.num_computed_tokens[index] + scheduled[request_id]))
        return after

    def _set_blocks(self, request_id: str, blocks: Any, *, replace: bool) -> None:
        tracked = self._tracked.get(request_id)
        if tracked is None or blocks is None:
            return
        if replace:
            tracked.blocks = list(blocks[0])
        else:
            tracked.blocks.extend(blocks[0])

    def _store_new(self, tracked: Tracked, upto: int) -> None:
        """Store what a step completes: whole chunks now and then, the open tail when the prompt ends."""
        prompt_ends = tracked.stored < tracked.request.num_prompt_tokens <= upto
        if not prompt_ends and upto - tracked.stored < self._chunker.max_tokens:
            return
        self._extend(tracked)
        if not prompt_ends:
            upto = max((end for end in tracked.chain.ends if end <= upto), default=0)
        self._store(tracked, upto)
        tracked.stored = max(tracked.stored, upto)

    def _store(self, tracked: Tracked, upto: int, finishes: str | None = None) -> bool:
        """Order the store of what the first `upto` tokens have new; False where that is nothing."""
        upto = min(upto, len(tracked.blocks) * self._block_tokens)
        new = self._hierarchy.reserve(tracked.namespace, tracked.chain, upto)
        if not new:
            return False
        chunks = [chunk for _, chunk in new]
        slots = [_slots(tracked.blocks, at, at + len(chunk), self._block_tokens) for at, chunk in new]
        job = self._new_job(rows(chunks, self._hierarchy.page_tokens), np.concatenate(slots), finishes)
        tail, last = tracked.tail, chunks[-1]
        covers = tail is not None and any(chunk.parent is tail.parent for chunk in chunks)
        superseded = tail if covers else None
        self._under_way[job.id] = UnderWay(chunks, self._workers, is_store=True, superseded=superseded)
        self._orders.stores.append(job)
        if last.key not in tracked.chain.keys:
            tracked.tail = last
        elif covers:
            tracked.tail = None
        return True

    def _settle(self, done: UnderWay) -> None:
        if not done.is_store:
            self._hierarchy.unpin(done.chunks)
        elif done.failed:
            for chunk in reversed(done.chunks):
                self._hierarchy.abandon(chunk)
        else:
            for chunk in done.chunks:
                self._hierarchy.commit(chunk)
            if done.superseded is not None:
                self._hierarchy.discard(done.superseded)

    def _new_job(self, tier_rows: Indices, slots: Indices, finishes: str | None = None) -> Job:
        if len(tier_rows) != len(slots):
            raise ValueError(f"job: {len(tier_rows)} rows for {len(slots)} slots")
        self._jobs += 1
        return Job(self._jobs, tier_rows, slots, finishes)


def _overlapping(chunks: tuple[Chunk, ...], start: int, end: int) -> tuple[list[Chunk], int]:
    """The chunks of a chain that hold any of the tokens from `start` to `end`, and where the first begins."""
    found: list[Chunk] = []
    first = position = 0
    for chunk in chunks:
        following = position + len(chunk)
        if following > start and position < end:
            if not found:
                first = position
            found.append(chunk)
        position = following
    return found, first


def _slots(blocks: list[int], start: int, end: int, block_tokens: int) -> Indices:
    """Slots of the tokens from `start` to `end` of a request with these blocks; int64."""
    positions = np.arange(start, end, dtype=np.int64)
    found: Indices = np.asarray(blocks, dtype=np.int64)[positions // block_tokens]
    return found * block_tokens + positions % block_tokens
