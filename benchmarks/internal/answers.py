"""What fusion costs in answers and saves in time: questions with known answers over passages (`bench answers`).

Each question is asked with full prefill, with its passages in an order in which they were stored, with passages
that are moved and not recomputed, and with every selection at every ratio, on one engine, the order turned round
from question to question. Differences to full prefill are taken question by question.
"""

import hashlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ragkv.benchmarks.engine import Engine, EngineOptions
from ragkv.benchmarks.internal.answers_journal import Journal, Row
from ragkv.benchmarks.internal.answers_questions import Asked, build, draft, load_drafts
from ragkv.benchmarks.internal.answers_score import exact_match, f1, interval
from ragkv.benchmarks.internal.fusion import CHECKED, MODEL_TOKENS, Setting, check_length, draw, parse_settings
from ragkv.benchmarks.internal.fusion_measure import SETTINGS, Reply, ask, hints, in_full, reused, store
from ragkv.benchmarks.model import model_folder, natural_dtype
from ragkv.benchmarks.report import median_ratio, write_json
from ragkv.benchmarks.serve_setup import describe_machine, on_cpu

ALWAYS: tuple[Setting, ...] = (("full", 1.0), ("ordered", 0.0))  # others are compared with these
ANSWER_TOKENS = 24
STOP = "\n"
EARLY = 2  # questions, after which the run says how long it will take


@dataclass(frozen=True)
class Options:
    """What is asked. `passages`: of a prompt, at least 2; `passage_tokens`: of each; `model`: as `model_folder`
    takes it; `filings`: a folder, instead of generated ones."""

    selections: str
    ratios: str
    questions: int = 100
    passages: int = 6
    passage_tokens: int = 500
    seed: int = 0
    dtype: str = "auto"
    model: Path | None = None
    filings: Path | None = None

    def settings(self) -> list[Setting]:
        """What each question is asked with. ValueError: bad lists."""
        listed = parse_settings(self.selections, self.ratios)
        if CHECKED[1] not in {float(ratio) for ratio in self.ratios.split(",")}:
            listed = [setting for setting in listed if setting != CHECKED]
        return [*ALWAYS, *(setting for setting in listed if setting not in ALWAYS)]

    def describe(self, model: Path) -> dict[str, Any]:
        """What has to be equal for questions of two runs to be put together: all but their number."""
        cpu = on_cpu()
        return {
            "model": model.name,
            "dtype": natural_dtype(self.dtype, cpu),
            "settings": [f"{selection} {ratio:g}" for selection, ratio in self.settings()],
            "passages": self.passages,
            "passage_tokens": self.passage_tokens,
            "seed": self.seed,
            "filings": "generated" if self.filings is None else _digest(self.filings),
            **describe_machine(cpu),
        }


def measure(
    engine: Engine, tokenizer: Any, asked: Asked, settings: Sequence[Setting], *, backwards: bool = False
) -> Row:
    """A question with every setting: `rows` in the order of `settings`, and the seconds that all of it took.
    `backwards`: ask with the settings from last to first."""
    start = time.monotonic()
    store(engine, asked.trial)
    chain = asked.stored
    salt = f"stored order of {chain.name}"  # fusion must not find these copies of the passages
    engine.evict()
    before_question = chain.prompt[: -len(chain.question)]
    ask(engine, before_question, 1, {"documents": chain.documents()}, salt=salt)
    rows: dict[Setting, Row] = {}
    for selection, ratio in reversed(settings) if backwards else settings:
        reply = _ask(engine, asked, selection, ratio, salt)
        rows[selection, ratio] = {
            "selection": selection,
            "ratio": ratio,
            "answer": tokenizer.decode(reply.tokens, skip_special_tokens=True).partition(STOP)[0].strip(),
            "ttft_s": reply.ttft_s,
            "reused": min(1.0, reused(asked.trial, reply)),
        }
    return {
        "number": asked.number,
        "kind": asked.kind,
        "question": asked.text,
        "known": list(asked.answers),
        "prompt_tokens": len(asked.trial.prompt),
        "seconds": time.monotonic() - start,
        "rows": [rows[setting] for setting in settings],
    }


