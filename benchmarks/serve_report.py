"""The report of `ragkv bench serve`: percentiles of what each system did, and ratios of the same requests."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ragkv.benchmarks.serve_client import Sample
from ragkv.benchmarks.serve_workload import FOLLOW_UP, KINDS, OPEN, PASSAGES, SWITCH

PERCENTILES = (50, 95, 99)
Key = tuple[int, int, int]
"""Round, session and turn: the same request in every system."""


@dataclass(frozen=True)
class Figure:
    """A time that is reported: of which requests, and where a sample has it."""

    name: str
    title: str
    field: str
    kinds: tuple[str, ...]

    def of(self, samples: Sequence[Sample]) -> dict[Key, float]:
        """Seconds of each request that has this figure and went well."""
        found: dict[Key, float] = {}
        for sample in samples:
            seconds = getattr(sample, self.field)
            if sample.kind in self.kinds and sample.error is None and seconds is not None:
                found[sample.round, sample.session, sample.turn] = seconds
        return found


FIRST = Figure("first_turn_ttft", "TTFT, first turn", "ttft_s", (OPEN,))
LATER = Figure("followup_ttft", "TTFT, follow-up turns", "ttft_s", (FOLLOW_UP, PASSAGES))
SWITCHED = Figure("switch_ttft", "TTFT, switch of filing", "ttft_s", (SWITCH,))
TPOT = Figure("tpot", "time per output token", "tpot_s", KINDS)
E2E = Figure("e2e", "end to end", "latency_s", KINDS)
FIGURES = (FIRST, LATER, SWITCHED, TPOT, E2E)


@dataclass(frozen=True)
class Played:
    """What a system did in all rounds. `wall_s`: seconds spent playing; `hit_tokens`: by source, of the
    `prompt_tokens` that it was asked; `peak_memory_bytes`: of all its processes, None where nobody looked."""

    system: str
    samples: list[Sample]
    wall_s: float
    hit_tokens: dict[str, int]
    prompt_tokens: int
    peak_memory_bytes: int | None


def percentiles(values: Sequence[float]) -> dict[str, Any]:
    """p50, p95 and p99 (linear between the two nearest), each None without values, and how many there are."""
    if not values:
        return {f"p{p}": None for p in PERCENTILES} | {"n": 0}
    found = np.percentile(values, PERCENTILES)
    return {f"p{p}": float(value) for p, value in zip(PERCENTILES, found, strict=True)} | {"n": len(values)}


def summarize(played: Played) -> dict[str, Any]:
    """One entry of the report's `systems`, but for its ratios. Seconds are those of requests that went well."""
    good = [sample for sample in played.samples if sample.error is None]
    hits = sum(played.hit_tokens.values())
    rates = {"requests_per_s": len(good), "output_tokens_per_s": sum(sample.output_tokens for sample in good)}
    return {
        "system": played.system,
        **{f"{figure.name}_s": percentiles(list(figure.of(good).values())) for figure in FIGURES},
        **{name: count / played.wall_s if played.wall_s > 0 else None for name, count in rates.items()},
        "requests": len(played.samples),
        "errors": len(played.samples) - len(good),
        "wall_s": played.wall_s,
        "prompt_tokens": played.prompt_tokens,
        "hit_tokens": dict(played.hit_tokens),
        "hit_fraction": hits / played.prompt_tokens if played.prompt_tokens else None,
        "peak_memory_bytes": played.peak_memory_bytes,
        "turns": _turns(played.samples),
        "samples": [asdict(sample) for sample in played.samples],
    }


def _turns(samples: Sequence[Sample]) -> dict[str, Any]:
    """By the turn's number; turns that switch to another filing are told apart from the others."""
    turns: dict[str, Any] = {}
    for number in sorted({sample.turn for sample in samples}):
        chosen = [sample for sample in samples if sample.turn == number and sample.kind != SWITCH]
        lengths = [sample.prompt_tokens for sample in chosen if sample.prompt_tokens is not None]
        turns[str(number)] = {
            "ttft_s": percentiles(list({**FIRST.of(chosen), **LATER.of(chosen)}.values())),
            "e2e_s": percentiles(list(E2E.of(chosen).values())),
            "prompt_tokens": statistics.median(lengths) if lengths else None,
            "errors": sum(sample.error is not None for sample in chosen),
        }
    return turns


