"""A worker whose caches lose their memory and get it again, as vLLM 0.33 says it to connectors."""

import numpy as np
import pytest

from ragkv.config import Settings
from ragkv.connectors.vllm.error_boundary import Faults
from ragkv.connectors.vllm.messages import DEVICE_MOVER, Job, StepOrders
from ragkv.connectors.vllm.streams import Event, Ticket
from ragkv.connectors.vllm.worker import WorkerSide
from ragkv.kvstore.metrics import Metrics
from toy_worker import Equipment
from whole_start import Engine, alone, serves

JOB = Job(1, np.arange(3), np.arange(3), "r")


class Mover:
    most_tokens = 10**6

    def __init__(self, turn):
        self.turn, self.moved, self.closed = turn, [], False

    def store(self, rows, slots):
        self.moved.append(len(rows))
        return Ticket(Event())

    def load(self, rows, slots, shifts=None):
        return self.store(rows, slots)

    def ordered(self, kind):
        return Ticket(Event())

    def close(self):
        self.closed = True


class Kept(Equipment):
    """Makes movers, and keeps those that it made."""

    def __init__(self):
        super().__init__(0, None, None, 0, 1000, (8, None))
        self.made = []

    def make_fusion(self):
        return turn, self.fuser

    def make_movers(self, prepare, fusion_bytes):
        self.made.append({0: Mover(prepare), DEVICE_MOVER: Mover(prepare)})
        return dict(self.made[-1])


@pytest.fixture
def equipment():
    return Kept()


@pytest.fixture
def unequipped(equipment):
    metrics = Metrics()
    return WorkerSide(None, None, Settings(), metrics, Faults(metrics), lambda *_: equipment)


@pytest.fixture
def worker(unequipped):
    unequipped.register({})
    return unequipped


def turn(shifts):
    return shifts


def step(worker, device=False, **kinds):
    job = Job(1, np.arange(3), np.arange(3), "r", device)
    worker.begin(StepOrders(**{kind: [job] for kind in kinds}, block_tokens=8))
    worker.carry_out()
    return worker.take_report()


def test_after_waking_copies_go_by_new_movers(worker, equipment):
    worker.take_caches_again()
    (before,) = equipment.made
    worker.let_go_of_caches()
    worker.let_go_of_caches()
    assert all(mover.closed for mover in before.values()), "nothing of it runs any more"
    worker.take_caches_again()
    worker.take_caches_again()
    _, after = equipment.made
    assert all(mover.turn is turn for mover in after.values())
    assert step(worker, stores=True).failed == set()
    assert after[False].moved == [3] and not before[False].moved


def test_while_asleep_a_load_fails_and_is_told(worker):
    worker.let_go_of_caches()
    assert step(worker, loads=True).failed == {1}
    assert worker.take_invalid_blocks() == {0} and worker.take_finished() == (set(), {"r"})


def test_where_blocks_do_not_tell_whose_they_are_failed_loads_are_told_by_request(unequipped, equipment):
    equipment.by_request = True
    unequipped.register({})
    unequipped.let_go_of_caches()
    assert step(unequipped, loads=True).failed == {1}
    assert unequipped.take_unloaded() == {"r"} and not unequipped.take_unloaded()
    unequipped.begin(StepOrders(given_up={"other": [3, 4]}, block_tokens=8))
    unequipped.carry_out()
    assert unequipped.take_unloaded() == {"other"} and unequipped.take_finished() == (set(), {"r", "other"})
    assert unequipped.take_invalid_blocks() == set()


def test_after_waking_nothing_is_read_from_the_device_tier_but_what_was_copied_there_since(worker):
    assert step(worker, device=True, stores=True).failed == step(worker, device=True, loads=True).failed == set()
    worker.let_go_of_caches()
    worker.take_caches_again()
    assert step(worker, device=True, loads=True).failed == {1}
    assert step(worker, device=True, stores=True).failed == step(worker, device=True, loads=True).failed == set()


@pytest.mark.parametrize("began", [False, True])
def test_a_worker_that_has_ended_or_never_began_does_not_wake(unequipped, began):
    worker = unequipped
    if began:
        worker.register({})
        worker.close()
    worker.let_go_of_caches()
    worker.take_caches_again()
    assert step(worker, loads=True).failed == {1}


def test_the_connector_passes_it_on(monkeypatch):
    with alone(monkeypatch):
        scheduler, connector = Engine(None).start()

        def failed():
            connector.bind_connector_metadata(StepOrders(stores=[JOB], block_tokens=8))
            connector.wait_for_save()
            return connector.build_connector_worker_meta().failed

        connector.unregister_kv_caches()
        assert failed() == {1}
        connector.restore_kv_caches()
        assert failed() == set()
        serves(scheduler, connector)
