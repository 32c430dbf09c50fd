"""The scheduler side: decides what to load and what to store, and keeps the books of what is under way."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ragkv.connectors.vllm.documents import DocumentStats
from ragkv.connectors.vllm.faults import Faults
from ragkv.connectors.vllm.fusing import Fusing, saved
from ragkv.connectors.vllm.hints import Hints, read_hints
from ragkv.connectors.vllm.protocol import Indices, Job, StepOrders, StepReport, slots_between
from ragkv.connectors.vllm.tracking import (
    ANSWER_SECONDS,
    IDLE_SECONDS,
    Recorder,
    Tracked,
    UnderWay,
    progress,
)
from ragkv.connectors.vllm.turns import Turns
from ragkv.kvstore import metrics as m
from ragkv.kvstore.catalogue import Chunk, rows, starts
from ragkv.kvstore.chunking import Chunker, TokenChain
from ragkv.kvstore.fusion.plan import Plan
from ragkv.kvstore.metrics import Metrics
from ragkv.kvstore.placement import Placement

Part = tuple[Chunk, int, int, int]  # a chunk, where it begins, and from which to which token it is wanted


class SchedulerSide:
    """One engine's head. `namespace_of` gives a request's namespace, or None to leave the request alone.
    `recorder`, where given, is told every prompt once. `stores`, `loads`: what the engine's role lets it do."""

    def __init__(
        self,
        placement: Placement,
        chunker: Chunker,
        namespace_of: Callable[[Any], bytes | None],
        block_tokens: int,
        workers: int,
        metrics: Metrics,
        faults: Faults,
        recorder: Recorder | None = None,
        clock: Callable[[], float] = time.monotonic,
        fusing: Fusing | None = None,
        documents: DocumentStats | None = None,
        *,
        stores: bool = True,
        loads: bool = True,
    ) -> None:
        self._placement, self._hierarchy = placement, placement.hierarchy
        self._chunker, self._namespace_of = chunker, namespace_of
        self._block_tokens, self._workers = block_tokens, workers
        self._metrics, self._faults, self._recorder, self._clock = metrics, faults, recorder, clock
        self.fusing, self._documents, self._turns = fusing, documents, Turns(metrics)
        self._tracked: dict[str, Tracked | None] = {}
        self._under_way: dict[int, UnderWay] = {}
        self._orders = StepOrders(block_tokens=block_tokens)
        self._jobs, self._idle = 0, False
        self._stores, self._loads = stores, loads

    def lookup(self, request: Any, computed: int) -> int | None:
        """Tokens beyond the first `computed` that can be loaded: at most all of the prompt but its last. None: ask
        again, more is on its way from a lower tier."""
        self._placement.tick()
        tracked = self._track(request)
        if tracked is None:
            return 0
        tracked.computed = computed
        if not self._loads:
            return 0
        if self.fusing is not None:
            self.fusing.inherit(tracked, computed)
        if tracked.fetch is not None:
            if self._placement.waits(tracked.fetch, 0.0, IDLE_SECONDS if self._idle else 0.0):
                return None
        elif not tracked.fetched:
            self._look_up(tracked)
            if self._fetch(tracked):
                return None
        self._look_up(tracked)
        found = max(0, tracked.match.length - computed)
        exact = computed + (found if found and self._worth(tracked, found) else 0)
        if self.fusing is None:
            return exact - computed
        upto = self.fusing.lookup(tracked, exact, self._tracked, idle=self._idle)
        return None if upto is None else upto - computed

    def allocated(self, request: Any, blocks: list[int], external: int) -> None:
        """vLLM took a request up, with these blocks, and counts on `external` tokens of the last lookup."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return
        start, end = tracked.computed, tracked.computed + external
        self._metrics.count(m.LOOKUPS, result="hit" if external else "miss")
        self._metrics.count(m.LOOKED_UP_TOKENS, request.num_tokens - start)
        tracked.stored = tracked.mended = 0
        self._turns.count(tracked, external)
        if not external:
            return
        plan = tracked.plan
        end = end if plan is None else plan.exact
        if end > max(start, tracked.match.length) or (plan is not None and plan.end != start + external):
            raise ValueError(f"{external} tokens were promised behind {start}, and are not to be had")
        chunks = tracked.match.chunks
        by_tier = self._by_tier(tracked, start, end)
        for tier, tokens in tracked.sources.items():
            self._metrics.count(m.HIT_TOKENS, tokens, tier=tier)
        for device, parts in by_tier:
            slots = [slots_between(blocks, at, upto, self._block_tokens) for _, _, at, upto in parts]
            which = [
                rows([chunk], self._hierarchy.page_tokens, device=device)[at - first : upto - first]
                for chunk, first, at, upto in parts
            ]
            job = self._new_job(np.concatenate(which), np.concatenate(slots), device=device)
            self._hierarchy.pin(chunks[-1:])  # and so all before it
            self._under_way[job.id] = UnderWay(list(chunks[-1:]), self._workers, is_store=False)
            self._orders.loads.append(job)
        if plan is not None:
            self._fuse(tracked, plan, blocks)
        if self._documents is not None:
            for each in tracked.hints.documents:
                self._documents.note(each.id, saved(each.start, each.end, start, end, plan))
        if end > start:
            tracked.tail = tracked.match.whole_tail
            if tracked.exact_upto(end) == end:
                self._copy_hot(tracked, blocks)
            else:  # the engine's blocks hold it, but not exactly
                self._hierarchy.used(chunks, tracked.hints.priority)
            self._placement.used(chunks)
            self._keep(tracked.hints, chunks, starts(chunks))

    def _fuse(self, tracked: Tracked, plan: Plan, blocks: list[int]) -> None:
        """Order what a plan moves to be loaded, and mended."""
        assert self.fusing is not None
        chunks, which, slots, shifts = self.fusing.moves(tracked, blocks)
        job = self._new_job(which, slots, shifts=shifts)
        self._hierarchy.pin(chunks)
        self._under_way[job.id] = UnderWay(chunks, self._workers, is_store=False)
        self._orders.loads.append(job)
        self._orders.fusions.append(self.fusing.order(tracked, blocks))
        self._hierarchy.used(chunks)
        self._placement.used(chunks)
        tracked.sources[m.MEMORY] = tracked.sources.get(m.MEMORY, 0) + plan.end - plan.exact

    def sources(self, request: Any) -> dict[str, int]:
        """Tokens by the tier that they came from, as last allocated."""
        tracked = self._tracked.get(request.request_id)
        return {} if tracked is None else tracked.sources

    def disown(self, request: Any) -> None:
        """Its lookup failed: nothing of a request is kept. Must not fail itself."""
        self._tracked[request.request_id] = None

    def disappoint(self, request: Any, blocks: list[int], external: int) -> None:
        """Tell vLLM to compute what `allocated` failed to load. Must not fail itself."""
        tracked = self._tracked.get(request.request_id)
        start = tracked.computed if tracked is not None else 0
        self._orders.invalid_blocks.update(blocks[start // self._block_tokens :] if external else ())

    def orders(self, scheduler_output: Any) -> StepOrders:
        """What the workers shall do in this step."""
        self._placement.tick()
        self._orders.tokens = scheduler_output.total_num_scheduled_tokens
        self._idle = not scheduler_output.total_num_scheduled_tokens
        for request_id, after in progress(self._tracked, scheduler_output):
            tracked = self._tracked.get(request_id)
            if tracked is not None:
                self._store_new(tracked, min(after, tracked.request.num_tokens))
        return self.take_orders()

    def take_orders(self) -> StepOrders:
        """What has been ordered so far."""
        orders, self._orders = self._orders, StepOrders(block_tokens=self._block_tokens)
        return orders

    def finished(self, request: Any, blocks: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """A request ended. True: vLLM must keep its blocks until the store of its last tokens is done. And what
        its response tells, where it gave hints or was to be fused."""
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None:
            return False, None
        tracked.blocks = blocks
        # The last token was sampled, not computed; what runs ahead of the others was thrown away.
        upto = min(request.num_tokens - 1, request.num_computed_tokens)
        tracked.extend()
        told = None if self.fusing is None else self.fusing.tell(tracked, upto)
        return self._store(tracked, upto, finishes=request.request_id), told

    def report(self, report: StepReport) -> None:
        """What the workers have done."""
        if report.tainted:
            self.distrust()
        for tokens, seconds in report.prefills:
            self._placement.gate.prefill.note(tokens, seconds)
        for tokens, seconds in report.copies:
            self._placement.gate.copy.note(tokens, seconds)
        for work, seconds in report.fusions:
            self._placement.gate.fuse.note(work, seconds)
        if report.unfused and self.fusing is not None:
            self.fusing.failed(report.unfused)
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

    def close(self, seconds: float) -> bool:
        """Write down what must survive, within a bound. Whether all of it was."""
        if self._recorder is not None:
            self._recorder.close()
        return self._placement.close(seconds)

    def _track(self, request: Any) -> Tracked | None:
        request_id = request.request_id
        if request_id not in self._tracked:
            namespace = self._namespace_of(request)
            if namespace is None:
                self._tracked[request_id] = None
                return None
            hints, problem = read_hints(request.kv_transfer_params)
            if problem is not None:
                self._faults.note("hints", problem)
            if hints.priority and self._hierarchy.classes == 1:
                self._faults.note(
                    "hints", f"priority = {hints.priority}; memory.priorities = 1: there are no classes"
                )
            if hints.unpin is not None:
                self._hierarchy.holds.release(hints.unpin)
            chain = TokenChain(namespace, self._chunker, hints.boundaries)
            tracked = self._tracked[request_id] = Tracked(request, namespace, chain, hints)
            tracked.extend()
            self._turns.begin(tracked)
            if self._recorder is not None:
                self._recorder.record(namespace, chain)
        return self._tracked[request_id]

    def _look_up(self, tracked: Tracked) -> None:
        """Match in memory; vLLM asks again in every step while a request waits for blocks."""
        request = tracked.request
        seen = (request.num_tokens, self._hierarchy.version)
        if tracked.seen != seen:
            tracked.extend()
            tracked.match = self._hierarchy.match(tracked.namespace, tracked.chain, request.num_tokens - 1)
            tracked.seen = seen

    def _fetch(self, tracked: Tracked) -> bool:
        """Bring up what lower tiers have, once a request; whether it should wait."""
        tracked.fetched = True
        tracked.fetch = self._placement.fetch(
            tracked.namespace, tracked.chain, tracked.match, tracked.computed, tracked.request.num_tokens - 1
        )
        return tracked.fetch is not None and self._placement.waits(tracked.fetch, ANSWER_SECONDS)

    def _worth(self, tracked: Tracked, tokens: int) -> bool:
        """What the gate says of loading from memory, once a request."""
        if tracked.declined is None:
            tracked.declined = not self._placement.gate.allows(tokens, m.MEMORY)
            decision = "decline" if tracked.declined else "load"
            self._metrics.count(m.GATE_DECISIONS, tier=m.MEMORY, decision=decision)
        return not tracked.declined

    def _by_tier(self, tracked: Tracked, start: int, end: int) -> list[tuple[bool, list[Part]]]:
        """The parts of a match from token `start` to `end`, of the device tier and of memory."""
        found: dict[bool, list[Part]] = {True: [], False: []}
        device, brought = self._hierarchy.device, tracked.fetch.sources if tracked.fetch is not None else {}
        tracked.sources = {}
        for chunk, first in zip(tracked.match.chunks, starts(tracked.match.chunks), strict=True):
            at, upto = max(start, first), min(end, first + len(chunk))
            if at < upto:
                on_device = device is not None and chunk in device
                found[on_device].append((chunk, first, at, upto))
                tier = brought.get(chunk, m.DEVICE if on_device else m.MEMORY)
                tracked.sources[tier] = tracked.sources.get(tier, 0) + upto - at
        return [(on_device, parts) for on_device, parts in found.items() if parts]

    def _copy_hot(self, tracked: Tracked, blocks: list[int]) -> None:
        """Note the use of a match, and order copies to the device tier of the chunks that are hot now. They are
        taken from the engine's cache, behind the step in which they are loaded."""
        hot = self._hierarchy.touch(tracked.match, tracked.hints.priority)
        if not hot:
            return
        places = dict(zip(tracked.match.chunks, starts(tracked.match.chunks), strict=True))
        where = [slots_between(blocks, places[c], places[c] + len(c), self._block_tokens) for c in hot]
        job = self._new_job(
            rows(hot, self._hierarchy.page_tokens, device=True), np.concatenate(where), device=True
        )
        pages = [chunk.device for chunk in hot]
        self._under_way[job.id] = UnderWay(hot, self._workers, is_store=True, pages=pages)
        self._orders.stores.append(job)

    def _keep(self, hints: Hints, chunks: Sequence[Chunk], starts: Sequence[int]) -> None:
        """Pin chunks as a request asks."""
        if hints.pin is None:
            return
        until = self._clock() + hints.pin.seconds
        for chunk, start in zip(chunks, starts, strict=True):
            if (hints.pin.end is not None and start >= hints.pin.end) or chunk not in self._hierarchy:
                return
            if not self._hierarchy.holds.hold(hints.pin.owner, chunk, until):
                self._faults.note("pins", "owners have pinned all that they may of the memory tier")
                return

    def _store_new(self, tracked: Tracked, upto: int) -> None:
        """Store what a step completes: whole chunks now and then, the open tail when the prompt ends."""
        prompt_ends = tracked.stored < tracked.request.num_prompt_tokens <= upto
        if not prompt_ends and upto - tracked.stored < self._chunker.max_tokens:
            return
        tracked.extend()
        if not prompt_ends:
            upto = max((end for end in tracked.chain.ends if end <= upto), default=0)
        self._store(tracked, upto)
        tracked.stored = max(tracked.stored, upto)

    def _store(self, tracked: Tracked, upto: int, finishes: str | None = None) -> bool:
        """Order the store of what the first `upto` tokens have new; False where that is nothing."""
        upto = tracked.exact_upto(min(upto, len(tracked.blocks) * self._block_tokens)) if self._stores else 0
        new = self._hierarchy.reserve(
            tracked.namespace, tracked.chain, upto, asked=tracked.asked, priority=tracked.hints.priority
        )
        tracked.asked = max((end for end in tracked.chain.ends if end <= upto), default=0)
        if not new:
            return False
        chunks = [chunk for _, chunk in new]
        slots = [slots_between(tracked.blocks, at, at + len(chunk), self._block_tokens) for at, chunk in new]
        job = self._new_job(rows(chunks, self._hierarchy.page_tokens), np.concatenate(slots), finishes)
        tail, last = tracked.tail, chunks[-1]
        covers = tail is not None and any(chunk.parent is tail.parent for chunk in chunks)
        superseded = tail if covers else None
        under_way = UnderWay(chunks, self._workers, is_store=True, superseded=superseded, hints=tracked.hints)
        under_way.starts, under_way.namespace = [at for at, _ in new], tracked.namespace
        self._under_way[job.id] = under_way
        self._orders.stores.append(job)
        if last.open:
            tracked.tail = last
        elif covers:
            tracked.tail = None
        return True

    def _settle(self, done: UnderWay) -> None:
        if not done.is_store:
            self._hierarchy.unpin(done.chunks)
        elif done.pages:
            assert self._hierarchy.device is not None
            for chunk, pages in zip(done.chunks, done.pages, strict=True):
                self._hierarchy.device.made(chunk, pages, well=not done.failed)
        elif done.failed:
            for chunk in reversed(done.chunks):
                self._hierarchy.abandon(chunk)
        else:
            self._stored(done)

    def _stored(self, done: UnderWay) -> None:
        for chunk in done.chunks:
            self._hierarchy.commit(chunk)
            self._metrics.count(m.STORED_TOKENS, len(chunk))
            if done.hints.ttl is not None and chunk in self._hierarchy:
                self._hierarchy.holds.expire(chunk, self._clock() + done.hints.ttl)
        self._keep(done.hints, done.chunks, done.starts)
        self._placement.stored(done.namespace, zip(done.starts, done.chunks, strict=True))
        if done.superseded is not None:
            self._hierarchy.discard(done.superseded)

    def _new_job(
        self,
        tier_rows: Indices,
        slots: Indices,
        finishes: str | None = None,
        *,
        device: bool = False,
        shifts: Indices | None = None,
    ) -> Job:
        if len(tier_rows) != len(slots):
            raise ValueError(f"job: {len(tier_rows)} rows for {len(slots)} slots")
        self._jobs += 1
        return Job(self._jobs, tier_rows, slots, finishes, device, shifts)
