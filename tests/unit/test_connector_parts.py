"""The connector's small parts: messages, a worker without a tier, the early look at settings, the handshake."""

import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from vllm.config import KVTransferConfig
from vllm.v1.metrics.cache_hit_source import CacheHitSource as Source

from engine_config import caches, config, spec
from ragkv import preflight
from ragkv.config import Settings
from ragkv.connectors.vllm import NAME, plugin
from ragkv.connectors.vllm.error_boundary import Faults
from ragkv.connectors.vllm.messages import Handshake, Job, StepOrders, StepReport
from ragkv.connectors.vllm.scheduler import SchedulerSide
from ragkv.connectors.vllm.worker import WorkerSide
from ragkv.errors import ConfigError
from ragkv.kvstore import metrics as m
from ragkv.kvstore.metrics import Metrics
from ragkv.policies import POLICIES
from whole_start import Engine, alone, fresh_factory

# --- messages ---


def test_reports_add_up():
    first = StepReport({1: 1, 2: 1}, {2})
    total = first.aggregate(StepReport({2: 1, 3: 1}, {3})).aggregate(StepReport({1: 2}, unfused={"r"}))
    assert total == StepReport({1: 3, 2: 2, 3: 1}, {2, 3}, unfused={"r"})
    assert first == StepReport({1: 1, 2: 1}, {2}), "the first keeps its own"
    assert StepReport(unfused={"r"}).aggregate(StepReport(unfused={"s"})).unfused == {"r", "s"}
    times = StepReport(prefills=[(9, 0.5)], copies=[(4, 0.1)])
    total = times.aggregate(StepReport(prefills=[(9, 0.7)])).aggregate(StepReport(copies=[(4, 0.2)]))
    assert total == StepReport(prefills=[(9, 0.5), (9, 0.7)], copies=[(4, 0.1), (4, 0.2)])
    assert times == StepReport(prefills=[(9, 0.5)], copies=[(4, 0.1)])


def test_orders_and_handshakes_are_plain_data():
    job = Job(7, np.array([3, 4], dtype=np.int64), np.array([90, 91], dtype=np.int64), "r1")
    copy = Job(8, job.rows, job.slots, device=True)
    given = StepOrders([job], [job, copy], given_up={"r2": [5]}, block_tokens=16, tokens=700)
    orders = pickle.loads(pickle.dumps(given))
    assert (orders.given_up, orders.block_tokens, orders.tokens) == ({"r2": [5]}, 16, 700)
    assert [each.device for each in orders.stores] == [False, True]
    (came,) = orders.loads
    assert (came.id, came.request, came.rows.dtype) == (7, "r1", np.int64)
    assert came.rows.tolist() == [3, 4] and came.slots.tolist() == [90, 91]
    assert pickle.loads(pickle.dumps(Handshake("why"))) == Handshake("why")


@pytest.fixture(autouse=True)
def nothing_around(monkeypatch):
    with alone(monkeypatch):
        yield


@pytest.fixture
def engine():
    return Engine(None, ranks=2)


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
    broken = WorkerSide(config(), None, Settings(), Metrics(), Faults(Metrics()))
    broken.register({})
    assert "layout was probed: AttributeError: " in broken.handshake().refusal


def test_a_worker_without_a_tier_fails_its_orders_and_frees_what_waits(worker):
    load = Job(1, np.array([0]), np.array([37]), "r0")
    store = Job(2, np.array([0]), np.array([50]), "r1")
    worker.begin(StepOrders([load], [store], given_up={"r2": [9]}, finishing={"r1"}, block_tokens=16))
    worker.carry_out()
    assert worker.take_invalid_blocks() == {9, 2} and worker.take_invalid_blocks() == set()
    assert worker.take_finished() == ({"r1"}, {"r0", "r2"}) and worker.take_finished() == (set(), set())
    assert worker.take_report() == StepReport({1: 1, 2: 1}, {1, 2})
    assert worker.take_report() is None
    worker.close(), worker.close()


