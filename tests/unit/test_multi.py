"""ragkv inside vLLM's MultiConnector, without an engine: settings, policy, model, handshake, failed loads."""

import copy
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.v1.worker.worker_base import WorkerWrapperBase

from quiet_connector import QuietConnector as LoudConnector  # noqa: F401  # by name; with a word of its own
from ragkv import preflight
from ragkv.connectors.vllm import NAME, model, plugin
from ragkv.connectors.vllm.messages import Handshake, StepReport
from ragkv.connectors.vllm.multi import MULTI, ROOM_CHECKED, TOLD_LATE, told_late
from ragkv.connectors.vllm.scheduler import SchedulerSide
from ragkv.errors import ConfigError
from whole_start import Engine, alone, fresh_factory

QUIET, LOUD = "QuietConnector", "LoudConnector"


class QuietConnector(KVConnectorBase_V1):
    pass


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    factory = fresh_factory(monkeypatch)
    for name in (QUIET, LOUD):
        factory.register_connector(name, __name__, name)
    plugin.install()


def child(name=NAME, **extra):
    return {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": extra}


def several(*children):
    return KVTransferConfig(
        kv_connector=MULTI, kv_role="kv_both", kv_connector_extra_config={"connectors": list(children)}
    )


def asked(config):
    """vLLM asks for the class, as it does before all else; the configuration."""
    assert KVConnectorFactory.get_connector_class(config).__name__ == MULTI
    return config


def ours(config):
    """The configuration that MultiConnector makes for our child."""
    (entry,) = (e for e in config.kv_connector_extra_config["connectors"] if e["kv_connector"] == NAME)
    return KVTransferConfig(**entry, engine_id=config.engine_id)


@pytest.mark.parametrize("children", [[child()], [child(QUIET), child()], [child(MULTI, connectors=[child()])]])
def test_a_failed_load_is_computed_there_too(children):
    config = several(*children)
    assert config.kv_load_failure_policy == "fail"
    assert asked(config).kv_load_failure_policy == "recompute"


def test_a_multi_connector_without_ragkv_is_left_alone():
    config = several(child(QUIET))
    before = copy.deepcopy(config)
    assert asked(config) == before


def test_settings_of_a_child_are_checked_early():
    with pytest.raises(ConfigError, match=r"memory\.policy = 'mru'"):
        asked(several(child(QUIET), child(memory={"policy": "mru"})))


def test_two_of_ours_are_refused():
    with pytest.raises(ConfigError, match="2 times; allowed: once"):
        asked(several(child(), child()))


def test_room_is_looked_at_once_for_all_processes_of_an_engine(monkeypatch):
    config = asked(several(child(memory={"capacity": "2MiB"})))
    monkeypatch.setattr(preflight, "available_bytes", lambda: 0)
    elsewhere = asked(pickle.loads(pickle.dumps(config)))
    loaded = plugin.check_settings(ours(elsewhere))
    assert loaded.settings.memory.capacity == 2**21
    assert ours(elsewhere).kv_connector_extra_config[ROOM_CHECKED] is True
    with pytest.raises(ConfigError, match=r"memory\.capacity"):
        asked(several(child(memory={"capacity": "2MiB"})))


def test_the_model_is_found_from_a_copy_of_the_configuration(monkeypatch):
    config, other = (SimpleNamespace(compilation_config=SimpleNamespace()) for _ in range(2))
    runner = SimpleNamespace(get_model=lambda: "the model", get_draft_model=lambda: "its drafter")
    worker = type("Worker", (), {})()
    worker.vllm_config, worker.model_runner = config, runner
    for name in ("init_device", "initialize_from_config"):
        monkeypatch.setattr(WorkerWrapperBase, name, lambda wrapper: None)
    model.watch_workers()
    WorkerWrapperBase.initialize_from_config(SimpleNamespace(worker=worker))
    assert model.find_model(config) == model.find_model(copy.copy(config)) == "the model"
    assert model.find_drafter(copy.copy(config)) == "its drafter"
    assert model.find_model(other) is None and model.find_drafter(other) is None


@pytest.mark.parametrize(
    ("children", "late"),
    [
        ([child()], False),
        ([child(QUIET), child()], False),
        ([child(LOUD), child()], True),
        ([child(), child(LOUD)], True),
        ([child(), child(MULTI, connectors=[child(LOUD)])], True),
    ],
)
def test_handshakes_that_vllm_would_mix_up_are_told_later(children, late):
    """MultiConnector hands the first child's handshake to all of them."""
    assert told_late(ours(asked(several(*children)))) is late
    assert not told_late(KVTransferConfig(**child()))


@pytest.fixture
def engine(monkeypatch, request):
    """A start of vLLM with two ranks; `marks`: in our entry."""
    with alone(monkeypatch):
        yield Engine(None, ranks=2, **getattr(request, "param", {TOLD_LATE: True}))


@pytest.fixture
def late(engine):
    """The scheduler's connector, to which the workers' word comes late."""
    made = engine.scheduler()
    yield made
    made.shutdown()


@pytest.fixture
def worker(engine, late):
    made = engine.worker()
    yield made
    made.shutdown()


def first_report(worker):
    """Of both workers, which are alike."""
    first, second = worker.build_connector_worker_meta(), StepReport()
    second.handshakes = [replace(first.handshakes[0], rank=1)]
    return pickle.loads(pickle.dumps(first.aggregate(second)))


def output(report=None, invalid=()):
    return SimpleNamespace(
        kv_connector_worker_meta=report,
        invalid_block_ids=set(invalid),
        finished_sending=None,
        finished_recving=None,
    )


def test_reuse_begins_with_the_workers_first_report(late, worker):
    late.set_xfer_handshake_metadata({0: object(), 1: object()})  # another child's
    assert late.scheduler_side is None, "it waits for ours"
    late.update_connector_output(output(first_report(worker)))
    assert late.scheduler_side is not None


def test_a_refusal_that_comes_late_stands_aside(late, worker):
    late.update_connector_output(output(StepReport(handshakes=[Handshake("no"), Handshake("no")])))
    late.update_connector_output(output(first_report(worker)))
    assert late.scheduler_side is None
    late.update_connector_output(output(StepReport(done={1: 1}), [3]))


@pytest.mark.parametrize("engine", [{TOLD_LATE: True}, {TOLD_LATE: False}, {}], indirect=True)
def test_a_worker_tells_late_only_there(engine, worker):
    late = engine.config.kv_transfer_config.kv_connector_extra_config.get(TOLD_LATE, False)
    hand, report = worker.get_handshake_metadata(), worker.build_connector_worker_meta()
    if late:
        assert hand is None and len(report.handshakes) == 1
    else:
        assert hand.refusal is None and report is None
    assert worker.build_connector_worker_meta() is None, "it tells once"


@pytest.mark.parametrize("engine", [{TOLD_LATE: False}, {}], ids=["among others", "alone"], indirect=True)
def test_after_anothers_failed_load_nothing_under_way_is_kept(engine, late, worker, monkeypatch):
    """Its blocks hold no KV, and what was computed on them must not be stored. ragkv's own failed loads never
    reach a forward."""
    distrusted, reports = [], []
    monkeypatch.setattr(SchedulerSide, "invalidate_in_flight", lambda side: distrusted.append(True))
    monkeypatch.setattr(SchedulerSide, "report", lambda side, report, sent, received: reports.append(report))
    hand = worker.get_handshake_metadata()
    late.set_xfer_handshake_metadata({rank: replace(hand, rank=rank) for rank in (0, 1)})
    late.update_connector_output(output(StepReport(done={1: 1})))
    assert not distrusted and len(reports) == 1
    late.update_connector_output(output(StepReport(done={2: 1}), [7]))
    late.update_connector_output(output(None, [7]))
    among_others = TOLD_LATE in engine.config.kv_transfer_config.kv_connector_extra_config
    assert len(distrusted) == (2 if among_others else 0) and len(reports) == 3


def test_our_marks_are_no_settings():
    entry = child(memory={"capacity": "2MiB"}, **{TOLD_LATE: True, ROOM_CHECKED: True})
    assert plugin.check_settings(KVTransferConfig(**entry)).settings.memory.capacity == 2**21
