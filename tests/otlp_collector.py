"""A collector of OpenTelemetry spans over HTTP, and a look at whether ragkv's stand in vLLM's trace."""

import contextlib
import gzip
import http.server
import json
import secrets
import threading
import time
import urllib.request
from dataclasses import dataclass

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

OURS = {"ragkv.lookup", "ragkv.load", "ragkv.fuse", "ragkv.store"}
VLLMS = "llm_request"


@dataclass(frozen=True)
class Span:
    """`trace`, `parent`: in hexadecimal; `began`, `ended`: ns since 1970; `resource`: of the process."""

    name: str
    trace: str
    parent: str
    began: int
    ended: int
    attributes: dict
    resource: dict


class Collector:
    """`endpoint`: for `--otlp-traces-endpoint`, with `environment` around the server."""

    def __init__(self):
        self._spans, self._came = [], threading.Condition()
        self.endpoint = ""
        self.environment = {
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_BSP_SCHEDULE_DELAY": "100",  # ms
            "OTEL_SERVICE_NAME": "ragkv-test",
        }

    def add(self, body):
        """A request that came."""
        spans = [
            Span(
                span.name,
                span.trace_id.hex(),
                span.parent_span_id.hex(),
                span.start_time_unix_nano,
                span.end_time_unix_nano,
                _values(span.attributes),
                _values(resource.resource.attributes),
            )
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        with self._came:
            self._spans += spans
            self._came.notify_all()

    def of(self, trace):
        """The spans of a trace that came so far."""
        with self._came:
            return [span for span in self._spans if span.trace == trace]

    def wait_for(self, trace, names, seconds=30.0):
        """The spans of a trace, once these names are among them; fails when they do not come."""
        deadline = time.monotonic() + seconds
        while True:
            found = self.of(trace)
            if names <= {span.name for span in found}:
                return found
            with self._came:
                left = deadline - time.monotonic()
                assert left > 0, f"trace {trace}: of {sorted(names)} came {sorted(s.name for s in found)}"
                self._came.wait(min(left, 1.0))


@contextlib.contextmanager
def collecting():
    """A Collector that listens."""
    collector = Collector()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            data = self.rfile.read(int(self.headers["Content-Length"]))
            collector.add(gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector.endpoint = f"http://127.0.0.1:{server.server_port}/v1/traces"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def check_one_trace(url, collector):
    """A live server (with `collector.endpoint` and `collector.environment`, and no ragkv gate) is asked the same
    thing twice; vLLM's span and ours stand under one trace id each time. Gives the second request's spans."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as answer:
        model = json.load(answer)["data"][0]["id"]
    start = secrets.randbelow(5000)
    prompt = [1000 + start + n for n in range(300)]
    first, spans = _ask(url, model, prompt, collector, {VLLMS, "ragkv.lookup", "ragkv.store"})
    assert _one(spans, "ragkv.lookup").attributes["ragkv.result"] == "miss"
    second, spans = _ask(url, model, prompt, collector, {VLLMS, "ragkv.lookup", "ragkv.load"})
    assert first != second
    lookup, load = _one(spans, "ragkv.lookup"), _one(spans, "ragkv.load")
    assert lookup.attributes["ragkv.result"] == "hit"
    assert load.attributes["ragkv.tokens"] == lookup.attributes["ragkv.tokens.hit"] > 0
    assert lookup.began <= lookup.ended <= load.began <= load.ended
    request = _one(spans, VLLMS)
    assert request.began <= lookup.began
    assert {span.resource["service.name"] for span in spans} == {"ragkv-test"}
    return spans


def _ask(url, model, prompt, collector, names):
    trace, parent = secrets.token_hex(16), secrets.token_hex(8)
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": 2, "temperature": 0}).encode()
    headers = {"Content-Type": "application/json", "traceparent": f"00-{trace}-{parent}-01"}
    request = urllib.request.Request(f"{url}/v1/completions", body, headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert json.load(answer)["choices"]
    spans = collector.wait_for(trace, names)
    assert {span.parent for span in spans if span.name in OURS | {VLLMS}} == {parent}
    return trace, spans


def _one(spans, name):
    (found,) = [span for span in spans if span.name == name]
    return found


def _values(attributes):
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
