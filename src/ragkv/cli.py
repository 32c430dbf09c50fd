"""The command `ragkv`. Heavy imports wait until a command needs them."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ragkv.config import Loaded, check_shared_memory, load
from ragkv.config.sources import hide_password
from ragkv.errors import RagKVError
from ragkv.ingest_command import ingest
from ragkv.store_command import app as store_app

app = typer.Typer(no_args_is_help=True, add_completion=False, help="A KV cache for vLLM that knows documents.")
config_app = typer.Typer(no_args_is_help=True, help="Look at settings.")
bench_app = typer.Typer(no_args_is_help=True, help="Measure.")
app.add_typer(config_app, name="config")
app.add_typer(bench_app, name="bench")
app.add_typer(store_app, name="store")

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


@app.command()
def simulate(
    trace: Annotated[
        str, typer.Argument(help="A trace file (ours or Mooncake's), or generated:KIND or generated:KIND:SEED.")
    ],
    policy: Annotated[str | None, typer.Option(help="Eviction policies; all, where not given.")] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Cache sizes (5%, 1000 blocks, 4GiB); else 1%,5%,10%,20%.")
    ] = None,
    admission: Annotated[str, typer.Option(help="Admission policies.")] = "always",
    semantics: Annotated[str, typer.Option(help="What may hit: prefix or content.")] = "prefix",
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


app.command()(ingest)


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
def restart(
    tier: Annotated[str, typer.Option(help="What outlives the engine: disk or redis.")] = "disk",
    tokens: Annotated[int, typer.Option(min=200, max=7000, help="Tokens of each document.")] = 3000,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Documents.")] = 8,
    redis: Annotated[str | None, typer.Option(help="URL of a server, instead of one of its own.")] = None,
    filings: FilingsOption = None,
    json_file: JsonOption = None,
) -> None:
    """TTFT and hits of a second engine, from what a first one left."""
    from ragkv.benchmarks.restart import run

    run(tier, tokens, rounds, filings, redis, json_file)


@bench_app.command()
def plan(
    tokens: Annotated[int, typer.Option(min=1000, help="Tokens of the prompt.")] = 100_000,
    chunks: Annotated[int, typer.Option(min=1000, help="Chunks in the catalogue.")] = 1_000_000,
    json_file: JsonOption = None,
) -> None:
    """Time to plan a long prompt against a large catalogue."""
    from ragkv.benchmarks.plan import run

    run(tokens, chunks, json_file)


@bench_app.command()
def tiers(
    tier: Annotated[str, typer.Option(help="Which: disk, redis, or both.")] = "disk,redis",
    folder: Annotated[Path | None, typer.Option(help="On the disk to measure.")] = None,
    redis: Annotated[str | None, typer.Option(help="URL of a server; else one is started.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Bytes a second of the disk and Redis tiers, beside plain reads and writes."""
    from ragkv.benchmarks.tiers import run

    run(tier.split(","), folder, redis, json_file)


@bench_app.command()
def fuzz(
    inputs: Annotated[int, typer.Option(min=1, help="Harmed payloads to try.")] = 1_000_000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same inputs.")] = 0,
    json_file: JsonOption = None,
) -> None:
    """Give harmed payloads to the codec: it must refuse them."""
    from ragkv.benchmarks.fuzz import run

    run(inputs, seed, json_file)


@bench_app.command()
def fusion(
    selections: Annotated[
        str, typer.Option(help="Which tokens are computed again.")
    ] = "none,random,first_tokens,deviation,query,query_deviation,full",
    ratios: Annotated[str, typer.Option(help="How many of them, as shares.")] = "0.05,0.15,0.3",
    passages: Annotated[int, typer.Option(min=1, max=100, help="Passages of a prompt.")] = 6,
    tokens: Annotated[int, typer.Option(min=16, max=7000, help="Tokens of each passage.")] = 500,
    stored: Annotated[
        str,
        typer.Option(help="What passages were prefilled behind: prefix (the system prompt), elsewhere or alone."),
    ] = "prefix",
    text: Annotated[
        str, typer.Option(help="questions about several filings, or a filing's running text.")
    ] = "questions",
    continuation: Annotated[int, typer.Option(min=1, max=512, help="Tokens that quality is measured over.")] = 32,
    trials: Annotated[int, typer.Option(min=1, max=100, help="Prompts, each measured with every setting.")] = 6,
    dtype: Annotated[str, typer.Option(help="What the model computes in.")] = "auto",
    filings: FilingsOption = None,
    json_file: JsonOption = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a picture into this file.")] = None,
) -> None:
    """Quality and TTFT of fused passages against full prefill. Lists are separated by commas."""
    from ragkv.benchmarks.fusion import run
    from ragkv.benchmarks.fusion_trials import Shape

    run(
        selections=selections,
        ratios=ratios,
        shape=Shape(passages, tokens, stored, text, continuation),
        trials=trials,
        dtype=dtype,
        filings=filings,
        json_file=json_file,
        plot=plot,
    )


@config_app.command()
def check(file: Annotated[Path, typer.Argument(help="A YAML file of settings.")]) -> None:
    """Say whether a file's settings hold, on this machine."""
    from ragkv.kvstore.segment import available_bytes
    from ragkv.kvstore.stores.redis_url import parse_location

    loaded = load(environ={}, file=file)
    if loaded.settings.redis.url is not None:
        parse_location(loaded.settings.redis.url)
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
        raise RagKVError(f"ragkv: --extra = {hide_password(text)!r}; allowed: a JSON object")
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
    except (RagKVError, ValueError, OSError) as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None
