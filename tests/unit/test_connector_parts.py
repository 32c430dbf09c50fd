"""The connector's small parts: hints, the border, stats, identity, messages, and the early look at settings."""

import json
import logging
import pickle
from types import SimpleNamespace

import numpy as np
import prometheus_client
import pytest
import torch
from vllm.config import KVTransferConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode, MLAAttentionSpec, SlidingWindowSpec

from ragkv.config import Settings
from ragkv.connectors.vllm import NAME, plugin
from ragkv.connectors.vllm.connector import RagKVConnector
from ragkv.connectors.vllm.faults import Faults, gives, guarded
from ragkv.connectors.vllm.hints import named_boundaries
from ragkv.connectors.vllm.identity import (
    Namespaces,
    engine_identity,
    examine,
    load_structure,
    token_structure,
    weights_fingerprint,
)
from ragkv.connectors.vllm.protocol import Handshake, Job, StepOrders, StepReport
from ragkv.connectors.vllm.stats import RagKVPromMetrics, RagKVStats
from ragkv.connectors.vllm.worker import WorkerSide
from ragkv.errors import ConfigError, LayoutError
from ragkv.kvstore import metrics as m
from ragkv.kvstore.metrics import METRICS, Metrics
from ragkv.kvstore.segment import Segment

# --- hints ---


@pytest.mark.parametrize(
    "params",
    [None, {}, {"ragkv": None}, {"ragkv": {}}, {"other": 1}, {"ragkv": {"documents": []}}, [], "ragkv", 7],
)
def test_no_hints_are_no_problem(params):
    assert named_boundaries(params) == ([], None)


def test_documents_name_both_their_ends_once_and_never_the_start_of_the_prompt():
    spans = [
        {"id": "b", "start": 40, "end": 90},
        {"start": 0, "end": 40},
        {"start": 10, "end": 90, "id": None},
    ]
    assert named_boundaries({"ragkv": {"documents": spans}}) == ([10, 40, 90], None)


@pytest.mark.parametrize(
    ("hints", "says"),
    [
        (7, "ragkv = 7"),
        ("documents", "ragkv = 'documents'"),
        ([], r"ragkv = \[\]"),
        ({"documents": None}, "documents = None"),
        ({"documents": {"start": 1, "end": 2}}, "documents = "),
        ({"documents": [3]}, r"documents = \[3\]"),
        ({"documents": [None]}, "documents"),
        ({"documents": [{}]}, "documents"),
        ({"documents": [{"start": 1}]}, "documents"),
        ({"documents": [{"start": 5, "end": 5}]}, "start < end"),
        ({"documents": [{"start": -1, "end": 5}]}, "documents"),
        ({"documents": [{"start": 1.0, "end": 5}]}, "documents"),
        ({"documents": [{"start": "1", "end": "5"}]}, "documents"),
        ({"documents": [{"start": False, "end": True}]}, "documents"),
        ({"documents": [{"start": 1, "end": 5}, {"start": 9, "end": 2}]}, "documents"),
    ],
)
def test_malformed_hints_name_nothing_and_say_why(hints, says):
    boundaries, problem = named_boundaries({"ragkv": hints})
    assert boundaries == []
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(problem)


@pytest.mark.parametrize("unknown", ["fuze", 3, None, ("a", "b")])
def test_an_unknown_hint_is_told_and_the_known_ones_hold(unknown):
    boundaries, problem = named_boundaries({"ragkv": {unknown: 1, "documents": [{"start": 2, "end": 5}]}})
    assert boundaries == [2, 5]
    assert str(unknown)[:4] in problem and "documents" in problem


def test_what_is_said_of_a_huge_hint_is_short():
    for hints in ("x" * 10**6, {"documents": ["x" * 10**6] * 100}, {"y" * 10**6: 1}):
        assert len(named_boundaries({"ragkv": hints})[1]) < 300


# --- the border ---


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


def test_texts_that_requests_choose_are_logged_once(caplog):
    """Else whoever sends requests could fill the log, and our memory."""
    guard = Guarded()
    for number in range(50):
        guard.faults.note("hints", f"ragkv = {number}")
    assert errors(guard.metrics) == {"hints": 50}
    assert [record.getMessage() for record in caplog.records] == [
        "ragkv: hints: ragkv = 0; treated as a miss, logged once"
    ]
    assert len(guard.faults._seen) == 1


# --- stats ---


