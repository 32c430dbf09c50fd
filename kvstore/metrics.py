"""Every metric that ragkv exports, and a recorder that knows nothing of Prometheus.

Names carry their unit and counters end in `_total`. `METRICS` is the one list: the recorder refuses names and
labels that are not in it, and the exporter registers just what it holds.
"""

from dataclasses import dataclass
from typing import Any, Literal

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
SEPARATOR = "\x1f"

LOOKED_UP_TOKENS = "ragkv_lookup_tokens_total"
HIT_TOKENS = "ragkv_hit_tokens_total"
STORED_TOKENS = "ragkv_stored_tokens_total"
LOOKUPS = "ragkv_lookups_total"
USED_BYTES = "ragkv_used_bytes"
PLANE_BYTES = "ragkv_memory_plane_bytes"
USED_PAGES = "ragkv_used_pages"
CAPACITY_BYTES = "ragkv_capacity_bytes"
CHUNKS = "ragkv_stored_chunks"
EVICTED_CHUNKS = "ragkv_evicted_chunks_total"
REFUSED_CHUNKS = "ragkv_refused_chunks_total"
LOAD_SECONDS = "ragkv_load_seconds"
STORE_SECONDS = "ragkv_store_seconds"
ERRORS = "ragkv_errors_total"
PROMOTED_TOKENS = "ragkv_promoted_tokens_total"
WAITS = "ragkv_waits_total"
WAIT_SECONDS = "ragkv_wait_seconds"
GATE_DECISIONS = "ragkv_gate_decisions_total"
GATE_STATE = "ragkv_gate_state"
PINNED_BYTES = "ragkv_pinned_bytes"
TIER_STATE = "ragkv_tier_state"
TIER_ERRORS = "ragkv_tier_errors_total"
READ_BYTES = "ragkv_tier_read_bytes_total"
READ_SECONDS = "ragkv_tier_read_seconds"
WRITTEN_BYTES = "ragkv_tier_written_bytes_total"
WRITE_SECONDS = "ragkv_tier_write_seconds"
QUEUED_BYTES = "ragkv_tier_queued_bytes"
FREE_BYTES = "ragkv_tier_free_bytes"
UNWRITTEN_CHUNKS = "ragkv_tier_unwritten_chunks_total"
REJECTED_PAYLOADS = "ragkv_tier_rejected_payloads_total"
FUSION_DECISIONS = "ragkv_fusion_decisions_total"
FUSED_TOKENS = "ragkv_fused_tokens_total"
FUSION_SECONDS = "ragkv_fusion_seconds"
ORDERED_TOKENS = "ragkv_ordered_tokens_total"
DOCUMENT_HITS = "ragkv_document_hits_total"
DOCUMENT_SAVED_TOKENS = "ragkv_document_saved_tokens_total"
TURN_REQUESTS = "ragkv_turn_requests_total"
TURN_PROMPT_TOKENS = "ragkv_turn_prompt_tokens_total"
TURN_REUSED_TOKENS = "ragkv_turn_reused_tokens_total"

MEMORY, DEVICE, DISK, REDIS, STORE = "memory", "device", "disk", "redis", "store"
CAPACITY, RESET, SUPERSEDED, ABANDONED, EXPIRED = "capacity", "reset", "superseded", "abandoned", "expired"
NO_ROOM, COLLISION, ADMISSION = "no_room", "collision", "admission"
RESTING, THROTTLED = "resting", "throttled"
_LOWER = ((DISK,), (REDIS,), (STORE,))
_TIERS = ((MEMORY,), (DEVICE,), *_LOWER)
_TURNS = (("1",), ("2",), ("3",), ("4",), ("5+",))


