"""Spans of what ragkv does for a request, in the request's own trace. Loaded only where vLLM traces.

Times are of the wall clock. A lookup's are the scheduler side's; of the others the workers say when they began and
ended. vLLM makes its span when the request has ended, under what the request's headers name: so do these.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ragkv.connectors.vllm.messages import Fusion, Job, StepOrders, StepReport, Times, merge_times
from ragkv.connectors.vllm.request_state import RequestState
from ragkv.connectors.vllm.scheduler import SchedulerSide
from ragkv.kvstore import metrics as m
from ragkv.kvstore.fusion.plan import Declined, Plan
from ragkv.kvstore.prompt import Load, Store

LOOKUP, LOAD, FUSE, STORE = "ragkv.lookup", "ragkv.load", "ragkv.fuse", "ragkv.store"
SCOPE = "ragkv"
MOST_OPEN = 10_000  # jobs whose end is awaited; a worker that died reports none
FLUSH_SECONDS = 2.0

Attributes = dict[str, str | int | bool]


@dataclass(slots=True)
class _Request:
    """`context`: what its spans are under; where the headers name nothing its first lookup, None until then.
    `began`, `ended`: of a lookup, from the first question to the first answer (0: none yet)."""

    context: Context | None
    began: int = 0
    ended: int = 0


@dataclass(slots=True)
class _Open:
    """A span whose end the workers will report, of a request."""

    name: str
    asked: _Request
    attributes: Attributes


class TracedSide(SchedulerSide):
    """A scheduler side that tells what it does. `flush` sends what is waiting to be sent."""

    def __init__(
        self,
        *args: Any,
        tracer: trace.Tracer,
        flush: Callable[[], object],
        wall: Callable[[], int] = time.time_ns,
        **more: Any,
    ) -> None:
        super().__init__(*args, **more)
        self._tracer, self._flush, self._wall = tracer, flush, wall
        self._requests: dict[str, _Request] = {}
        self._open: dict[int, _Open] = {}
        self._times: dict[int, Times] = {}

    def lookup(self, request: Any, computed: int) -> int | None:
        """As `SchedulerSide.lookup`; notes when it was first asked, and first answered."""
        with self._noted():
            asked = self._requests.get(request.request_id)
            if asked is None:
                asked = self._requests[request.request_id] = _Request(_context(request))
            asked.began = asked.began or self._wall()
        answer = super().lookup(request, computed)
        with self._noted():
            asked = self._requests[request.request_id]
            asked.ended = 0 if answer is None else asked.ended or self._wall()
        return answer

    def allocated(self, request: Any, blocks: list[int], external: int) -> None:
        """As `SchedulerSide.allocated`; ends the lookup's span, and opens those of what it orders."""
        loads, state = len(self._orders.loads), self._states.get(request.request_id)
        again = state is not None and not state.looked_up
        super().allocated(request, blocks, external)
        with self._noted():
            if state is None or again:
                return
            self._looked_up(state, external)
            for job in self._orders.loads[loads:]:
                self._expect(job.id, LOAD, state, self._of_load(state, job))
            load = self._loads.get(request.request_id)
            if load is not None and load.fusion is not None:
                self._jobs += 1
                load.fusion = replace(load.fusion, timed=self._jobs)
                self._expect(self._jobs, FUSE, state, _of_fusion(state, load.fusion))

    def take_orders(self) -> StepOrders:
        """As `SchedulerSide.take_orders`; asks for the times of the jobs."""
        orders = super().take_orders()
        with self._noted():
            orders.loads = [replace(job, timed=job.id in self._open) for job in orders.loads]
            orders.stores = [replace(job, timed=job.id in self._open) for job in orders.stores]
        return orders

    def finished(self, request: Any, blocks: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """As `SchedulerSide.finished`; nothing more is noted of the request."""
        try:
            return super().finished(request, blocks)
        finally:
            self._requests.pop(request.request_id, None)

    def report(
        self, report: StepReport | None, sent: Collection[str] = (), received: Collection[str] = ()
    ) -> set[str]:
        """As `SchedulerSide.report`; ends the spans whose work all workers have done."""
        waiting = super().report(report, sent, received)
        self._end_spans(report or StepReport())
        return waiting

    def _end_spans(self, report: StepReport) -> None:
        with self._noted():
            merge_times(self._times, report.times)
            for number in report.times:
                if number not in self._open:
                    del self._times[number]
                elif self._times[number][2] >= self._workers:
                    began, ended, _, failed = self._times.pop(number)
                    each = self._open.pop(number)
                    self._span(each.name, each.asked.context, began, ended, each.attributes, failed=failed)

    def close(self, seconds: float) -> bool:
        """As `SchedulerSide.close`; then sends what spans there are, within `FLUSH_SECONDS`."""
        complete = super().close(seconds)
        with self._noted():
            sender = threading.Thread(target=self._flush, name="ragkv-flush", daemon=True)
            sender.start()
            sender.join(FLUSH_SECONDS)
        return complete

    def _new_job(self, state: RequestState, work: Load | Store, blocks: list[int], *, fused: bool = False) -> Job:
        job = super()._new_job(state, work, blocks, fused=fused)
        with self._noted():
            if isinstance(work, Store):
                tier = m.DEVICE if job.device else m.MEMORY
                attributes = {"ragkv.chunks": len(work.chunks), **self._size(job), "ragkv.tier": tier}
                self._expect(job.id, STORE, state, attributes)
        return job

    def _looked_up(self, state: RequestState, external: int) -> None:
        asked, request = self._requests[state.request.request_id], state.request
        attributes: Attributes = {
            "ragkv.request.id": request.request_id,
            "ragkv.result": _result(state, external),
            "ragkv.tokens": request.num_tokens,
            "ragkv.tokens.engine": state.computed,
            "ragkv.tokens.hit": external,
            "ragkv.chunks": len(state.prompt.match.chunks),
            "ragkv.turn": state.turn,
        }
        if external:
            attributes |= {f"ragkv.tokens.{tier}": tokens for tier, tokens in state.sources.items()}
        if state.prompt.declined is not None:
            attributes["ragkv.gate"] = "decline" if state.prompt.declined else "load"
        if state.prompt.fetch is not None:
            attributes["ragkv.fetch"] = state.prompt.fetch.result
        outcome = state.fusion.outcome[2] if state.fusion.outcome is not None else None
        if isinstance(outcome, Declined):
            attributes |= {"ragkv.fusion": outcome.kind, "ragkv.fusion.reason": outcome.reason}
        elif isinstance(outcome, Plan):
            attributes["ragkv.fusion"] = "moved"
        ended = asked.ended or self._wall()
        span = self._span(LOOKUP, asked.context, asked.began or ended, ended, attributes)
        if asked.context is None:
            asked.context = trace.set_span_in_context(span, Context())
        asked.began = asked.ended = 0

    def _of_load(self, state: RequestState, job: Job) -> Attributes:
        tier = m.DEVICE if job.device else m.MEMORY
        attributes = {**self._size(job), "ragkv.tier": tier, "ragkv.moved": job.shifts is not None}
        if tier == m.MEMORY and job.shifts is None:
            brought = {name: tokens for name, tokens in state.sources.items() if name in (m.DISK, m.REDIS)}
            attributes |= {f"ragkv.tokens.{name}": tokens for name, tokens in brought.items()}
        return attributes

    def _size(self, job: Job) -> Attributes:
        return {"ragkv.tokens": len(job.rows), "ragkv.bytes": len(job.rows) * self._cache.token_bytes}

    def _expect(self, number: int, name: str, state: RequestState, attributes: Attributes) -> None:
        """A job was ordered: its span is made once all workers have reported it."""
        request_id = state.request.request_id
        asked = self._requests[request_id]
        self._open[number] = _Open(name, asked, {"ragkv.request.id": request_id, **attributes})
        if len(self._open) > MOST_OPEN:
            lost = next(iter(self._open))
            del self._open[lost]
            self._times.pop(lost, None)

    def _span(
        self,
        name: str,
        context: Context | None,
        began: int,
        ended: int,
        attributes: Attributes,
        *,
        failed: bool = False,
    ) -> trace.Span:
        context = Context() if context is None else context  # never under a span of the engine's start
        span = self._tracer.start_span(name, context, attributes=attributes, start_time=began)
        if failed:
            span.set_status(trace.StatusCode.ERROR, "a worker failed")
        span.end(ended)
        return span

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        """Tracing fails no request."""
        try:
            yield
        except Exception as error:  # whatever it is: spans are lost, and nothing else
            self._faults.note("tracing", error)


def open_tracer(endpoint: str) -> tuple[trace.Tracer, Callable[[], object]]:
    """A tracer that sends where vLLM sends, and what flushes it: vLLM's own where it has made one in this process,
    which is so unless several API servers share an engine."""
    from opentelemetry.sdk.trace import TracerProvider
    from vllm.tracing import init_tracer

    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        init_tracer(SCOPE, endpoint)
    provider = trace.get_tracer_provider()
    assert isinstance(provider, TracerProvider)
    return provider.get_tracer(SCOPE), provider.force_flush


def _context(request: Any) -> Context | None:
    """What a request's headers put its spans under, or None."""
    headers = getattr(request, "trace_headers", None)
    if not headers:
        return None
    context = TraceContextTextMapPropagator().extract(headers, Context())
    return context if trace.get_current_span(context).get_span_context().is_valid else None


def _result(state: RequestState, external: int) -> str:
    if external:
        return "hit"
    declined = state.prompt.declined or (
        state.prompt.fetch is not None and state.prompt.fetch.result == "declined"
    )
    return "declined" if declined else "miss"


def _of_fusion(state: RequestState, fusion: Fusion) -> Attributes:
    plan = state.fusion.plan
    assert plan is not None
    return {
        "ragkv.tokens": fusion.end - plan.exact,
        "ragkv.tokens.moved": plan.moved,
        "ragkv.tokens.recomputed": plan.budget,
        "ragkv.tokens.gap": fusion.end - plan.exact - plan.moved,
        "ragkv.chunks": len({id(piece.chunk) for piece in plan.pieces}),
        "ragkv.selection": fusion.selection,
    }
