"""What commands share: options, the file of settings, names that a shell completes, and JSON on stdout."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ragkv.config.sources import FILE_VARIABLE

ConfigOption = Annotated[Path | None, typer.Option(help="A YAML file of settings; else RAGKV_CONFIG's.")]
DtypeOption = Annotated[str, typer.Option(help="What the model computes in; auto on an old CPU: float32.")]
FilingsOption = Annotated[Path | None, typer.Option(help="A folder of filings (*.txt), not the generated ones.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "--json", help="Write the figures, as JSON, to this file.")
]
PlotOption = Annotated[Path | None, typer.Option(help="Draw a picture into this file.")]


def one_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    """A completer of one name."""
    return lambda incomplete: [name for name in sorted(names) if name.startswith(incomplete)]


def some_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    """A completer of a list with commas: it completes the last name and offers none twice."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [before + comma + name for name in one_of(names)(last) if name not in before.split(",")]

    return complete


def settings_file(config: Path | None, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The file of settings that a command reads: `--config`'s, else the variable's."""
    return config or (Path(environ[FILE_VARIABLE]) if environ.get(FILE_VARIABLE) else None)


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    typer.echo(json.dumps(value, indent=2))
