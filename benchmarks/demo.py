"""The demonstration: a conversation over two 10-K filings, on plain vLLM and with ragkv, side by side.

Between turns vLLM's own prefix cache is emptied, as the other requests of a busy server would. The turns of
the two filings alternate. Both engines get the same prompts and must give the same greedy answers; the model
runs in float32 here, since in bfloat16 vLLM's own answers change with the way a prompt is split into steps.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ragkv.benchmarks.engine import Answer, Engine, EngineOptions
from ragkv.benchmarks.model import ensure_model
from ragkv.benchmarks.report import (
    FLOOR,
    PLAIN,
    RAGKV,
    new_figure,
    reusable_tokens,
    save_figure,
    write_json,
)
from ragkv.benchmarks.tenk import Filing, generate_filing, load_filings

FILINGS, TURNS, ANSWER_TOKENS = 2, 4, 32
MOST_CHARACTERS = 12  # a token; more of a long filing need not be looked at
SYSTEM = "You are a financial analyst. Answer questions about the filing below, briefly and only from its text."


@dataclass(frozen=True)
class Turn:
    """One question, asked of both engines, and of plain vLLM once more with its own cache warm."""

    filing: str
    number: int
    prompt: Sequence[int]
    reusable: int
    plain: Answer
    floor: Answer
    ragkv: Answer

    def as_json(self) -> dict[str, Any]:
        """One entry of the report's `turns`."""
        return {
            "filing": self.filing,
            "turn": self.number,
            "prompt_tokens": len(self.prompt),
            "hit_tokens": dict(self.ragkv.hit_tokens),
            "ttft_s": self.ragkv.ttft_s,
            "plain_ttft_s": self.plain.ttft_s,
        }


