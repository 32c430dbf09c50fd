"""The command `ragkv doctor`: does ragkv work here, and if not, why?"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ragkv.shown import printable

if TYPE_CHECKING:
    from ragkv.checks import Finding

EPILOG = """Examples:\n
  ragkv doctor\n
  ragkv doctor --config ragkv.yaml --url http://localhost:8000\n
  ragkv doctor --quick --json\n
Exit status: 1 when something prevents reuse, 0 when nothing does; warnings do not count."""
MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "bold red")}


def doctor(
    config: Annotated[Path | None, typer.Option(help="A YAML file of settings; else RAGKV_CONFIG's.")] = None,
    url: Annotated[str | None, typer.Option(help="Look at this running server too.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Start no small engine, measure no disk.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check by trying: vLLM, its KV layout, shared memory, disk, Redis; and say what to do."""
    from ragkv.doctor import examine

    errors = Console(stderr=True)
    with errors.status("checking" if quick else "checking, with a small engine: a minute or less"):
        findings = examine(config, url, quick, os.environ)
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in findings], indent=2))
    else:
        show(findings, Console())
    if any(each.status == "fail" for each in findings):
        raise typer.Exit(1)


def show(findings: "list[Finding]", console: Console) -> None:
    """Print what was found, then what is to be done."""
    table = Table.grid(padding=(0, 2))
    for each in findings:
        mark, style = MARKS[each.status]
        table.add_row(Text(mark, style), each.check, Text(printable(each.said)))
    console.print(table)
    todo = [each for each in findings if each.status != "ok" and each.todo]
    console.print("\nTo do:" if todo else "\nNothing to do.")
    for each in todo:
        console.print(Text(printable(f"{each.check}: {each.todo}"), MARKS[each.status][1]), soft_wrap=True)
