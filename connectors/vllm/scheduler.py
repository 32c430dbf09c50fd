"""The scheduler side: decides what to load and what to store.

A lookup promises tokens; vLLM then takes the request up, and lets it wait while they are loaded. What was found is
kept from the lookup on. What was promised and does not come is told before the request has run: vLLM computes it.
"""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from ragkv.config.settings import HINT_NAMES
from ragkv.connectors.vllm.control import Control
from ragkv.connectors.vllm.documents import DocumentStats
from ragkv.connectors.vllm.fusing import saved
from ragkv.connectors.vllm.heeding import Heed
from ragkv.connectors.vllm.hints import read_hints, with_problem
from ragkv.connectors.vllm.jobs import Jobs
from ragkv.connectors.vllm.loading import Load
from ragkv.connectors.vllm.messages import Job, StepOrders, slots_between
from ragkv.connectors.vllm.tracking import (
    ANSWER_SECONDS,
    IDLE_SECONDS,
    NO_MATCH,
    Recorder,
    Tracked,
    UnderWay,
    progress,
    tenant_of,
)
from ragkv.connectors.vllm.turns import Turns
from ragkv.kvstore import metrics as m
from ragkv.kvstore.catalogue import Chunk, rows, starts
from ragkv.kvstore.chunking import Chunker, TokenChain
from ragkv.kvstore.fusion.plan import Cover, Plan
from ragkv.kvstore.holds import NEVER

Part = tuple[Chunk, int, int, int]  # a chunk, where it begins, and from which to which token it is wanted
HELD_SHARE = 0.5  # of memory, at most, is kept for requests that wait for lower tiers


