"""Rotations are prepared once for the tokens of a copy, and turn any layers' raw keys as one by one."""

from types import SimpleNamespace

import pytest
import torch

from ragkv.connectors.vllm import fusion_worker
from ragkv.connectors.vllm.fusion_worker import make_turn, together
from ragkv.connectors.vllm.identity import PlaneLayers, Shape
from ragkv.connectors.vllm.layout import Geometry
from ragkv.connectors.vllm.tiles import RAW
from ragkv.kvstore.fusion.rotation import Rotation

HEADS, DIM, TOKENS = 2, 8, 7
NEAR, FAR = Rotation((0.5, 0.25, 0.1), True), Rotation((0.01, 0.002), False)
BY_LAYER = [NEAR, NEAR, FAR, NEAR]
SHIFTS = torch.tensor([5, 0, -3, 5, 5, 900, 0])


def prepared(monkeypatch, dtype, cache_dtype="auto"):
    monkeypatch.setattr(fusion_worker, "rotations", lambda model, layers: BY_LAYER)
    geometry = Geometry(len(BY_LAYER), HEADS, DIM, dtype.itemsize, 16)
    stored = torch.uint8 if dtype.itemsize == 1 else dtype
    names = tuple(f"layer.{n}" for n in range(len(BY_LAYER)))
    shape = Shape((PlaneLayers(geometry, names),), stored, 1, 1)
    config = SimpleNamespace(cache_config=SimpleNamespace(cache_dtype=cache_dtype))
    return make_turn(config, shape, None)


@pytest.mark.parametrize("most_bytes", [1, 4 * HEADS * DIM * TOKENS * 2, 1 << 20])
@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [
        (torch.float32, "auto"),
        (torch.bfloat16, "auto"),
        (torch.float8_e4m3fn, "fp8"),
        (torch.float8_e5m2, "fp8_e5m2"),
    ],
    ids=str,
)
def test_all_layers_turn_as_each_by_itself(dtype, cache_dtype, most_bytes, monkeypatch):
    monkeypatch.setattr(fusion_worker, "TURN_BYTES", most_bytes)
    turn = prepared(monkeypatch, dtype, cache_dtype)(SHIFTS)
    keys = torch.randn(4, 2, TOKENS, HEADS, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)[:, 0]
    raw = keys.view(RAW[dtype.itemsize])
    before = raw.clone()
    for layers in (range(4), range(2, 4), range(3, 4)):
        turned = turn(layers, raw[layers.start : layers.stop])
        assert turned.dtype == raw.dtype and turned.shape == (len(layers), TOKENS, HEADS, DIM)
        for place, number in enumerate(layers):
            wanted = BY_LAYER[number].turn(keys[number], SHIFTS)
            assert torch.equal(turned[place], wanted.view(raw.dtype))
    assert torch.equal(raw, before)


def test_shifts_are_looked_at_once_a_copy(monkeypatch):
    """To look for equal ones in each layer made the host wait for the device each time."""
    prepare, looked = prepared(monkeypatch, torch.float32), []
    unique = torch.unique
    monkeypatch.setattr(torch, "unique", lambda *args, **named: looked.append(1) or unique(*args, **named))
    turn = prepare(SHIFTS)
    assert len(looked) == len({NEAR, FAR})
    raw = torch.zeros(4, TOKENS, HEADS, DIM, dtype=torch.int32)
    turn(range(4), raw)
    turn(range(4), raw)
    assert len(looked) == 2


@pytest.mark.parametrize(
    ("kinds", "most", "sizes"),
    [([], 3, []), ([1, 1, 1], 3, [3]), ([1, 1, 1], 2, [2, 1]), ([1, 2, 2, 1], 9, [1, 2, 1]), ([1, 1], 1, [1, 1])],
)
def test_layers_go_together_if_they_are_of_one_kind(kinds, most, sizes):
    found = list(together(kinds, most))
    assert [part.stop - part.start for part in found] == sizes
    assert [number for part in found for number in range(part.start, part.stop)] == list(range(len(kinds)))
