"""TTFT of exact reuse against plain vLLM: cold, warm, and the floor, paired and alternating, over several starts.

A round takes one document that neither engine has seen, and asks two questions about it:

    cold    ragkv, first question: prefill and store        plain   vLLM, first question: prefill
    warm    ragkv, second question, vLLM's cache emptied    floor   vLLM, second question, hit in its own cache

An engine has a speed of its own from its start on, whatever it is, so that a pair of engines measures the draw.
Hence several starts of both, with the same documents; and the one that is not measured is stopped, since an idle
engine spins. The ratio of a start is the median of its pairs; what is told is the median of the starts' ratios,
with the lowest and the highest.
"""

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from ragkv.benchmarks.engine import Engine, EngineOptions, Resting
from ragkv.benchmarks.model import MODEL, ensure_model
from ragkv.benchmarks.report import median_ratio, reusable_tokens, write_json
from ragkv.benchmarks.serve_setup import describe_machine, on_cpu
from ragkv.benchmarks.server import terminated_kindly
from ragkv.benchmarks.tenk import generate_filing, load_filings

TIERS = {"memory": {"memory": {"capacity": "2GiB"}}}
MOVES = ("store", "load")
QUESTIONS = ("\n\nWhat were net sales in the last year?", "\n\nWho is the chief executive officer?")


def documents(tokenizer: Any, tokens: int, rounds: int, folder: Path | None) -> list[list[int]]:
    """`rounds` documents of just `tokens` tokens that share no prefix. ValueError: the filings are too short."""
    if folder is None:
        texts = [generate_filing(seed, words=max(400, tokens)).text for seed in range(rounds)]
        cut = [tokenizer.encode(text, add_special_tokens=False)[:tokens] for text in texts]
    else:
        ids = [tokenizer.encode(filing.text, add_special_tokens=False) for filing in load_filings(folder)]
        cut = [each[at : at + tokens] for at in range(0, max(map(len, ids)), tokens) for each in ids][:rounds]
    short = [len(each) for each in cut if len(each) < tokens]
    if short or len(cut) < rounds:
        raise ValueError(f"the filings give {len(cut) - len(short)} documents of {tokens} tokens, not {rounds}")
    # A first line of its own for each, so that no document begins like another.
    return [tokenizer.encode(f"Document {n}.\n\n") + each for n, each in enumerate(cut)]


@dataclass(frozen=True)
class Start:
    """What one start of both engines gave: seconds of every step, a list a kind with an entry a round; tokens hit
    and tokens that could be; and what a worker spent on stores and loads in a step."""

    seconds: dict[str, list[float]]
    hits: int
    reusable: int
    store_seconds: float
    load_seconds: float

    @property
    def cold_over_plain(self) -> float:
        return median_ratio(self.seconds["cold"], self.seconds["plain"])

    @property
    def warm_over_floor(self) -> float:
        return median_ratio(self.seconds["warm"], self.seconds["floor"])


def measure(plain: Engine, ragkv: Engine, documents: list[list[int]], questions: list[list[int]]) -> Start:
    """All rounds of one start."""
    seconds: dict[str, list[float]] = {"cold": [], "plain": [], "warm": [], "floor": []}
    hits = reusable = 0

    def with_ragkv(first: list[int], second: list[int]) -> None:
        nonlocal hits
        ragkv.evict()
        seconds["cold"].append(ragkv.ask([first])[0].ttft_s)
        ragkv.evict()
        warm = ragkv.ask([second])[0]
        seconds["warm"].append(warm.ttft_s)
        hits += warm.cached_tokens

    def without(first: list[int], second: list[int]) -> None:
        plain.evict()
        seconds["plain"].append(plain.ask([first])[0].ttft_s)
        seconds["floor"].append(plain.ask([second])[0].ttft_s)

    sides: list[Callable[[list[int], list[int]], None]] = [with_ragkv, without]
    for number, document in enumerate(documents):
        first, second = ([*document, *question] for question in questions)
        reusable += reusable_tokens(second, [first])
        for side in sides if number % 2 else reversed(sides):
            side(first, second)
    worker = ragkv.metrics()
    per_step = [worker[f"ragkv_{name}_seconds_sum"] / worker[f"ragkv_{name}_seconds_count"] for name in MOVES]
    return Start(seconds, hits, reusable, *per_step)


