"""Hit rates of policies on a trace, at several cache sizes or through a stack of tiers (`ragkv simulate`)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ragkv.benchmarks.clairvoyant import most_hits
from ragkv.benchmarks.compared import make_compared
from ragkv.benchmarks.replay import replay
from ragkv.benchmarks.report import new_figure, save_figure, write_json
from ragkv.benchmarks.simulate_plan import CLAIRVOYANT, Plan, make_plan
from ragkv.benchmarks.stack import Tier, replay_tiers
from ragkv.errors import ConfigError
from ragkv.policies import make_admission
from ragkv.policies.admission import AdmissionPolicy

ALWAYS, BYPASS = "always", "bypass"
Result = dict[str, Any]
Report = Callable[[int], object]


def replay_sizes(plan: Plan, progress: Report) -> list[Result]:
    """One result for each admission, policy and size."""
    results: list[Result] = []
    for admission in plan.admissions:
        for policy in plan.policies:
            for size in plan.sizes:
                done = replay(plan.blocks, policy, size.units, _admission(admission), progress=progress)
                results.append(
                    _result(plan, policy, admission, size.text, size.units, done.hits)
                    | {"references_per_s": round(done.references / done.seconds)}
                )
    return results


def replay_stacks(plan: Plan, progress: Report) -> list[Result]:
    """One result for each admission and policy; where all tiers name theirs, for each admission."""
    fixed = all(level.policy for level in plan.tiers)
    results: list[Result] = []
    for admission in plan.admissions:
        for policy in [""] if fixed else plan.policies:
            names = [level.policy or policy for level in plan.tiers]
            tiers = [
                Tier(level.name, make_compared(name), level.size.units, _admission(admission) if place else None)
                for place, (level, name) in enumerate(zip(plan.tiers, names, strict=True))
            ]
            done = replay_tiers(plan.blocks, tiers, progress)
            label = names[0] if len(set(names)) == 1 else "/".join(names)
            units = sum(level.size.units for level in plan.tiers)
            results.append(
                _result(plan, label, admission, plan.tiers_text, units, sum(done.hits))
                | {
                    "references_per_s": round(done.references / done.seconds),
                    "tiers": [
                        {
                            "tier": level.name,
                            "policy": name,
                            "size": level.size.text,
                            "capacity": level.size.units,
                            "hit_rate": hits / done.references,
                        }
                        for level, name, hits in zip(plan.tiers, names, done.hits, strict=True)
                    ],
                }
            )
    return results


def bounds(plan: Plan) -> list[Result]:
    """The clairvoyant's result for each size, or for all tiers together."""
    sizes = [(size.text, size.units) for size in plan.sizes]
    if plan.tiers:
        sizes = [(plan.tiers_text, sum(level.size.units for level in plan.tiers))]
    return [
        _result(plan, CLAIRVOYANT, BYPASS, text, units, most_hits(plan.blocks, units)) for text, units in sizes
    ]


def _admission(name: str) -> AdmissionPolicy | None:
    return None if name == ALWAYS else make_admission(name)


def _result(plan: Plan, policy: str, admission: str, size: str, units: int, hits: int) -> Result:
    return {
        "policy": policy,
        "admission": admission,
        "size": size,
        "hit_rate": hits / plan.blocks.references,
        "capacity": units,
        "unit": plan.trace.unit,
        "semantics": plan.semantics,
    }


def _label(result: Result) -> str:
    plain = result["admission"] in (ALWAYS, BYPASS)
    return result["policy"] if plain else f"{result['policy']}, {result['admission']}"


def _by_label(results: Sequence[Result]) -> dict[str, list[Result]]:
    rows: dict[str, list[Result]] = {}
    for result in results:
        rows.setdefault(_label(result), []).append(result)
    return rows


def _title(plan: Plan) -> str:
    blocks = plan.blocks
    unique = len(blocks.weights)
    weight = f" of {sum(blocks.weights):,} tokens" if plan.trace.unit == "tokens" else ""
    most = 1 - unique / blocks.references
    return (
        f"{Path(plan.trace.name).name}: {len(blocks.requests):,} requests, {blocks.references:,} blocks, "
        f"{unique:,} unique{weight}\n{plan.semantics} semantics; an infinite cache hits {most:.1%}"
    )


