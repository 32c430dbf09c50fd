"""`ragkv bench compare`: do two reports of `ragkv bench serve` differ by more than the noise?

Where both runs asked the same, each request is compared with itself; else the two sets of requests are. A
difference counts where its whole 99% interval lies beyond the tolerance, which is also what a machine's own drift
from one run to the next must stay within.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ragkv.benchmarks.report import write_json
from ragkv.benchmarks.serve_client import Sample
from ragkv.benchmarks.serve_noise import CONFIDENCE, Interval, interval
from ragkv.benchmarks.serve_report import FIGURES, Key, percentiles
from ragkv.benchmarks.serve_workload import Shape
from ragkv.errors import ConfigError, RagKVError

TOLERANCE = 0.05
WORSE_STATUS = 3
SAME, WORSE, BETTER, UNKNOWN = "no difference", "worse", "better", "too few to tell"
THROUGHPUT = "requests_per_s"


@dataclass(frozen=True)
class Run:
    """A report that was read. `systems`: entries by name; `samples`: the requests of each."""

    path: Path
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    systems: dict[str, Mapping[str, Any]]
    samples: dict[str, list[Sample]]


@dataclass(frozen=True)
class Change:
    """What became of one figure. `low`, `high`: the interval of `ratio`, new over old; None where unknown."""

    figure: str
    old: float | None
    new: float | None
    ratio: float | None
    low: float | None
    high: float | None
    verdict: str


def read_run(path: Path) -> Run:
    """A report of `ragkv bench serve`. RagKVError names the file and what is wrong with it."""
    names = {field.name for field in fields(Sample)}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        systems = {str(entry["system"]): entry for entry in data["systems"]}
        samples = {
            name: [Sample(**{key: sample[key] for key in names}) for sample in entry["samples"]]
            for name, entry in systems.items()
        }
        run = Run(path, dict(data["config"]), dict(data["environment"]), systems, samples)
        for entry in systems.values():
            _checked(entry)
    except OSError as error:
        raise RagKVError(f"{path} cannot be read: {error.strerror or error}") from None
    except json.JSONDecodeError as error:
        raise RagKVError(f"{path} is not JSON: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise RagKVError(f"{path} is no report of `ragkv bench serve`: {reason}") from None
    return run


def _checked(entry: Mapping[str, Any]) -> None:
    """TypeError or KeyError where something that is compared has no number."""
    _numbers(entry, ("errors",), ("hit_fraction", THROUGHPUT))
    for sample in entry["samples"]:
        _numbers(sample, ("round", "session", "turn", "started_s"), ("ttft_s", "tpot_s", "latency_s"))


def _numbers(values: Mapping[str, Any], needed: Sequence[str], optional: Sequence[str]) -> None:
    for name in (*needed, *optional):
        value = values[name]
        if not (isinstance(value, int | float) or (value is None and name in optional)):
            raise TypeError(f"{name} = {value!r}")


def compare(old: Run, new: Run, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """Every figure of every system that both have. RagKVError: there is none; ConfigError: a bad tolerance.

    "paired": each request is compared with itself. "worse": whether anything got worse.
    """
    if not 0 <= tolerance < math.inf:
        raise ConfigError(f"tolerance = {tolerance}; allowed: shares from 0")
    common = [name for name in old.systems if name in new.systems]
    if not common:
        theirs, ours = ", ".join(old.systems) or "none", ", ".join(new.systems) or "none"
        raise RagKVError(f"{new.path} has no system of {old.path}: it has {ours}, not {theirs}")
    paired = _same_workload(old.config, new.config) and all(
        _same_requests(old.samples[name], new.samples[name]) for name in common
    )
    systems: list[dict[str, Any]] = []
    for name in common:
        changes = _figures(old, new, name, paired, tolerance)
        changes += [_errors(old.systems[name], new.systems[name])]
        changes += [_hits(old.systems[name], new.systems[name], tolerance)]
        systems.append({"system": name, "figures": [vars(change) for change in changes]})
    return {
        "old": str(old.path),
        "new": str(new.path),
        "tolerance": tolerance,
        "confidence": CONFIDENCE,
        "paired": paired,
        "environment_differs_in": _differing(old.environment, new.environment),
        "config_differs_in": _differing(old.config, new.config),
        "systems": systems,
        "worse": any(figure["verdict"] == WORSE for system in systems for figure in system["figures"]),
    }


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys under which they have something else."""
    return sorted(key for key in {*old, *new} if old.get(key) != new.get(key))


