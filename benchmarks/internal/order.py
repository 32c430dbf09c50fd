"""How much of retrieved passages is exact in the order given, and in stored order (`internal order`).

A log of retrievals: each asks for some of a pool of passages, which are drawn by a Zipf law of their popularity,
and given in an order of relevance of its own. Passages are first stored after the system prompt, with likely
chains of an earlier part of the log, as `ragkv ingest --retrievals` does. Then the same questions are asked in the
order given, and once more, from the same start, in the order that the engine answers; the request for it counts.
"""

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ragkv.benchmarks.engine import Engine
from ragkv.benchmarks.internal.fusion_measure import ask, options
from ragkv.benchmarks.internal.fusion_trials import Shape, Trial, build_trial, choose_filings
from ragkv.benchmarks.model import ensure_model
from ragkv.benchmarks.report import median_ratio, write_json
from ragkv.chains import likely_chains

MEMORY = {"memory": {"capacity": "6GiB"}}
MODEL_TOKENS = 8192
Row = dict[str, Any]


@dataclass(frozen=True)
class Log:
    """`questions` that each retrieve `passages` of a pool of `pool`, whose popularity falls as rank ** -`zipf`;
    before them `past` retrievals, of which `chains` are stored."""

    pool: int = 40
    passages: int = 6
    questions: int = 200
    zipf: float = 1.2
    past: int = 400
    chains: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.passages > self.pool:
            raise ValueError(f"--passages = {self.passages}; allowed: at most --pool, {self.pool}")

    def draw(self) -> tuple[list[list[int]], list[list[int]]]:
        """The retrievals of the past, and the questions'; each of distinct passages, the most relevant first."""
        chance = random.Random(self.seed)
        weights = [(rank + 1) ** -self.zipf for rank in range(self.pool)]
        drawn = []
        for _ in range(self.past + self.questions):
            found: dict[int, None] = {}
            while len(found) < self.passages:
                found[chance.choices(range(self.pool), weights)[0]] = None
            drawn.append(chance.sample(list(found), self.passages))
        return drawn[: self.past], drawn[self.past :]

    def stored(self) -> list[tuple[int, ...]]:
        """What is prefilled first: every passage, and the likely chains."""
        past = [[f"{number:04}" for number in each] for each in self.draw()[0]]
        chains = [tuple(map(int, chain)) for chain in likely_chains(past, self.chains)] if self.chains else []
        return [*((number,) for number in range(self.pool)), *chains]


def bound(stored: Sequence[Sequence[int]], questions: Sequence[Sequence[int]]) -> float:
    """The share of passages that no order could exceed: those that a question shares with one earlier prompt."""
    seen, shared = [set(each) for each in stored], 0
    for question in questions:
        shared += max(len(set(question) & each) for each in seen)
        seen.append(set(question))
    return shared / sum(map(len, questions))


@dataclass(frozen=True)
class Texts:
    """Token ids of the system prompt, of each passage of the pool, and of each question."""

    system: list[int]
    pool: list[list[int]]
    questions: list[list[int]]

    def prompt(self, order: Sequence[int], question: Sequence[int] = ()) -> tuple[list[int], dict[str, Any]]:
        """A prompt of passages in that order, and its hints."""
        trial = Trial("order", self.system, [self.pool[number] for number in order], question, ())
        return trial.prompt, {"documents": trial.documents(), "fuse": False}


def make_texts(model: Path, log: Log, tokens: int, filings: Path | None) -> Texts:
    """Passages of filings, of `tokens` tokens each, and questions. ValueError: prompts would be too long."""
    from transformers import AutoTokenizer

    if log.passages * tokens + 200 > MODEL_TOKENS:
        raise ValueError(f"--passages x --tokens = {log.passages * tokens}; allowed: at most {MODEL_TOKENS - 200}")
    tokenizer, shape = AutoTokenizer.from_pretrained(model), Shape(log.passages, tokens)
    chosen = choose_filings(filings, log.pool, shape)
    trials = [build_trial(tokenizer, chosen, number, shape) for number in range(max(log.pool, log.questions))]
    pool = {tuple(each): None for trial in trials for each in trial.passages}
    if len(pool) < log.pool:
        raise ValueError(f"--pool = {log.pool}; allowed: at most {len(pool)}, as many passages as there are")
    return Texts(
        list(trials[0].system),
        [list(each) for each in pool][: log.pool],
        [list(trial.question) for trial in trials[: log.questions]],
    )