@dataclass(frozen=True, slots=True)
class Metric:
    """Kind, help text and label names of one metric. `known`: label values of series that are there from the
    start, at 0, so that a rate sees how they begin to grow; of a gauge none is."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()
    known: tuple[tuple[str, ...], ...] = ()

    @property
    def at_start(self) -> tuple[tuple[str, ...], ...]:
        """The label values of all series that are there from the start."""
        if self.kind == "gauge":
            return ()
        return self.known if self.labels else ((),)


METRICS: dict[str, Metric] = {
    each.name: each
    for each in (
        Metric(
            LOOKED_UP_TOKENS, "counter", "Prompt tokens that ragkv looked up: those after the engine's own hit."
        ),
        Metric(
            HIT_TOKENS,
            "counter",
            "Prompt tokens of exact hits, by the tier that held their KV.",
            ("tier",),
            _TIERS,
        ),
        Metric(STORED_TOKENS, "counter", "Tokens whose KV was stored in memory."),
        Metric(
            LOOKUPS, "counter", "Lookups of requests, by result (hit, miss).", ("result",), (("hit",), ("miss",))
        ),
        Metric(USED_BYTES, "gauge", "Bytes in use, by tier.", ("tier",)),
        Metric(
            PLANE_BYTES,
            "gauge",
            "Bytes in use in memory, by kind of layers (full attention; window_N, chunk_N: layers that attend to N"
            " tokens).",
            ("plane",),
        ),
        Metric(USED_PAGES, "gauge", "Pages in use, by tier.", ("tier",)),
        Metric(CAPACITY_BYTES, "gauge", "Byte budget, by tier.", ("tier",)),
        Metric(CHUNKS, "gauge", "Stored chunks, by tier.", ("tier",)),
        Metric(
            EVICTED_CHUNKS,
            "counter",
            "Chunks removed from a tier, by tier and reason (capacity, reset, superseded, abandoned, expired).",
            ("tier", "reason"),
        ),
        Metric(
            REFUSED_CHUNKS,
            "counter",
            "Chunks that memory did not store, by reason (no_room, collision, admission).",
            ("reason",),
        ),
        Metric(LOAD_SECONDS, "histogram", "Time that a worker's copies of one load took."),
        Metric(STORE_SECONDS, "histogram", "Time that a worker's copies of one store took."),
        Metric(ERRORS, "counter", "Faults that ragkv caught and treated as a miss, by kind.", ("kind",)),
        Metric(
            PROMOTED_TOKENS,
            "counter",
            "Tokens promoted into memory, by the tier that held them.",
            ("tier",),
            _LOWER,
        ),
        Metric(
            WAITS,
            "counter",
            "Requests that waited for lower tiers, by result (loaded, missed, declined, deadline).",
            ("result",),
        ),
        Metric(WAIT_SECONDS, "histogram", "Time that requests waited for lower tiers."),
        Metric(
            GATE_DECISIONS,
            "counter",
            "Decisions of the load gate, by slowest tier and decision (load, decline; small: too few tokens).",
            ("tier", "decision"),
        ),
        Metric(
            GATE_STATE,
            "gauge",
            "Whether the gate declines loads of some size, by slowest tier (or fusion): 0 none, 1 all but trials.",
            ("tier",),
        ),
        Metric(PINNED_BYTES, "gauge", "Bytes in memory that owners have pinned."),
        Metric(
            TIER_STATE,
            "gauge",
            "Circuit breaker of a lower tier, by side (read, write): 0 in use, 1 on trial, 2 at rest.",
            ("tier", "side"),
        ),
        Metric(
            TIER_ERRORS,
            "counter",
            "Failed operations of a lower tier, by reason (timeout, gone, full, refused, io, …).",
            ("tier", "reason"),
        ),
        Metric(READ_BYTES, "counter", "Bytes read from a lower tier.", ("tier",)),
        Metric(READ_SECONDS, "histogram", "Time to read one batch of chunks from a lower tier.", ("tier",)),
        Metric(WRITTEN_BYTES, "counter", "Bytes written to a lower tier.", ("tier",)),
        Metric(WRITE_SECONDS, "histogram", "Time to write one chunk to a lower tier.", ("tier",)),
        Metric(QUEUED_BYTES, "gauge", "Bytes waiting to be written to a lower tier.", ("tier",)),
        Metric(FREE_BYTES, "gauge", "Free bytes on the file system of a lower tier, as last measured.", ("tier",)),
        Metric(
            UNWRITTEN_CHUNKS,
            "counter",
            "Chunks not written to a lower tier, by reason (resting, throttled, admission, no_room).",
            ("tier", "reason"),
        ),
        Metric(
            REJECTED_PAYLOADS,
            "counter",
            "Payloads that failed a check when read, by reason; none was served.",
            ("tier", "reason"),
        ),
        Metric(
            FUSION_DECISIONS,
            "counter",
            "Documents in requests that asked for fusion, by decision (reused, moved, missing, too_short, "
            "declined, unsupported).",
            ("decision",),
        ),
        Metric(
            FUSED_TOKENS,
            "counter",
            "Prompt tokens of fusions, by kind (reused, recomputed, gap).",
            ("kind",),
            (("reused",), ("recomputed",), ("gap",)),
        ),
        Metric(FUSION_SECONDS, "histogram", "Time that a worker spent on the fusion of one request."),
        Metric(
            ORDERED_TOKENS,
            "counter",
            "Tokens of passages whose order was asked for, by kind (all; given: those that need not be computed "
            "in the order given; ordered: in the order answered).",
            ("kind",),
            (("all",), ("given",), ("ordered",)),
        ),
        Metric(
            DOCUMENT_HITS,
            "counter",
            "Requests that reused KV of a document, by its id in the hints.",
            ("document",),
        ),
        Metric(
            DOCUMENT_SAVED_TOKENS, "counter", "Tokens of a document that were not computed again.", ("document",)
        ),
        Metric(
            TURN_REQUESTS,
            "counter",
            "Requests, by turn of their conversation (1, 2, 3, 4, 5+).",
            ("turn",),
            _TURNS,
        ),
        Metric(TURN_PROMPT_TOKENS, "counter", "Prompt tokens, by turn of the conversation.", ("turn",), _TURNS),
        Metric(
            TURN_REUSED_TOKENS,
            "counter",
            "Prompt tokens that were not computed, by turn: the engine's own hits and ragkv's.",
            ("turn",),
            _TURNS,
        ),
    )
}


class Metrics:
    """Collects between two `drain` calls. Gauges keep their last value and are sent when they change."""

    def __init__(self) -> None:
        self._counters: dict[str, float] = {}
        self._gauges: dict[str, float] = {}
        self._sent: dict[str, float] = {}
        self._seconds: dict[str, list[float]] = {}

    def count(self, name: str, value: float = 1, **labels: str) -> None:
        """Add to a counter."""
        key = _key(name, "counter", labels)
        self._counters[key] = self._counters.get(key, 0) + value

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._gauges[_key(name, "gauge", labels)] = value

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Add one observation to a histogram."""
        self._seconds.setdefault(_key(name, "histogram", labels), []).append(seconds)

    def drain(self) -> dict[str, Any]:
        """What came since the last call, of plain types: {} when nothing did. See `merge` for its shape."""
        changed = {key: value for key, value in self._gauges.items() if self._sent.get(key) != value}
        self._sent.update(changed)
        data = {"counters": self._counters, "gauges": changed, "seconds": self._seconds}
        self._counters, self._seconds = {}, {}
        return {part: values for part, values in data.items() if values}


def merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    """Add one drained record to another: counters add up, gauges replace, observations append."""
    counters = into.setdefault("counters", {})
    for key, value in more.get("counters", {}).items():
        counters[key] = counters.get(key, 0) + value
    into.setdefault("gauges", {}).update(more.get("gauges", {}))
    seconds = into.setdefault("seconds", {})
    for key, values in more.get("seconds", {}).items():
        seconds.setdefault(key, []).extend(values)


def split(key: str) -> tuple[str, list[str]]:
    """Name and label values (in the order of `Metric.labels`) of a recorded key."""
    name, *values = key.split(SEPARATOR)
    return name, values


def _key(name: str, kind: str, labels: dict[str, str]) -> str:
    metric = METRICS[name]
    if metric.kind != kind or labels.keys() != set(metric.labels):
        raise ValueError(f"metric {name}: a {metric.kind} with labels {metric.labels}, used as {kind}, {labels}")
    return SEPARATOR.join((name, *(labels[label] for label in metric.labels)))
