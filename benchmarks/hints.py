"""What can one request's hints cost others?

The longest gap between tokens of a running answer while a request with the worst hints comes, against the same
prompt without hints. The engine is small and its steps are short, so that a gap shows what the scheduler's thread
does; prompts have 7,000 tokens. Each pair begins with empty caches, but for what a case stores ahead.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from ragkv.benchmarks.engine import Engine, EngineOptions
from ragkv.benchmarks.model import random_llama
from ragkv.benchmarks.report import write_json
from ragkv.benchmarks.server import terminated_kindly
from ragkv.benchmarks.stall import RUNNING_PROMPT, Stall, stall

TOKENS = 7000
STEP_TOKENS = 512  # of the engine
LIMIT = 0.020  # seconds by which hints may lengthen the longest gap
VOCABULARY = (300, 40_000)  # of the prompts' tokens
SETTINGS = {"memory": {"capacity": "1GiB"}, "placement": {"gate": False}}


@dataclass(frozen=True)
class Case:
    """Of random tokens: what is asked before (may be nothing), the prompt, and the hints."""

    name: str
    make: Callable[[Random], tuple[list[int], list[int], dict[str, Any]]]


def tokens(chance: Random, count: int) -> list[int]:
    """Text that nobody has seen."""
    return [chance.randrange(*VOCABULARY) for _ in range(count)]


def spans(size: int, count: int, **more: Any) -> dict[str, Any]:
    """Hints that call each `size` tokens a document, `count` times."""
    named = [{"id": f"{n}", "start": n * size, "end": (n + 1) * size} for n in range(count)]
    return {"documents": named, **more}


def _tiny(chance: Random) -> tuple[list[int], list[int], dict[str, Any]]:
    return [], tokens(chance, TOKENS), spans(1, 3400)


def _tiny_fused(chance: Random) -> tuple[list[int], list[int], dict[str, Any]]:
    prompt = tokens(chance, TOKENS)
    return prompt[1:], prompt, spans(1, 4000, fuse=True, recompute_ratio=1.0, selection="query")


def _paragraph(chance: Random) -> tuple[list[int], list[int], dict[str, Any]]:
    text = tokens(chance, 60)
    repeated = [token for n in range(TOKENS // 61) for token in [*text, 300 + n]]
    return repeated[7:], repeated, {"fuse": True}


def _pinned(chance: Random) -> tuple[list[int], list[int], dict[str, Any]]:
    pin = {"owner": "o" * 200, "seconds": 3e9, "documents": [f"{n}" for n in range(3400)]}
    return [], tokens(chance, TOKENS), spans(2, 3400, pin=pin, ttl=1, priority=9)


def _wrong(chance: Random) -> tuple[list[int], list[int], dict[str, Any]]:
    deep: Any = "\x1b" * 1000
    for _ in range(60):
        deep = [deep, {"start": deep}] if len(str(deep)) < 10**5 else [deep]
    wrong = {f"{'x' * 100}{n}": deep for n in range(20)}
    return (
        [],
        tokens(chance, TOKENS),
        {"documents": [{"id": deep, "start": -1}] * 4096, "ttl": "\n" * 1000, **wrong},
    )


CASES = (
    Case("3,400 documents of a token", _tiny),
    Case("4,000 documents of a token, fused", _tiny_fused),
    Case("a paragraph repeated, fused", _paragraph),
    Case("3,400 documents pinned", _pinned),
    Case("nothing but mistakes", _wrong),
)


def measure(engine: Engine, case: Case, rounds: int, seed: int) -> list[tuple[Stall, Stall]]:
    """Without hints and with them, by turns."""
    pairs = []
    for number in range(rounds):
        before, prompt, hints = case.make(Random(f"{seed} {case.name} {number}"))
        pair = []
        for given in (None, hints):
            engine.evict(ragkv_too=True)
            if before:
                engine.ask([before])
            running = tokens(Random(number), RUNNING_PROMPT)
            pair.append(engine.call(stall, running, prompt, given))
        pairs.append((pair[0], pair[1]))
    return pairs


def run(rounds: int, json_file: Path | None) -> dict[str, Any]:
    """Measure, print a table, write the report."""
    console = Console()
    with terminated_kindly(), TemporaryDirectory(prefix="ragkv-hints-") as folder:
        model = random_llama(Path(folder) / "model")
        llm = {"max_num_batched_tokens": STEP_TOKENS, "num_gpu_blocks_override": 160}
        with Engine(EngineOptions(model, SETTINGS, "float32", llm=llm)) as engine:
            console.print("starting an engine")
            measure(engine, CASES[0], 1, seed=1)  # the first steps of their size are slower
            found = {
                case.name: measure(engine, case, rounds, seed=0) for case in track(CASES, description="measuring")
            }
    report = summarize(found)
    console.print(table(report))
    console.print(judgement(report), highlight=False)
    write_json(json_file, report)
    return report


def summarize(found: dict[str, list[tuple[Stall, Stall]]]) -> dict[str, Any]:
    """Medians over the rounds, and every sample."""
    cases = {}
    for name, pairs in found.items():
        cases[name] = {
            "without_gap_s": statistics.median(without.gap for without, _ in pairs),
            "with_gap_s": statistics.median(hinted.gap for _, hinted in pairs),
            "more_s": statistics.median(hinted.gap - without.gap for without, hinted in pairs),
            "samples": [[vars(each) for each in pair] for pair in pairs],
        }
    return {"tokens": TOKENS, "rounds": len(next(iter(found.values()))), "cases": cases}


def table(report: dict[str, Any]) -> Table:
    """A line a case."""
    title = f"The longest gap in a running answer beside {report['tokens']:,} tokens, {report['rounds']} rounds"
    shown = Table("hints", "without them", "with them", "more", title=title)
    for name, case in report["cases"].items():
        gaps = (f"{case[key] * 1000:.1f} ms" for key in ("without_gap_s", "with_gap_s", "more_s"))
        shown.add_row(name, *gaps)
    return shown


def judgement(report: dict[str, Any]) -> str:
    """Whether hints hold up others, in a sentence."""
    name, worst = max(report["cases"].items(), key=lambda item: item[1]["more_s"])
    word = "within" if worst["more_s"] <= LIMIT else "beyond"
    return (
        f"The worst hints ({name}) lengthen the longest gap by {worst['more_s'] * 1000:.1f} ms, "
        f"{word} the limit of {LIMIT * 1000:.0f} ms."
    )