def _ask(engine: Engine, asked: Asked, selection: str, ratio: float, salt: str) -> Reply:
    if selection == "full":
        return in_full(engine, asked.trial, ANSWER_TOKENS, stop=STOP)
    engine.evict()
    if selection == "ordered":
        exact = {"documents": asked.stored.documents(), "fuse": False}
        return ask(engine, asked.stored.prompt, ANSWER_TOKENS, exact, salt=salt, stop=STOP)
    return ask(engine, asked.trial.prompt, ANSWER_TOKENS, hints(asked.trial, selection, ratio), stop=STOP)


def summarize(questions: Sequence[Row], seed: int = 0) -> list[Row]:
    """One result a setting, from every question: `exact`, `f1` and `agreement` (the same answer as full prefill's,
    by exact match) are means, times medians, `ttft_ratio` the median of the ratios to full prefill's.

    `_difference` is to full prefill; `_range` is a 95% interval by the paired bootstrap.
    """
    results = []
    full = [question["rows"][0] for question in questions]
    for rows in zip(*(question["rows"] for question in questions), strict=True):
        result: Row = {"selection": rows[0]["selection"], "ratio": rows[0]["ratio"]}
        for name, score in (("exact", exact_match), ("f1", f1)):
            result |= _compare(name, score, questions, rows, full, seed)
        agreement = [exact_match(row["answer"], [one["answer"]]) for row, one in zip(rows, full, strict=True)]
        seconds, others = [row["ttft_s"] for row in rows], [row["ttft_s"] for row in full]
        ratios = [own / other for own, other in zip(seconds, others, strict=True)]
        result |= {
            "agreement": statistics.fmean(agreement),
            "agreement_range": interval(agreement, seed=seed),
            "reused": statistics.fmean(row["reused"] for row in rows),
            "ttft_s": statistics.median(seconds),
            "ttft_ratio": median_ratio(seconds, others),
            "ttft_ratio_range": interval(ratios, "median", seed=seed),
        }
        results.append(result)
    return results


def _compare(
    name: str,
    score: Callable[[str, Sequence[str]], float],
    questions: Sequence[Row],
    rows: Sequence[Row],
    full: Sequence[Row],
    seed: int,
) -> Row:
    """A score's mean, by kind of question too, and its difference to full prefill's. `{name}_range`: the interval
    of the difference, around full prefill's mean."""
    known = [question["known"] for question in questions]
    scores, others = ([score(r["answer"], k) for r, k in zip(each, known, strict=True)] for each in (rows, full))
    kinds: dict[str, list[float]] = {}
    for question, value in zip(questions, scores, strict=True):
        kinds.setdefault(question["kind"], []).append(value)
    low, high = interval([one - other for one, other in zip(scores, others, strict=True)], seed=seed)
    mean, base = statistics.fmean(scores), statistics.fmean(others)
    return {
        name: mean,
        f"{name}_by_kind": {kind: statistics.fmean(values) for kind, values in kinds.items()},
        f"{name}_difference": mean - base,
        f"{name}_difference_range": (low, high),
        f"{name}_range": (base + low, base + high),
    }


COLUMNS = ("selection", "ratio", "exact", "F1", "F1 - full's", "agreement", "reused", "TTFT", "of full's")


def show(console: Console, results: Sequence[Row], title: str) -> None:
    """The table: a row a setting, with 95% intervals in brackets."""
    caption = "in brackets: 95% by the paired bootstrap; reused: share of the passages' tokens"
    table = Table(title=title, caption=caption)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "selection" else "right", no_wrap=True)
    for row in results:
        less, more = row["f1_difference_range"]
        few, many = row["agreement_range"]
        fast, slow = row["ttft_ratio_range"]
        table.add_row(
            row["selection"],
            f"{row['ratio']:.0%}",
            f"{row['exact']:.0%}",
            f"{row['f1']:.3f}",
            f"{row['f1_difference']:+.3f} [{less:+.3f}, {more:+.3f}]",
            f"{row['agreement']:.0%} [{few:.0%}, {many:.0%}]",
            f"{row['reused']:.0%}",
            f"{row['ttft_s'] * 1000:.0f} ms",
            f"{row['ttft_ratio']:.2f} [{fast:.2f}, {slow:.2f}]",
        )
    console.print(table)
    kinds = ", ".join(f"{kind} {value:.3f}" for kind, value in results[0]["f1_by_kind"].items())
    console.print(f"F1 of full prefill by kind: {kinds}")


