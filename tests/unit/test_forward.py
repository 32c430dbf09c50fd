"""Virtual sequences: runs of positions, in batches that an engine can take, and what it is told of them."""

import contextlib
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine_config import spec
from ragkv.connectors.vllm import forward as module
from ragkv.connectors.vllm.forward import EngineForward, batches, contiguous, watch
from simulated_device import SimulatedStreams

positions = st.lists(st.integers(0, 120), unique=True).map(sorted).map(lambda p: np.array(p, dtype=np.int64))


def spread(runs):
    return [position for start, end in runs for position in range(start, end)]


@given(positions)
def test_runs_are_the_longest_that_hold_just_these_positions(given_positions):
    runs = contiguous(given_positions)
    assert spread(runs) == given_positions.tolist()
    assert all(end < start for (_, end), (start, _) in pairwise(runs))


@given(positions, st.integers(1, 5), st.integers(1, 20))
def test_batches_keep_all_in_order_within_the_engines_bounds(given_positions, most_runs, most_tokens):
    made = list(batches(contiguous(given_positions), most_runs, most_tokens))
    assert [position for batch in made for position in spread(batch)] == given_positions.tolist()
    for batch in made:
        assert 1 <= len(batch) <= most_runs and 1 <= len(spread(batch)) <= most_tokens
        assert all(start < end for start, end in batch)


class World:
    """What a forward runs in. Keeps what builders are made of and build from, and what models are called with."""

    def __init__(self):
        self.seen, self.calls, self.specs, self.built = [], [], [], []

    def forward(self, names=("a", "b"), **scheduler):
        world = self

        class Builder:
            def __init__(self, spec, names, config, device):
                world.specs.append(spec)

            def build(self, common_prefix_len, common):
                return world.build(common)

        backend = SimpleNamespace(get_builder_cls=lambda: Builder)
        layer = SimpleNamespace(get_attn_backend=lambda: backend)
        bounds = {"max_num_seqs": 4, "max_num_batched_tokens": 64} | scheduler
        config = SimpleNamespace(scheduler_config=SimpleNamespace(**bounds))
        model = lambda **inputs: self.model(**inputs)  # noqa: E731
        layers = dict.fromkeys(names, layer)
        return EngineForward(config, spec(block_size=16), layers, model, 16, 4, torch.device("cpu"))

    def build(self, common):
        self.built.append(common)
        return common

    def model(self, input_ids, positions):
        self.calls.append((input_ids, positions))


@pytest.fixture
def world(monkeypatch):
    made = World()

    def context(metadata, config, slot_mapping):
        made.seen.append((metadata, slot_mapping))
        return torch.inference_mode()

    monkeypatch.setattr("vllm.forward_context.set_forward_context", context)
    return made


def test_what_a_backend_is_told_of_runs(world):
    tokens, blocks = np.arange(100, 200, dtype=np.int32), np.array([7, 3, 9, 5], dtype=np.int64)
    world.forward().compute(tokens, np.array([2, 3, 4, 20, 33, 34]), blocks)
    assert [each.block_size for each in world.specs] == [4], "the kernel's blocks, four to one of the scheduler's"
    (common,) = world.built
    assert common.query_start_loc.tolist() == [0, 1, 3, 6], "short runs first"
    assert common.seq_lens.tolist() == [21, 35, 5] and common.num_reqs == 3 and common.num_actual_tokens == 6
    assert common.max_query_len == 3 and common.max_seq_len == 35 and common.causal is True
    slots = [3 * 16 + 4, 9 * 16 + 1, 9 * 16 + 2, 7 * 16 + 2, 7 * 16 + 3, 7 * 16 + 4]
    assert common.slot_mapping.tolist() == slots and common.slot_mapping.dtype == torch.int64
    table = [28, 29, 30, 31, 12, 13, 14, 15, 36, 37, 38, 39]
    assert common.block_table_tensor.tolist() == [table] * 3 and common.block_table_tensor.dtype == torch.int32
    ((ids, at),) = world.calls
    assert (ids.tolist(), ids.dtype) == ([120, 133, 134, 102, 103, 104], torch.int32)
    assert (at.tolist(), at.dtype) == ([20, 33, 34, 2, 3, 4], torch.int64)
    ((metadata, slot_mapping),) = world.seen
    assert metadata == {"a": common, "b": common} and slot_mapping["b"].tolist() == slots


def test_what_is_too_much_for_one_forward_goes_in_several(world):
    world.forward().compute(np.arange(99, dtype=np.int32), np.arange(0, 40, 4), np.arange(8, dtype=np.int64))
    assert [at.tolist() for _, at in world.calls] == [[0, 4, 8, 12], [16, 20, 24, 28], [32, 36]]


def test_a_forward_is_no_wider_than_profiling_would_forgive(world):
    wide = world.forward(max_num_batched_tokens=16384)
    wide.compute(np.arange(5000, dtype=np.int32), np.arange(5000), np.arange(400, dtype=np.int64))
    assert [len(at) for _, at in world.calls] == [2048, 2048, 904]


@pytest.mark.parametrize("ended", [False, True], ids=["by itself", "by a watch"])
def test_a_build_waits_for_the_forward_before_it_however_that_ended(world, monkeypatch, ended):
    """Builders write into host buffers that copies of that forward may still read: the host waits once between two
    builds, and never else."""
    device, seen = SimulatedStreams(lambda ready: 0), []
    build, model = world.build, world.model

    def noted(common):
        seen.append(["build", not device.compute.queue])
        return build(common)

    def queued(**inputs):
        device.compute.submit(lambda: model(**inputs))
        if ended:
            raise OSError("enough")

    world.build, world.model = noted, queued
    monkeypatch.setattr(module, "compute_stream", lambda of: device.compute)
    forward = world.forward()
    for _ in range(3):
        with pytest.raises(OSError) if ended else contextlib.nullcontext():
            forward.forward(np.arange(99, dtype=np.int32), [(0, 9)], np.arange(8, dtype=np.int64))
        seen.append(["left under way", len(device.compute.queue)])
    assert seen == [["build", True], ["left under way", 2]] * 3
    assert len(world.calls) == 2, "the last one is still to come"


class Attention(torch.nn.Module):
    def forward(self, query, key, value):
        return query + key + value


def test_a_watch_sees_inputs_however_they_are_given_stops_and_goes():
    layers, seen = [Attention(), Attention()], []
    three = [torch.tensor(float(n)) for n in (1, 2, 3)]

    def model():
        layers[0](*three)
        layers[1](three[0], value=three[2], key=three[1])
        seen.append("behind")

    with watch(layers, lambda number, inputs: seen.append((number, *map(float, inputs))), stop=True):
        model()
    assert seen == [(0, 1, 2, 3), (1, 1, 2, 3)]
    with watch(layers[:1], lambda number, inputs: seen.append(number), stop=False):
        model()
    assert seen[2:] == [0, "behind"]
    model()
    assert seen[4:] == ["behind"], "no hook is left"
    with (
        pytest.raises(OSError, match="x"),
        watch(layers, lambda *_: (_ for _ in ()).throw(OSError("x")), stop=True),
    ):
        model()
    model()
    assert seen[5:] == ["behind"], "nor any is left here"
