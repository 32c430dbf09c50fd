"""`internal fuzz --engine`: runs the fuzzer of engines, prints what it found, writes the report."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ragkv.benchmarks.internal.engine_fuzz import Findings, FuzzOptions, Wrong, fuzz
from ragkv.benchmarks.report import write_json
from ragkv.errors import RagKVError

SHOWN = 5


def run(options: FuzzOptions, json_file: Path | None) -> dict[str, Any]:
    """Fuzz, print a table, write the report. RagKVError: something is wrong, after the report is written."""
    console = Console()
    started = time.perf_counter()
    with Progress(transient=True, console=console) as bar:
        task = bar.add_task("fuzzing", total=options.prompts)
        findings = fuzz(options, lambda done: bar.update(task, completed=done))
    made = report(options, findings, time.perf_counter() - started)
    console.print(table(made))
    for wrong in findings.wrong[:SHOWN]:
        console.print(describe(wrong, options), markup=False, highlight=False, soft_wrap=True)
    for dead in findings.dead:
        console.print(dead, markup=False, highlight=False, soft_wrap=True)
    write_json(json_file, made)
    if findings.bad:
        raise RagKVError(
            f"fuzz: {len(findings.wrong)} wrong answers and failed requests, {len(findings.dead)} dead engines"
        )
    return made


def report(options: FuzzOptions, findings: Findings, seconds: float) -> dict[str, Any]:
    """What goes into the JSON file."""
    outputs = findings.outputs
    return {
        "prompts": findings.prompts,
        "seed": options.seed,
        "seconds": seconds,
        "outputs": outputs.total(),
        "equal": outputs["equal"],
        "near_ties": outputs["near tie"],
        "wrong_outputs": outputs["wrong"],
        "noise": findings.noise,
        "distinct_prompts": findings.distinct_prompts,
        "distinct_answers": len(findings.answers),
        "aborted": findings.aborted,
        "failed_requests": findings.failed,
        "resets": findings.resets,
        "refused_resets": findings.refused_resets,
        **{name: findings.engine[name] for name in COUNTS},
        "faults": dict(sorted(findings.faults.items())),
        "faults_injected": findings.faults.total(),
        "dead_engines": findings.dead,
        "wrong": [_as_json(each, options) for each in findings.wrong],
    }


COUNTS = {
    "preemptions": "preemptions",
    "hit_requests": "lookups with a hit in ragkv",
    "hit_tokens": "tokens hit in ragkv",
    "own_hit_tokens": "tokens hit in vLLM's own cache",
    "promoted_tokens": "tokens read from disk",
    "evicted_chunks": "chunks evicted",
    "fused_tokens": "tokens fused",
    "errors": "faults that ragkv has caught",
}


def table(made: dict[str, Any]) -> Table:
    """The counts of a report."""
    shown = Table(
        "", "count", title=f"{made['prompts']:,} prompts in {made['seconds']:.0f} s, seed {made['seed']}"
    )
    rows = {
        "outputs compared": "outputs",
        "equal": "equal",
        "near ties": "near_ties",
        "wrong": "wrong_outputs",
        "requests aborted": "aborted",
        "requests failed": "failed_requests",
        "resets": "resets",
        "resets refused": "refused_resets",
        **{text: name for name, text in COUNTS.items()},
        "faults injected": "faults_injected",
    }
    for text, name in rows.items():
        shown.add_row(text, f"{made[name]:,}")
    shown.add_row("engines that died", f"{len(made['dead_engines']):,}")
    shown.add_row("largest noise in log probabilities", f"{made['noise']:.1g}")
    return shown


def describe(wrong: Wrong, options: FuzzOptions) -> str:
    """What is wrong, how to see it again, and what its wave did."""
    done = "; ".join(map(str, wrong.operations))
    return (
        f"WRONG, episode {wrong.episode}, wave {wrong.wave}: {wrong.request}: {wrong.what}\n"
        f"  again: {again(wrong, options)}\n"
        f"  its wave: {done}"
    )


def again(wrong: Wrong, options: FuzzOptions) -> str:
    """The command that plays the episode again."""
    faults = f" --faults {options.store_faults:g} --copy-faults {options.copy_faults:g}"
    fusion = " --fusion" if options.fusion else ""
    only = f"--seed {options.seed} --only {wrong.episode}"
    return f"ragkv bench fuzz --engine {only}{faults}{fusion}"


def _as_json(wrong: Wrong, options: FuzzOptions) -> dict[str, Any]:
    operations = [{"operation": type(each).__name__.lower(), **asdict(each)} for each in wrong.operations]
    return {
        "episode": wrong.episode,
        "wave": wrong.wave,
        "request": wrong.request,
        "what": wrong.what,
        "again": again(wrong, options),
        "operations": operations,
    }