def _ratios(samples: Sequence[Sample], others: Sequence[Sample]) -> dict[str, float | None]:
    """Medians of the ratios of the same requests, where both went well; None where there is no such pair."""
    ratios: dict[str, float | None] = {}
    for figure in FIGURES:
        ours, theirs = figure.of(samples), figure.of(others)
        pairs = [seconds / theirs[key] for key, seconds in ours.items() if theirs.get(key, 0.0) > 0]
        ratios[figure.name] = statistics.median(pairs) if pairs else None
    return ratios


def report(
    environment: Mapping[str, Any],
    config: Mapping[str, Any],
    played: Sequence[Played],
    baseline: str | None = None,
    skipped: Sequence[Mapping[str, str]] = (),
) -> dict[str, Any]:
    """All that was measured, ready for JSON: numbers that are not finite become None.

    `baseline`: the system that the ratios are against, else the first. `skipped`: {"system", "why"} of each system
    that did not run.
    """
    against = next((each for each in played if each.system == baseline), played[0] if played else None)
    systems = []
    for each in played:
        ratios = _ratios(each.samples, against.samples) if against else {}
        systems.append(summarize(each) | {"ratios": ratios})
    result = {
        "environment": dict(environment),
        "config": dict(config),
        "baseline": against.system if against else None,
        "systems": systems,
        "skipped": [dict(each) for each in skipped],
    }
    finite: dict[str, Any] = _finite(result)
    return finite


def _finite(value: Any) -> Any:
    """The same, without the numbers that JSON has no words for."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(report: Mapping[str, Any]) -> Group:
    """What to print: times, what they came from, and each turn by itself."""
    systems = report["systems"]
    parts = [_times(report), _work(systems), _by_turn(systems)]
    lines = [f"skipped: {each['system']}: {each['why']}" for each in report["skipped"]]
    for system in systems:
        errors = Counter(sample["error"] for sample in system["samples"] if sample["error"])
        lines += [f"{system['system']}: {count} x {text}" for text, count in errors.most_common(3)]
    return Group(*parts, *map(Text, lines))


def _times(report: Mapping[str, Any]) -> Table:
    shown = [f for f in FIGURES if any(system[f"{f.name}_s"]["n"] for system in report["systems"])]
    times = Table(title="Seconds", caption="n: requests; a percentile of few is near their longest")
    times.add_column("")
    times.add_column("system", no_wrap=True)
    for name in ("p50", "p95", "p99", "n", f"of {report['baseline']}"):
        times.add_column(name, justify="right", no_wrap=True)
    for figure in shown:
        for place, system in enumerate(report["systems"]):
            entry, ratio = system[f"{figure.name}_s"], system["ratios"].get(figure.name)
            times.add_row(
                "" if place else figure.title,
                system["system"],
                *(_seconds(entry[f"p{p}"]) for p in PERCENTILES),
                str(entry["n"]),
                "" if ratio is None else f"{ratio:.2f} x",
                end_section=place == len(report["systems"]) - 1,
            )
    return times


def _work(systems: Sequence[Mapping[str, Any]]) -> Table:
    work = Table(title="Throughput, hits, errors")
    work.add_column("system", no_wrap=True)
    for name in ("requests/s", "tokens/s", "errors", "hit", "hit tokens by source", "peak memory"):
        work.add_column(name, justify="right")
    for system in systems:
        hits = ", ".join(f"{source} {count:,}" for source, count in system["hit_tokens"].items() if count)
        memory, fraction = system["peak_memory_bytes"], system["hit_fraction"]
        work.add_row(
            system["system"],
            _number(system["requests_per_s"]),
            _number(system["output_tokens_per_s"]),
            f"{system['errors']} of {system['requests']}",
            "" if fraction is None else f"{fraction:.1%}",
            hits or "none",
            "" if memory is None else f"{memory / 2**30:.2f} GiB",
        )
    return work


def _by_turn(systems: Sequence[Mapping[str, Any]]) -> Table:
    turns = Table(title="Median seconds to first token, by turn")
    turns.add_column("system", no_wrap=True)
    numbers = sorted({int(number) for system in systems for number in system["turns"]})
    for number in numbers:
        turns.add_column(str(number), justify="right", no_wrap=True)
    for system in systems:
        entries = [system["turns"].get(str(number)) for number in numbers]
        turns.add_row(system["system"], *(_seconds(entry["ttft_s"]["p50"]) if entry else "" for entry in entries))
    return turns


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.{3 if value >= 0.1 else 4}f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
