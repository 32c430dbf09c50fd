"""A worker whose caches lose their memory and get it again, as vLLM 0.33 says it to connectors."""

from types import SimpleNamespace

import numpy as np
import pytest

from ragkv.config import Settings
from ragkv.connectors.vllm.connector import RagKVConnector
from ragkv.connectors.vllm.faults import Faults
from ragkv.connectors.vllm.protocol import Job, StepOrders
from ragkv.connectors.vllm.worker import WorkerSide
from ragkv.kvstore.metrics import Metrics
from toy_worker import Stopwatch


class Mover:
    def __init__(self):
        self.turn, self.moved = None, []

    def store(self, rows, slots):
        self.moved.append(len(rows))
        return SimpleNamespace(query=lambda: True)

    def load(self, rows, slots, shifts=None):
        return self.store(rows, slots)


@pytest.fixture
def worker():
    metrics = Metrics()
    made = WorkerSide(None, None, Settings(), metrics, Faults(metrics))
    made._stopwatch, made._segment = Stopwatch(), object()
    made._make_movers = lambda: (Mover(), Mover())
    made._mover, made._device_mover = made._make_movers()
    for mover in (made._mover, made._device_mover):
        mover.turn = turn
    return made


def turn(layer, keys, shifts):
    return keys


def orders(**kinds):
    job = Job(1, np.arange(3), np.arange(3))
    return StepOrders(**{kind: [job] for kind in kinds}, block_tokens=8)


def test_after_waking_copies_go_by_new_movers(worker):
    before = worker._mover, worker._device_mover
    worker.let_go_of_caches()
    worker.let_go_of_caches()
    worker.take_caches_again()
    after = worker._mover, worker._device_mover
    worker.take_caches_again()
    assert (worker._mover, worker._device_mover) == after
    assert not set(before) & set(after) and all(mover.turn is turn for mover in after)
    worker.store(orders(stores=True))
    assert worker._mover.moved == [3] and not before[0].moved
    assert worker.take_report().failed == set()


def test_while_asleep_a_load_fails_and_is_told(worker):
    worker.let_go_of_caches()
    worker.load(orders(loads=True))
    assert worker.take_report().failed == {1} and worker.take_invalid_blocks() == {0}


def test_a_worker_that_has_ended_or_never_began_does_not_wake(worker):
    worker._segment = None
    worker.let_go_of_caches()
    worker.take_caches_again()
    assert worker._mover is None


def test_the_connector_passes_it_on(worker):
    connector = RagKVConnector.__new__(RagKVConnector)
    connector._worker = worker
    connector.unregister_kv_caches()
    assert worker._mover is None
    connector.restore_kv_caches()
    assert worker._mover is not None
    connector._worker = None
    connector.unregister_kv_caches()
    connector.restore_kv_caches()
