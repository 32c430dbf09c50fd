"""Do a request's hints hold up others? The longest gap between tokens of a running answer, as in `stall`, while a
second request comes: without hints, and, to the same prompt, with the worst hints that are known to us.

    spans     a document of every token, and more than are taken
    pins      everything pinned for as long as may be, with documents that overlap, for one more owner each time;
              and the last one's pins taken back, a time to live, the highest priority
    junk      everything wrong, and long
    order     as many and as long passages to be ordered as may be
    fuse      one paragraph repeated, stored after other first tokens: without the hint it is prefilled

All but the last ask for a prompt that ragkv has in memory, so that nothing else takes long.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from ragkv.benchmarks.engine import Engine, EngineOptions
from ragkv.benchmarks.internal.stall import RUNNING_PROMPT, SETTINGS, Stall, stall
from ragkv.benchmarks.model import ensure_model
from ragkv.benchmarks.prefix import documents
from ragkv.benchmarks.report import write_json
from ragkv.benchmarks.server import terminated_kindly
from ragkv.config.settings import HINT_NAMES
from ragkv.connectors.vllm.hints import MOST_ORDERED_TOKENS, MOST_PASSAGES

LIMIT = 0.020  # seconds: hints may make others wait so much longer
SPANS = 4000
HEAD, PARAGRAPH = 100, 61  # tokens

Hints = dict[str, Any]
Pair = tuple[Stall, Stall]


def spans(tokens: int, number: int) -> Hints:
    """As many documents as there are tokens."""
    return {
        "documents": [{"id": f"{number}-{at}", "start": at, "end": at + 1} for at in range(min(SPANS, tokens))]
    }


def pins(tokens: int, number: int) -> Hints:
    """Everything that is kept, for long."""
    found = [{"id": str(at), "start": at, "end": tokens - at} for at in range(min(256, tokens // 2))]
    named = [each["id"] for each in found]
    return {
        "documents": found,
        "pin": {"owner": f"desk {number}", "seconds": 604_800, "documents": named},
        "unpin": {"owner": f"desk {number - 1}"},
        "ttl": 3e9,
        "priority": 9,
    }


def junk(tokens: int, number: int) -> Hints:
    """Nothing that can be."""
    long: list[Any] = [{"\x1b" * 100: [[[]]] * 100}] * 10
    wrong = (name for name in HINT_NAMES if name != "store")
    return {**dict.fromkeys(wrong, long), **{f"{'x' * 100}{each}": each for each in range(tokens)}}


def fuse(tokens: int, number: int) -> Hints:
    """Fusion, with a document of every token."""
    return {**spans(tokens, number), "fuse": True, "selection": "deviation", "recompute_ratio": 0.15}


def order(tokens: int, number: int) -> Hints:
    """As many passages as may be, and as long."""
    size = MOST_ORDERED_TOKENS // MOST_PASSAGES
    return {"order": {"before": [], "passages": [[number, each] * (size // 2) for each in range(MOST_PASSAGES)]}}


KINDS: dict[str, Callable[[int, int], Hints]] = {
    "spans": spans,
    "pins": pins,
    "junk": junk,
    "order": order,
    "fuse": fuse,
}


def measure(engine: Engine, kind: str, prompts: list[list[int]], running: list[int]) -> list[Pair]:
    """For each two prompts a round: the first is asked without hints, the second with; and the other way round in
    every second round."""
    found: list[Pair] = []
    for number in track(range(len(prompts) // 2), description=kind):
        both: dict[bool, Stall] = {}
        for hinted in (False, True) if number % 2 else (True, False):
            prompt = prompts[2 * number + hinted]
            engine.evict()
            hints = KINDS[kind](len(prompt), number) if hinted else None
            both[hinted] = engine.call(stall, running, prompt, hints)
        found.append((both[False], both[True]))
    return found


def repeated(words: list[int], tokens: int, count: int) -> list[list[int]]:
    """Prompts of one repeated paragraph, each with first tokens of its own."""
    paragraph = words[:PARAGRAPH]
    body = (paragraph * (tokens // PARAGRAPH + 1))[: tokens - HEAD]
    return [[*words[PARAGRAPH + each :][:HEAD], *body] for each in range(count)]


def run(tokens: int, rounds: int, filings: Path | None, json_file: Path | None) -> dict[str, Any]:
    """Measure, print a table, write the report. ValueError: too little text."""
    console = Console()
    model = ensure_model(progress=console.print)
    from transformers import AutoTokenizer

    (text,) = documents(AutoTokenizer.from_pretrained(model), tokens, 1, filings)
    known = text[:tokens]
    new = repeated(known, tokens, 2 * rounds + 2)
    running = list(range(300, 300 + RUNNING_PROMPT))
    console.print("starting an engine with ragkv")
    found: dict[str, list[Pair]] = {}
    with terminated_kindly(), Engine(EngineOptions(model, ragkv=SETTINGS)) as engine:
        engine.ask([known])
        engine.ask([new[0]])
        for kind in KINDS:
            prompts = new[1:] if kind == "fuse" else [known] * (2 * rounds + 1)
            engine.evict()
            engine.call(stall, running, prompts.pop(), KINDS[kind](tokens, rounds))  # the first is slower
            found[kind] = measure(engine, kind, prompts, running)
    report = summarize(tokens, rounds, found)
    console.print(table(report))
    console.print(judgement(report), highlight=False)
    write_json(json_file, report)
    return report


def summarize(tokens: int, rounds: int, found: dict[str, list[Pair]]) -> dict[str, Any]:
    """Medians over the rounds, and every sample."""
    kinds = {
        kind: {
            "quiet_gap_s": statistics.median(each.quiet for pair in pairs for each in pair),
            "gap_s": statistics.median(without.gap for without, _ in pairs),
            "hinted_gap_s": statistics.median(hinted.gap for _, hinted in pairs),
            "longer_s": statistics.median(hinted.gap - without.gap for without, hinted in pairs),
            "samples": [[vars(without), vars(hinted)] for without, hinted in pairs],
        }
        for kind, pairs in found.items()
    }
    quiet = sorted(each.quiet for pairs in found.values() for pair in pairs for each in pair)
    middle = quiet[len(quiet) // 4], quiet[3 * len(quiet) // 4]  # half of them lie between
    return {"tokens": tokens, "rounds": rounds, "quiet_range_s": middle, "kinds": kinds}


def table(report: dict[str, Any]) -> Table:
    """A row a kind."""
    title = f"A running answer beside {report['tokens']:,} tokens, {report['rounds']} rounds"
    shown = Table("hints", "quiet", "longest gap without", "with", "longer by", title=title)
    for kind, each in report["kinds"].items():
        names = ("quiet_gap_s", "gap_s", "hinted_gap_s", "longer_s")
        shown.add_row(kind, *(f"{1000 * each[name]:.1f} ms" for name in names))
    return shown


def judgement(report: dict[str, Any]) -> str:
    """Whether hints hold up others, in a sentence."""
    worst = max(report["kinds"], key=lambda kind: report["kinds"][kind]["longer_s"])
    longer = report["kinds"][worst]["longer_s"]
    word = "within" if longer <= LIMIT else "beyond"
    low, high = report["quiet_range_s"]
    if high - low > LIMIT:
        return (
            f"Nothing can be said: while nothing else happens, half of the gaps lie from {1000 * low:.0f} to "
            f"{1000 * high:.0f} ms. Measure on a machine that does nothing else."
        )
    return (
        f"The worst hints ({worst}) make others wait {1000 * longer:.1f} ms longer than the same prompt without "
        f"them, {word} the limit of {1000 * LIMIT:.0f} ms."
    )
