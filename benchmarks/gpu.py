"""`ragkv bench gpu`: whether ragkv is right and fast on this machine's GPU, one line a check.

    1  pinning, layouts, order and speed of copies; needs no vLLM
    2  what `ragkv doctor` says of vLLM
    3  hits bit by bit, and preemptions, on a small model
    4  a load and a fusion that fail
    5  TTFT, and other requests' tokens, on a model of 8B with dummy weights
    6  fusion of two documents that changed places

A check that fails and without which the others would mean nothing ends the run.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from ragkv.benchmarks.gpu_judge import Check, judge_findings
from ragkv.benchmarks.report import write_json
from ragkv.errors import RagKVError

BUS = 50e9  # bytes a second of a plain copy, where step 1 was not run
STEPS = "1,2,3,4,5,6"


class GpuError(RagKVError):
    """There is nothing to measure on, or something was not as it must be."""


def check_all(
    steps: Iterable[Callable[[Mapping[str, Check]], Iterable[Check]]], show: Callable[[Check], None]
) -> Any:
    """Run steps, each given what was found before, until a decisive check fails; all checks."""
    found: dict[str, Check] = {}
    for step in steps:
        for check in step(found):
            found[check.name] = check
            show(check)
            if check.decisive and not check.ok:
                return list(found.values())
    return list(found.values())


def step_1(_: Mapping[str, Check]) -> Iterator[Check]:
    """Copies."""
    import torch

    from ragkv.benchmarks.gpu_copies import check_copies
    from ragkv.connectors.vllm.streams import make_streams

    device = torch.device("cuda", torch.cuda.current_device())
    yield from check_copies(device, make_streams(device))
    torch.cuda.empty_cache()


def step_2(_: Mapping[str, Check]) -> Iterator[Check]:
    """vLLM itself."""
    from ragkv.checks import check_vllm

    yield judge_findings(check_vllm(False, os.environ))


def step_3(_: Mapping[str, Check]) -> Iterator[Check]:
    """The small model; step 4 is a part of it, since the engine takes longer to start than to be asked."""
    from ragkv.benchmarks.gpu_engines import steps_3_and_4

    yield from steps_3_and_4()


def step_5(found: Mapping[str, Check]) -> Iterator[Check]:
    """The large model, and step 6 on the same engine."""
    from ragkv.benchmarks.gpu_engines import steps_5_and_6

    speed = found.get("load speed")
    yield from steps_5_and_6(BUS if speed is None else float(speed.figures["raw"]))


PARTS = {1: step_1, 2: step_2, 3: step_3, 4: step_3, 5: step_5, 6: step_5}


def parse_steps(text: str) -> list[int]:
    """Numbers of steps, ascending. ValueError: there is no such step."""
    numbers = sorted({int(each) for each in text.split(",") if each.strip().isdigit()})
    if not numbers or len(numbers) != len(text.split(",")) or not set(numbers) <= PARTS.keys():
        raise ValueError(f"--steps = {text!r}; allowed: numbers from {STEPS}, each once")
    return numbers


def run(steps: str, json_file: Path | None) -> list[Check]:
    """Check, print a line each, write the report. GpuError: no GPU, or a check failed."""
    import torch

    numbers = parse_steps(steps)
    if not torch.cuda.is_available():
        raise GpuError(f"ragkv bench gpu needs a CUDA device, and torch {torch.__version__} sees none")
    console = Console()

    def show(check: Check) -> None:
        if check.step in numbers:
            mark = "[green]ok  [/]" if check.ok else "[red]fail[/]"
            console.print(f"{mark} {check.step} {check.name}: ", end="", soft_wrap=True)
            console.print(check.said, markup=False, highlight=False, soft_wrap=True)

    parts = list(dict.fromkeys(PARTS[number] for number in numbers))
    checks = [check for check in check_all(parts, show) if check.step in numbers]
    name = torch.cuda.get_device_name()
    write_json(
        json_file, {"device": name, "torch": torch.__version__, "checks": [asdict(each) for each in checks]}
    )
    if bad := [check.name for check in checks if not check.ok]:
        raise GpuError(f"{len(bad)} of {len(checks)} checks failed: {', '.join(bad)}")
    return checks
