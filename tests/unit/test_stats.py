"""The connector's border: faults become misses, and metrics come into vLLM's own."""

import json
import logging
from types import SimpleNamespace

import prometheus_client
import pytest

from memory_growth import grown
from ragkv.connectors.vllm.error_boundary import Faults, gives, guarded
from ragkv.connectors.vllm.stats import RagKVPromMetrics, RagKVStats
from ragkv.errors import StoreError
from ragkv.kvstore import metrics as m
from ragkv.kvstore.metrics import METRICS, Metrics


class Guarded:
    def __init__(self):
        self.metrics = Metrics()
        self.faults = Faults(self.metrics)

    @guarded(gives(7))
    def constant(self, error=None):
        if error is not None:
            raise error
        return 1

    def _other(self, first, second=0):
        return ["instead", first, second]

    @guarded(_other)
    def computed(self, first, second=0):
        raise RuntimeError("lost")


def errors(metrics):
    return {key.split("\x1f")[1]: n for key, n in metrics.drain().get("counters", {}).items()}


def test_a_guarded_method_gives_its_own_answer_or_the_fallback():
    guard = Guarded()
    assert guard.constant() == 1
    assert errors(guard.metrics) == {}
    assert guard.constant(ValueError("x")) == 7
    assert guard.constant(error=ValueError("x")) == 7
    assert guard.computed(1, 2) == guard.computed(1, second=2) == ["instead", 1, 2]
    assert errors(guard.metrics) == {"constant": 2, "computed": 2}


def test_what_is_no_fault_goes_through():
    with pytest.raises(KeyboardInterrupt):
        Guarded().constant(KeyboardInterrupt())


def test_a_fault_is_counted_each_time_and_logged_once_a_kind_and_type(caplog):
    guard = Guarded()
    with caplog.at_level(logging.WARNING, "vllm.ragkv"):
        for text in ("a", "b", "c"):
            guard.constant(ValueError(text))
        guard.constant(KeyError("d"))
        guard.faults.note("load", ValueError("e"))
    assert errors(guard.metrics) == {"constant": 4, "load": 1}
    assert [r.getMessage().split(";")[0] for r in caplog.records] == [
        "ragkv: constant: a",
        "ragkv: constant: 'd'",
        "ragkv: load: e",
    ]
    assert all(record.exc_info[1] is not None for record in caplog.records), "with its traceback"


def test_an_error_of_ours_is_logged_without_a_traceback(caplog):
    guard = Guarded()
    with caplog.at_level(logging.WARNING, "vllm.ragkv"):
        guard.faults.note("disk tier", StoreError("full", "disk: no space left"))
    (record,) = caplog.records
    assert record.getMessage() == "ragkv: disk tier: disk: no space left; treated as a miss, logged once"
    assert not record.exc_info


def test_texts_that_requests_choose_are_logged_once(caplog):
    """Else whoever sends requests could fill the log, and our memory."""
    guard = Guarded()

    def note():
        for number in range(5000):
            guard.faults.note("hints", f"ragkv = {number}")

    assert grown(note) < 50_000
    assert errors(guard.metrics) == {"hints": 5000}
    assert [record.getMessage() for record in caplog.records] == [
        "ragkv: hints: ragkv = 0; treated as a miss, logged once"
    ]


def recorded():
    metrics = Metrics()
    metrics.count(m.HIT_TOKENS, 30, tier=m.MEMORY)
    metrics.count(m.LOOKUPS, result="hit")
    metrics.gauge(m.USED_PAGES, 12, tier=m.MEMORY)
    metrics.observe(m.LOAD_SECONDS, 0.002)
    metrics.count(m.EVICTED_CHUNKS, 3, tier=m.DISK, reason=m.CAPACITY)
    metrics.gauge(m.TIER_STATE, 2, tier=m.REDIS, side="read")
    metrics.observe(m.READ_SECONDS, 0.002, tier=m.DISK)
    return metrics.drain()


