"""`ragkv ingest`: have a server compute and keep passages before anybody asks about them."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ragkv.benchmarks.report import write_json
from ragkv.config import cache_folder
from ragkv.ingest import FileReport, Ingest, Journal, read_text, run
from ragkv.options import OutputOption
from ragkv.rag import Server
from ragkv.shown import printable

EPILOG = "Example: ragkv ingest filings/*.txt --url http://localhost:8000 --system-prompt system.txt"


def ingest(
    files: Annotated[list[Path], typer.Argument(metavar="FILES", help="Text files, UTF-8.")],
    url: Annotated[str, typer.Option(help="The server, such as http://localhost:8000.")],
    model: Annotated[str | None, typer.Option(help="Its model or adapter; else the first it serves.")] = None,
    system_prompt: Annotated[
        str, typer.Option(help="What stands before the passages: a file that is there, else the text itself.")
    ] = "",
    passage_tokens: Annotated[int, typer.Option(min=16, help="Longest passage to cut a file into.")] = 512,
    whole: Annotated[bool, typer.Option("--whole", help="A file is one passage.")] = False,
    retrievals: Annotated[
        Path | None,
        typer.Option(help="Past retrievals, a JSON list of passages' ids a line: likely orders follow."),
    ] = None,
    chains: Annotated[int, typer.Option(min=1, help="How many such orders to prefill, with --retrievals.")] = 64,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Requests under way at once.")] = 4,
    again: Annotated[bool, typer.Option("--again", help="Send also what the journal says is stored.")] = False,
    journal: Annotated[Path | None, typer.Option(help="What is stored where; else in the user's cache.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="VLLM_API_KEY", help="The server's key.")] = None,
    json_file: OutputOption = None,
) -> None:
    """Prefill passages behind the system prompt. What was interrupted goes on where it stopped."""
    notes = Journal(journal or default_journal())
    system = _text(system_prompt)
    work = Ingest(
        Server(url, model, api_key=api_key),
        system,
        None if whole else passage_tokens,
        (lambda key: False) if again else notes.__contains__,
    )
    with _bar() as bar:
        task = bar.add_task("prefilling passages", total=None)
        reports = run(
            work,
            files,
            notes,
            concurrency,
            lambda done, total: bar.update(task, completed=done, total=total),
            retrievals=retrievals,
            chains=chains,
        )
    _show(reports, work)
    head = {name: getattr(work, name) for name in ("url", "model", "system_tokens", "reported")}
    write_json(json_file, head | {"files": [asdict(report) for report in reports]})
    if any(report.error for report in reports):
        raise typer.Exit(1)


def _bar() -> Progress:
    """On a terminal alone."""
    errors = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=errors,
        disable=not errors.is_terminal,
        transient=True,
    )


def default_journal() -> Path:
    """Where the journal is kept unless the caller says otherwise: in the user's cache."""
    return cache_folder() / "ingest.jsonl"


def _text(given: str) -> str:
    """The content of the file, where there is one of that name."""
    try:
        is_file = bool(given) and Path(given).is_file()
    except OSError:  # too long for a name
        is_file = False
    try:
        return read_text(Path(given)) if is_file else given
    except UnicodeDecodeError as error:
        raise ValueError(f"--system-prompt = {given}: byte {error.start} is not UTF-8") from None


def _show(reports: list[FileReport], work: Ingest) -> None:
    console = Console()
    table = Table("file", "passages", "known before", "tokens", "stored now", "found there")
    rows = [(each.passages, each.known, each.tokens, each.stored_tokens, each.hit_tokens) for each in reports]
    for report, row in zip(reports, rows, strict=True):
        table.add_row(Text(printable(report.file)), *(f"{figure:,}" for figure in row))
    if len(reports) > 1:
        table.add_section()
        table.add_row("all", *(f"{sum(column):,}" for column in zip(*rows, strict=True)))
    console.print(table)
    lines = [(f"{work.model}, behind a system prompt of {work.system_tokens:,} tokens", "")]
    if not work.reported and any(report.answered for report in reports):
        lines.append((f"{work.url} does not say what it stores: does it run with ragkv?", "yellow"))
    lines += [(f"{report.file}: {report.error}", "red") for report in reports if report.error]
    for line, style in lines:
        console.print(printable(line), style=style, markup=False, highlight=False, soft_wrap=True)