def run(
    tier: str, tokens: int, rounds: int, starts: int, filings: Path | None, json_file: Path | None
) -> dict[str, Any]:
    """Measure, print a table, write the report. ValueError: an unknown tier, or too little text."""
    if tier not in TIERS:
        raise ValueError(f"--tier = {tier!r}; allowed: {', '.join(TIERS)}")
    console = Console()
    model = ensure_model(progress=console.print)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = documents(tokenizer, tokens, rounds, filings)
    questions = [tokenizer.encode(question, add_special_tokens=False) for question in QUESTIONS]
    found = []
    for number in track(range(starts), description="starts of plain vLLM and vLLM with ragkv", console=console):
        sides = [("plain", EngineOptions(model)), ("ragkv", EngineOptions(model, ragkv=TIERS[tier]))]
        with contextlib.ExitStack() as stack:
            stack.enter_context(terminated_kindly())  # a stopped engine does not end by itself
            engines = {}
            for name, options in sides if number % 2 else reversed(sides):
                engines[name] = engine = stack.enter_context(Resting(options)).wait()
                engine.ask([list(range(100, 100 + tokens))])  # the first forward of its size is slower
            found.append(measure(engines["plain"], engines["ragkv"], texts, questions))
            dtype = engines["ragkv"].dtype()  # both engines have the same
    environment = describe_machine(on_cpu()) | {"model": MODEL, "dtype": dtype}
    report = {"environment": environment, "tier": tier, "tokens": tokens, "rounds": rounds, "starts": starts}
    report |= summarize(tokens, found)
    show(report, console)
    write_json(json_file, report)
    return report


def summarize(tokens: int, starts: Sequence[Start]) -> dict[str, Any]:
    """Medians of the starts, what each of them gave, and every sample."""
    cold = [start.cold_over_plain for start in starts]
    warm = [start.warm_over_floor for start in starts]
    seconds = {kind: [value for start in starts for value in start.seconds[kind]] for kind in starts[0].seconds}
    levels = {kind: [statistics.median(start.seconds[kind]) for start in starts] for kind in seconds}
    return {
        "cold_over_plain": statistics.median(cold),
        "cold_over_plain_spread": [min(cold), max(cold)],
        "warm_over_floor": statistics.median(warm),
        "warm_over_floor_spread": [min(warm), max(warm)],
        "cold_over_plain_levels": statistics.median(levels["cold"]) / statistics.median(levels["plain"]),
        "hit_fraction": sum(start.hits for start in starts) / sum(start.reusable for start in starts),
        "store_seconds_per_step": statistics.median(start.store_seconds for start in starts),
        "load_seconds_per_step": statistics.median(start.load_seconds for start in starts),
        "prefill_tokens_per_second": tokens / statistics.median(seconds["plain"]),
        "levels": levels,
        "seconds": seconds,
    }


def show(report: dict[str, Any], console: Console) -> None:
    """The table, and what no row says."""
    title = f"{report['tokens']} tokens, tier {report['tier']}, {report['rounds']} rounds in each of "
    table = Table("", "median TTFT", "starts", "against", title=f"{title}{report['starts']} starts")

    def add(text: str, kind: str, ratio: str = "", against: str = "") -> None:
        levels = report["levels"][kind]
        compared = ""
        if ratio:
            low, high = report[f"{ratio}_spread"]
            compared = f"{report[ratio]:.3f} x {against} ({low:.3f} to {high:.3f})"
        middle = statistics.median(report["seconds"][kind])
        spread = f"{min(levels) * 1000:.0f} to {max(levels) * 1000:.0f} ms"
        table.add_row(text, f"{middle * 1000:.0f} ms", spread, compared)

    add("plain vLLM, cold", "plain")
    add("ragkv, cold", "cold", "cold_over_plain", "plain cold")
    add("plain vLLM, own cache", "floor")
    add("ragkv, warm", "warm", "warm_over_floor", "own cache")
    console.print(table)
    console.print(
        f"The model computed in {report['environment']['dtype']}. "
        f"The machine prefills {report['prefill_tokens_per_second']:,.0f} tokens a second. By the medians of all "
        f"starts, cold is {report['cold_over_plain_levels']:.3f} x plain cold. Of the reusable tokens "
        f"{report['hit_fraction']:.1%} were hit. A worker spent {report['store_seconds_per_step'] * 1000:.0f} ms "
        f"on a step's stores, {report['load_seconds_per_step'] * 1000:.0f} ms on its loads."
    )
