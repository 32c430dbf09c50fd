"""Spans of what ragkv does for a request, in the request's own trace. Loaded only where vLLM traces.

Times are of the wall clock. A lookup's are the scheduler side's; of the others the workers say when they began and
ended. vLLM makes its span when the request has ended, under what the request's headers name: so do these.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ragkv.connectors.vllm.listener import Listener
from ragkv.connectors.vllm.messages import Fusion, Job, Times, merge_times
from ragkv.connectors.vllm.request_state import RequestState
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


class Tracing(Listener):
    """Makes the spans. `workers`: that must do each job; `token_bytes`: of a token's KV. `flush` sends what is
    waiting to be sent. `note` is told of a fault, by kind: tracing fails no request."""

    times = True

    def __init__(
        self,
        tracer: trace.Tracer,
        flush: Callable[[], object],
        workers: int,
        token_bytes: int,
        note: Callable[[str, Exception], object],
        wall: Callable[[], int] = time.time_ns,
    ) -> None:
        self.tracer, self.flush = tracer, flush
        self._workers, self._token_bytes, self._note, self._wall = workers, token_bytes, note, wall
        self.requests: dict[str, _Request] = {}  # that have not ended
        self.open: dict[int, _Open] = {}  # by the number under which workers report
        self.reports: dict[int, Times] = {}  # of those that not all workers have reported

    def asked(self, request: Any) -> None:
        """A lookup begins with the first question."""
        with self._noted():
            asked = self.requests.get(request.request_id)
            if asked is None:
                asked = self.requests[request.request_id] = _Request(_context(request))
            asked.began = asked.began or self._wall()

    def answered(self, request: Any, tokens: int | None) -> None:
        """It ends with the first answer, unless vLLM asks again."""
        with self._noted():
            asked = self.requests[request.request_id]
            asked.ended = 0 if tokens is None else asked.ended or self._wall()

    def allocated(self, state: RequestState, external: int) -> None:
        """vLLM took the request up: the lookup's span is whole."""
        with self._noted():
            asked = self.requests[state.request.request_id]
            ended = asked.ended or self._wall()
            span = self._span(LOOKUP, asked.context, asked.began or ended, ended, _of_lookup(state, external))
            if asked.context is None:
                asked.context = trace.set_span_in_context(span, Context())
            asked.began = asked.ended = 0

    def ordered(self, state: RequestState, job: Job, work: Load | Store) -> None:
        """A copy's span begins, of which workers report the times."""
        with self._noted():
            attributes: Attributes = {
                "ragkv.tokens": len(job.rows),
                "ragkv.bytes": len(job.rows) * self._token_bytes,
                "ragkv.tier": m.DEVICE if job.device else m.MEMORY,
            }
            if isinstance(work, Store):
                self._expect(job.id, STORE, state, {**attributes, "ragkv.chunks": len(work.chunks)})
                return
            below = {tier: tokens for tier, tokens in work.sources.items() if tier not in (m.MEMORY, m.DEVICE)}
            attributes |= {f"ragkv.tokens.{tier}": tokens for tier, tokens in below.items()}
            self._expect(job.id, LOAD, state, {**attributes, "ragkv.moved": job.shifts is not None})

    def fused(self, state: RequestState, fusion: Fusion) -> None:
        """A fusion's span begins."""
        with self._noted():
            self._expect(fusion.timed, FUSE, state, _of_fusion(state, fusion))

    def withdrawn(self, number: int) -> None:
        """Not all workers will do it: there is no span."""
        self.open.pop(number, None)

    def reported(self, times: Mapping[int, Times]) -> None:
        """Spans end whose work all workers have done."""
        with self._noted():
            merge_times(self.reports, times)
            for number in times:
                if number not in self.open:
                    del self.reports[number]
                elif self.reports[number][2] >= self._workers:
                    began, ended, _, failed = self.reports.pop(number)
                    each = self.open.pop(number)
                    self._span(each.name, each.asked.context, began, ended, each.attributes, failed=failed)

    def finished(self, request: Any) -> None:
        """Nothing more is noted of the request."""
        self.requests.pop(request.request_id, None)

    def closed(self) -> None:
        """Send what spans there are, within `FLUSH_SECONDS`."""
        with self._noted():
            sender = threading.Thread(target=self.flush, name="ragkv-flush", daemon=True)
            sender.start()
            sender.join(FLUSH_SECONDS)

    def _expect(self, number: int, name: str, state: RequestState, attributes: Attributes) -> None:
        """A job was ordered: its span is made once all workers have reported it."""
        request_id = state.request.request_id
        asked = self.requests[request_id]
        self.open[number] = _Open(name, asked, {"ragkv.request.id": request_id, **attributes})
        if len(self.open) > MOST_OPEN:
            lost = next(iter(self.open))
            del self.open[lost]
            self.reports.pop(lost, None)

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
        span = self.tracer.start_span(name, context, attributes=attributes, start_time=began)
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
            self._note("tracing", error)


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


def _of_lookup(state: RequestState, external: int) -> Attributes:
    request, prompt = state.request, state.prompt
    attributes: Attributes = {
        "ragkv.request.id": request.request_id,
        "ragkv.result": _result(state, external),
        "ragkv.tokens": request.num_tokens,
        "ragkv.tokens.engine": state.computed,
        "ragkv.tokens.hit": external,
        "ragkv.chunks": len(prompt.match.chunks),
        "ragkv.turn": state.turn,
    }
    if external:
        attributes |= {f"ragkv.tokens.{tier}": tokens for tier, tokens in state.sources.items()}
    if prompt.declined is not None:
        attributes["ragkv.gate"] = "decline" if prompt.declined else "load"
    if prompt.fetch is not None:
        attributes["ragkv.fetch"] = prompt.fetch.result
    outcome = state.fusion.outcome[2] if state.fusion.outcome is not None else None
    if isinstance(outcome, Declined):
        attributes |= {"ragkv.fusion": outcome.kind, "ragkv.fusion.reason": outcome.reason}
    elif isinstance(outcome, Plan):
        attributes["ragkv.fusion"] = "moved"
    return attributes


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