def _same_workload(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether both configurations ask the same of the same texts, at the same pace."""
    names = [*(field.name for field in fields(Shape)), "texts"]
    return all(old.get(name) == new.get(name) for name in names)


def _same_requests(old: Sequence[Sample], new: Sequence[Sample]) -> bool:
    """Whether there are common requests, and all of them are of one kind and length in both."""
    theirs = {_key(sample): sample for sample in old}
    pairs = [(theirs[_key(sample)], sample) for sample in new if _key(sample) in theirs]
    return bool(pairs) and all(
        a.kind == b.kind and (a.prompt_tokens == b.prompt_tokens or None in (a.prompt_tokens, b.prompt_tokens))
        for a, b in pairs
    )


def _key(sample: Sample) -> Key:
    return sample.round, sample.session, sample.turn


def _figures(old: Run, new: Run, system: str, paired: bool, tolerance: float) -> list[Change]:
    changes: list[Change] = []
    before, after = old.samples[system], new.samples[system]
    for figure in FIGURES:
        theirs, ours = _logarithms(figure.of(before)), _logarithms(figure.of(after))
        if theirs or ours:
            name = f"{figure.name}_s"
            medians = [percentiles(list(figure.of(samples).values()))["p50"] for samples in (before, after)]
            changes.append(_change(name, medians, interval(theirs, ours, paired), tolerance))
    speeds = [run.systems[system][THROUGHPUT] for run in (old, new)]
    found = interval(_round_speeds(before), _round_speeds(after), paired)
    return [*changes, _change(THROUGHPUT, speeds, found, tolerance, -1)]


def _logarithms(values: Mapping[Key, float]) -> dict[Key, float]:
    return {key: math.log(value) for key, value in values.items() if value > 0}


def _round_speeds(samples: Sequence[Sample]) -> dict[Key, float]:
    """The logarithm of each round's requests a second; a round without any has none."""
    rounds: defaultdict[int, list[float]] = defaultdict(list)
    for sample in samples:
        if sample.error is None and sample.latency_s is not None:
            rounds[sample.round].append(sample.started_s + sample.latency_s)
    return _logarithms({(number, 0, 0): len(ends) / max(ends) for number, ends in rounds.items() if max(ends) > 0})


def _change(
    name: str,
    values: Sequence[float | None],
    found: Interval | None,
    tolerance: float,
    worse_sign: int = 1,
) -> Change:
    """`values`: old and new; `found`: None where nobody can tell."""
    old, new = values
    if found is None:
        return Change(name, old, new, new / old if old and new else None, None, None, UNKNOWN)
    bound = math.log1p(tolerance)
    sign = 1 if found.low > bound else -1 if found.high < -bound else 0
    verdict = {0: SAME, worse_sign: WORSE, -worse_sign: BETTER}[sign]
    ratio, low, high = map(math.exp, (found.middle, found.low, found.high))
    return Change(name, old, new, ratio, low, high, verdict)


def _errors(old: Mapping[str, Any], new: Mapping[str, Any]) -> Change:
    """Any difference is told: of their share, since one run may have asked more."""
    before, after = old["errors"], new["errors"]
    theirs, ours = before * len(new["samples"]), after * len(old["samples"])
    verdict = WORSE if ours > theirs else BETTER if ours < theirs else SAME
    return Change("errors", before, after, after / before if before else None, None, None, verdict)


def _hits(old: Mapping[str, Any], new: Mapping[str, Any], tolerance: float) -> Change:
    """Hits hardly vary: the share itself is held against the tolerance."""
    before, after = old["hit_fraction"], new["hit_fraction"]
    if before is None or after is None:
        return Change("hit_fraction", before, after, None, None, None, UNKNOWN)
    verdict = WORSE if before - after > tolerance else BETTER if after - before > tolerance else SAME
    return Change("hit_fraction", before, after, after / before if before else None, None, None, verdict)


def show(console: Console, result: Mapping[str, Any]) -> None:
    """The table, and what it rests on in words."""
    titles = {f"{figure.name}_s": f"{figure.title}, s" for figure in FIGURES}
    titles |= {THROUGHPUT: "requests a second", "errors": "errors", "hit_fraction": "share of tokens hit"}
    table = Table()
    table.add_column("system", no_wrap=True)
    table.add_column("median", no_wrap=True)
    for name in ("old", "new", "ratio", f"{CONFIDENCE:.0%} interval"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for system in result["systems"]:
        for place, figure in enumerate(system["figures"]):
            interval = "" if figure["low"] is None else f"{figure['low']:.2f} to {figure['high']:.2f}"
            table.add_row(
                "" if place else system["system"],
                titles[figure["figure"]],
                *("" if figure[side] is None else f"{figure[side]:.4g}" for side in ("old", "new")),
                "" if figure["ratio"] is None else f"{figure['ratio']:.3f}",
                interval,
                figure["verdict"],
                style="red" if figure["verdict"] == WORSE else None,
                end_section=place == len(system["figures"]) - 1,
            )
    console.print(table)
    how = "each request against itself" if result["paired"] else "unpaired: the two runs did not ask the same"
    console.print(f"Ratios are new over old, {how}; a difference is one beyond {result['tolerance']:.0%}.")
    if result["environment_differs_in"]:
        console.print(f"The environments differ in {', '.join(result['environment_differs_in'])}.")
    if result["config_differs_in"]:
        console.print(f"The runs were asked for other {', '.join(result['config_differs_in'])}.")


def run(
    old: Path, new: Path, *, tolerance: float = TOLERANCE, fail: bool = False, json_file: Path | None = None
) -> int:
    """Compare, print, write; returns the exit status: `WORSE_STATUS` where `fail` and something got worse, else 0.

    RagKVError: one of the files is no report, or they have no system in common.
    """
    result = compare(read_run(old), read_run(new), tolerance)
    console = Console()
    console.width = max(console.width, 110)  # of the table
    show(console, result)
    write_json(json_file, result)
    return WORSE_STATUS if fail and result["worse"] else 0