def recorded():
    metrics = Metrics()
    metrics.count(m.HIT_TOKENS, 30, tier=m.MEMORY)
    metrics.count(m.LOOKUPS, result="hit")
    metrics.gauge(m.USED_PAGES, 12, tier=m.MEMORY)
    metrics.observe(m.LOAD_SECONDS, 0.002)
    return metrics.drain()


def test_stats_add_up_and_survive_the_way_to_another_process():
    total = RagKVStats(data=recorded()).aggregate(RagKVStats(data=json.loads(json.dumps(recorded()))))
    assert total.reduce() == {"hit_tokens_total:memory": 60, "lookups_total:hit": 2}
    assert total.data["gauges"] == {f"{m.USED_PAGES}\x1fmemory": 12}
    assert total.data["seconds"] == {m.LOAD_SECONDS: [0.002, 0.002]}
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
        assert value(f"{m.LOAD_SECONDS}_count", labels) == times
        assert value(f"{m.LOAD_SECONDS}_bucket", {**labels, "le": "0.0025"}) == times
        assert value(f"{m.LOAD_SECONDS}_bucket", {**labels, "le": "0.001"}) == 0


# --- identity ---


def weights(folder, name="model.safetensors", size=300_000, change=None):
    content = bytearray(np.random.default_rng(1).bytes(size))
    if change is not None:
        content[change] ^= 1
    (folder / name).write_bytes(content)


@pytest.mark.parametrize("change", [0, 150_001, 299_999])
def test_the_fingerprint_of_weights_changes_with_their_bytes(tmp_path, change):
    weights(tmp_path)
    before = weights_fingerprint(str(tmp_path), "main", 0)
    assert weights_fingerprint(str(tmp_path), "other name of the same", 0) == before
    weights(tmp_path, change=change)
    assert weights_fingerprint(str(tmp_path), "main", 0) != before


def test_the_fingerprint_of_weights_changes_with_files_sizes_names_and_seed(tmp_path):
    seen = set()

    def look(seed=0):
        seen.add(weights_fingerprint(str(tmp_path), "main", seed))
        return len(seen)

    weights(tmp_path)
    assert look() == 1
    assert look(seed=1) == 2
    weights(tmp_path, "more.bin", 10)
    assert look() == 3
    weights(tmp_path, "more.bin", 11)
    assert look() == 4
    (tmp_path / "more.bin").rename(tmp_path / "less.bin")
    assert look() == 5
    (tmp_path / "tokenizer.json").write_text("{}")
    assert look() == 5, "only weights count"


def test_a_single_file_and_a_name_are_told_apart(tmp_path):
    weights(tmp_path, "model.gguf")
    file = str(tmp_path / "model.gguf")
    assert weights_fingerprint(file, "None", 0) == weights_fingerprint(str(tmp_path), "None", 0)
    assert weights_fingerprint("org/model", "a", 0) != weights_fingerprint("org/model", "b", 0)
    assert weights_fingerprint("org/model", "a", 0) != weights_fingerprint("org/other", "a", 0)


def breaks(vocabulary, *tokens):
    structure = token_structure(vocabulary)
    return structure.breaks(np.array([vocabulary[token] for token in tokens], dtype=np.int32)).tolist()


def test_structure_of_byte_level_vocabularies():
    vocabulary = {"a": 0, "Ċ": 1, "ĊĊ": 2, ".ĠĊĊ": 3, "Ġ": 4, "ĠĊ": 5, "čĊ": 6, "ĉ": 9}
    assert breaks(vocabulary, "a", "ĊĊ", "a") == [2]
    assert breaks(vocabulary, "a", "Ċ", "a", "Ċ", "Ċ", "a") == [5]
    assert breaks(vocabulary, "a", ".ĠĊĊ", "a") == [2]
    assert breaks(vocabulary, "a", "Ċ", "Ġ", "ĠĊ", "a", "a") == [4]
    assert breaks(vocabulary, "a", "Ċ", "ĉ", "čĊ", "a") == [4]
    assert breaks(vocabulary, "a", "Ċ", "a", "Ċ", "a") == []


def test_structure_of_sentencepiece_vocabularies():
    vocabulary = {"▁the": 0, "<0x0A>": 1, "▁": 2, "a": 3}
    assert breaks(vocabulary, "a", "<0x0A>", "<0x0A>", "▁the", "a") == [3]
    assert breaks(vocabulary, "a", "<0x0A>", "▁", "<0x0A>", "▁the") == [4]
    assert breaks(vocabulary, "a", "<0x0A>", "▁the", "<0x0A>", "a") == []


