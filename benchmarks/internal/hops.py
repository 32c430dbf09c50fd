"""How many functions and modules of ragkv one request passes through, counted on the toy engine of the tests.

    PYTHONPATH=src python benchmarks/internal/hops.py

Four cases: a lookup that hits in memory, one that hits on disk, a cold step with write-through, and a lookup that
fuses. Counted are calls of ragkv's own functions: distinct functions, distinct modules, and changes of module
(calls from one module into another). I/O counts too, which the toy engine runs on the same thread, and so do the
workers of the cold step.
"""

import importlib
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
OURS = tuple(f"{ROOT / folder}{os.sep}" for folder in ("connectors", "kvstore", "policies", "config", "src/ragkv"))

from ragkv.config.settings import FusionSettings  # noqa: E402

Lower: Any = importlib.import_module("hand_lanes").Lower
toy: Any = importlib.import_module("toy_engine")
PROMPT: list[int] = toy.text(1, 100)


class Hops:
    """Counts calls while it is entered."""

    def __init__(self) -> None:
        self.functions: Counter[tuple[str, str]] = Counter()
        self.changes: Counter[tuple[str, str]] = Counter()
        self._names: dict[str, str | None] = {}

    def __enter__(self) -> "Hops":
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    @property
    def modules(self) -> list[str]:
        """Modules that were called, by name."""
        return sorted({module for module, _ in self.functions})

    def _profile(self, frame: FrameType, event: str, _argument: Any) -> None:
        if event != "call" or (module := self._module(frame)) is None:
            return
        self.functions[module, frame.f_code.co_qualname] += 1
        above = frame.f_back
        caller = None
        while above is not None and (caller := self._module(above)) is None:
            above = above.f_back
        if caller is not None and caller != module:
            self.changes[caller, module] += 1

    def _module(self, frame: FrameType) -> str | None:
        """Of a frame: its module, where that is ours."""
        file = frame.f_code.co_filename
        if file not in self._names:
            path = os.path.realpath(file)
            ours = next((path[len(str(ROOT)) + 1 : -3] for each in OURS if path.startswith(each)), None)
            self._names[file] = None if ours is None else ours.replace(os.sep, ".")
        return self._names[file]


def memory_hit(hops: Hops) -> None:
    """A prompt is looked up that memory holds."""
    engine = toy.Engine()
    engine.run(PROMPT)
    request = _ask(engine, PROMPT)
    with hops:
        assert engine.side.lookup(request, 0) == len(PROMPT) - 1


def disk_hit(hops: Hops) -> None:
    """A prompt is looked up that only disk holds; the lookup waits for the reads, as in an idle engine."""
    engine = toy.Engine(lowers=[Lower()])
    engine.run(PROMPT)
    engine.restart(5.0)
    request = _ask(engine, PROMPT)
    lanes = [lane for lower in engine.lowers for lane in (lower.reads, lower.writes)]
    with hops:
        while (answer := engine.side.lookup(request, 0)) is None:
            assert sum(lane.run() for lane in lanes)
    assert answer == len(PROMPT) - 1


def cold_step(hops: Hops) -> None:
    """A prompt is looked up in vain, computed, stored, and written through to disk."""
    engine = toy.Engine(lowers=[Lower()])
    engine.request(PROMPT)
    with hops:
        engine.step()
        engine.step(admit=False, run=())
        engine.work()


def fused_lookup(hops: Hops) -> None:
    """A prompt is looked up whose passages memory holds behind other text."""
    system, passages, question = toy.text(900, 41), [toy.text(100 + n, 90) for n in range(4)], toy.text(901, 40)
    engine = toy.Engine(pages=800, blocks=400, fusion=FusionSettings(enabled=True, min_tokens=16))
    for passage in passages:
        engine.run(system + passage, kv_transfer_params={"ragkv": {"fuse": False}})
    request = _ask(engine, [*system, *passages[2], *passages[0], *passages[3], *question])
    with hops:
        assert engine.side.lookup(request, 0) > len(system + passages[2])
    assert engine.side.lookup(request, 0)


CASES: dict[str, Callable[[Hops], None]] = {
    "memory hit": memory_hit,
    "disk hit": disk_hit,
    "cold step, write-through": cold_step,
    "fused lookup": fused_lookup,
}


def _ask(engine: Any, prompt: list[int]) -> Any:
    request = toy.Request("probe", prompt)
    engine._name(request)
    return request


def main() -> None:
    """Print a line a case; with an argument, the modules of the cases whose names begin with it too."""
    print(f"{'':26}functions  modules  changes of module")
    for name, case in CASES.items():
        hops = Hops()
        case(hops)
        changes = sum(hops.changes.values())
        print(f"{name:26}{len(hops.functions):9}{len(hops.modules):9}{changes:9}")
        if len(sys.argv) > 1 and name.startswith(sys.argv[1]):
            print(*(f"    {module}" for module in hops.modules), sep="\n")


if __name__ == "__main__":
    main()
