"""The worker side: which pool a job goes to, what it reports of times, and the clocks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ragkv.config import Settings
from ragkv.connectors.vllm import equipment
from ragkv.connectors.vllm.error_boundary import Faults
from ragkv.connectors.vllm.identity import PlaneLayers, Shape
from ragkv.connectors.vllm.layout import Geometry
from ragkv.connectors.vllm.messages import DEVICE_MOVER, Job, StepOrders, StepReport
from ragkv.connectors.vllm.streams import Ticket, compute_stream
from ragkv.connectors.vllm.worker import LEAST_TOKENS, SOME_STEPS, WorkerSide
from ragkv.kvstore import metrics as m
from ragkv.kvstore.metrics import Metrics
from toy_worker import Compute

LAYERS, HEADS, DIM, BLOCK, BLOCKS, PAGE = 2, 2, 4, 8, 6, 16
TOKENS = BLOCKS * BLOCK
DEVICE_PAGES = 3
GEOMETRY = Geometry(LAYERS, HEADS, DIM, 2, BLOCK)


class Backend:
    """[blocks, 2, block tokens, heads, dim], as FlashAttention in vLLM 0.25."""

    def do_kv_cache_update(self, layer, key, value, cache, slots):
        cache[slots // BLOCK, 0, slots % BLOCK] = key
        cache[slots // BLOCK, 1, slots % BLOCK] = value


class Clock:
    """Each look takes a second."""

    now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def make_worker(monkeypatch, device_capacity, compute):
    """A worker, and its equipment."""
    names = tuple(f"layer.{n}" for n in range(LAYERS))
    shape = Shape((PlaneLayers(GEOMETRY, names, sizes=(LAYERS,)),), torch.bfloat16, 1, 1)
    monkeypatch.setattr(equipment, "examine", lambda vllm, cache: shape)
    monkeypatch.setattr("vllm.distributed.parallel_state.get_tensor_model_parallel_rank", lambda: 0)
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(
            static_forward_context={name: SimpleNamespace(impl=Backend()) for name in shape.layers}
        ),
        model_config=SimpleNamespace(dtype=torch.bfloat16),
        kv_transfer_config=SimpleNamespace(engine_id=f"test-worker-{id(shape)}"),
    )
    settings = Settings(memory={"capacity": "1MiB"}, device={"capacity": device_capacity})
    metrics, kept = Metrics(), []

    def equip(*given):
        kept.append(equipment.Equipment(*given))
        kept[0].compute = compute or kept[0].compute
        return kept[0]

    side = WorkerSide(config, SimpleNamespace(num_blocks=BLOCKS), settings, metrics, Faults(metrics), equip)
    caches = {
        name: torch.randn(BLOCKS, 2, BLOCK, HEADS, DIM, generator=torch.Generator().manual_seed(n)).bfloat16()
        for n, name in enumerate(shape.layers)
    }
    side.register(caches)
    assert side.handshake().refusal is None
    return side, caches, metrics, kept[0]


@pytest.fixture
def made(monkeypatch):
    """Makes workers; what they mapped is removed."""
    sides = []

    def make(device_capacity=DEVICE_PAGES * PAGE * GEOMETRY.token_bytes, compute=None):
        side, caches, metrics, kept = make_worker(monkeypatch, device_capacity, compute)
        sides.append((side, kept))
        return side, caches, metrics

    yield make
    for side, kept in sides:
        kept.segment.unlink()
        side.close()


def tokens_at(caches, slots):
    """Elements of some slots in all layers [slots, layers, 2, heads, dim]."""
    slots = torch.as_tensor(slots)
    return torch.stack([cache[slots // BLOCK, :, slots % BLOCK] for cache in caches.values()], 1).clone()


def job(number, rows, slots, **more):
    return Job(number, np.array(rows, dtype=np.int64), np.array(slots, dtype=np.int64), **more)


def orders(loads=(), stores=(), tokens=0):
    return StepOrders(list(loads), list(stores), block_tokens=BLOCK, tokens=tokens, work=2.0 * tokens)


def step(side, **given):
    side.begin(orders(**given))
    side.carry_out()


def test_what_was_stored_in_device_rows_is_loaded_from_there(made):
    side, caches, _ = made()
    slots, rows = list(range(3, 33)), list(range(DEVICE_PAGES * PAGE - 30, DEVICE_PAGES * PAGE))
    before = tokens_at(caches, slots)
    step(side, stores=[job(1, rows, slots, device=True)])
    for cache in caches.values():
        cache.zero_()
    back = list(range(TOKENS - 1, TOKENS - 31, -1))
    step(side, loads=[job(2, rows, back, device=True)])
    assert torch.equal(tokens_at(caches, back), before)
    assert side.take_report().done == {1: 1, 2: 1}


def test_device_rows_and_memory_rows_are_two_pools(made):
    side, caches, _ = made()
    rows, here, there = list(range(PAGE)), list(range(PAGE)), list(range(PAGE, 2 * PAGE))
    first, second = tokens_at(caches, here), tokens_at(caches, there)
    assert not torch.equal(first, second)
    step(side, stores=[job(1, rows, here), job(2, rows, there, device=True)])
    step(side, loads=[job(3, rows, there), job(4, rows, here, device=True)])
    assert torch.equal(tokens_at(caches, here), second) and torch.equal(tokens_at(caches, there), first)
    assert side.take_report().done == {1: 1, 2: 1, 3: 1, 4: 1}


@pytest.mark.parametrize("more", [0, 7])
def test_on_a_cpu_the_pool_is_an_ordinary_tensor_of_whole_pages(monkeypatch, more):
    size = DEVICE_PAGES * PAGE * GEOMETRY.token_bytes
    side, _, _, kept = make_worker(monkeypatch, size + more, None)
    pool = kept.make_movers(None, 0)[DEVICE_MOVER].tier.rows
    assert pool.device.type == "cpu" and pool.is_contiguous() and pool.nbytes == size
    side.close()


@pytest.mark.parametrize("capacity", [0, PAGE * GEOMETRY.token_bytes - 1])
def test_without_a_page_there_is_no_pool_and_its_jobs_fail_alone(made, capacity):
    side, _, metrics = made(capacity)
    rows, slots = list(range(PAGE)), list(range(PAGE))
    step(
        side,
        loads=[job(1, rows, slots, device=True)],
        stores=[job(2, rows, slots, device=True), job(3, rows, slots)],
    )
    report = side.take_report()
    assert report.failed == {1, 2} and report.done == {1: 1, 2: 1, 3: 1}
    assert side.take_invalid_blocks() == {0, 1} and side.take_finished() == (set(), {""})
    counters = metrics.drain()["counters"]
    assert counters[m.ERRORS + m.SEPARATOR + "load"] == counters[m.ERRORS + m.SEPARATOR + "store"] == 1


def test_a_row_outside_the_pool_fails_its_jobs(made):
    side, _, _ = made()
    step(side, loads=[job(1, [DEVICE_PAGES * PAGE], [40], device=True), job(2, [0], [0])])
    assert side.take_report().failed == {1}
    assert side.take_invalid_blocks() == {5}


# --- times ---


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr("ragkv.connectors.vllm.streams.time.monotonic", made)
    return made


def test_a_steps_forward_is_timed(made, clock):
    side, _, _ = made()
    side.begin(orders(tokens=500))
    clock.now += 40.0
    side.carry_out(), side.carry_out()
    assert side.take_report() == StepReport(prefills=[(1000.0, 41.0)])
    assert side.take_report() is None


def test_a_forward_that_came_to_no_end_is_not_timed(made, clock):
    """As in a step in which vLLM runs no forward: its beginning is not the next one's."""
    side, _, _ = made()
    side.begin(orders(tokens=500))
    clock.now += 1000.0
    step(side, tokens=1)
    assert side.take_report() is None