def test_what_was_ordered_is_carried_out_once_by_whatever_vllm_calls_first(engine):
    """0.25 to 0.30 call only for what has finished in a step without a forward; others for saves too."""
    connector = engine.worker(registered=False)
    store = Job(2, np.array([0]), np.array([50]), "r1")
    for calls in (("get_finished",), ("wait_for_save", "get_finished"), ("get_finished", "wait_for_save")):
        connector.bind_connector_metadata(StepOrders([], [store], finishing={"r1"}, block_tokens=16))
        connector.start_load_kv(None)
        told = [
            connector.get_finished(set()) if call == "get_finished" else connector.wait_for_save()
            for call in calls
        ]
        assert [each for each in told if each is not None] == [({"r1"}, None)]
        assert connector.build_connector_worker_meta() == StepReport({2: 1}, {2})
        assert connector.get_finished(set()) == (None, None)


def test_with_a_drafter_what_was_ordered_waits_until_that_has_run():
    """vLLM asks what has finished, then lets the drafter run, then calls for saves; its V1 runner does."""
    drafting = config(speculative_config=SimpleNamespace(method="eagle"))
    worker = WorkerSide(drafting, caches(spec()), Settings(), Metrics(), Faults(Metrics()))
    store = Job(2, np.array([0]), np.array([50]), "r1")

    def begin(tokens):
        worker.begin(StepOrders([], [store], finishing={"r1"}, block_tokens=16, tokens=tokens))

    begin(tokens=3)
    worker.carry_out(drafted=False)
    assert worker.take_finished() == (set(), set())
    worker.carry_out()
    assert worker.take_finished() == ({"r1"}, set())
    begin(tokens=0)
    worker.carry_out(drafted=False)
    assert worker.take_finished() == ({"r1"}, set()), "no forward, no drafter"
    begin(tokens=3)
    begin(tokens=0)  # nobody called for saves
    assert worker.take_finished() == ({"r1"}, set())


# --- the early look at the settings ---


def transfer(**extra):
    return KVTransferConfig(kv_connector=NAME, kv_role="kv_both", kv_connector_extra_config=extra)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"memory": {"capacity": "lots"}}, "memory.capacity"),
        ({"memory": {"capcity": "1GiB"}}, "memory.capcity"),
        ({"memroy": {}}, "memroy"),
        ({"memory": 7}, "memory"),
        ({"memory": {"policy": "mru"}}, ", ".join(sorted(POLICIES))),
        ({"disk": {"path": "kv"}}, "disk.path = 'kv'"),
        ({"redis": {"url": "http://host"}}, "redis://"),
        ({"redis": {"url": "redis://:hunter2@"}}, "redis.url = 'redis://': "),
        ({"chunks": {"min_tokens": 300}}, "min_tokens < average_tokens"),
        ({"config": "/nowhere/ragkv.yaml"}, "/nowhere/ragkv.yaml"),
    ],
)
def test_bad_settings_stop_the_start(extra, says):
    with pytest.raises(ConfigError, match=says) as caught:
        plugin.check_settings(transfer(**extra))
    assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)


def test_more_memory_than_the_machine_has_stops_the_start(monkeypatch):
    with pytest.raises(ConfigError, match=r"memory.capacity = 1048576TiB.*(--shm-size|shared memory|/dev/shm)"):
        plugin.check_settings(transfer(memory={"capacity": "1048576TiB"}))
    monkeypatch.setattr(preflight, "available_bytes", lambda: 2**20)
    with pytest.raises(ConfigError, match=r"memory.capacity = 2MiB"):
        plugin.check_settings(transfer(memory={"capacity": "2MiB"}))
    assert plugin.check_settings(transfer(memory={"capacity": "1MiB"})).settings.memory.capacity == 2**20


