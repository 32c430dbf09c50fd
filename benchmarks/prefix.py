"""TTFT of exact reuse against plain vLLM: cold, warm, and the floor, paired and alternating.

A round takes one document that neither engine has seen, and asks two questions about it:

    cold    ragkv, first question: prefill and store        plain   vLLM, first question: prefill
    warm    ragkv, second question, vLLM's cache emptied    floor   vLLM, second question, hit in its own cache
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from ragkv.benchmarks.engine import Engine, EngineOptions
from ragkv.benchmarks.model import ensure_model
from ragkv.benchmarks.report import median_ratio, reusable_tokens, write_json
from ragkv.benchmarks.tenk import generate_filing, load_filings

TIERS = {"memory": {"memory": {"capacity": "2GiB"}}}
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


def measure(
    plain: Engine, ragkv: Engine, documents: list[list[int]], questions: list[list[int]]
) -> tuple[dict[str, list[float]], float]:
    """Seconds of every step, a list a kind with an entry a round, and the share of reusable tokens hit."""
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
    for number, document in enumerate(track(documents, description="measuring")):
        first, second = ([*document, *question] for question in questions)
        reusable += reusable_tokens(second, [first])
        for side in sides if number % 2 else reversed(sides):
            side(first, second)
    return seconds, hits / reusable


def run(tier: str, tokens: int, rounds: int, filings: Path | None, json_file: Path | None) -> dict[str, Any]:
    """Measure, print a table, write the report. ValueError: an unknown tier, or too little text."""
    if tier not in TIERS:
        raise ValueError(f"--tier = {tier!r}; allowed: {', '.join(TIERS)}")
    console = Console()
    model = ensure_model(progress=console.print)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = documents(tokenizer, tokens, rounds, filings)
    questions = [tokenizer.encode(question, add_special_tokens=False) for question in QUESTIONS]
    console.print("starting two engines, plain vLLM and vLLM with ragkv")
    with Engine(EngineOptions(model)) as plain, Engine(EngineOptions(model, ragkv=TIERS[tier])) as ragkv:
        for engine in (plain, ragkv):
            engine.ask([list(range(100, 100 + tokens))])  # the first forward of its size is slower
        seconds, hit_fraction = measure(plain, ragkv, texts, questions)
        worker = ragkv.metrics()
    report: dict[str, Any] = {
        "tier": tier,
        "tokens": tokens,
        "rounds": rounds,
        "cold_over_plain": median_ratio(seconds["cold"], seconds["plain"]),
        "warm_over_floor": median_ratio(seconds["warm"], seconds["floor"]),
        "hit_fraction": hit_fraction,
        "store_seconds_per_step": worker["ragkv_store_seconds_sum"] / worker["ragkv_store_seconds_count"],
        "load_seconds_per_step": worker["ragkv_load_seconds_sum"] / worker["ragkv_load_seconds_count"],
        "seconds": seconds,
    }
    table = Table("", "median TTFT", "against", title=f"{tokens} tokens, tier {tier}, {rounds} rounds")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    table.add_row("plain vLLM, cold", f"{medians['plain'] * 1000:.0f} ms", "")
    table.add_row(
        "ragkv, cold", f"{medians['cold'] * 1000:.0f} ms", f"{report['cold_over_plain']:.3f} x plain cold"
    )
    table.add_row("plain vLLM, own cache", f"{medians['floor'] * 1000:.0f} ms", "")
    table.add_row(
        "ragkv, warm", f"{medians['warm'] * 1000:.0f} ms", f"{report['warm_over_floor']:.3f} x own cache"
    )
    console.print(table)
    console.print(
        f"Of the reusable tokens {hit_fraction:.1%} were hit. A worker spent "
        f"{report['store_seconds_per_step'] * 1000:.0f} ms on a step's stores, "
        f"{report['load_seconds_per_step'] * 1000:.0f} ms on its loads."
    )
    write_json(json_file, report)
    return report
