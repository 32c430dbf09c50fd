"""The command `ragkv`. Heavy imports wait until a command needs them."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ragkv.config import Loaded, check_shared_memory, load
from ragkv.errors import RagKVError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="A KV cache for vLLM that knows documents.")
config_app = typer.Typer(no_args_is_help=True, help="Look at settings.")
bench_app = typer.Typer(no_args_is_help=True, help="Measure.")
app.add_typer(config_app, name="config")
app.add_typer(bench_app, name="bench")

FilingsOption = Annotated[
    Path | None, typer.Option(help="A folder of filings (*.txt) instead of the generated ones.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")]


@app.command()
def demo(
    filings: FilingsOption = None,
    tokens: Annotated[int, typer.Option(min=200, max=7000, help="Tokens of each filing.")] = 3000,
    json_file: JsonOption = None,
    picture: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("out/demo.png"),
) -> None:
    """A conversation over two 10-K filings, on plain vLLM and with ragkv."""
    from ragkv.benchmarks.demo import run

    run(filings, tokens, json_file, picture)


@bench_app.command()
def prefix(
    tier: Annotated[str, typer.Option(help="The tier to load from: memory.")] = "memory",
    tokens: Annotated[int, typer.Option(min=200, max=7000, help="Tokens of each document.")] = 3000,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Documents, each measured on both engines.")] = 8,
    filings: FilingsOption = None,
    json_file: JsonOption = None,
) -> None:
    """TTFT cold and warm against plain vLLM, paired."""
    from ragkv.benchmarks.prefix import run

    run(tier, tokens, rounds, filings, json_file)


@bench_app.command()
def plan(
    tokens: Annotated[int, typer.Option(min=1000, help="Tokens of the prompt.")] = 100_000,
    chunks: Annotated[int, typer.Option(min=1000, help="Chunks in the catalogue.")] = 1_000_000,
    json_file: JsonOption = None,
) -> None:
    """Time to plan a long prompt against a large catalogue."""
    from ragkv.benchmarks.plan import run

    run(tokens, chunks, json_file)


@config_app.command()
def check(file: Annotated[Path, typer.Argument(help="A YAML file of settings.")]) -> None:
    """Say whether a file's settings hold, on this machine."""
    from ragkv.kvstore.segment import available_bytes

    loaded = load(environ={}, file=file)
    check_shared_memory(loaded.settings, available_bytes())
    typer.echo(f"{file}: good")


@config_app.command()
def show(
    file: Annotated[Path | None, typer.Option(help="A YAML file of settings.")] = None,
    extra: Annotated[str, typer.Option(help="kv_connector_extra_config, as JSON.")] = "{}",
) -> None:
    """Every setting's value, and where it came from."""
    _print(load(_mapping(extra), file=file))


def _mapping(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise RagKVError(f"ragkv: --extra = {text!r}; allowed: a JSON object")
    return value


def _print(loaded: Loaded) -> None:
    table = Table("setting", "value", "from")
    for row in loaded.rows():
        table.add_row(*row)
    Console().print(table)


def main() -> None:
    """The console script: errors of ours and bad input are one line, and exit status 1."""
    try:
        app()
    except (RagKVError, ValueError) as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None