class SchedulerSide(Jobs):
    """One engine's head. `namespace_of` gives a request's namespace, or None to leave the request alone.
    `recorder`, where given, is told every prompt once. `stores`, `loads`: what the engine's role lets it do.
    `allow`: kinds of hints that count. The rest is as for `Jobs`."""

    def __init__(
        self,
        *args: Any,
        chunker: Chunker,
        namespace_of: Callable[[Any], bytes | None],
        recorder: Recorder | None = None,
        documents: DocumentStats | None = None,
        stores: bool = True,
        loads: bool = True,
        allow: Collection[str] = HINT_NAMES,
        control: Control | None = None,
        **more: Any,
    ) -> None:
        super().__init__(*args, **more)
        self._chunker, self._namespace_of, self._recorder = chunker, namespace_of, recorder
        self._documents, self._turns = documents, Turns(self._metrics)
        self._duties, self._allow = (loads, stores), allow
        self._may_load, self._may_store = loads, stores
        self._control = None if control is None else Heed(control, self._placement, self._clock)
        self._promised: dict[str, int] = {}  # tokens that vLLM has itself, of requests that were promised more
        self._waiting: dict[str, int] = {}  # pages of memory that are kept for requests that wait for lower tiers
        self._idle = False
        if self.fusing is not None and "fuse" in allow:  # else the first that asks for it has the others wait
            self._hierarchy.index_contents()

    def lookup(self, request: Any, computed: int) -> int | None:
        """Tokens beyond the first `computed` that can be loaded: at most all of the prompt but its last. None: ask
        again, more is on its way from a lower tier."""
        self._placement.tick()
        self._heed()
        tracked = self._track(request)
        if tracked is None:
            return 0
        tracked.computed, tracked.looked = computed, True
        self._promised.pop(request.request_id, None)
        self._waiting.pop(request.request_id, None)
        if self.fusing is not None:
            self.fusing.inherit(tracked, computed)
        if not self._may_load or tracked.refused or getattr(request, "skip_reading_prefix_cache", False):
            tracked.match, tracked.seen, tracked.plan, tracked.planned = NO_MATCH, (-1, -1), None, None
            answer: int | None = 0
        else:
            answer = self._answer(tracked)
        if answer:
            self._promised[request.request_id] = computed
        elif answer == 0:
            self._let_go(tracked)
        elif sum(self._waiting.values()) + tracked.pages <= HELD_SHARE * self._hierarchy.pages:
            self._waiting[request.request_id] = tracked.pages
        else:  # too many wait: what is evicted meanwhile is looked up again
            self._let_go(tracked)
        return answer

    def _answer(self, tracked: Tracked) -> int | None:
        computed = tracked.computed
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
        upto = self.fusing.lookup(tracked, exact, idle=self._idle)
        if upto is None:
            return None
        if tracked.plan is not None:
            moved = list(dict.fromkeys(piece.chunk for piece in tracked.plan.pieces))
            self._hold(tracked, [*tracked.match.chunks[-1:], *moved])
        return upto - computed

    def allocated(self, request: Any, blocks: list[int], external: int) -> None:
        """vLLM took a request up, with these blocks, and counts on `external` tokens of the last lookup. (It says
        so again, with 0, when what was loaded has come.)"""
        tracked = self._tracked.get(request.request_id)
        if tracked is None and external:
            raise ValueError(f"{external} tokens were promised to a request that is not known any more")
        if tracked is None or not tracked.looked:
            return
        start, end = tracked.computed, tracked.computed + external
        self._metrics.count(m.LOOKUPS, result="hit" if external else "miss")
        self._metrics.count(m.LOOKED_UP_TOKENS, request.num_tokens - start)
        tracked.stored = tracked.mended = 0
        if external:
            self._begin_load(tracked, start, end, blocks)
        if tracked.hints.pin is not None:
            self._look_up(tracked)  # vLLM may have had it all itself, or ragkv may only store
            chunks = tracked.match.chunks
            self._keep(request.request_id, tracked.hints, tracked.tenant, chunks, starts(chunks))
        self._turns.count(tracked, external)
        tracked.looked = False
        self._promised.pop(request.request_id, None)
        self._let_go(tracked)

    def _begin_load(self, tracked: Tracked, start: int, end: int, blocks: list[int]) -> None:
        """Order what was promised: tokens from `start` to `end`."""
        plan, promised = tracked.plan, end
        if plan is not None and self.fusing is not None:
            promised, end = self.fusing.end(tracked), plan.exact if promised == self.fusing.end(tracked) else -1
        if not start <= end <= max(start, tracked.match.length):
            raise ValueError(f"{promised - start} tokens were promised behind {start}, and are not to be had")
        load = Load(tracked.request.request_id, blocks[start // self._block_tokens :], set())
        jobs = self._exact_jobs(tracked, start, end, blocks, fused=plan is not None)
        if plan is not None:
            jobs.append(self._moving_job(tracked, plan, blocks, load))
        chunks = tracked.match.chunks
        if self._documents is not None and tracked.hints.documents and tracked.hints.store:
            moved = Cover(plan.pieces if plan is not None else ())
            for each in tracked.hints.documents:
                self._documents.note(each.id, saved(each.start, each.end, start, end, moved))
        for job, under_way in jobs:
            self._hierarchy.pin(under_way.chunks)
            self._give_out(job, under_way)
            self._orders.loads.append(job)
            load.jobs.add(job.id)
        self._loads.begin(load)
        if end > start:
            tracked.tail = tracked.match.whole_tail
            if tracked.exact_upto(end) == end:
                self._copy_hot(tracked, blocks, load)
            else:  # the engine's blocks hold it, but not exactly
                self._hierarchy.used(chunks, tracked.hints.priority)
            self._placement.used(chunks)

    def _exact_jobs(
        self, tracked: Tracked, start: int, end: int, blocks: list[int], *, fused: bool
    ) -> list[tuple[Job, UnderWay]]:
        """Loads of what matched, by tier."""
        chunks = tracked.match.chunks
        jobs = []
        for device, parts in self._by_tier(tracked, start, end):
            slots = [slots_between(blocks, at, upto, self._block_tokens) for _, _, at, upto in parts]
            which = [
                rows([chunk], self._hierarchy.page_tokens, device=device)[at - first : upto - first]
                for chunk, first, at, upto in parts
            ]
            job = self._new_job(tracked, np.concatenate(which), np.concatenate(slots), device=device, fused=fused)
            reads = UnderWay(job.request, list(chunks[-1:]), self._workers, is_store=False)  # and so all before it
            reads.copies = [chunk for chunk, *_ in parts] if device else []
            jobs.append((job, reads))
        return jobs

    def _moving_job(self, tracked: Tracked, plan: Plan, blocks: list[int], load: Load) -> tuple[Job, UnderWay]:
        """The load of what a plan moves; and the order to mend it, for later."""
        assert self.fusing is not None
        chunks, which, slots, shifts = self.fusing.moves(tracked, blocks)
        job = self._new_job(tracked, which, slots, shifts=shifts, fused=True)
        load.fusion = self.fusing.order(tracked, blocks)
        self._hierarchy.used(chunks)
        self._placement.used(chunks)
        more = self.fusing.end(tracked) - plan.exact
        tracked.sources[m.MEMORY] = tracked.sources.get(m.MEMORY, 0) + more
        return job, UnderWay(job.request, chunks, self._workers, is_store=False)

    def sources(self, request: Any) -> dict[str, int]:
        """Tokens by the tier that they came from, as last allocated."""
        tracked = self._tracked.get(request.request_id)
        return {} if tracked is None else tracked.sources

    def disown(self, request: Any) -> None:
        """Its lookup failed: nothing of a request is kept. Must not fail itself."""
        tracked = self._tracked.get(request.request_id)
        self._tracked[request.request_id] = None
        self._promised.pop(request.request_id, None)
        self._waiting.pop(request.request_id, None)
        if tracked is not None:
            self._let_go(tracked)

    def disappoint(self, request: Any, blocks: list[int], external: int) -> None:
        """Tell vLLM to compute what `allocated` failed to load. Must not fail itself."""
        request_id = request.request_id
        start = self._promised.pop(request_id, 0)
        self._take_back(self._orders.loads, {request_id})
        if (load := self._loads.received(request_id, self._orders)) is not None:
            self._take_back(load.after, {request_id})
        if external:
            own = load.blocks if load is not None else blocks[start // self._block_tokens :]
            self._loads.begin(Load(request_id, own, set(), failed=True))
            self._orders.given_up[request_id] = own
        self.disown(request)

    def orders(self, scheduler_output: Any) -> StepOrders:
        """What the workers shall do in this step."""
        self._placement.tick()
        self._heed()
        scheduled = scheduler_output.num_scheduled_tokens
        self._orders.tokens = scheduler_output.total_num_scheduled_tokens
        self._orders.alone = next(iter(scheduled)) if len(scheduled) == 1 else None
        self._idle = not self._orders.tokens
        preempted = set(getattr(scheduler_output, "preempted_req_ids", None) or ()) & self._storing.keys()
        self._take_back(self._orders.stores, preempted)
        self._orders.preempted = preempted
        self._orders.fusions = self._loads.fusions(busy=not self._idle)
        for request_id, after in progress(self._tracked, scheduler_output):
            start = after - scheduled[request_id]
            self._orders.work += self._placement.gate.work(start, after - start)
            tracked = self._tracked.get(request_id)
            if tracked is not None:
                self._store_new(tracked, min(after, tracked.request.num_tokens))
        return self.take_orders()

    def finished(self, request: Any, blocks: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """A request ended. True: vLLM must keep its blocks until its stores are done. (Those of a request that
        waits for its KV it keeps until that is received.) And what its response tells, where it gave hints or was
        to be fused."""
        request_id = request.request_id
        tracked = self._tracked.pop(request_id, None)
        self._promised.pop(request_id, None)
        self._waiting.pop(request_id, None)
        told = None
        loading = request_id in self._loads
        if tracked is not None:
            self._let_go(tracked)
            # The last token was sampled, not computed; what runs ahead of the others was thrown away.
            upto = 0 if loading else min(request.num_tokens - 1, request.num_computed_tokens)
            tracked.blocks = blocks
            tracked.extend()
            told = None if self.fusing is None else self.fusing.tell(tracked, upto)
            if not loading:
                self._store(tracked, upto)
        if loading:
            self._loads.cancel(request_id, self._orders)
            return False, told
        if not self._storing[request_id]:
            return False, told
        self._orders.finishing.add(request_id)
        self._ending.add(request_id)
        return True, told

    @property
    def has_pending_work(self) -> bool:
        """As of `Jobs`; and a flush that has begun goes on though no request runs."""
        return super().has_pending_work or (self._control is not None and self._control.under_way)

    def _heed(self) -> None:
        """Do as the operator wants: before anything is looked up or stored."""
        if self._control is not None:
            self._control.heed(storing=bool(self._storing))
            wanted = self._control.control
            self._may_load, self._may_store = self._duties[0] and wanted.loads, self._duties[1] and wanted.stores

    def close(self, seconds: float) -> bool:
        """Write down what must survive, within a bound. Whether all of it was."""
        if self._control is not None:
            self._control.control.close()
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
            hints = read_hints(request.kv_transfer_params, self._allow)
            if hints.priority and self._hierarchy.classes == 1:
                hints = with_problem(
                    hints, f"ragkv.priority = {hints.priority}; memory.priorities = 1: no classes"
                )
            if hints.problems:
                self._faults.note("hints", "; ".join(hints.problems))
            if hints.unpin is not None:
                self._hierarchy.holds.release(hints.unpin, tenant_of(request))
            chain = TokenChain(namespace, self._chunker, hints.boundaries)
            tracked = self._tracked[request_id] = Tracked(request, namespace, chain, hints, tenant_of(request))
            tracked.extend()
            self._turns.begin(tracked)
            if self._recorder is not None and hints.store:
                self._recorder.record(namespace, chain)
        return self._tracked[request_id]

    def _look_up(self, tracked: Tracked) -> None:
        """Match in memory; vLLM asks again in every step while a request waits for blocks."""
        request = tracked.request
        seen = (request.num_tokens, self._hierarchy.version)
        if tracked.seen != seen:
            tracked.extend()
            tracked.match = self._hierarchy.match(tracked.namespace, tracked.chain, request.num_tokens - 1)
            tracked.pages = sum(chunk.page_count for chunk in tracked.match.chunks)
            tracked.seen = seen
        self._hold(tracked, tracked.match.chunks[-1:])

    def _fetch(self, tracked: Tracked) -> bool:
        """Bring up what lower tiers have, once a request; whether it should wait."""
        tracked.fetched = True
        tracked.fetch = self._placement.fetch(
            tracked.namespace, tracked.chain, tracked.match, tracked.computed, tracked.request.num_tokens - 1
        )
        return tracked.fetch is not None and self._placement.waits(tracked.fetch, ANSWER_SECONDS)

    def _worth(self, tracked: Tracked, tokens: int) -> bool:
        """What the gate says of loading from memory, once a request; what is too small may grow, though."""
        gate, decision = self._placement.gate, None
        small = gate.small(tokens)
        if small:
            decision, tracked.small = None if tracked.small else "small", True
        elif tracked.declined is None:
            tracked.declined = not gate.allows(tokens, m.MEMORY, start=tracked.computed)
            decision = "decline" if tracked.declined else "load"
        if decision is not None:
            self._metrics.count(m.GATE_DECISIONS, tier=m.MEMORY, decision=decision)
        return not small and not tracked.declined

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

    def _copy_hot(self, tracked: Tracked, blocks: list[int], load: Load) -> None:
        """Note the use of a match, and prepare copies to the device tier of the chunks that are hot now."""
        hot = self._hierarchy.touch(tracked.match, tracked.hints.priority)
        if hot:
            places = dict(zip(tracked.match.chunks, starts(tracked.match.chunks), strict=True))
            load.after.append(self._copies_of_hot(tracked, hot, places, blocks))

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

    def _store(self, tracked: Tracked, upto: int) -> bool:
        """Order the store of what the first `upto` tokens have new; False where that is nothing."""
        if not (self._may_store and tracked.hints.store):
            return False
        upto = tracked.exact_upto(min(upto, len(tracked.blocks) * self._block_tokens))
        hints = tracked.hints
        new = self._hierarchy.reserve(
            *(tracked.namespace, tracked.chain, upto),
            asked=tracked.asked,
            priority=hints.priority,
            until=NEVER if hints.ttl is None else self._clock() + hints.ttl,
        )
        tracked.asked = max((end for end in tracked.chain.ends if end <= upto), default=0)
        if new:
            self._order_store(tracked, new)
        return bool(new)
