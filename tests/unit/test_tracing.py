"""Spans of what ragkv does for a request: which, under what, with which times and attributes."""

import os
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager
from itertools import chain, count
from types import SimpleNamespace

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

import toy_engine
from hand_lanes import Lower
from otlp_collector import OURS, collecting
from ragkv.config.settings import FusionSettings
from ragkv.connectors.vllm import tracing
from ragkv.connectors.vllm.builder import make_listener
from ragkv.connectors.vllm.error_boundary import Faults
from ragkv.connectors.vllm.messages import merge_times
from ragkv.connectors.vllm.scheduler import SchedulerSide
from ragkv.connectors.vllm.tracing import FUSE, LOAD, LOOKUP, STORE, Tracing
from ragkv.kvstore import metrics as m
from ragkv.kvstore.gate import BELIEF, Gate
from ragkv.kvstore.metrics import Metrics
from toy_engine import BREAK, Engine, closing, text

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
PROMPT = text(1, 60)
TOKEN_BYTES = 2 * 2 * 2 * 4  # workers, layers, K and V, an int32


class Spans:
    """What has been made of spans; to look at them is to forget them."""

    def __init__(self):
        self._exporter, self.provider = InMemorySpanExporter(), TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer, self.flush = self.provider.get_tracer("ragkv"), self.provider.force_flush
        self.wall = count(10)

    def side(self, cache, groups, workers, metrics, faults, **more):
        self.tracing = Tracing(
            self.tracer, lambda: self.flush(), workers, cache.token_bytes, faults.note, lambda: next(self.wall)
        )
        return SchedulerSide(cache, groups, workers, metrics, faults, listener=self.tracing, **more)

    def made(self):
        found = self._exporter.get_finished_spans()
        self._exporter.clear()
        return found


@pytest.fixture
def spans(monkeypatch):
    """Engines are traced from now on. The clock shows a later nanosecond at each look."""
    spans = Spans()
    monkeypatch.setattr(toy_engine, "SchedulerSide", spans.side)
    monkeypatch.setattr("ragkv.connectors.vllm.worker.time.time_ns", lambda: next(spans.wall))
    return spans


@pytest.fixture
def engine(spans):
    with closing(Engine()) as made:
        yield made
    assert not spans.tracing.open and not spans.tracing.reports and not spans.tracing.requests


@contextmanager
def about_to_fuse(passages=2, **more):
    """An engine that holds some passages, and a prompt in which the last of them comes first."""
    settings = FusionSettings(enabled=True, min_tokens=16)
    with closing(Engine(pages=800, blocks=400, fusion=settings, **more)) as engine:
        system, stored = text(9, 40), [[*text(n, 90), BREAK] for n in range(passages)]
        for passage in stored:
            engine.run(system + passage)
        yield engine, [*system, *stored[-1], *chain.from_iterable(stored[:-1]), *text(8, 40)]


def names(spans):
    return [span.name for span in spans]


def seen(span):
    return {name.removeprefix("ragkv."): value for name, value in span.attributes.items()}


# --- which spans, and what they hold ---


def test_a_first_request_is_stored_and_the_same_again_is_loaded(engine, spans):
    engine.run(PROMPT)
    lookup, store = spans.made()
    chunks = len(engine.memory)
    assert (lookup.name, store.name) == (LOOKUP, STORE)
    assert seen(lookup) == {
        "request.id": "r1",
        "result": "miss",
        "tokens": 60,
        "tokens.engine": 0,
        "tokens.hit": 0,
        "chunks": 0,
        "turn": 1,
    }
    size = {"tokens": 60, "bytes": 60 * TOKEN_BYTES, "tier": "memory"}
    assert seen(store) == {"request.id": "r1", "chunks": chunks, **size}
    engine.run(PROMPT, local=16)
    lookup, load = spans.made()
    assert (lookup.name, load.name) == (LOOKUP, LOAD)
    expected = {"result": "hit", "tokens.engine": 16, "tokens.hit": 43, "tokens.memory": 43, "gate": "load"}
    assert expected.items() <= seen(lookup).items() and seen(lookup)["chunks"] == chunks
    assert seen(load) == {
        "request.id": "r2",
        "tokens": 43,
        "bytes": 43 * TOKEN_BYTES,
        "tier": "memory",
        "moved": False,
    }


def test_the_answer_is_stored_in_the_trace_too(engine, spans):
    engine.run(PROMPT, text(2, 40), trace_headers=HEADERS)
    stores = [span for span in spans.made() if span.name == STORE]
    assert len(stores) >= 2 and {format(span.context.trace_id, "032x") for span in stores} == {TRACE}


