"""Faults of ragkv's parts, made in the engine's own process by replacing methods for a while.

All that is known of the parts' names stands in `POINTS`. Where KV was to be written, wrong KV is written before
the fault, so that a test sees whoever uses it.
"""

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from ragkv.benchmarks.internal.faulty_stores import Fault as StoreFault
from ragkv.benchmarks.internal.faulty_stores import FaultyStore, Plan
from ragkv.connectors.vllm import fusing
from ragkv.kvstore.stores.disk import DiskStore

CONNECTOR = "ragkv.connectors.vllm"
POINTS = {
    "load": (f"{CONNECTOR}.transfer", "DirectMover", "load"),
    "store": (f"{CONNECTOR}.transfer", "DirectMover", "store"),
    "fuse": (f"{CONNECTOR}.fusion_worker", "Fuser", "fuse"),
    "lookup": (f"{CONNECTOR}.scheduler", "SchedulerSide", "lookup"),
    "allocated": (f"{CONNECTOR}.scheduler", "SchedulerSide", "allocated"),
    "orders": (f"{CONNECTOR}.scheduler", "SchedulerSide", "orders"),
    "report": (f"{CONNECTOR}.scheduler", "SchedulerSide", "report"),
    "finished": (f"{CONNECTOR}.scheduler", "SchedulerSide", "finished"),
    "wait": (f"{CONNECTOR}.scheduler", "SchedulerSide", "lookup"),  # no fault: it answers "ask again"
}
STORE_POINTS = {"read": "get", "write": "put"}  # of the lower tiers, all of whose faults come in turn
PLANS: list[Plan] = [lambda method, number: None]  # the last one says which calls of stores break


class Injected(Exception):
    """A fault of ours."""


@dataclass(frozen=True)
class Fault:
    """Calls of a point fail: `times` of them, the first `after` excepted. `done`: what was called is carried out
    before (a load and a fusion never are: they leave wrong KV; nor are orders, or they would be lost)."""

    point: str
    times: int = 1
    after: int = 0
    done: bool = False


@dataclass
class Struck:
    """How often a fault has struck."""

    times: int = 0


@contextlib.contextmanager
def injected(llm: Any, fault: Fault | None) -> Iterator[Struck]:
    """While it holds, `fault` is there."""
    struck = Struck()
    if fault is None:
        yield struck
    elif fault.point in STORE_POINTS:
        with _store_fails(fault, struck):
            yield struck
    else:
        undo = _install(fault, struck)
        try:
            yield struck
        finally:
            undo()


def break_rank(worker: Any, fault: Fault, rank: int) -> None:
    """In a worker, by `collective_rpc`: from now on `fault` is there, in that rank alone."""
    worker.rig_struck = Struck()
    if worker.rank == rank:
        worker.rig_undo = _install(fault, worker.rig_struck)


def mend_rank(worker: Any) -> int:
    """In a worker: no more of it; how often it has struck there."""
    getattr(worker, "rig_undo", lambda: None)()
    return worker.rig_struck.times


def _install(fault: Fault, struck: Struck) -> Callable[[], None]:
    """Replace what is to fail; what is returned puts it back."""
    module, owner, method = POINTS[fault.point]
    kind = getattr(importlib.import_module(module), owner)
    original = getattr(kind, method)
    setattr(kind, method, _failing(fault, original, struck))
    return lambda: setattr(kind, method, original)


def wrap_stores(_llm: Any) -> None:
    """Let the lower tiers be able to fail, once an engine has started."""
    calls = {method: getattr(DiskStore, method) for method in STORE_POINTS.values()}

    @functools.cache
    def faulty(store: DiskStore) -> FaultyStore:
        inner: Any = SimpleNamespace(name=store.name, capabilities=store.capabilities)
        vars(inner).update({method: functools.partial(call, store) for method, call in calls.items()})
        return FaultyStore(inner, lambda method, number: PLANS[-1](method, number))

    DiskStore.get = lambda store, key: faulty(store).get(key)  # type: ignore[method-assign]
    DiskStore.put = lambda store, key, parts: faulty(store).put(key, parts)  # type: ignore[method-assign]


def forget_failures(_llm: Any) -> None:
    """An engine in which fusion has failed some times is not asked for it again; here it is."""
    fusing.MOST_FAILURES = sys.maxsize


@contextlib.contextmanager
def _store_fails(fault: Fault, struck: Struck) -> Iterator[None]:
    """The next calls of a lower tier fail, each in another way."""
    kinds = tuple(StoreFault)

    def plan(method: str, number: int) -> StoreFault | None:
        if method != STORE_POINTS[fault.point] or struck.times >= fault.times:
            return None
        struck.times += 1
        return kinds[number % len(kinds)]

    PLANS.append(plan)
    try:
        yield
    finally:
        PLANS.remove(plan)


def _failing(fault: Fault, original: Callable[..., Any], struck: Struck) -> Callable[..., Any]:
    calls = 0

    @functools.wraps(original)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if not fault.after < calls <= fault.after + fault.times:
            return original(self, *args, **kwargs)
        struck.times += 1
        if fault.point == "wait":
            original(self, *args, **kwargs)
            return None
        if fault.point == "load":
            half_load(self, original, *args, **kwargs)
        elif fault.point == "fuse":
            half_fuse(self, original, *args)
        elif fault.done and fault.point != "orders":
            original(self, *args, **kwargs)
        raise Injected(f"{fault.point}, call {calls}")

    return called


def half_load(mover: Any, load: Callable[..., Any], rows: Any, slots: Any, shifts: Any = None) -> None:
    """Load the first half of the tokens, and put noise where the others belong."""
    half = len(rows) // 2
    load(mover, rows[:half], slots[:half], *(() if shifts is None else (shifts[:half],)))
    put_noise(mover.layers, slots[half:])


def half_fuse(fuser: Any, fuse: Callable[..., Any], fusion: Any) -> None:
    """Compute the first few tokens as a fusion does, and put noise where the others belong."""
    end, size = min(fusion.start + 7, fusion.end), fuser.block_tokens
    fuse(fuser, replace(fusion, end=end, runs=((end - 1, end),), budget=1))  # computes all of these
    positions = torch.arange(end, fusion.end)
    put_noise(fuser.caches, torch.from_numpy(fusion.blocks)[positions // size] * size + positions % size)


def put_noise(layers: Any, slots: torch.Tensor) -> None:
    """Overwrite K and V of some slots, in all layers."""
    chance = torch.Generator().manual_seed(len(slots))
    for some in layers.groups:
        found = layers.find(slots)
        for kind in (0, 1):
            raw = layers.read(found, kind, some)
            noise = torch.randint(-100, 100, raw.shape, generator=chance)
            values = noise.float().view(raw.dtype) if raw.element_size() == 4 else noise.to(raw.dtype)
            layers.write(found, kind, values, some)