def run(
    options: Options, finished: Path | None = None, json_file: Path | None = None, plot: Path | None = None
) -> dict[str, Any]:
    """Ask what the file `finished` does not have yet, print a table, write the report and the picture.

    ValueError: bad lists or sizes, too little text, or a file of other settings.
    """
    settings = options.settings()
    console = Console()
    console.width = max(console.width, 130)  # of the table
    model = model_folder(options.model, progress=console.print)
    described = options.describe(model)
    journal = Journal(finished, described)
    asked, tokenizer = _questions(model, options, console)
    remaining = [each for each in asked if each.number not in journal.finished]
    if len(remaining) < len(asked):
        console.print(f"{len(asked) - len(remaining)} of {len(asked)} questions are finished")
    if remaining:
        console.print("starting an engine, vLLM with ragkv")
        engine_options = EngineOptions(model, SETTINGS, dtype=options.dtype, max_model_len=MODEL_TOKENS)
        with Engine(engine_options) as engine:
            _measure(engine, tokenizer, remaining, settings, journal, console)
    questions = [journal.finished[each.number] for each in asked]
    kinds = Counter(question["kind"] for question in questions)
    prompt = statistics.fmean(question["prompt_tokens"] for question in questions)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    title = (
        f"{len(questions)} questions ({counts}), {model.name}\n"
        f"{options.passages} passages of {options.passage_tokens} tokens, prompts of {prompt:.0f}"
    )
    report = {
        "results": summarize(questions, options.seed),
        **asdict(options),
        **described,
        "questions": len(questions),
        "kinds": dict(kinds),
        "prompt_tokens": prompt,
        "seconds_per_question": statistics.fmean(question["seconds"] for question in questions),
    }
    show(console, report["results"], title)
    write_json(json_file, report)
    if plot is not None:
        bars = "F1 (bars: 95% of the difference to full prefill)"
        draw(report["results"], title, plot, quality="f1", label=bars)
    return report


def _questions(model: Path, options: Options, console: Console) -> tuple[list[Asked], Any]:
    """The questions, and the tokenizer. ValueError: what a folder or the sizes do not allow."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    count, size, seed = options.questions, options.passage_tokens, options.seed
    if options.filings is None:
        drafts = [draft(number, options.passages, size, seed) for number in range(count)]
    else:
        drafts, left_out = load_drafts(options.filings, options.passages, seed)
        if left_out:
            console.print(f"{left_out} questions left out: their answers do not occur in the filing")
        if len(drafts) < count:
            console.print(f"{options.filings} has {len(drafts)} questions, not {count}")
        drafts = drafts[:count]
    asked = [build(tokenizer, number, each, size, seed) for number, each in enumerate(drafts)]
    check_length([each.trial for each in asked], ANSWER_TOKENS)
    return asked, tokenizer


def _measure(
    engine: Engine,
    tokenizer: Any,
    remaining: Sequence[Asked],
    settings: Sequence[Setting],
    journal: Journal,
    console: Console,
) -> None:
    """Ask all that remains, after a warm-up with each selection: the first forward of each kind is slower."""
    measure(engine, tokenizer, remaining[0], list({name: (name, ratio) for name, ratio in settings}.values()))
    seconds: list[float] = []
    with Progress(console=console) as bar:
        task = bar.add_task("asking", total=len(remaining))
        for each in remaining:
            row = measure(engine, tokenizer, each, settings, backwards=each.number % 2 == 1)
            journal.add(row)
            bar.advance(task)
            seconds.append(row["seconds"])
            left = len(remaining) - len(seconds)
            if len(seconds) == EARLY and left:
                mean = statistics.fmean(seconds)
                console.print(f"a question takes {mean:.0f} s: {left} more, about {left * mean / 60:.0f} minutes")


def _digest(folder: Path) -> str:
    """Of the texts and questions of a folder."""
    digest = hashlib.blake2b(digest_size=8)
    for path in [*sorted(folder.glob("*.txt")), *folder.glob("questions.jsonl")]:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()