def test_structure_of_bytes_of_holes_and_of_nothing():
    assert breaks({b"a": 7, b"\n\n": 3}, b"a", b"\n\n", b"a") == [2]
    assert token_structure({}).breaks(np.array([1, 2, 99], dtype=np.int32)).tolist() == []
    config = SimpleNamespace(model_config=SimpleNamespace(skip_tokenizer_init=True))
    assert load_structure(config).breaks(np.array([0, 0, 0], dtype=np.int32)).tolist() == []


def spec(cls=FullAttentionSpec, **change):
    given = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
    return cls(**given | change)


def config(**change):
    parallel = {
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "tensor_parallel_size": 2,
    }
    parallel |= {name: change.pop(name) for name in list(change) if name in parallel}
    model = {
        "hf_config": SimpleNamespace(to_dict=lambda: {"rope_theta": 1e4}),
        "model": "org/model",
        "revision": None,
        "seed": 0,
        "quantization": None,
        "dtype": torch.bfloat16,
        "is_prefix_caching_supported": True,
    }
    model |= {name: change.pop(name) for name in list(change) if name in model}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel),
        model_config=SimpleNamespace(**model),
        cache_config=SimpleNamespace(cache_dtype=change.pop("cache_dtype", "auto")),
        load_config=SimpleNamespace(load_format=change.pop("load_format", "auto")),
        speculative_config=change.pop("speculative_config", None),
    )


def caches(*specs, layers=("layer.0", "layer.1", "layer.2")):
    return SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=each, layer_names=list(layers)) for each in specs]
    )


def test_the_shape_of_an_engine():
    shape = examine(config(), caches(spec()))
    geometry = shape.geometry
    assert shape.layers == ("layer.0", "layer.1", "layer.2") and shape.ranks == 2
    assert (geometry.layers, geometry.heads, geometry.head_dim) == (3, 2, 64)
    assert (geometry.itemsize, geometry.block_tokens) == (2, 16)
    assert geometry.token_bytes == 2 * 3 * 2 * 64 * 2
    assert shape.page_bytes(5) == 5 * geometry.token_bytes * 2


@pytest.mark.parametrize(
    ("change", "groups", "says"),
    [
        ({"pipeline_parallel_size": 2}, [spec()], "pipeline_parallel_size = 2"),
        ({"decode_context_parallel_size": 2}, [spec()], "decode_context_parallel_size = 2"),
        ({"prefill_context_parallel_size": 2}, [spec()], "prefill_context_parallel_size = 2"),
        (
            {"speculative_config": SimpleNamespace(method="eagle3")},
            [spec()],
            "speculative decoding by eagle3",
        ),
        ({"is_prefix_caching_supported": False}, [spec()], "cannot do without a prefix"),
        ({}, [], "0 groups"),
        ({}, [spec(), spec()], "2 groups"),
        ({}, [spec(SlidingWindowSpec, sliding_window=64)], "SlidingWindowSpec"),
        ({}, [spec(MLAAttentionSpec, num_kv_heads=1)], "MLAAttentionSpec"),
        ({}, [spec(head_size_v=32)], "head sizes of K and V differ: 64, 32"),
        ({}, [spec(non_causal=True)], "not causal"),
        ({}, [spec(kv_quant_mode=KVQuantMode.INT8_PER_TOKEN_HEAD)], "INT8_PER_TOKEN_HEAD"),
        ({}, [spec(kv_quant_mode=KVQuantMode.NVFP4)], "NVFP4"),
    ],
)
def test_engines_that_cannot_be_served_are_refused_in_plain_words(change, groups, says):
    with pytest.raises(LayoutError, match=says):
        examine(config(**change), caches(*groups))


@pytest.mark.parametrize(
    ("change", "group"),
    [
        ({"speculative_config": SimpleNamespace(method="ngram")}, spec()),
        ({}, spec(kv_quant_mode=KVQuantMode.FP8_PER_TENSOR, dtype=torch.uint8)),
        ({}, spec(sliding_window=128)),
    ],
)
def test_what_may_look_odd_and_is_served(change, group):
    assert examine(config(**change), caches(group)).geometry.itemsize == group.dtype.itemsize


def test_an_engine_is_named_by_all_that_its_kv_depends_on():
    variants = [
        {},
        {"hf_config": SimpleNamespace(to_dict=lambda: {"rope_theta": 1e6})},
        {"model": "org/other"},
        {"revision": "abc"},
        {"seed": 1},
        {"quantization": "awq"},
        {"dtype": torch.float16},
        {"cache_dtype": "fp8"},
        {"load_format": "dummy"},
        {"tensor_parallel_size": 4},
    ]
    names = [engine_identity(config(**each), examine(config(**each), caches(spec()))) for each in variants]
    assert len(set(names)) == len(variants)
    assert names[0] == engine_identity(config(), examine(config(), caches(spec())))
    assert all(len(name) == 16 for name in names)


