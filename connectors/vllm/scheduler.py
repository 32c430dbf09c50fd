"""The scheduler side: decides what to load and what to store.

A lookup promises tokens; vLLM then takes the request up, and lets it wait while they are loaded. What was found is
kept from the lookup on. What was promised and does not come is told before the request has run: vLLM computes it.
"""

from collections.abc import Callable, Collection
from typing import Any

from ragkv.config.settings import HINT_NAMES
from ragkv.connectors.vllm.control import Control
from ragkv.connectors.vllm.documents import DocumentStats
from ragkv.connectors.vllm.fusing import saved
from ragkv.connectors.vllm.hints import read_hints, with_problem
from ragkv.connectors.vllm.jobs import Jobs
from ragkv.connectors.vllm.loading import PendingLoad
from ragkv.connectors.vllm.messages import StepOrders, Tables
from ragkv.connectors.vllm.request_state import Recorder, RequestState, progress, tenant_of
from ragkv.connectors.vllm.turns import Turns
from ragkv.kvstore import metrics as m
from ragkv.kvstore.cache import KVCache
from ragkv.kvstore.chunking import Chunker, TokenChain
from ragkv.kvstore.fusion.plan import Cover
from ragkv.kvstore.prompt import Prompt, Result

MARKS = 8  # windows: in long prompts so many tokens apart what layers with windows hold is kept