def show(console: Console, plan: Plan, results: Sequence[Result]) -> None:
    """The table: a row a policy; a column a size, or a tier."""
    columns = [f"{size.text}\n{size.units:,}" for size in plan.sizes]
    if plan.tiers:
        columns = [f"{escape(level.name)}\n{level.size.units:,}" for level in plan.tiers] + ["all tiers"]
    table = Table(
        "policy", title=escape(_title(plan)), caption=f"hits in % of block references; sizes in {plan.trace.unit}"
    )
    for column in [*columns, "references/s"]:
        table.add_column(column, justify="right")
    rows = _by_label(results)
    rates = {label: _rates(row, plan) for label, row in rows.items()}
    for label, row in rows.items():
        cells = ["" if rate is None else f"{100 * rate:.2f}" for rate in rates[label]]
        speeds = [result["references_per_s"] for result in row if "references_per_s" in result]
        speed = f"{len(speeds) / sum(1 / speed for speed in speeds):,.0f}" if speeds else ""
        table.add_row(label, *cells, speed)
    console.print(table)


def _rates(row: Sequence[Result], plan: Plan) -> list[float | None]:
    if not plan.tiers:
        return [result["hit_rate"] for result in row]
    (result,) = row
    by_tier = [tier["hit_rate"] for tier in result.get("tiers", ())] or [None] * len(plan.tiers)
    return [*by_tier, result["hit_rate"]]


def draw(plan: Plan, results: Sequence[Result], path: Path) -> None:
    """The picture: hit rate over cache size, a line a policy; or a bar a policy, a colour a tier."""
    rows = _by_label(results)
    figure, axes = new_figure(9, 5.5)
    axes.set_title(_title(plan), fontsize=10)
    bound = {"color": "black", "linestyle": "--", "linewidth": 1.2}
    if plan.tiers:
        _draw_tiers(axes, plan, rows, bound)
    else:
        for label, marker in zip(rows, cycle("osv^D*Px"), strict=False):
            style = bound if label == CLAIRVOYANT else {"marker": marker, "markersize": 5}
            points = sorted((each["capacity"], 100 * each["hit_rate"]) for each in rows[label])
            axes.plot(*zip(*points, strict=True), label=label, **style)
        axes.set_xscale("log")
        axes.set_xticks([size.units for size in plan.sizes], [size.text for size in plan.sizes])
        axes.minorticks_off()
        axes.set_xlabel(f"cache size (100% is {sum(plan.blocks.weights):,} {plan.trace.unit})")
    axes.set_ylabel("hits, % of block references")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path)


def _draw_tiers(axes: Any, plan: Plan, rows: dict[str, list[Result]], bound: dict[str, Any]) -> None:
    labels = [label for label in rows if label != CLAIRVOYANT]
    floors = [0.0] * len(labels)
    for place, level in enumerate(plan.tiers):
        heights = [100 * rows[label][0]["tiers"][place]["hit_rate"] for label in labels]
        axes.bar(labels, heights, 0.6, bottom=floors, label=f"{level.name} ({level.size.text})")
        floors = [a + b for a, b in zip(floors, heights, strict=True)]
    axes.axhline(100 * rows[CLAIRVOYANT][0]["hit_rate"], label=CLAIRVOYANT, **bound)


@contextmanager
def _progress(total: int) -> Iterator[Report]:
    """A bar on stderr, where that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("replaying"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda requests: bar.advance(task, requests)


def run(
    source: str,
    *,
    policies: str | None = None,
    sizes: str | None = None,
    admissions: str = ALWAYS,
    semantics: str = "prefix",
    tiers: str | None = None,
    block_bytes: str | None = None,
    json_file: Path | None = None,
    picture: Path | None = None,
) -> dict[str, Any]:
    """Replay, print a table, write the report and the picture. ConfigError: what cannot be, in one line."""
    plan = make_plan(source, policies, sizes, admissions, semantics, tiers, block_bytes)
    replays = len(plan.admissions) * max(1, len(plan.policies)) * max(1, len(plan.sizes))
    with _progress(replays * len(plan.blocks.requests)) as progress:
        results = (replay_stacks if plan.tiers else replay_sizes)(plan, progress) + bounds(plan)
    report = {
        "trace": plan.trace.name,
        "requests": len(plan.blocks.requests),
        "unique_blocks": len(plan.blocks.weights),
        "results": results,
    }
    show(Console(), plan, results)
    try:
        write_json(json_file, report)
        if picture is not None:
            draw(plan, results, picture)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}; allowed: files that can be written") from None
    return report