def play(
    engine: Engine, texts: Texts, log: Log, *, ordered: bool, progress: Callable[[], object] = lambda: None
) -> list[Row]:
    """Ask all questions of a log, after what is prefilled first: exact tokens and times of each."""
    engine.evict(ragkv_too=True)
    for chain in log.stored():
        engine.evict()
        prompt, hints = texts.prompt(chain)
        ask(engine, prompt, 1, hints)
        progress()
    rows = []
    for given, question in zip(log.draw()[1], texts.questions, strict=True):
        engine.evict()
        order, seconds = given, 0.0
        if ordered:
            wanted = {"before": texts.system, "passages": [texts.pool[number] for number in given]}
            reply = ask(engine, texts.system[:1], 1, {"order": wanted, "store": False})
            order, seconds = [given[place] for place in reply.told["order"]["passages"]], reply.ttft_s
        prompt, hints = texts.prompt(order, question)
        reply = ask(engine, prompt, 1, hints)
        size = len(prompt) - len(texts.system) - len(question)
        exact = min(size, max(0, reply.cached_tokens - len(texts.system)))
        rows.append(
            {"exact": exact, "passage_tokens": size, "ttft_s": seconds + reply.ttft_s, "asking_s": seconds}
        )
        progress()
    return rows


def summarize(given: Sequence[Row], ordered: Sequence[Row], limit: float) -> Row:
    """Shares of passage tokens that were exact, and medians of times, with the median of their pairs' ratios."""
    exact = [
        sum(row["exact"] for row in rows) / sum(row["passage_tokens"] for row in rows) for rows in (given, ordered)
    ]
    seconds = [[row["ttft_s"] for row in rows] for rows in (given, ordered)]
    return {
        "given_exact": exact[0],
        "ordered_exact": exact[1],
        "times": exact[1] / exact[0] if exact[0] else float("inf"),
        "bound": limit,
        "given_ttft_s": statistics.median(seconds[0]),
        "ordered_ttft_s": statistics.median(seconds[1]),
        "ttft_ratio": sum(seconds[1]) / sum(seconds[0]),
        "ttft_median_ratio": median_ratio(seconds[1], seconds[0]),
        "asking_s": statistics.median(row["asking_s"] for row in ordered),
    }


def run(
    log: Log, tokens: int = 500, dtype: str = "auto", filings: Path | None = None, json_file: Path | None = None
) -> Row:
    """Measure, print a table, write the report. ValueError: invalid sizes."""
    console = Console()
    model = ensure_model(progress=console.print)
    texts = make_texts(model, log, tokens, filings)
    console.print("starting an engine, vLLM with ragkv")
    with Engine(options(model, dtype=dtype, max_model_len=MODEL_TOKENS, ragkv=MEMORY)) as engine:
        prompt, hints = texts.prompt(range(log.passages), texts.questions[0])
        ask(engine, prompt, 1, hints)  # the first is slower
        with Progress(console=console) as bar:
            task = bar.add_task("asking", total=2 * (len(log.stored()) + log.questions))
            given, ordered = (
                play(engine, texts, log, ordered=ordered, progress=lambda: bar.advance(task))
                for ordered in (False, True)
            )
    result = summarize(given, ordered, bound(log.stored(), log.draw()[1]))
    table = Table(
        "order", "exact", "TTFT, median", title=f"{log.questions} questions, {log.passages} passages each"
    )
    table.add_row("as given", f"{result['given_exact']:.1%}", f"{1000 * result['given_ttft_s']:.0f} ms")
    table.add_row("as stored", f"{result['ordered_exact']:.1%}", f"{1000 * result['ordered_ttft_s']:.0f} ms")
    console.print(table)
    console.print(
        f"stored order: {result['times']:.1f} x the exact tokens, {result['ttft_ratio']:.2f} x the time to first "
        f"token in all, {1000 * result['asking_s']:.0f} ms of it for the order; no order could exceed "
        f"{result['bound']:.1%}"
    )
    write_json(json_file, {**result, **asdict(log), "tokens": tokens, "model": model.name, "dtype": dtype})
    return result