def test_what_the_gate_declines(spans):
    gate = Gate()
    with closing(Engine(gate=gate)) as engine:
        engine.run(PROMPT)
        for _ in range(BELIEF):
            gate.prefill.note(60, 60e-9)
            gate.copy.note(59, 59.0)
        spans.made()
        assert engine.run(PROMPT) == 0
        (lookup,) = [span for span in spans.made() if span.name == LOOKUP]
    assert seen(lookup)["result"] == "declined" and seen(lookup)["gate"] == "decline"


def test_what_came_from_below_says_so(spans):
    with closing(Engine(lowers=[Lower()])) as engine:
        engine.run(PROMPT)
        engine.restart(5.0)
        spans.made()
        engine.run(PROMPT)
        lookup, load = spans.made()[:2]
    assert {"fetch": "loaded", "tokens.disk": 59, "result": "hit"}.items() <= seen(lookup).items()
    assert seen(load)["tokens.disk"] == 59


def test_copies_to_the_device_tier_and_loads_from_there(spans):
    with closing(Engine(device=60)) as engine:
        for _ in range(3):
            engine.run(PROMPT)
        tiers = [(span.name, seen(span)["tier"]) for span in spans.made() if span.name != LOOKUP]
        assert (STORE, "device") in tiers, "hot after the second hit"
        engine.run(PROMPT)
        loads = [span for span in spans.made() if span.name == LOAD]
    tokens = {seen(span)["tier"]: seen(span)["tokens"] for span in loads}
    assert tokens.keys() == {"device", "memory"}, "the open tail is in memory alone"
    assert sum(tokens.values()) == 59


def test_fusion(spans):
    with about_to_fuse(passages=3) as (engine, prompt):
        assert seen(spans.made()[0])["fusion"] == "missing"
        engine.run(prompt, trace_headers=HEADERS)
        found = {span.name: span for span in spans.made() if span.name != LOAD or seen(span)["moved"]}
        (fusion,) = engine.fusions
        moved = sum(end - start for start, end in fusion.runs)
    assert seen(found[LOOKUP])["fusion"] == "moved" and seen(found[LOAD])["tokens"] == moved
    assert {
        "tokens": fusion.end - fusion.start,
        "tokens.moved": moved,
        "tokens.recomputed": fusion.budget,
        "tokens.gap": fusion.end - fusion.start - moved,
        "selection": "query",
    }.items() <= seen(found[FUSE]).items()
    assert format(found[FUSE].context.trace_id, "032x") == TRACE


# --- under what ---


def test_all_spans_stand_where_vllms_own_stands(engine, spans):
    for _ in range(2):
        engine.run(PROMPT, trace_headers=HEADERS)
    found = spans.made()
    assert set(names(found)) == {LOOKUP, STORE, LOAD} < OURS
    assert {format(span.context.trace_id, "032x") for span in found} == {TRACE}
    assert {format(span.parent.span_id, "016x") for span in found} == {PARENT}


@pytest.mark.parametrize("headers", [None, {}, {"traceparent": "00-zz-1-01"}, {"other": "1"}])
def test_without_headers_a_request_has_a_trace_of_its_own(engine, spans, headers):
    first, second = ({"trace_headers": headers} for _ in range(2))
    with spans.tracer.start_as_current_span("the engine's start"):
        engine.run(PROMPT, **first)
    lookup, store, _ = spans.made()
    assert lookup.parent is None and store.parent.span_id == lookup.context.span_id
    assert store.context.trace_id == lookup.context.trace_id
    engine.run(PROMPT, **second)
    assert {span.context.trace_id for span in spans.made()}.isdisjoint({lookup.context.trace_id})


