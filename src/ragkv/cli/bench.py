"""`ragkv demo`, `ragkv simulate` and `ragkv bench`: what users measure. Each command imports its program late."""

import importlib
import importlib.util
import math
from pathlib import Path
from typing import Annotated

import typer

from ragkv.benchmarks.compared import COMPARED
from ragkv.options import DtypeOption, FilingsOption, OutputOption, PlotOption, one_of, some_of
from ragkv.policies import ADMISSIONS

SYSTEMS = ("plain", "ragkv", "ragkv+fusion", "vllm-offload", "lmcache")

Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="A name or folder; the demonstration's, where not given.")
]
Arguments = Annotated[
    list[str] | None, typer.Argument(metavar="-- VLLM ARGUMENTS", help="More arguments for every vLLM.")
]
System = Annotated[
    str, typer.Option(help=f"Set side by side: {', '.join(SYSTEMS)}.", autocompletion=some_of(SYSTEMS))
]
Url = Annotated[
    list[str] | None,
    typer.Option(help="A server that runs already, as URL or NAME=URL, instead of systems. May come again."),
]
Rate = Annotated[float, typer.Option(min=0, help="Sessions that arrive a second; inf: all at once.")]
Think = Annotated[float, typer.Option(min=0, help="Mean seconds between an answer and the next turn.")]
Passages = Annotated[float, typer.Option(min=0, max=1, help="Share of later turns that bring retrieved passages.")]
Switch = Annotated[float, typer.Option(min=0, max=1, help="Share of sessions that change filings half-way.")]
KvCacheTokens = Annotated[
    int | None, typer.Option(min=1, help="Tokens of vLLM's own cache; else what requests in flight need.")
]
LmcachePython = Annotated[
    Path | None, typer.Option(help="Python of an environment with vLLM and LMCache: docs/benchmarks.md.")
]

app = typer.Typer(no_args_is_help=True, help="Measure.")


def demo(
    filings: FilingsOption = None,
    tokens: Annotated[int, typer.Option(min=200, max=7000, help="Tokens of each filing.")] = 3000,
    json_file: OutputOption = None,
    picture: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("out/demo.png"),
) -> None:
    """A conversation over two 10-K filings, on plain vLLM and with ragkv.

    Example: ragkv demo --filings FOLDER --output demo.json
    """
    from ragkv.benchmarks.demo import run

    run(filings, tokens, json_file, picture)


def simulate(
    trace: Annotated[
        str, typer.Argument(help="A trace file (ours or Mooncake's), or generated:KIND or generated:KIND:SEED.")
    ],
    policy: Annotated[
        str | None, typer.Option(help="Eviction policies; all, where not given.", autocompletion=some_of(COMPARED))
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Cache sizes (5%, 1000 blocks, 4GiB); else 1%,5%,10%,20%.")
    ] = None,
    admission: Annotated[
        str, typer.Option(help="Admission policies.", autocompletion=some_of(ADMISSIONS))
    ] = "always",
    semantics: Annotated[
        str, typer.Option(help="What may hit: prefix or content.", autocompletion=one_of(("prefix", "content")))
    ] = "prefix",
    tiers: Annotated[
        str | None, typer.Option(help="Tiers instead of sizes: memory=1%,disk=10%, each perhaps :POLICY.")
    ] = None,
    block_bytes: Annotated[
        str | None, typer.Option(help="Bytes of a block (a token, where the trace counts tokens).")
    ] = None,
    json_file: OutputOption = None,
    plot: PlotOption = None,
) -> None:
    """Hit rates of policies on a trace of requests. Lists are separated by commas.

    Example: ragkv simulate generated:conversation --policy lru,lfu --sizes 1%,5%
    """
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


@app.command()
def prefix(
    tier: Annotated[str, typer.Option(help="The tier to load from: memory.")] = "memory",
    tokens: Annotated[int, typer.Option(min=200, max=7000, help="Tokens of each document.")] = 3000,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Documents, each measured on both engines.")] = 4,
    starts: Annotated[int, typer.Option(min=1, max=50, help="Times that both engines are started.")] = 5,
    filings: FilingsOption = None,
    json_file: OutputOption = None,
) -> None:
    """TTFT cold and warm against plain vLLM, paired, over several starts of both.

    Example: ragkv bench prefix --tokens 6000 --output prefix.json
    """
    from ragkv.benchmarks.prefix import run

    run(tier, tokens, rounds, starts, filings, json_file)


