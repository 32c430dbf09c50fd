"""The toy engine's worker hands: they copy numpy arrays, and write real bytes into the memory tier."""

from types import SimpleNamespace

import numpy as np
import torch

from ragkv.connectors.vllm.copying import Copier
from ragkv.connectors.vllm.messages import DEVICE_MOVER
from ragkv.connectors.vllm.sampling import WeightsObserver
from ragkv.connectors.vllm.streams import Event, Stream, Ticket

PAGE, LAYERS = 4, 2
HALF = (1 << 31) - 1


class MemoryRows:
    """One rank's rows of the memory tier: a value's halves are K and V, and each layer has its own variant."""

    def __init__(self, buffer, ranks, rank):
        self._pages = np.frombuffer(buffer, dtype=np.int32).reshape(-1, ranks, LAYERS, 2, PAGE)[:, rank]

    def __setitem__(self, rows, values):
        for layer in range(LAYERS):
            self._pages[rows // PAGE, layer, 0, rows % PAGE] = (values & HALF) ^ layer
            self._pages[rows // PAGE, layer, 1, rows % PAGE] = (values >> 31) ^ layer

    def __getitem__(self, rows):
        layers = self._pages[rows // PAGE, :, :, rows % PAGE].astype(np.int64)
        values = [(layers[:, layer, 1] ^ layer) << 31 | (layers[:, layer, 0] ^ layer) for layer in range(LAYERS)]
        return np.where(values[0] == values[1], values[0], -1)


class Mover:
    """Copies between one worker's cache and its share of a tier; told so, it fails, having written rubbish."""

    def __init__(self, cache, tier, fails):
        self.cache, self.tier, self.fails = cache, tier, fails
        self.most_tokens = 10**9

    def fence_stores(self):
        """Nothing runs late."""

    def ordered(self, kind):
        return Ticket(Event())

    def close(self):
        """Nothing runs late."""

    def load(self, rows, slots, shifts=None):
        self._fail("load", self.cache, slots)
        self.cache[slots.numpy()] = self.tier[rows.numpy()]
        return Ticket(Event())

    def store(self, rows, slots):
        self._fail("store", self.tier, rows)
        self.tier[rows.numpy()] = self.cache[slots.numpy()]
        return Ticket(Event())

    def _fail(self, kind, target, places):
        if kind in self.fails:
            target[places[: len(places) // 2].numpy()] = np.int64(-7)
            raise OSError(f"no {kind}")


class Fuser:
    """Mends nothing but the gaps, which it computes: so what was moved, and all behind it, stays wrong for good.
    Told so, it fails."""

    def __init__(self, cache, fails, block, compute):
        self.cache, self.fails, self.block, self.compute = cache, fails, block, compute
        self.fused = []

    def fuse(self, fusion):
        if "fuse" in self.fails:
            raise OSError("no fuse")
        moved = {position for start, end in fusion.runs for position in range(start, end)}
        assert moved and min(moved) >= fusion.start and max(moved) == fusion.asked - 1
        assert len(fusion.tokens) == fusion.end == fusion.asked + len(fusion.question)
        assert 0 <= fusion.budget <= len(moved)
        positions = np.arange(fusion.end)
        slots = fusion.blocks[positions // self.block] * self.block + positions % self.block
        assert (self.cache[slots[: fusion.start]] >= 0).all(), "the exact part is there"
        for position in range(fusion.start, fusion.end):
            if position in moved:
                assert self.cache[slots[position]] >= 0, "moved tokens were loaded"
            else:
                self.cache[slots[position]] = self.compute(
                    self.cache[slots[position - 1]], fusion.tokens[position]
                )
        self.fused.append(fusion)


class Took:
    """An event that was reached so many seconds after whatever it is asked about."""

    def __init__(self, seconds):
        self.seconds = seconds

    def query(self):
        return True

    def since(self, start):
        return self.seconds


class Compute:
    """A compute stream that takes `seconds` for everything; None: it never comes to an end."""

    seconds = 0.0

    def record(self):
        return self

    def query(self):
        return self.seconds is not None

    def since(self, start):
        return self.seconds


class Equipment:
    """What a toy worker works with, as the connector's. `cache`: the engine's; `rows`: this rank's of memory;
    `device`: tokens of the device tier, in which nothing is at first; `fails`: what fails; `model`: at whose
    weights it looks."""

    by_request = False  # block numbers tell which request has lost its KV
    stages = 1
    shares = {0: 1.0}  # noqa: RUF012

    segment = SimpleNamespace(identity=None, close=lambda: None)

    def __init__(self, rank, cache, rows, device, step_tokens, fuse, model=None):
        self.rank, self.cache, self.fails = rank, cache, set()
        self.memory, self.compute = Mover(cache, rows, self.fails), Compute()
        self.fuser = Fuser(cache, self.fails, *fuse)
        self._device, self._step_tokens, self._model = device, step_tokens, model

    def make_copier(self, faults):
        return Copier({}, {0: PAGE}, 1, self._step_tokens, faults)

    def make_observer(self, faults):
        return WeightsObserver(self._model, torch.device("cpu"), Stream(), self.rank, faults)

    def make_fusion(self):
        return None, self.fuser

    def make_movers(self, prepare, fusion_bytes):
        return {0: self.memory, DEVICE_MOVER: Mover(self.cache, np.full(self._device, -2), self.fails)}

    def close(self):
        """Nothing is mapped."""