class SchedulerSide(Jobs):
    """One engine's head. `namespace_of` gives a request's namespace, or None to leave the request alone.
    `recorder`, where given, is told every prompt once. `stores`, `loads`: what the engine's role lets it do.
    `allow`: kinds of hints that count. The rest is as for `Jobs`."""

    def __init__(
        self,
        cache: KVCache,
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
        super().__init__(cache, *args, **more)
        self._chunker, self._namespace_of, self._recorder = chunker, namespace_of, recorder
        self._documents, self._turns = documents, Turns(self._metrics)
        self._duties, self._allow = (loads, stores), allow
        self._may_load, self._may_store = loads, stores
        self._control = control
        self._promised: dict[str, int] = {}  # tokens that vLLM has itself, of requests that were promised more
        self._idle = False
        planes = cache.memory.planes
        self._stride = MARKS * max((plane.window or plane.span for plane in planes), default=0)
        self._state_planes = {number for number, plane in enumerate(planes, 1) if plane.state}
        blocks = [group.block_tokens for group in self._groups if group.plane in self._state_planes]
        self._state_tokens = max(blocks, default=0)  # vLLM computes up to multiples of it

    def lookup(self, request: Any, computed: int) -> int | None:
        """Tokens beyond the first `computed` that can be loaded: at most all of the prompt but its last. None: ask
        again, more is on its way from a lower tier."""
        self._listener.asked(request)
        answer = self._answer(request, computed)
        self._listener.answered(request, answer)
        return answer

    def _answer(self, request: Any, computed: int) -> int | None:
        self._cache.tick()
        self._heed()
        state = self._track(request)
        if state is None:
            return 0
        state.computed, state.looked_up = computed, True
        self._promised.pop(request.request_id, None)
        if self.fusing is not None:
            self.fusing.inherit(state, computed)
        if not self._may_load or state.refused or getattr(request, "skip_reading_prefix_cache", False):
            state.fusion.plan = None
            self._cache.skip(state.prompt)
            return 0
        if self._seeks_order(state):
            return None
        found = self._find(state, computed)
        if found:
            self._promised[request.request_id] = computed
        elif found == 0:
            self._cache.release(state.prompt)
        return found

    def _seeks_order(self, state: RequestState) -> bool:
        """Whether an order of passages that a request asks for is not found yet."""
        order, ordering = state.hints.order, self._cache.ordering
        if order is None:
            return False
        if state.search is None:
            state.search = ordering.begin(self._chunker, state.prompt.namespace, order.before, order.passages)
        return ordering.waits(state.search, idle=self._idle)

    def _find(self, state: RequestState, computed: int) -> int | None:
        state.extend()
        limit = state.request.num_tokens - 1
        found = self._cache.lookup(state.prompt, computed, limit, idle=self._idle)
        match = state.prompt.match
        state.junction = match.shared if match.shared > max(computed, match.length) else 0
        if state.junction and self._state_planes and self._may_store and state.hints.store:
            self._stop_at_junction(state, max(computed, match.length))
        if found.result is Result.PENDING:
            return None
        if self.fusing is None:
            return found.tokens
        upto = self.fusing.lookup(state, computed + found.tokens, idle=self._idle)
        return None if upto is None else upto - computed

    def allocated(self, request: Any, tables: Tables, external: int) -> None:
        """vLLM took a request up, with these blocks, and counts on `external` tokens of the last lookup. (It says
        so again, with 0, when what was loaded has come.)"""
        state = self._states.get(request.request_id)
        if state is None and external:
            raise ValueError(f"{external} tokens were promised to a request that is not known any more")
        if state is None or not state.looked_up:
            return
        start = state.computed
        self._metrics.count(m.LOOKUPS, result="hit" if external else "miss")
        self._metrics.count(m.LOOKED_UP_TOKENS, request.num_tokens - start)
        state.stored = 0
        state.unload()
        if external:
            self._begin_load(state, start, start + external, tables)
        if state.prompt.pin is not None:  # vLLM may have had it all itself, or ragkv may only store
            state.extend()
            self._cache.pin(state.prompt, request.num_tokens - 1)
        self._turns.count(state, external)
        state.looked_up = False
        self._promised.pop(request.request_id, None)
        self._cache.release(state.prompt)
        self._listener.allocated(state, external)

    def _begin_load(self, state: RequestState, start: int, end: int, tables: Tables) -> None:
        """Order what was promised: tokens from `start` to `end`."""
        blocks = tables[self._groups[0].number]
        plan, wrong = state.fusion.plan, len(blocks) * self._block_tokens < end
        if plan is not None and self.fusing is not None:
            wrong |= end != self.fusing.end(state)
            end = plan.exact
        if wrong:
            raise ValueError(f"tokens were promised from {start} on that are not to be had, or have no blocks")
        pending = PendingLoad(state.request.request_id, blocks[start // self._block_tokens :], set())
        loads = self._cache.prepare_load(state.prompt, start, end)
        if plan is not None:
            loads.append(self._cache.prepare_moved_load(plan.pieces))
        for load in loads:
            jobs = self._new_jobs(state, load, tables, fused=plan is not None)
            self._orders.loads += jobs
            pending.jobs.update(job.id for job in jobs[:1])
            for tier, tokens in load.sources.items():
                state.sources[tier] = state.sources.get(tier, 0) + tokens
        if plan is not None and self.fusing is not None:
            self._jobs += 1
            pending.fusion = self.fusing.order(state, blocks, self._jobs if self._listener.times else 0)
            self._listener.fused(state, pending.fusion)
            state.sources[m.MEMORY] = state.sources.get(m.MEMORY, 0) + self.fusing.end(state) - plan.exact
        if self._documents is not None and state.hints.store:
            moved = Cover(plan.pieces if plan is not None else ())
            for each in state.hints.documents:
                self._documents.note(each.id, saved(each.start, each.end, start, end, moved))
        self._loads.begin(pending)
        if end > start:  # where the engine's blocks do not hold it exactly, nothing is copied from them
            store = self._cache.touch(state.prompt, exact=state.exact_upto(end) == end)
            if store is not None:
                pending.after += self._new_jobs(state, store, tables)

    def sources(self, request: Any) -> dict[str, int]:
        """Tokens by the tier that they came from, as last allocated."""
        state = self._states.get(request.request_id)
        return {} if state is None else state.sources

    def ignore_request(self, request: Any) -> None:
        """Its lookup failed: nothing of a request is kept. Must not fail itself."""
        state = self._states.get(request.request_id)
        self._states[request.request_id] = None
        self._promised.pop(request.request_id, None)
        if state is not None:
            self._cache.release(state.prompt)

    def fail_allocation(self, request: Any, tables: Tables, external: int) -> None:
        """Tell vLLM to compute what `allocated` failed to load. Must not fail itself."""
        request_id = request.request_id
        start = self._promised.pop(request_id, 0)
        self._take_back(self._orders.loads, {request_id})
        if (load := self._loads.received(request_id, self._orders)) is not None:
            self._drop(load)
        if external:
            blocks = tables[self._groups[0].number]
            own = load.blocks if load is not None else blocks[start // self._block_tokens :]
            self._loads.begin(PendingLoad(request_id, own, set(), failed=True))
            self._orders.given_up[request_id] = own
        self.ignore_request(request)

    def orders(self, scheduler_output: Any) -> StepOrders:
        """What the workers shall do in this step."""
        self._cache.tick()
        self._heed()
        scheduled = scheduler_output.num_scheduled_tokens
        self._orders.tokens = scheduler_output.total_num_scheduled_tokens
        self._orders.alone = next(iter(scheduled)) if len(scheduled) == 1 else None
        self._idle = not self._orders.tokens
        preempted = set(getattr(scheduler_output, "preempted_req_ids", None) or ()) & self._storing.keys()
        self._take_back(self._orders.stores, preempted)
        self._orders.preempted = preempted
        self._orders.fusions = self._loads.fusions(busy=not self._idle)
        for request_id, after in progress(self._states, scheduler_output):
            start = after - scheduled[request_id]
            self._orders.work += self._cache.gate.work(start, after - start)
            state = self._states.get(request_id)
            if state is not None:
                self._resolve(state, request_id, scheduler_output)
                self._store_new(state, after)
        return self.take_orders()

    def finished(self, request: Any, tables: Tables) -> tuple[bool, dict[str, Any] | None]:
        """A request ended. True: vLLM must keep its blocks until its stores are done. (Those of a request that
        waits for its KV it keeps until that is received.) And what its response tells, where it gave hints or was
        to be fused."""
        try:
            return self._finish(request, tables)
        finally:
            self._listener.finished(request)

    def _finish(self, request: Any, tables: Tables) -> tuple[bool, dict[str, Any] | None]:
        request_id = request.request_id
        state = self._states.pop(request_id, None)
        self._promised.pop(request_id, None)
        told = None
        loading = request_id in self._loads
        if state is not None:
            self._cache.release(state.prompt)
            # The last token was sampled, not computed; what runs ahead of the others was thrown away.
            upto = 0 if loading else min(request.num_tokens - 1, request.num_computed_tokens)
            if self._state_planes and upto and request.num_computed_tokens == request.num_tokens:
                upto += 1  # the step under way computes it, and orders follow that step: its state is that of all
            state.tables = tables
            state.extend()
            if loading:
                state.unload()
            told = None if self.fusing is None else self.fusing.tell(state, upto)
            if not loading:
                self._store(state, upto)
                self._store_windows(state, upto, request.num_computed_tokens)
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
        return super().has_pending_work or (self._control is not None and self._control.flush_began)

    def _heed(self) -> None:
        """Do as the operator wants: before anything is looked up or stored."""
        if self._control is not None:
            self._control.heed(storing=bool(self._storing))
            self._may_load = self._duties[0] and self._control.loads
            self._may_store = self._duties[1] and self._control.stores

    def close(self, seconds: float) -> bool:
        """Write down what must survive, within a bound. Whether all of it was."""
        if self._control is not None:
            self._control.close()
        if self._recorder is not None:
            self._recorder.close()
        written = self._cache.close(seconds)
        self._listener.closed()
        return written

    def _track(self, request: Any) -> RequestState | None:
        request_id = request.request_id
        if request_id not in self._states:
            self._states[request_id] = None
            namespace = self._namespace_of(request)
            if namespace is not None:
                self._states[request_id] = self._new_state(request, namespace)
        return self._states[request_id]

    def _new_state(self, request: Any, namespace: bytes) -> RequestState:
        hints, tenant = read_hints(request.kv_transfer_params, self._allow), tenant_of(request)
        if hints.priority and self._cache.priority_classes == 1:
            hints = with_problem(hints, f"ragkv.priority = {hints.priority}; memory.priorities = 1: no classes")
        if hints.problems:
            self._faults.note("hints", "; ".join(hints.problems))
        if hints.unpin is not None:
            self._cache.unpin(tenant, hints.unpin)
        chain = TokenChain(namespace, self._chunker, hints.boundaries, self._loose(request.num_prompt_tokens))
        state = RequestState(
            request, Prompt(namespace, chain, tenant, hints.priority, hints.ttl, hints.pin), hints
        )
        state.extend()
        self._turns.begin(state)
        if self._recorder is not None and hints.store:
            self._recorder.record(namespace, chain)
        return state

    def _loose(self, prompt: int, junction: int = 0) -> list[int]:
        """Where the chunks of a prompt of so many tokens end for its own sake: with the prompt, so that what
        windows and states hold there has a place; and where vLLM stops for states to be kept."""
        if not self._has_windows:
            return []
        return sorted({self._last_stop(prompt - 1), self._last_stop(junction), prompt} - {0})

    def _last_stop(self, position: int) -> int:
        """Up to this position, the last at which vLLM stops for states to be kept; 0: none."""
        return position // self._state_tokens * self._state_tokens if self._state_tokens else 0

    def _stop_at_junction(self, state: RequestState, have: int) -> None:
        """Let vLLM stop where this prompt and others have parted, as it does at junctions that it sees itself, so
        that there is a state to keep there. (It has looked for them before it asks what can be loaded.)"""
        request, state.junction = state.request, self._last_stop(state.junction)
        if state.junction <= have or getattr(request, "shared_prefix_boundary", None) is None:
            return
        request.shared_prefix_boundary = max(request.shared_prefix_boundary, state.junction)
        if state.junction not in state.prompt.chain.ends:
            old = state.prompt.chain
            loose = self._loose(request.num_prompt_tokens, state.junction)
            state.prompt.chain = TokenChain(state.prompt.namespace, self._chunker, state.hints.boundaries, loose)
            state.prompt.chain.extend(old.tokens)

    def _store_new(self, state: RequestState, upto: int) -> None:
        """Store what a step completes: whole chunks now and then, the open tail when the prompt ends; and what
        windows hold there, and where others are likely to part."""
        after, upto = upto, min(upto, state.request.num_tokens)
        prompt_ends = state.stored < state.request.num_prompt_tokens <= upto
        places = [place for place in self._places(state) if state.stored < place <= upto]
        if not (prompt_ends or places) and upto - state.stored < self._chunker.max_tokens:
            return
        state.extend()
        if not prompt_ends:
            upto = max((end for end in state.prompt.chain.ends if end <= upto), default=0)
        self._store(state, upto)
        for place in places:
            end = max((end for end in state.prompt.chain.ends if end <= place), default=0)
            self._store_windows(state, end, after)
        if prompt_ends or (self._stride and upto - state.marked >= self._stride):
            self._store_windows(state, upto, after)
        state.stored = max(state.stored, upto)

    def _places(self, state: RequestState) -> list[int]:
        """Where what windows and states hold is kept, beside where the prompt ends."""
        if not self._has_windows:
            return []
        return sorted({*state.places, self._last_stop(state.request.num_prompt_tokens - 1)})

    def _store(self, state: RequestState, upto: int) -> None:
        """Order the store of what the first `upto` tokens have new."""
        if self._may_store and state.hints.store:
            blocks = len(state.tables[self._groups[0].number]) if state.tables else 0
            upto = state.exact_upto(min(upto, blocks * self._block_tokens))
            store = self._cache.prepare_store(state.prompt, upto, self._confirmed_by())
            if store is not None:
                self._orders.stores += self._new_jobs(state, store, state.tables)

    def _store_windows(self, state: RequestState, upto: int, after: int) -> None:
        """Order the store of what layers with windows or states hold at token `upto`, so that prompts can go on
        there. `after`: tokens that are computed then; states are of these, and of those that vLLM offers."""
        if not self._has_windows or not (self._may_store and state.hints.store and state.tables):
            return
        if not upto or state.exact_upto(upto) < upto:
            return
        state.marked = max(state.marked, upto)
        live = [0] * (1 + max(group.plane for group in self._groups))
        offered = state.offered.get(upto, {}) if upto != after else {}
        tables = [list(table) for table in state.tables] if offered else state.tables
        for group in self._groups:
            table = tables[group.number]
            kept = next((place for place, block in enumerate(table) if block), len(table))
            if group.plane in self._state_planes:
                if group.number in offered:
                    table[(upto - 1) // group.block_tokens] = offered[group.number]
                known = upto == after or group.number in offered
                live[group.plane] = max(live[group.plane], upto - 1 if known else upto)
            else:
                live[group.plane] = max(live[group.plane], kept * group.block_tokens)
        for store in self._cache.windows.prepare_stores(state.prompt, upto, live[1:], self._confirmed_by()):
            self._orders.stores += self._new_jobs(state, store, tables)

    def _resolve(self, state: RequestState, request: str, scheduler_output: Any) -> None:
        """The tables as they are in this step: where layers have windows, vLLM takes blocks out of them; and the
        blocks that will have states that a forward leaves on its way."""
        if not self._has_windows:
            return
        blocks = scheduler_output.kv_connector_block_state
        state.tables, state.offered = blocks.get_block_ids(request) or (), {}
        for group, block, tokens in (getattr(blocks, "boundary_state_offloads", None) or {}).get(request, ()):
            state.offered.setdefault(tokens, {})[group] = block