def test_stats_add_up_and_survive_the_way_to_another_process():
    total = RagKVStats(data=recorded()).aggregate(RagKVStats(data=json.loads(json.dumps(recorded()))))
    assert total.reduce() == {
        "evicted_chunks_total:disk:capacity": 6,
        "hit_tokens_total:memory": 60,
        "lookups_total:hit": 2,
    }
    assert total.data["gauges"] == {f"{m.USED_PAGES}\x1fmemory": 12, f"{m.TIER_STATE}\x1fredis\x1fread": 2}
    assert total.data["seconds"] == {m.LOAD_SECONDS: [0.002] * 2, f"{m.READ_SECONDS}\x1fdisk": [0.002] * 2}
    assert not total.is_empty()
    total.reset()
    assert total.is_empty() and total.reduce() == {}


def test_stats_of_nothing_are_empty():
    assert RagKVStats().is_empty()
    assert RagKVStats(data={"counters": {}, "gauges": {}, "seconds": {}}).is_empty()
    assert RagKVStats().aggregate(RagKVStats()).is_empty()
    assert not RagKVStats(data={"gauges": {m.USED_PAGES: 0}}).is_empty()


@pytest.fixture
def registry():
    return prometheus_client.CollectorRegistry()


@pytest.fixture
def exported(registry):
    """As vLLM builds it: one set of metrics, two engines."""
    kinds = (prometheus_client.Counter, prometheus_client.Gauge, prometheus_client.Histogram)
    types = {kind: lambda kind=kind, **given: kind(registry=registry, **given) for kind in kinds}
    engines = {0: ["toy", "0"], 1: ["toy", "1"]}
    return RagKVPromMetrics(SimpleNamespace(kv_transfer_config=None), types, ["model_name", "engine"], engines)


def test_every_metric_is_exported_under_its_name(exported, registry):
    families = {family.name: family for family in registry.collect()}
    names = {name.removesuffix("_total") if each.kind == "counter" else name for name, each in METRICS.items()}
    assert families.keys() == names
    for name, each in METRICS.items():
        family = families[name.removesuffix("_total") if each.kind == "counter" else name]
        assert (family.type, family.documentation) == (each.kind, each.text)


def test_what_is_known_beforehand_is_there_from_the_start_at_zero(exported, registry):
    """Else a rate would never see the first hit: a series that begins at 499 has not grown."""
    for engine in ("0", "1"):
        labels = {"model_name": "toy", "engine": engine}
        value = registry.get_sample_value
        assert value(m.STORED_TOKENS, labels) == value(f"{m.LOAD_SECONDS}_count", labels) == 0
        for tier in (m.MEMORY, m.DEVICE, m.DISK, m.REDIS, m.STORE):
            assert value(m.HIT_TOKENS, {**labels, "tier": tier}) == 0
            assert value(m.USED_BYTES, {**labels, "tier": tier}) is None, "a gauge is not known"
        assert value(m.LOOKUPS, {**labels, "result": "hit"}) == 0


def test_records_are_booked_by_engine(exported, registry):
    exported.observe(recorded(), 0)
    exported.observe(recorded(), 1)
    exported.observe(recorded(), 1)
    exported.observe({}, 0)
    for engine, times in (("0", 1), ("1", 2)):
        labels = {"model_name": "toy", "engine": engine}
        value = registry.get_sample_value
        assert value(m.HIT_TOKENS, {**labels, "tier": "memory"}) == 30 * times
        assert value(m.LOOKUPS, {**labels, "result": "hit"}) == times
        assert value(m.USED_PAGES, {**labels, "tier": "memory"}) == 12
        assert value(m.EVICTED_CHUNKS, {**labels, "tier": "disk", "reason": "capacity"}) == 3 * times
        assert value(m.TIER_STATE, {**labels, "tier": "redis", "side": "read"}) == 2
        assert value(f"{m.READ_SECONDS}_count", {**labels, "tier": "disk"}) == times
        assert value(f"{m.LOAD_SECONDS}_count", labels) == times
        assert value(f"{m.LOAD_SECONDS}_bucket", {**labels, "le": "0.0025"}) == times
        assert value(f"{m.LOAD_SECONDS}_bucket", {**labels, "le": "0.001"}) == 0
