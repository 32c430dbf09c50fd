"""What every benchmark shares: medians, JSON files, pictures."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PLAIN, RAGKV, FLOOR = "#9aa0a6", "#1a73e8", "#d93025"


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the ratios of pairs that were measured side by side."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def median_seconds(work: Callable[[], object], repeats: int, before: Callable[[], object] = lambda: None) -> float:
    """Median time of some work, each time after `before`."""
    times = []
    for _ in range(repeats):
        before()
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens two prompts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def reusable_tokens(prompt: Sequence[int], earlier: Sequence[Sequence[int]]) -> int:
    """Tokens of `prompt` whose KV an exact cache could have: shared with an earlier sequence, not the last."""
    return min(max((shared_prefix(prompt, each) for each in earlier), default=0), len(prompt) - 1)


def write_json(path: Path | None, data: Any) -> None:
    """Write a report, if a file was asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def new_figure(width: float = 9, height: float = 4.5) -> tuple[Any, Any]:
    """A figure and its axes, in the project's looks, without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG and let the figure go."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
