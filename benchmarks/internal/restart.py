"""What outlives the engine: TTFT and hits of a second engine, from what a first one left on disk or in Redis.

One engine reads some documents and ends. A second one is asked the same again, each document twice, with vLLM's
own cache emptied before each time: first it comes from the lower tier, then from memory. Both are times of one
engine, in one run, on the same prompt.
"""

import contextlib
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from ragkv.benchmarks.engine import Engine, EngineOptions
from ragkv.benchmarks.model import MODEL, ensure_model
from ragkv.benchmarks.prefix import QUESTIONS, documents
from ragkv.benchmarks.report import median_ratio, reusable_tokens, write_json
from ragkv.benchmarks.serve_setup import describe_machine, on_cpu

TIERS = ("disk", "redis")


@contextlib.contextmanager
def place(tier: str, redis_url: str | None) -> Iterator[dict[str, Any]]:
    """Settings of a lower tier, with a folder or a server of its own. ValueError: there is none to be had."""
    if tier == "disk":
        with tempfile.TemporaryDirectory(prefix="ragkv-bench-") as folder:
            yield {"disk": {"path": f"{folder}/tier"}}
    elif redis_url is not None:
        yield {"redis": {"url": redis_url, "prefix": "ragkv-bench"}}
    else:
        from ragkv.benchmarks.internal.redis_server import Server

        with Server() as server:
            yield {"redis": {"url": server.url}}


def measure(second: Engine, prompts: list[list[int]], console: Console) -> dict[str, list[float]]:
    """Seconds to first token and cached tokens of every prompt: from the lower tier, then from memory."""
    found: dict[str, list[float]] = {"below": [], "memory": [], "below_tokens": [], "memory_tokens": []}
    for prompt in track(prompts, description="second engine", console=console):
        for name in ("below", "memory"):
            second.evict()
            answer = second.ask([prompt])[0]
            found[name].append(answer.ttft_s)
            found[f"{name}_tokens"].append(answer.cached_tokens)
    return found


def run(
    tier: str, tokens: int, rounds: int, filings: Path | None, redis_url: str | None, json_file: Path | None
) -> dict[str, Any]:
    """Measure, print a table, write the report. ValueError: an unknown tier, or too little text."""
    if tier not in TIERS:
        raise ValueError(f"--tier = {tier!r}; allowed: {', '.join(TIERS)}")
    console = Console()
    model = ensure_model(progress=console.print)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    question = tokenizer.encode(QUESTIONS[0], add_special_tokens=False)
    prompts = [[*text, *question] for text in documents(tokenizer, tokens, rounds, filings)]
    warm_up = list(range(100, 100 + tokens))
    with place(tier, redis_url) as settings:
        options = EngineOptions(model, {"memory": {"capacity": "2GiB"}, **settings})
        with Engine(options) as first:
            first.ask([warm_up])
            cold = [first.ask([prompt])[0].ttft_s for prompt in track(prompts, description="first engine")]
        with Engine(options) as second:
            second.ask([warm_up[::-1]])
            found = measure(second, prompts, console)
            dtype = second.dtype()
    reusable = sum(reusable_tokens(prompt, [prompt]) for prompt in prompts)
    report: dict[str, Any] = {
        "environment": describe_machine(on_cpu()) | {"model": MODEL, "dtype": dtype},
        "tier": tier,
        "tokens": tokens,
        "rounds": rounds,
        "hit_fraction": sum(found["below_tokens"]) / reusable,
        "below_over_memory": median_ratio(found["below"], found["memory"]),
        "seconds": {"cold": cold, "below": found["below"], "memory": found["memory"]},
    }
    show(report, console)
    write_json(json_file, report)
    return report


def show(report: dict[str, Any], console: Console) -> None:
    """The table, and what no row says."""
    tier = report["tier"]
    title = f"{report['tokens']} tokens, {report['rounds']} documents, after a restart"
    table = Table("", "median TTFT", title=title)
    rows = (
        ("cold", "first engine, cold"),
        ("below", f"second engine, from {tier}"),
        ("memory", "second engine, from memory"),
    )
    for kind, text in rows:
        table.add_row(text, f"{statistics.median(report['seconds'][kind]) * 1000:.0f} ms")
    console.print(table)
    console.print(
        f"The model computed in {report['environment']['dtype']}. "
        f"Of the first engine's tokens {report['hit_fraction']:.1%} were hit by the second; "
        f"{tier} takes {report['below_over_memory']:.2f} x memory (median of pairs)."
    )
