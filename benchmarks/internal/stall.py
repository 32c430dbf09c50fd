"""Does a long load hold up others? The longest gap between tokens of a running answer while another request comes.

An answer of many tokens runs. In the middle of it a second request asks for one token to a prompt of, say, 6,000:

    quiet     no second request: the longest gap of as many tokens as the others are looked at for
    load      ragkv knows all of the prompt but its last token, vLLM's own cache is empty
    prefill   plain vLLM, which computes the prompt: its step lasts as long as a whole prefill, or a part of it
              as large as `max_num_batched_tokens`

A gap is measured where tokens arrive, at the engine's front end.
"""

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from ragkv.benchmarks.engine import Engine, EngineOptions, Resting
from ragkv.benchmarks.model import ensure_model
from ragkv.benchmarks.prefix import documents
from ragkv.benchmarks.report import median_ratio, write_json
from ragkv.benchmarks.server import terminated_kindly

BEFORE, AFTER = 16, 16  # tokens of the running answer, before the second request comes and after it has ended
MOST_ANSWER = 4096  # the running answer ends before, by an abort
RUNNING_PROMPT = 64
LIMIT = 2.0  # a load may make the longest gap so many times as long

SETTINGS = {"memory": {"capacity": "2GiB"}}


@dataclass(frozen=True)
class Stall:
    """One round: seconds. `quiet`: the longest gap before the second request; `gap`: the longest while it waits,
    loads, is computed and answered; `ttft`: from its arrival to its token."""

    quiet: float
    gap: float
    ttft: float
    cached_tokens: int


def stall(llm: Any, running: list[int], second: list[int], hints: dict[str, Any] | None = None) -> Stall:
    """Run beside the engine: an answer to `running`, and in its middle one token to `second`, which brings these
    hints."""
    engine = llm.llm_engine
    engine.add_request("running", {"prompt_token_ids": running}, _sampling(MOST_ANSWER))
    times: list[float] = []
    while len(times) < BEFORE + 1:
        _step(engine, times)
    came, answered, cached = time.perf_counter(), None, 0
    engine.add_request("second", {"prompt_token_ids": second}, _sampling(1, hints))
    left = AFTER
    while left:
        for output in _step(engine, times):
            answered, cached = time.perf_counter(), output.num_cached_tokens or 0
        left -= answered is not None
    engine.abort_request(["running"])
    while engine.has_unfinished_requests():
        engine.step()
    before = [at for at in times if at <= came]
    return Stall(
        quiet=longest_gap(before),
        gap=longest_gap([before[-1], *(at for at in times if at > came)]),
        ttft=(answered or came) - came,
        cached_tokens=cached,
    )


def longest_gap(times: Iterable[float]) -> float:
    """Between two times that follow each other."""
    return max(after - before for before, after in pairwise(times))


def _sampling(tokens: int, hints: dict[str, Any] | None = None) -> Any:
    from vllm import SamplingParams

    extra = None if hints is None else {"kv_transfer_params": {"ragkv": hints}}
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=extra)


def _step(engine: Any, times: list[float]) -> list[Any]:
    """One step; when the running answer got a token is kept, outputs of the second request are given back."""
    outputs = engine.step()
    if any(output.request_id == "running" for output in outputs):
        times.append(time.perf_counter())
    return [output for output in outputs if output.request_id == "second"]


def measure(plain: Engine, ragkv: Engine, prompts: list[list[int]], running: list[int]) -> dict[str, list[Stall]]:
    """Rounds on both engines: what is loaded, and what is prefilled."""
    found: dict[str, list[Stall]] = {"load": [], "prefill": []}
    for prompt in track(prompts, description="measuring"):
        ragkv.evict()
        ragkv.ask([prompt[:-1]])
        for name, engine in (("load", ragkv), ("prefill", plain)):
            engine.evict()
            found[name].append(engine.call(stall, running, prompt))
    return found


def run(tokens: int, rounds: int, filings: Path | None, json_file: Path | None) -> dict[str, Any]:
    """Measure, print a table, write the report. ValueError: too little text."""
    console = Console()
    model = ensure_model(progress=console.print)
    from transformers import AutoTokenizer

    texts = documents(AutoTokenizer.from_pretrained(model), tokens, rounds + 1, filings)
    prompts = [text[:tokens] for text in texts]
    running = list(range(300, 300 + RUNNING_PROMPT))
    console.print("starting two engines, plain vLLM and vLLM with ragkv")
    with (
        terminated_kindly(),  # a stopped engine does not end by itself
        Resting(EngineOptions(model)) as plain,
        Resting(EngineOptions(model, ragkv=SETTINGS)) as ragkv,
    ):
        measure(plain, ragkv, prompts[:1], running)  # the first forward of its size is slower
        found = measure(plain, ragkv, prompts[1:], running)
    report = summarize(tokens, found)
    console.print(table(report))
    console.print(judgement(report), highlight=False)
    write_json(json_file, report)
    return report


def summarize(tokens: int, found: dict[str, list[Stall]]) -> dict[str, Any]:
    """Medians over the rounds, ratios of pairs, and every sample."""
    loads, prefills = found["load"], found["prefill"]
    return {
        "tokens": tokens,
        "rounds": len(loads),
        "hit_fraction": sum(each.cached_tokens for each in loads) / (len(loads) * (tokens - 1)),
        "quiet_gap_s": statistics.median(each.quiet for each in loads),
        "load_gap_s": statistics.median(each.gap for each in loads),
        "plain_quiet_gap_s": statistics.median(each.quiet for each in prefills),
        "prefill_gap_s": statistics.median(each.gap for each in prefills),
        "load_ttft_s": statistics.median(each.ttft for each in loads),
        "prefill_ttft_s": statistics.median(each.ttft for each in prefills),
        "load_over_quiet": median_ratio([each.gap for each in loads], [each.quiet for each in loads]),
        "prefill_over_quiet": median_ratio([each.gap for each in prefills], [each.quiet for each in prefills]),
        "samples": {name: [vars(each) for each in stalls] for name, stalls in found.items()},
    }


def table(report: dict[str, Any]) -> Table:
    """The three gaps."""
    title = f"A running answer beside {report['tokens']:,} tokens, {report['rounds']} rounds"
    shown = Table("", "longest gap", "against quiet", "the other's first token", title=title)

    def add(text: str, gap: str, ratio: str | None = None, ttft: str | None = None) -> None:
        against = f"{report[ratio]:.2f} x" if ratio else ""
        first = f"{report[ttft] * 1000:.0f} ms" if ttft else ""
        shown.add_row(text, f"{report[gap] * 1000:.1f} ms", against, first)

    add("ragkv, quiet", "quiet_gap_s")
    add("ragkv, the other is loaded", "load_gap_s", "load_over_quiet", "load_ttft_s")
    add("plain vLLM, quiet", "plain_quiet_gap_s")
    add("plain vLLM, the other is prefilled", "prefill_gap_s", "prefill_over_quiet", "prefill_ttft_s")
    return shown


def judgement(report: dict[str, Any]) -> str:
    """Whether the load holds up others, in a sentence."""
    ratio, hits = report["load_over_quiet"], report["hit_fraction"]
    word = "within" if ratio <= LIMIT else "beyond"
    return (
        f"A load makes the longest gap {ratio:.2f} times as long, {word} the limit of {LIMIT:g}; a prefill, "
        f"{report['prefill_over_quiet']:.0f} times. Of the loaded prompts {hits:.1%} were hit."
    )
