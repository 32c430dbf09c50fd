"""The picture of `ragkv bench serve`: time to first token by turn, and requests a second, of each system."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ragkv.benchmarks.report import FLOOR, PLAIN, RAGKV, new_figure, save_figure

COLORS = {"plain": PLAIN, "ragkv": RAGKV, "ragkv+fusion": "#188038", "lmcache": FLOOR, "vllm-offload": "#e37400"}
OTHERS = ("#9334e6", "#12858d", "#a50e0e", "#5f6368")
DODGE = 0.06  # of a turn, between systems, so that their whiskers stand beside one another
LABEL_GAP = 0.075  # of the axis, at least, between two labels


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: medians by turn, with whiskers up to the 95th percentile. ValueError: nothing went well."""
    systems = [system for system in report["systems"] if _points(system)]
    if not systems:
        raise ValueError(f"{path}: no request went well, so there is nothing to draw")
    figure, axes = new_figure(9, 4)
    grid = figure.add_gridspec(1, 2, width_ratios=(3, 1))
    axes.set_subplotspec(grid[0])
    colors = _colors([system["system"] for system in systems])
    _draw_turns(axes, systems, colors)
    beside = figure.add_subplot(grid[1])
    beside.spines[["top", "right", "left"]].set_visible(False)
    _draw_throughput(beside, systems, colors)
    save_figure(figure, path)


def _points(system: Mapping[str, Any]) -> list[tuple[int, float, float]]:
    """Turn, median and 95th percentile of the time to first token, in seconds."""
    entries = ((int(number), turn["ttft_s"]) for number, turn in system["turns"].items())
    return [(number, entry["p50"], entry["p95"]) for number, entry in entries if entry["n"]]


def _colors(names: Sequence[str]) -> dict[str, str]:
    unknown = [name for name in names if name not in COLORS]
    return COLORS | {name: OTHERS[place % len(OTHERS)] for place, name in enumerate(unknown)}


def _draw_turns(axes: Any, systems: Sequence[Mapping[str, Any]], colors: Mapping[str, str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    ends = {}
    for place, system in enumerate(systems):
        name, points = system["system"], _points(system)
        turns = [turn + DODGE * (place - (len(systems) - 1) / 2) for turn, _, _ in points]
        medians = [median for _, median, _ in points]
        above = [high - median for _, median, high in points]
        style: dict[str, Any] = {"color": colors[name], "linewidth": 2, "markersize": 5, "marker": "o"}
        axes.errorbar(turns, medians, [[0] * len(above), above], elinewidth=1, capsize=2, **style)
        ends[name] = medians[-1]
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} s"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("turn of the session")
    axes.set_title("Time to first token: median, and up to p95", fontsize=10, loc="left")
    last = max(turn for system in systems for turn, _, _ in _points(system))
    bottom, top = axes.get_ylim()
    for name, height in spread(ends, bottom, top).items():
        axes.text(last + 0.2, height, name, color=colors[name], va="center", fontsize=9, fontweight="bold")
    axes.set_ylim(bottom, top)


def spread(heights: Mapping[str, float], bottom: float, top: float) -> dict[str, float]:
    """Where the labels stand on a logarithmic axis: at their heights, but apart from one another."""
    span = math.log(top / bottom) or 1.0
    placed: dict[str, float] = {}
    at = -math.inf
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        at = max(at + LABEL_GAP, math.log(height / bottom) / span)
        placed[name] = bottom * math.exp(at * span)
    return placed


def _draw_throughput(axes: Any, systems: Sequence[Mapping[str, Any]], colors: Mapping[str, str]) -> None:
    shown = [(system["system"], system["requests_per_s"] or 0.0) for system in reversed(systems)]
    bars = axes.barh([name for name, _ in shown], [rate for _, rate in shown], height=0.5)
    for bar, (name, rate) in zip(bars, shown, strict=True):
        bar.set_color(colors[name])
        axes.annotate(
            f"{name}  {rate:.2f}",
            (0, bar.get_y() + bar.get_height()),
            (0, 3),
            textcoords="offset points",
            fontsize=9,
        )
    axes.set_yticks([])
    axes.grid(False)
    axes.set_title("Requests a second", fontsize=10, loc="left")