@app.command()
def gpu(
    steps: Annotated[str, typer.Option(help="Which steps, separated by commas.")] = "1,2,3,4,5,6",
    json_file: OutputOption = None,
) -> None:
    """Whether copies, hits, faults, times and fusion are as they must be on this machine's GPU.

    Example: ragkv bench gpu --output gpu.json
    """
    from ragkv.benchmarks.gpu import run

    run(steps, json_file)


@app.command(epilog="Example: ragkv bench serve MODEL --documents 8 --output FILE -- --tensor-parallel-size 2")
def serve(
    model: Model = None,
    arguments: Arguments = None,
    system: System = "plain,ragkv",
    url: Url = None,
    documents: Annotated[int, typer.Option(min=1, help="Filings a round.")] = 4,
    turns: Annotated[int, typer.Option(min=1, max=100, help="Questions a session.")] = 5,
    sessions: Annotated[int | None, typer.Option(min=1, help="Sessions a round; else one a filing.")] = None,
    tokens: Annotated[int, typer.Option(min=200, help="Tokens of each filing.")] = 3000,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 2,
    rate: Rate = math.inf,
    think: Think = 0.0,
    passages: Passages = 0.0,
    switch: Switch = 0.0,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds, each with filings of its own.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="The same seed asks the same.")] = 0,
    memory: Annotated[str, typer.Option(help="Memory of each cache beside vLLM's own.")] = "2GiB",
    kv_cache_tokens: KvCacheTokens = None,
    dtype: DtypeOption = "auto",
    lmcache_python: LmcachePython = None,
    filings: FilingsOption = None,
    json_file: OutputOption = None,
    plot: PlotOption = None,
) -> None:
    """Chats about filings on whole servers, side by side: TTFT by turn, throughput, hits, memory."""
    from ragkv.benchmarks.serve import Options, run
    from ragkv.benchmarks.serve_workload import Shape

    named, more = _model_and_arguments(model, arguments or [])
    shape = Shape(
        documents, turns, sessions, tokens, concurrency, rate, think, passages, switch, answer_tokens, seed
    )
    run(
        Options(
            shape,
            systems=tuple(system.split(",")),
            urls=tuple(url or ()),
            model=named,
            rounds=rounds,
            filings=filings,
            memory=memory,
            kv_cache_tokens=kv_cache_tokens,
            dtype=dtype,
            lmcache_python=lmcache_python,
            arguments=more,
            json_file=json_file,
            plot=plot,
        )
    )


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(help="A report of `ragkv bench serve`.")],
    new: Annotated[Path, typer.Argument(help="Another one, of the same systems.")],
    tolerance: Annotated[float, typer.Option(min=0, help="Smaller differences, as shares, are none.")] = 0.05,
    fail: Annotated[bool, typer.Option("--fail", help="Exit with status 3 where something got worse.")] = False,
    json_file: OutputOption = None,
) -> None:
    """Whether two reports of `ragkv bench serve` differ by more than the noise.

    Example: ragkv bench compare before.json after.json --fail
    """
    from ragkv.benchmarks.serve_compare import run

    raise typer.Exit(run(old, new, tolerance=tolerance, fail=fail, json_file=json_file))


def _model_and_arguments(model: str | None, arguments: list[str]) -> tuple[str | None, tuple[str, ...]]:
    """Where no model is named, vLLM's first argument is parsed as the model."""
    if model is not None and model.startswith("-"):
        return None, (model, *arguments)
    return model, tuple(arguments)


def _add_internal(commands: str = "ragkv.benchmarks.internal") -> None:
    """In a clone, the commands for those who change ragkv; the wheel has none of them."""
    if importlib.util.find_spec(commands) is not None:
        app.registered_commands += importlib.import_module(f"{commands}.commands").app.registered_commands


_add_internal()