def request(**features):
    given = {"prompt_embeds": None, "lora_request": None, "mm_features": [], "cache_salt": None}
    return SimpleNamespace(**given | features)


def test_a_changed_adapter_is_left_alone_until_it_has_a_new_name(tmp_path):
    weights(tmp_path, "adapter_model.safetensors", 100)
    lora = SimpleNamespace(lora_name="a", lora_int_id=1, lora_path=str(tmp_path), load_inplace=False)
    names = Namespaces(b"e" * 16)
    first = names.of(request(lora_request=lora))
    assert first is not None and first == names.of(request(lora_request=lora))
    assert first != names.of(request())
    weights(tmp_path, "adapter_model.safetensors", 101)
    assert names.of(request(lora_request=lora)) is None
    renewed = SimpleNamespace(**vars(lora) | {"lora_int_id": 2})
    assert names.of(request(lora_request=renewed)) not in (None, first)
    assert names.of(request(lora_request=lora)) is None


def test_the_same_adapter_under_another_id_shares(tmp_path):
    weights(tmp_path, "adapter_model.safetensors", 100)
    loras = [
        SimpleNamespace(lora_name="a", lora_int_id=n, lora_path=str(tmp_path), load_inplace=False) for n in (1, 2)
    ]
    names = Namespaces(b"e" * 16)
    assert len({names.of(request(lora_request=lora)) for lora in loras}) == 1


def test_no_media_and_no_list_of_media_are_the_same():
    names = Namespaces(b"e" * 16)
    assert names.of(request(mm_features=None, cache_salt="x")) == names.of(request(cache_salt="x"))


# --- messages ---


def test_reports_add_up():
    first = StepReport({1: 1, 2: 1}, {2})
    total = first.aggregate(StepReport({2: 1, 3: 1}, {3})).aggregate(StepReport({1: 2}, tainted=True))
    assert total == StepReport({1: 3, 2: 2, 3: 1}, {2, 3}, True)
    assert first == StepReport({1: 1, 2: 1}, {2}, False), "the first keeps its own"
    assert StepReport(tainted=True).aggregate(StepReport()).tainted


def test_orders_and_handshakes_are_plain_data():
    job = Job(7, np.array([3, 4], dtype=np.int64), np.array([90, 91], dtype=np.int64), "r1")
    orders = pickle.loads(pickle.dumps(StepOrders([job], [job, job], {5}, 16)))
    assert (orders.invalid_blocks, orders.block_tokens, len(orders.stores)) == ({5}, 16, 2)
    (came,) = orders.loads
    assert (came.id, came.finishes, came.rows.dtype) == (7, "r1", np.int64)
    assert came.rows.tolist() == [3, 4] and came.slots.tolist() == [90, 91]
    assert pickle.loads(pickle.dumps(Handshake("why"))) == Handshake("why")


# --- a worker without a tier ---


@pytest.fixture
def worker():
    metrics = Metrics()
    return WorkerSide(config(), caches(spec(non_causal=True)), Settings(), metrics, Faults(metrics))


def test_a_worker_that_never_saw_the_caches_refuses(worker):
    assert "never registered" in worker.handshake().refusal


def test_a_worker_says_why_it_cannot_take_part(worker):
    worker.register({})
    assert "not causal" in worker.handshake().refusal
    worker._kv_cache_config = None
    worker.register({})
    assert "AttributeError while its layout was probed" in worker.handshake().refusal


def test_a_worker_without_a_tier_fails_its_orders_and_frees_what_waits(worker):
    load = Job(1, np.array([0]), np.array([37]))
    store = Job(2, np.array([0]), np.array([50]), "r1")
    orders = StepOrders([load], [store], {9}, 16)
    worker.load(orders)
    assert worker.take_invalid_blocks() == {9, 2} and worker.take_invalid_blocks() == set()
    worker.store(orders)
    assert worker.take_finished() == {"r1"} and worker.take_finished() == set()
    assert worker.take_report() == StepReport({1: 1, 2: 1}, {1, 2}, True)
    assert worker.take_report() is None
    worker.close(), worker.close()


def test_promises_that_nobody_ordered_taint_a_report_too(worker):
    worker.load(StepOrders(invalid_blocks={4}))
    assert worker.take_report() == StepReport(tainted=True)


