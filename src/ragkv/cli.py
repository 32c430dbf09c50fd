"""The command `ragkv`. Heavy imports wait until a command needs them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ragkv import bench_command, completion, config_command, observe_command, store_command
from ragkv.bench_command import FilingsOption, JsonOption
from ragkv.control_command import EPILOG as CONTROL_EXAMPLES
from ragkv.control_command import control
from ragkv.doctor_command import EPILOG as DOCTOR_EXAMPLES
from ragkv.doctor_command import doctor
from ragkv.errors import RagKVError
from ragkv.ingest_command import ingest
from ragkv.serve_command import CONTEXT as SERVE_CONTEXT
from ragkv.serve_command import EPILOG as SERVE_EXAMPLES
from ragkv.serve_command import serve
from ragkv.shown import printable
from ragkv.top_command import EPILOG as TOP_EXAMPLES
from ragkv.top_command import top

HELP = {"help_option_names": ["-h", "--help"]}  # commands below take it over

app = typer.Typer(
    context_settings=HELP,
    no_args_is_help=True,
    help="A KV cache for vLLM that knows documents.",
    epilog="Exit status: 0 when all is well, 1 with one line that says what is not, 2 for wrong usage.",
)
app.add_typer(config_command.app, name="config")
app.add_typer(bench_command.app, name="bench")
app.add_typer(store_command.app, name="store")
app.add_typer(observe_command.app, name="observe")


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


@app.command(epilog="Example: ragkv demo --filings FOLDER --output demo.json")
def demo(
    filings: FilingsOption = None,
    tokens: Annotated[int, typer.Option(min=200, max=7000, help="Tokens of each filing.")] = 3000,
    json_file: JsonOption = None,
    picture: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("out/demo.png"),
) -> None:
    """A conversation over two 10-K filings, on plain vLLM and with ragkv."""
    from ragkv.benchmarks.demo import run

    run(filings, tokens, json_file, picture)


@app.command(epilog="Example: ragkv simulate generated:conversation --policy lru,lfu --sizes 1%,5%")
def simulate(
    trace: Annotated[
        str, typer.Argument(help="A trace file (ours or Mooncake's), or generated:KIND or generated:KIND:SEED.")
    ],
    policy: Annotated[
        str | None,
        typer.Option(help="Eviction policies; all, where not given.", autocompletion=completion.policies),
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Cache sizes (5%, 1000 blocks, 4GiB); else 1%,5%,10%,20%.")
    ] = None,
    admission: Annotated[
        str, typer.Option(help="Admission policies.", autocompletion=completion.admissions)
    ] = "always",
    semantics: Annotated[
        str,
        typer.Option(
            help="What may hit: prefix or content.", autocompletion=completion.one_of(("prefix", "content"))
        ),
    ] = "prefix",
    tiers: Annotated[
        str | None, typer.Option(help="Tiers instead of sizes: memory=1%,disk=10%, each perhaps :POLICY.")
    ] = None,
    block_bytes: Annotated[
        str | None, typer.Option(help="Bytes of a block (a token, where the trace counts tokens).")
    ] = None,
    json_file: JsonOption = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a picture into this file.")] = None,
) -> None:
    """Hit rates of policies on a trace of requests. Lists are separated by commas."""
    from ragkv.benchmarks.simulate import run

    run(
        trace,
        policies=policy,
        sizes=sizes,
        admissions=admission,
        semantics=semantics,
        tiers=tiers,
        block_bytes=block_bytes,
        json_file=json_file,
        picture=plot,
    )


app.command(context_settings=SERVE_CONTEXT, epilog=SERVE_EXAMPLES)(serve)
app.command(epilog=DOCTOR_EXAMPLES)(doctor)
app.command(epilog=TOP_EXAMPLES)(top)
app.command(epilog=CONTROL_EXAMPLES)(control)
app.command(epilog="Example: ragkv ingest filings/*.txt --url http://localhost:8000 --system-prompt system.txt")(
    ingest
)


def main() -> None:
    """The console script: errors of ours and bad input are one line, and exit status 1."""
    try:
        app()
    except (RagKVError, ValueError, OSError) as error:
        text = printable(str(error), keep="\n")
        Console(stderr=True).print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None
