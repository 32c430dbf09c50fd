"""ragkv inside vLLM's MultiConnector, without an engine: settings, policy, model, handshake, failed loads."""

import copy
import pickle
from types import SimpleNamespace

import pytest
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from engine_config import config
from ragkv import preflight
from ragkv.connectors.vllm import NAME, model, plugin
from ragkv.connectors.vllm.connector import RagKVConnector
from ragkv.connectors.vllm.error_boundary import Faults
from ragkv.connectors.vllm.messages import Handshake, StepReport
from ragkv.connectors.vllm.multi import MULTI, ROOM_CHECKED, TOLD_LATE, told_late
from ragkv.connectors.vllm.trust import Trust
from ragkv.errors import ConfigError
from ragkv.kvstore.metrics import Metrics
from ragkv.kvstore.segment import Segment

QUIET, LOUD = "QuietConnector", "LoudConnector"


class QuietConnector(KVConnectorBase_V1):
    pass


class LoudConnector(KVConnectorBase_V1):
    """Has a word of its own for the handshake, as NIXL's."""

    def get_handshake_metadata(self):
        return object()


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    registry = {**KVConnectorFactory._registry, QUIET: lambda: QuietConnector, LOUD: lambda: LoudConnector}
    registry.pop(NAME, None)
    monkeypatch.setattr(KVConnectorFactory, "_registry", registry)
    found = KVConnectorFactory.get_connector_class
    monkeypatch.setattr(KVConnectorFactory, "get_connector_class", getattr(found, "__wrapped__", found))
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
    runner = SimpleNamespace(get_model=lambda: "the model")
    worker = type("Worker", (), {})()
    worker.vllm_config, worker.model_runner = config, runner
    monkeypatch.setattr(model, "_workers", {worker})
    assert model.find_model(config) == model.find_model(copy.copy(config)) == "the model"
    assert model.find_model(other) is None


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
def late(tmp_path):
    made = RagKVConnector.__new__(RagKVConnector)
    made._told_late, made._worker, made._workers, made._among_others = True, None, 2, True
    made.faults = Faults(Metrics())
    made.distrusted, made.reports = [], []
    made._trust, made._vllm_config = Trust(b""), config()
    side = SimpleNamespace(fusing=None, memory_tokens=4096, close=lambda seconds: True, requests=set())
    side.invalidate_in_flight = lambda: made.distrusted.append(True)
    side.report = lambda report, sent, received: made.reports.append(report)
    made._scheduler, made._proposed = None, side
    made._segment = Segment("engine", 4096, tmp_path)
    yield made
    made._close_segment()


def output(report=None, invalid=()):
    return SimpleNamespace(
        kv_connector_worker_meta=report,
        invalid_block_ids=set(invalid),
        finished_sending=None,
        finished_recving=None,
    )


def test_reuse_begins_with_the_workers_first_report(late):
    side, hand = late._proposed, Handshake(None, late._segment.identity)
    late.set_xfer_handshake_metadata({0: object(), 1: object()})  # another child's
    assert late._proposed is side, "it waits for ours"
    first, second = StepReport(handshakes=[hand]), StepReport(handshakes=[hand])
    late.update_connector_output(output(pickle.loads(pickle.dumps(first.aggregate(second)))))
    assert late._scheduler is side and late._proposed is None


def test_a_refusal_that_comes_late_stands_aside(late):
    late.update_connector_output(output(StepReport(handshakes=[Handshake("no"), Handshake("no")])))
    assert late._scheduler is None and late._proposed is None
    late.update_connector_output(output(StepReport(done={1: 1}), [3]))


def test_a_worker_tells_late_only_there(late):
    told = []
    worker = SimpleNamespace(
        register=lambda caches: None, tell_late=lambda: told.append(1), handshake=lambda: "word"
    )
    late._worker = worker
    late.register_kv_caches({})
    assert late.get_handshake_metadata() is None and told == [1]
    late._told_late = False
    late.register_kv_caches({})
    assert late.get_handshake_metadata() == "word" and told == [1]


def test_after_anothers_failed_load_nothing_under_way_is_kept(late):
    """Its blocks hold no KV, and what was computed on them must not be stored."""
    late._scheduler, late._proposed = late._proposed, None
    late.update_connector_output(output(StepReport(done={1: 1})))
    assert not late.distrusted and len(late.reports) == 1
    late.update_connector_output(output(StepReport(done={2: 1}), [7]))
    late.update_connector_output(output(None, [7]))
    assert len(late.distrusted) == 2 and len(late.reports) == 3
    late._among_others = False
    late.update_connector_output(output(StepReport(done={3: 1}), [7]))
    assert len(late.distrusted) == 2, "ragkv's own failed loads never reach a forward"


def test_our_marks_are_no_settings():
    entry = child(memory={"capacity": "2MiB"}, **{TOLD_LATE: True, ROOM_CHECKED: True})
    assert plugin.check_settings(KVTransferConfig(**entry)).settings.memory.capacity == 2**21