def test_neither_loads_nor_stores_count_for_the_forward(made, clock):
    side, _, _ = made()
    given = {"loads": [job(1, range(20), range(20))], "stores": [job(2, range(20), range(20))], "tokens": 100}
    step(side, **given)
    assert side.take_report().prefills == [(200.0, 1.0)]


def test_loads_from_memory_are_timed_and_others_are_not(made, clock):
    side, _, _ = made()
    step(side, stores=[job(0, [0], [40], device=True)])
    side.take_report()
    loads = [job(1, range(20), range(20)), job(2, range(20, 30), range(20, 30)), job(3, [0], [40], device=True)]
    step(side, loads=loads)
    assert side.take_report() == StepReport({1: 1, 2: 1, 3: 1}, copies=[(20, 1.0), (10, 1.0)])
    step(side, stores=[job(4, range(20), range(20))])
    assert side.take_report() == StepReport({4: 1})


def test_a_load_that_fails_says_nothing_of_times(made):
    side, _, _ = made()
    step(side, loads=[job(1, [10**9], [0])])
    assert side.take_report().copies == []


def test_of_small_steps_one_in_so_many_is_timed(made):
    side, _, _ = made()
    for _ in range(2 * SOME_STEPS):
        step(side, tokens=LEAST_TOKENS - 1)
    assert [work for work, _ in side.take_report().prefills] == [2 * (LEAST_TOKENS - 1)] * 2
    step(side, tokens=LEAST_TOKENS)
    assert [work for work, _ in side.take_report().prefills] == [2 * LEAST_TOKENS]


def test_times_that_are_not_known_yet_come_with_a_later_report(made):
    late = Compute()
    late.seconds = None
    side, _, _ = made(compute=late)
    step(side, tokens=100)
    assert side.take_report() is None
    late.seconds = 0.5
    step(side)
    assert side.take_report() == StepReport(prefills=[(200.0, 0.5)])
    step(side)
    assert side.take_report() is None


def test_the_clock_of_a_cpu(clock):
    stream = compute_stream(torch.device("cpu"))
    start = stream.record()
    clock.now += 3.0
    ticket = Ticket(stream.record(), start)
    clock.now += 100.0
    assert ticket.seconds() == ticket.seconds() == 4.0


class Event:
    """A CUDA event whose stream the test drives."""

    def __init__(self):
        self.stream, self.over = None, False

    def record(self, stream):
        self.stream = stream

    def query(self):
        return self.over

    def elapsed_time(self, end):
        assert end.over, "it would wait"
        return 250.0  # milliseconds


def test_the_clock_of_a_gpu_never_waits(monkeypatch):
    """By events in the compute stream."""
    events = []
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: events.append(Event()) or events[-1])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    stream = compute_stream(torch.device("cuda", 1))
    start = stream.record()
    ticket = Ticket(stream.record(), start)
    assert [event.stream for event in events] == ["stream of cuda:1"] * 2
    assert ticket.seconds() is None
    events[0].over = True
    assert ticket.seconds() is None
    events[1].over = True
    assert ticket.seconds() == 0.25
