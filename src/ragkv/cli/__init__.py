"""The command `ragkv`. Heavy imports wait until a command needs them."""

from typing import Annotated

import typer
from rich.console import Console

from ragkv.cli import bench, config, control, doctor, ingest, observe, serve, store, top
from ragkv.errors import RagKVError
from ragkv.shown import printable

HELP = {"help_option_names": ["-h", "--help"]}  # commands below take it over

app = typer.Typer(
    context_settings=HELP,
    no_args_is_help=True,
    help="A KV cache for vLLM that knows documents.",
    epilog="Exit status: 0 when all is well, 1 with one line that says what is not, 2 for wrong usage.",
)
for name, group in (("config", config), ("bench", bench), ("store", store), ("observe", observe)):
    app.add_typer(group.app, name=name)
app.command()(bench.demo)
app.command()(bench.simulate)
app.command(context_settings=serve.CONTEXT, epilog=serve.EPILOG)(serve.serve)
app.command(epilog=doctor.EPILOG)(doctor.doctor)
app.command(epilog=top.EPILOG)(top.top)
app.command(epilog=control.EPILOG)(control.control)
app.command(epilog=ingest.EPILOG)(ingest.ingest)


def _show_version(wanted: bool) -> None:
    if wanted:
        import ragkv

        typer.echo(f"ragkv {ragkv.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version, and end.")
    ] = False,
) -> None:
    """A KV cache for vLLM that knows documents."""


def main() -> None:
    """The console script. Errors of ours and invalid input are one line on stderr, and exit status 1."""
    run(app)


def run(command: typer.Typer) -> None:
    """Run a command line, with errors as `main` shows them."""
    try:
        command()
    except (RagKVError, ValueError, OSError) as error:
        text = printable(str(error), keep="\n")
        Console(stderr=True).print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None