# --- the early look at the settings ---


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    import os

    for name in list(os.environ):
        if name.startswith("RAGKV_"):
            monkeypatch.delenv(name)


def transfer(**extra):
    return KVTransferConfig(kv_connector=NAME, kv_role="kv_both", kv_connector_extra_config=extra)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"memory": {"capacity": "lots"}}, "memory.capacity"),
        ({"memory": {"capcity": "1GiB"}}, "memory.capcity"),
        ({"memroy": {}}, "memroy"),
        ({"memory": 7}, "memory"),
        ({"memory": {"policy": "mru"}}, "lfu, lru"),
        ({"chunks": {"min_tokens": 300}}, "min_tokens < average_tokens"),
        ({"config": "/nowhere/ragkv.yaml"}, "/nowhere/ragkv.yaml"),
    ],
)
def test_bad_settings_stop_the_start(extra, says):
    with pytest.raises(ConfigError, match=says):
        plugin.check_settings(transfer(**extra))


def test_more_memory_than_the_machine_has_stops_the_start(monkeypatch):
    with pytest.raises(ConfigError, match=r"memory.capacity = 1048576TiB.*(--shm-size|shared memory|/dev/shm)"):
        plugin.check_settings(transfer(memory={"capacity": "1048576TiB"}))
    monkeypatch.setattr(plugin, "available_bytes", lambda: 2**20)
    with pytest.raises(ConfigError, match=r"memory.capacity = 2MiB"):
        plugin.check_settings(transfer(memory={"capacity": "2MiB"}))
    assert plugin.check_settings(transfer(memory={"capacity": "1MiB"})).settings.memory.capacity == 2**20


def test_room_is_looked_at_once_for_all_processes_of_an_engine(monkeypatch):
    config = transfer(memory={"capacity": "2MiB"})
    plugin.check_settings(config)
    monkeypatch.setattr(plugin, "available_bytes", lambda: 0)
    elsewhere = pickle.loads(pickle.dumps(config))
    assert plugin.check_settings(elsewhere).settings.memory.capacity == 2**21
    with pytest.raises(ConfigError, match=r"memory\.capacity"):
        plugin.check_settings(transfer(memory={"capacity": "2MiB"}))


def test_install_is_safe_to_repeat_and_checks_what_vllm_asks_for(monkeypatch):
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    monkeypatch.setattr(KVConnectorFactory, "_registry", dict(KVConnectorFactory._registry))
    monkeypatch.setattr(KVConnectorFactory, "get_connector_class", KVConnectorFactory.get_connector_class)
    plugin.install()
    once = KVConnectorFactory.get_connector_class
    plugin.install()
    assert KVConnectorFactory.get_connector_class is once
    with pytest.raises(ConfigError, match="lfu, lru"):
        KVConnectorFactory.get_connector_class(transfer(memory={"policy": "mru"}))
    assert KVConnectorFactory.get_connector_class(transfer(memory={"capacity": "1MiB"})).__name__ == NAME


@pytest.fixture
def newborn(tmp_path):
    """A connector's scheduler side that has not heard of its two workers yet."""
    made = RagKVConnector.__new__(RagKVConnector)
    made._scheduler, made._proposed, made._workers = None, object(), 2
    made._segment = Segment("engine", 4096, tmp_path)
    yield made
    made._close_segment()


def test_reuse_begins_when_all_workers_map_the_same_memory(newborn):
    segment, side = newborn._segment, newborn._proposed
    assert newborn.get_num_new_matched_tokens(None, 0) == (0, False)
    newborn.set_xfer_handshake_metadata_pp_aware({(0, rank): Handshake(None, segment.identity) for rank in (0, 1)})
    assert newborn._scheduler is side and newborn._segment is segment
    assert not segment.path.exists(), "nobody needs the name any more"


@pytest.mark.parametrize("fault", ["one is missing", "one refuses", "one maps another", "one maps none"])
def test_no_reuse_where_one_worker_is_in_doubt(newborn, fault):
    path, good = newborn._segment.path, Handshake(None, newborn._segment.identity)
    other = {
        "one refuses": {1: Handshake("its layout is unknown", newborn._segment.identity)},
        "one maps another": {1: Handshake(None, ("elsewhere", 1, 2))},
        "one maps none": {1: Handshake(None, None)},
    }.get(fault, {})
    newborn.set_xfer_handshake_metadata({0: good, **other})
    assert newborn._scheduler is None and newborn._proposed is None
    assert newborn.get_num_new_matched_tokens(None, 0) == (0, False)
    assert not path.exists()
