"""What fusion costs in quality and saves in time, against full prefill (`internal fusion`).

A trial is a prompt of passages that were stored before, elsewhere. Each trial is prefilled in full and fused with
every setting, on one engine, the order turned round from trial to trial; figures are compared within a trial.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ragkv.benchmarks.engine import Engine
from ragkv.benchmarks.internal.fusion_measure import SELECTIONS, ask, hints, measure, options, prefill, store
from ragkv.benchmarks.internal.fusion_trials import Shape, Trial, build_trial, choose_filings
from ragkv.benchmarks.model import ensure_model
from ragkv.benchmarks.report import FLOOR, PLAIN, median_ratio, new_figure, save_figure, write_json
from ragkv.benchmarks.tenk import Filing

RATIOS = "0.05,0.15,0.3"
FIXED = {"none": 0.0, "full": 1.0, "ordered": 0.0}  # "ordered" is of `bench answers`
CHECKED = ("deviation", 1.0)  # recomputing everything must give full prefill
MODEL_TOKENS = 8192
STYLES = {  # of the picture: color, marker and line of each selection, which differ without the color too
    "none": (FLOOR, "X", "none"),
    "random": ("#8c564b", "s", ":"),
    "first_tokens": ("#e69f00", "o", "--"),
    "deviation": ("#009e73", "v", "-."),
    "query": ("#0072b2", "d", "-"),
    "query_deviation": ("#cc79a7", "P", (0, (6, 1, 1, 1, 1, 1))),
    "ordered": ("#000000", "^", "none"),
    "full": (PLAIN, "*", "none"),
}
LABELS = {
    "none": "none (moved, nothing recomputed)",
    "ordered": "passages in stored order",
    "full": "full prefill",
}
DIVERGENCE = "KL(full prefill || fused), nats a token"
MEANS = ("kl", "top1", "delta_nll", "answer_equal", "work", "reused")
Row = dict[str, Any]
Setting = tuple[str, float]


def parse_settings(selections: str, ratios: str) -> list[Setting]:
    """Selections with their ratios, from lists separated by commas. ValueError: what cannot be, in one line."""
    names = [name.strip() for name in selections.split(",")]
    for name in names:
        if name not in SELECTIONS:
            raise ValueError(f"--selections = {selections!r}; allowed: {', '.join(SELECTIONS)}")
    try:
        numbers = sorted({float(ratio) for ratio in ratios.split(",")})
    except ValueError:
        numbers = []
    if not numbers or not all(0 < ratio <= 1 for ratio in numbers):
        raise ValueError(f"--ratios = {ratios!r}; allowed: numbers above 0, at most 1, with commas between")
    settings = [(name, r) for name in names for r in ([FIXED[name]] if name in FIXED else numbers)]
    if CHECKED[0] in names:
        settings.append(CHECKED)
    return sorted(set(settings), key=lambda setting: (SELECTIONS.index(setting[0]), setting[1]))


def run_trial(
    engine: Engine,
    trial: Trial,
    settings: Sequence[Setting],
    *,
    continuation: int = 32,
    layers: int = 30,
    backwards: bool = False,
    progress: Callable[[], object] = lambda: None,
) -> list[Row]:
    """One row a setting, in the order of `settings`. `backwards`: measure them from last to first."""
    store(engine, trial)
    full = prefill(engine, trial, continuation)
    rows: dict[Setting, Row] = {}
    for selection, ratio in reversed(settings) if backwards else settings:
        rows[selection, ratio] = measure(engine, trial, selection, ratio, full, layers)
        progress()
    return [rows[setting] for setting in settings]


def warm_up(engine: Engine, trial: Trial, settings: Sequence[Setting]) -> None:
    """The first forward of each kind is slower than the others."""
    store(engine, trial)
    prefill(engine, trial, 1)
    for selection, ratio in settings:
        if selection != "full":
            engine.evict()
            ask(engine, trial.prompt, 2, hints(trial, selection, ratio))


def summarize(trials: Sequence[Sequence[Row]]) -> list[Row]:
    """One result a setting, from the rows of every trial: means of quality and work, medians of times.

    `kl_error`: standard error of the mean over the trials; `ttft_ratio`: median of the pairs' ratios.
    """
    results = []
    for rows in zip(*trials, strict=True):
        seconds, full = [row["ttft_s"] for row in rows], [row["full_ttft_s"] for row in rows]
        deviation = statistics.stdev(row["kl"] for row in rows) if len(rows) > 1 else 0.0
        results.append(
            {"selection": rows[0]["selection"], "ratio": rows[0]["ratio"]}
            | {name: statistics.fmean(row[name] for row in rows) for name in MEANS}
            | {"kl_error": deviation / len(rows) ** 0.5}
            | {"ttft_s": statistics.median(seconds), "full_ttft_s": statistics.median(full)}
            | {"ttft_ratio": median_ratio(seconds, full)}
        )
    return results


def show(console: Console, results: Sequence[Row], title: str) -> None:
    """The table: a row a setting."""
    plain = next((row["kl"] for row in results if row["selection"] == "none"), 0.0)
    table = Table(
        title=title, caption="reused, work: shares of the passages' tokens, of full prefill's token-layers"
    )
    for name in (
        "selection",
        "ratio",
        "KL",
        "of none",
        "top-1",
        "ΔNLL",
        "answers",
        "reused",
        "work",
        "TTFT",
        "of full",
    ):
        table.add_column(name, justify="left" if name == "selection" else "right", no_wrap=True)
    for row in results:
        table.add_row(
            row["selection"],
            f"{row['ratio']:.0%}",
            f"{row['kl']:.4f}",
            f"{row['kl'] / plain:.2f}" if plain else "",
            f"{row['top1']:.2f}",
            f"{row['delta_nll']:+.3f}",
            f"{row['answer_equal']:.0%}",
            f"{row['reused']:.0%}",
            f"{row['work']:.2f}",
            f"{row['ttft_s'] * 1000:.0f} ms",
            f"{row['ttft_ratio']:.2f}",
        )
    console.print(table)


def draw(results: Sequence[Row], title: str, path: Path, *, quality: str = "kl", label: str = DIVERGENCE) -> None:
    """The picture: quality against time, a line a selection, a point a ratio. `quality`: of the rows, with `label`
    at the axis; where they have `{quality}_range`, (low, high), bars show it."""
    figure, axes = new_figure(8, 5)
    axes.set_title(title, fontsize=10)
    for name, (color, marker, line) in STYLES.items():
        rows = [row for row in results if row["selection"] == name]
        if not rows:
            continue
        x, y = [row["ttft_ratio"] for row in rows], [row[quality] for row in rows]
        style = {"color": color, "marker": marker, "linestyle": line, "clip_on": False}
        axes.plot(x, y, label=LABELS.get(name, name), **style)
        for row in rows:
            low, high = row.get(f"{quality}_range", (row[quality], row[quality]))
            axes.vlines(row["ttft_ratio"], low, high, color=color, alpha=0.25)
        if name not in FIXED:
            for row in rows:
                place = (row["ttft_ratio"], row[quality])
                axes.annotate(f"{row['ratio']:.0%}", place, (3, 4), textcoords="offset points", fontsize=7)
    axes.set_xlabel("time to first token, of full prefill's")
    axes.set_ylabel(label)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, handlelength=5)  # so long that the lines can be told apart
    save_figure(figure, path)


def run(
    *,
    selections: str = ",".join(SELECTIONS),
    ratios: str = RATIOS,
    shape: Shape | None = None,
    trials: int = 6,
    dtype: str = "auto",
    filings: Path | None = None,
    json_file: Path | None = None,
    plot: Path | None = None,
) -> dict[str, Any]:
    """Measure, print a table, write the report and the picture. ValueError: bad lists, sizes, too little text."""
    settings = parse_settings(selections, ratios)
    shape = shape or Shape()
    console = Console()
    console.width = max(console.width, 110)  # of the table
    model = ensure_model(progress=console.print)
    layers = json.loads((model / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    built = _trials(model, choose_filings(filings, trials + 1, shape), shape, trials + 1)
    console.print("starting an engine, vLLM with ragkv")
    with Engine(options(model, dtype=dtype, max_model_len=MODEL_TOKENS)) as engine:
        results = summarize(_measure(engine, built, settings, shape.continuation, layers, console))
    prompt = statistics.fmean(len(trial.prompt) for trial in built[:-1])
    title = (
        f"{shape.passages} passages of {shape.passage_tokens} tokens ({shape.text}, stored {shape.stored}), "
        f"prompts of {prompt:.0f}, {trials} trials"
    )
    report = {
        "results": results,
        "model": model.name,
        "dtype": dtype,
        **asdict(shape),
        "prompt_tokens": prompt,
        "trials": trials,
        "filings": "generated" if filings is None else "real",
    }
    show(console, results, title)
    unfused = [row for row in results if row["selection"] != "full" and row["reused"] < 0.5]
    if unfused:
        console.print(
            f"{len(unfused)} of {len(results)} settings reused less than half of the passages: not fused?"
        )
    write_json(json_file, report)
    if plot is not None:
        draw(results, title, plot)
    return report


def _trials(model: Path, filings: Sequence[Filing], shape: Shape, count: int) -> list[Trial]:
    """So many trials. ValueError: their prompts and answers exceed the model's length."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    built = [build_trial(tokenizer, filings, number, shape) for number in range(count)]
    check_length(built, max(shape.continuation, 32))
    return built


def check_length(trials: Sequence[Trial], answer_tokens: int) -> None:
    """ValueError: prompts and answers exceed the model's length."""
    longest = max(len(trial.prompt) for trial in trials) + answer_tokens
    if longest > MODEL_TOKENS:
        raise ValueError(f"prompts and answers take {longest} tokens; allowed: at most {MODEL_TOKENS}")


def _measure(
    engine: Engine,
    built: list[Trial],
    settings: Sequence[Setting],
    continuation: int,
    layers: int,
    console: Console,
) -> list[list[Row]]:
    """The rows of each trial, after a warm-up with the last one, which is not measured."""
    *trials, first = built
    warm_up(engine, first, settings)
    with Progress(console=console) as bar:
        task = bar.add_task("measuring", total=len(trials) * len(settings))
        return [
            run_trial(
                engine,
                trial,
                settings,
                continuation=continuation,
                layers=layers,
                backwards=number % 2 == 1,
                progress=lambda: bar.advance(task),
            )
            for number, trial in enumerate(trials)
        ]