class Conversation:
    """The messages about one filing, cut to about `context_tokens` tokens."""

    def __init__(self, filing: Filing, tokenizer: Any, context_tokens: int) -> None:
        self.filing = filing
        self._tokenizer = tokenizer
        text = filing.text[: context_tokens * MOST_CHARACTERS]
        ids = tokenizer.encode(text, add_special_tokens=False)[:context_tokens]
        context = tokenizer.decode(ids)
        self._messages = [{"role": "system", "content": f"{SYSTEM}\n\n{context}"}]
        self._turn = 0

    def next_prompt(self) -> list[int]:
        """The token ids of the next turn's prompt."""
        question = self.filing.questions[self._turn].text
        self._turn += 1
        self._messages.append({"role": "user", "content": question})
        text = self._tokenizer.apply_chat_template(self._messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def answered(self, text: str) -> None:
        """Take the answer into the conversation."""
        self._messages.append({"role": "assistant", "content": text})


def choose_filings(folder: Path | None) -> list[Filing]:
    """The first filings of a folder, or generated ones."""
    if folder is None:
        return [generate_filing(seed, words=4000) for seed in range(FILINGS)]
    return load_filings(folder)[:FILINGS]


def play(
    plain: Engine, ragkv: Engine, talks: Sequence[Conversation], progress: Callable[[str], None]
) -> list[Turn]:
    """All turns, filings in turn."""
    turns: list[Turn] = []
    earlier: list[list[int]] = []
    for number in range(1, TURNS + 1):
        for talk in talks:
            prompt = talk.next_prompt()
            name = f"{talk.filing.name}, question {number}"
            progress(f"{name}: plain vLLM")
            plain.evict()
            cold = plain.ask([prompt], ANSWER_TOKENS)[0]
            floor = plain.ask([prompt], ANSWER_TOKENS)[0]
            progress(f"{name}: with ragkv")
            ragkv.evict()
            ours = ragkv.ask([prompt], ANSWER_TOKENS)[0]
            reusable = reusable_tokens(prompt, earlier)
            turns.append(Turn(talk.filing.name, number, prompt, reusable, cold, floor, ours))
            earlier.append([*prompt, *ours.tokens[:-1]])
            talk.answered(cold.text)
    return turns


def summarize(turns: Sequence[Turn]) -> dict[str, Any]:
    """Medians, the share of reusable tokens that were hit, and whether all answers agree."""
    first = [turn for turn in turns if turn.number == 1]
    later = [turn for turn in turns if turn.number > 1]
    return {
        "cold_ttft_s": statistics.median(turn.ragkv.ttft_s for turn in first),
        "plain_cold_ttft_s": statistics.median(turn.plain.ttft_s for turn in first),
        "warm_ttft_s": statistics.median(turn.ragkv.ttft_s for turn in later),
        "prefix_hit_ttft_s": statistics.median(turn.floor.ttft_s for turn in later),
        "hit_fraction": sum(turn.ragkv.cached_tokens for turn in later) / sum(turn.reusable for turn in later),
        "outputs_equal": all(turn.plain.tokens == turn.ragkv.tokens for turn in turns),
    }


def show(console: Console, turns: Sequence[Turn], summary: dict[str, Any]) -> None:
    """The table, and the summary in words."""
    table = Table(title="Time to first token, one turn a line")
    table.add_column("filing")  # the only column that gives way on a narrow terminal
    for name in ("turn", "prompt\ntokens", "hit\ntokens", "plain\nvLLM", "with\nragkv", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for turn in turns:
        hits = ", ".join(f"{n} {source}" for source, n in turn.ragkv.hit_tokens.items()) or "0"
        table.add_row(
            turn.filing,
            str(turn.number),
            str(len(turn.prompt)),
            hits,
            f"{turn.plain.ttft_s * 1000:.0f} ms",
            f"{turn.ragkv.ttft_s * 1000:.0f} ms",
            f"{turn.plain.ttft_s / turn.ragkv.ttft_s:.1f}x",
        )
    console.print(table)
    console.print(
        f"First question: {summary['cold_ttft_s']:.2f} s with ragkv, {summary['plain_cold_ttft_s']:.2f} s plain. "
        f"Later ones: {summary['warm_ttft_s'] * 1000:.0f} ms with ragkv "
        f"(plain vLLM on a hit in its own cache: {summary['prefix_hit_ttft_s'] * 1000:.0f} ms). "
        f"Of the tokens that could be reused {summary['hit_fraction']:.1%} were. "
        f"Answers equal to plain vLLM's: {'all' if summary['outputs_equal'] else 'NOT ALL'}."
    )


def draw(turns: Sequence[Turn], summary: dict[str, Any], path: Path) -> None:
    """The picture: two bars a turn, and the floor."""
    figure, axes = new_figure()
    places = range(len(turns))
    for offset, color, label, values in (
        (-0.2, PLAIN, "plain vLLM", [turn.plain.ttft_s for turn in turns]),
        (0.2, RAGKV, "with ragkv", [turn.ragkv.ttft_s for turn in turns]),
    ):
        bars = axes.bar([place + offset for place in places], values, 0.38, color=color, label=label)
        axes.bar_label(bars, [f"{v:.2f}" if v >= 0.095 else f"{v:.3f}" for v in values], fontsize=8, padding=2)
    floor = summary["prefix_hit_ttft_s"]
    axes.axhline(floor, color=FLOOR, linewidth=1, linestyle="--", label="plain vLLM, own prefix cache warm")
    names = sorted({turn.filing for turn in turns}, key=[turn.filing for turn in turns].index)
    axes.set_xticks(
        list(places), [f"filing {'AB'[names.index(turn.filing)]}\nquestion {turn.number}" for turn in turns]
    )
    legend = "   ".join(f"{'AB'[i]}: {name}" for i, name in enumerate(names))
    axes.set_title(f"Time to first token when vLLM's own cache was evicted between turns\n{legend}", fontsize=10)
    axes.set_ylabel("seconds")
    axes.legend(frameon=False, loc="upper right", ncols=3, bbox_to_anchor=(1, 1))
    axes.set_ylim(0, 1.25 * max(max(turn.plain.ttft_s, turn.ragkv.ttft_s) for turn in turns))
    save_figure(figure, path)


def run(filings: Path | None, context_tokens: int, json_file: Path | None, picture: Path) -> dict[str, Any]:
    """The whole demonstration; gives the report. ValueError: a folder without filings."""
    console = Console()
    chosen = choose_filings(filings)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("model")

        def progress(text: str) -> None:
            bar.update(task, description=text)
            if not console.is_terminal:
                console.print(text)

        model = ensure_model(progress=progress)
        progress("starting two engines, plain vLLM and vLLM with ragkv (about a minute)")
        from transformers import AutoTokenizer

        with (
            Engine(EngineOptions(model, None, "float32")) as plain,
            Engine(EngineOptions(model, {"memory": {"capacity": "2GiB"}}, "float32")) as ragkv,
        ):
            plain.wait(), ragkv.wait()
            tokenizer = AutoTokenizer.from_pretrained(model)
            for engine in (plain, ragkv):  # the first forward of an engine is slower than the others
                engine.ask([list(range(100, 400))], 4)
            talks = [Conversation(filing, tokenizer, context_tokens) for filing in chosen]
            turns = play(plain, ragkv, talks, progress)
        progress("stopping the engines")
    summary = summarize(turns)
    report = {"turns": [turn.as_json() for turn in turns], "summary": summary}
    show(console, turns, summary)
    draw(turns, summary, picture)
    console.print(f"Picture: {picture}")
    write_json(json_file, report)
    return report