def test_who_is_not_sampled_makes_no_span(engine, spans):
    engine.run(PROMPT, trace_headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert spans.made() == ()


# --- when ---


def test_a_lookup_lasts_from_the_first_question_to_the_first_answer(spans):
    with closing(Engine(lowers=[Lower()])) as engine:
        engine.run(PROMPT)
        engine.restart(5.0)
        request = engine.request(PROMPT)
        spans.made(), engine.step()
        amid = next(spans.wall)
        engine.work()
        free, engine.free = engine.free, []
        engine.step()
        answered = next(spans.wall)
        engine.free = free
        engine.step()
        engine.finish(request)
        lookup = next(span for span in spans.made() if span.name == LOOKUP)
    assert lookup.start_time < amid < lookup.end_time < answered


def test_a_request_that_was_preempted_is_looked_up_again(engine, spans):
    request = engine.request(PROMPT)
    engine.step(budget=40)
    amid = next(spans.wall)
    engine.preempt(request)
    engine.step()
    first, second = [span for span in spans.made() if span.name == LOOKUP]
    assert first.end_time < amid < second.start_time <= second.end_time


def test_a_job_lasts_from_the_first_worker_to_the_last(engine, spans):
    engine.run(PROMPT)
    engine.request(PROMPT)
    spans.made()
    before = next(spans.wall)
    engine.step(deliver=False)
    after = next(spans.wall)
    engine.deliver(0)
    assert names(spans.made()) == [LOOKUP], "one worker of two"
    engine.deliver(1)
    (load,) = spans.made()
    assert load.name == LOAD
    assert before < load.start_time < load.end_time < after, "one worker's would take no time at all"


def test_loads_and_fusions_last_as_long_as_the_device_says(spans, monkeypatch):
    with about_to_fuse(workers=1) as (engine, prompt):
        spans.made()
        request = engine.request(prompt)
        monkeypatch.setattr(engine.equipment[0].compute, "seconds", None)
        engine.step(), engine.step()
        assert FUSE not in names(spans.made()), "the device is not there yet"
        monkeypatch.setattr(engine.equipment[0].compute, "seconds", 2.5)
        engine.step()
        (fuse,) = [span for span in spans.made() if span.name == FUSE]
        engine.finish(request)
        engine.settle()
        engine.step(deliver=False)
        assert engine.outputs == [[(None, set(), set(), set())]], "nothing is told twice"
    assert fuse.end_time - fuse.start_time == 2_500_000_000


def test_times_of_workers_add_up():
    times = merge_times({1: (5, 9, 1, False)}, {1: (4, 8, 1, True), 2: (1, 2, 1, False)})
    assert times == {1: (4, 9, 2, True), 2: (1, 2, 1, False)}
    assert merge_times({1: (4, 8, 1, True)}, {1: (5, 9, 2, False)}) == {1: (4, 9, 3, True)}


# --- what goes wrong ---


@pytest.mark.parametrize(("kind", "name"), [("load", LOAD), ("store", STORE)])
def test_what_fails_in_a_worker_is_an_error_of_its_span(engine, spans, kind, name):
    if kind == "load":
        engine.run(PROMPT)
        spans.made()
    engine.request(PROMPT)
    engine.fail(kind, worker=1)
    engine.step()
    engine.fail(worker=1)
    found = {span.name: span.status.status_code for span in spans.made()}
    assert found == {LOOKUP: StatusCode.UNSET, name: StatusCode.ERROR}


@pytest.mark.parametrize("kind", ["fuse", "load"])
def test_a_fusion_that_fails_is_an_error_of_its_span_and_one_whose_load_fails_is_not_awaited(spans, kind):
    with about_to_fuse() as (engine, prompt):
        spans.made()
        engine.request(prompt)
        engine.fail(kind)
        engine.step(), engine.step()
        engine.fail()
        found = {span.name: span.status.status_code for span in spans.made()}
        assert not spans.tracing.open
    failed = (StatusCode.UNSET, StatusCode.ERROR) if kind == "fuse" else (StatusCode.ERROR, None)
    assert (found[LOAD], found.get(FUSE)) == failed


@pytest.mark.parametrize("method", ["_context", "_result", "merge_times", None])
def test_a_fault_of_tracing_is_noted_and_fails_nothing(spans, monkeypatch, method):
    def broken(*_, **__):
        raise RuntimeError("no trace")

    if method is None:
        spans.tracer = SimpleNamespace()
    else:
        monkeypatch.setattr(tracing, method, broken)
    with closing(Engine()) as engine:
        assert engine.run(PROMPT) == 0 and engine.run(PROMPT) == 59
        assert engine.metrics.get(m.ERRORS, "tracing") > 0
        assert engine.metrics.counted[m.HIT_TOKENS, "memory"] == 59


def test_requests_that_end_before_they_are_taken_up_leave_nothing(engine, spans):
    free, engine.free = engine.free, []
    request = engine.request(PROMPT)
    engine.step()
    engine.finish(request)
    engine.free = free
    assert spans.made() == ()


def test_a_fault_at_the_end_leaves_nothing(spans, monkeypatch):
    with closing(Engine()) as engine:
        request = engine.request(PROMPT)
        engine.step()
        monkeypatch.setattr(engine.cache, "prepare_store", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # noted at the connector's border
            engine.side.finished(request, [[]])
        assert not spans.tracing.requests


def test_a_load_that_no_worker_is_told_of_is_not_awaited(engine, spans, monkeypatch):
    engine.run(PROMPT)
    monkeypatch.setattr(engine.cache, "touch", lambda *_, **__: 1 / 0)
    spans.made()
    assert engine.run(PROMPT) == 0, "vLLM computes them"
    assert engine.metrics.get(m.ERRORS, "allocated") == 1
    assert not spans.tracing.open and LOAD not in names(spans.made())


def test_what_is_left_alone_makes_no_span(engine, spans):
    engine.run(PROMPT, prompt_embeds=object())
    assert spans.made() == ()


def test_jobs_that_are_never_reported_are_forgotten(engine, spans, monkeypatch):
    monkeypatch.setattr(tracing, "MOST_OPEN", 2)
    for seed in range(4):
        engine.request(text(seed, 60))
        engine.step(deliver=False)
        engine.deliver(0)
    assert len(spans.tracing.open) == 2 and spans.tracing.reports.keys() == spans.tracing.open.keys()
    engine.deliver()
    assert names(spans.made()).count(STORE) == 2


def test_the_end_does_not_wait_for_a_collector_that_hangs(spans, monkeypatch):
    let_go, came = threading.Event(), threading.Event()

    def hangs():
        came.set()
        let_go.wait()

    monkeypatch.setattr(tracing, "FLUSH_SECONDS", 0.01)
    spans.flush = hangs
    with closing(Engine()) as engine:
        assert engine.side.close(5.0)
    assert came.wait(60) and not let_go.is_set()
    let_go.set()


# --- on and off ---


def test_without_an_endpoint_nothing_is_traced_or_timed():
    for config in (SimpleNamespace(), SimpleNamespace(observability_config=SimpleNamespace())):
        assert make_listener(config, 2, TOKEN_BYTES, Faults(Metrics())) is None
    with closing(Engine()) as engine:
        engine.request(PROMPT)
        engine.step(deliver=False)
        assert [output[0].times for outputs in engine.outputs for output in outputs] == [{}, {}]


def test_without_an_endpoint_opentelemetry_is_not_needed():
    run("""
        import sys
        sys.modules["opentelemetry"] = None
        from types import SimpleNamespace
        from ragkv.connectors.vllm.builder import make_listener
        from ragkv.connectors.vllm.connector import RagKVConnector
        from ragkv.connectors.vllm.error_boundary import Faults
        from ragkv.kvstore.metrics import Metrics
        off = SimpleNamespace(observability_config=SimpleNamespace(otlp_traces_endpoint=None))
        assert make_listener(off, 2, 32, Faults(Metrics())) is None
        assert "ragkv.connectors.vllm.tracing" not in sys.modules
        on = SimpleNamespace(observability_config=SimpleNamespace(otlp_traces_endpoint="http://127.0.0.1:1"))
        assert make_listener(on, 2, 32, Faults(Metrics())) is None, "without it the engine runs all the same"
    """)


def test_spans_go_where_vllm_sends_its_own():
    """With a provider of vLLM's making: made by us where there is none yet, and then left alone."""
    with collecting() as collector:
        run(
            f"""
            from types import SimpleNamespace
            from opentelemetry import trace
            from ragkv.connectors.vllm.builder import make_listener
            from ragkv.connectors.vllm.error_boundary import Faults
            from ragkv.connectors.vllm.tracing import Tracing, _context
            from ragkv.kvstore.metrics import Metrics
            observability = SimpleNamespace(otlp_traces_endpoint={collector.endpoint!r})
            for number in range(2):
                made = make_listener(SimpleNamespace(observability_config=observability), 2, 32, Faults(Metrics()))
                assert isinstance(made, Tracing)
                provider = trace.get_tracer_provider() if not number else provider
                assert trace.get_tracer_provider() is provider
                context = _context(SimpleNamespace(trace_headers={HEADERS!r}))
                made.tracer.start_span(f"span {{number}}", context).end()
                assert made.flush()
            """,
            **collector.environment,
        )
        found = collector.of(TRACE)
    assert [(span.name, span.parent) for span in found] == [("span 0", PARENT), ("span 1", PARENT)]
    assert {span.resource["service.name"] for span in found} == {"ragkv-test"}


def run(program, **environment):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