def test_room_is_looked_at_once_for_all_processes_of_an_engine(monkeypatch):
    config = transfer(memory={"capacity": "2MiB"})
    plugin.check_settings(config)
    monkeypatch.setattr(preflight, "available_bytes", lambda: 0)
    elsewhere = pickle.loads(pickle.dumps(config))
    assert plugin.check_settings(elsewhere).settings.memory.capacity == 2**21
    with pytest.raises(ConfigError, match=r"memory\.capacity"):
        plugin.check_settings(transfer(memory={"capacity": "2MiB"}))


def test_install_is_safe_to_repeat_and_checks_what_vllm_asks_for(monkeypatch):
    factory = fresh_factory(monkeypatch)
    plugin.install()
    once = factory.get_connector_class
    plugin.install()
    assert factory.get_connector_class is once
    with pytest.raises(ConfigError, match=r"memory\.policy = 'mru'"):
        factory.get_connector_class(transfer(memory={"policy": "mru"}))
    assert factory.get_connector_class(transfer(memory={"capacity": "1MiB"})).__name__ == NAME


@pytest.fixture
def newborn(engine):
    """A scheduler's connector that has not heard of its two workers yet."""
    made = engine.scheduler()
    yield made
    made.shutdown()


@pytest.fixture
def hands(engine, newborn):
    """What its workers have to say."""
    worker = engine.worker()
    hand = worker.get_handshake_metadata()
    yield [replace(hand, rank=rank, weights=b"w") for rank in (0, 1)]
    worker.shutdown()


def test_reuse_begins_when_all_workers_map_the_same_memory(engine, newborn, hands):
    assert newborn.get_num_new_matched_tokens(None, 0) == (0, False) and engine.segment.exists()
    newborn.set_xfer_handshake_metadata_pp_aware({(0, hand.rank): hand for hand in hands})
    assert newborn.scheduler_side is not None
    assert not engine.segment.exists(), "nobody needs the name any more"


@pytest.mark.parametrize(
    ("found", "sources"),
    [
        ({m.MEMORY: 30, m.DEVICE: 10}, {Source.HOST: 30, Source.DEVICE: 10}),
        ({m.DISK: 25, m.REDIS: 15}, {Source.DISK: 25, Source.EXTERNAL_UNSPECIFIED: 15}),
        ({m.REDIS: 30, m.STORE: 10}, {Source.EXTERNAL_UNSPECIFIED: 40}),
        ({m.MEMORY: 30}, {Source.HOST: 40}),
        ({}, {Source.HOST: 40}),
    ],
)
def test_vllm_is_told_where_tokens_came_from(newborn, hands, monkeypatch, found, sources):
    assert newborn.get_external_cache_hit_sources(None, 40) == {Source.HOST: 40}
    newborn.set_xfer_handshake_metadata(dict(enumerate(hands)))
    monkeypatch.setattr(SchedulerSide, "sources", lambda side, request: found)
    assert newborn.get_external_cache_hit_sources(None, 40) == sources
    assert newborn.get_external_cache_hit_sources(None, 0) == {}


@pytest.mark.parametrize("fault", ["one is missing", "one refuses", "one maps another", "one maps none"])
def test_no_reuse_where_one_worker_is_in_doubt(engine, newborn, hands, monkeypatch, fault):
    closed, close = [], SchedulerSide.close
    monkeypatch.setattr(
        SchedulerSide, "close", lambda side, seconds: closed.append(seconds) or close(side, seconds)
    )
    other = {
        "one refuses": {1: replace(hands[1], refusal="its layout is unknown")},
        "one maps another": {1: replace(hands[1], segment=("elsewhere", 1, 2))},
        "one maps none": {1: replace(hands[1], segment=None)},
    }.get(fault, {})
    newborn.set_xfer_handshake_metadata({0: hands[0], **other})
    assert closed == [0.0], "its tiers are let go, and nothing is waited for"
    assert not engine.segment.exists()
    newborn.set_xfer_handshake_metadata(dict(enumerate(hands)))
    assert newborn.scheduler_side is None, "for good"
    assert newborn.get_num_new_matched_tokens(None, 0) == (0, False)
