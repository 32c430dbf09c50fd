"""`ragkv bench serve` and `ragkv bench compare`. Heavy imports wait until a command needs them."""

import math
from pathlib import Path
from typing import Annotated

import typer

from ragkv import completion

ModelArgument = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="A name or folder; the demonstration's, where not given.")
]
VllmArguments = Annotated[
    list[str] | None, typer.Argument(metavar="-- VLLM ARGUMENTS", help="More arguments for every vLLM.")
]
SYSTEMS = ("plain", "ragkv", "ragkv+fusion", "vllm-offload", "lmcache")
SystemOption = Annotated[
    str,
    typer.Option(help=f"Set side by side: {', '.join(SYSTEMS)}.", autocompletion=completion.some_of(SYSTEMS)),
]
UrlOption = Annotated[
    list[str] | None,
    typer.Option(help="A server that runs already, as URL or NAME=URL, instead of systems. May come again."),
]
Documents = Annotated[int, typer.Option(min=1, help="Filings a round.")]
Turns = Annotated[int, typer.Option(min=1, max=100, help="Questions a session.")]
Sessions = Annotated[int | None, typer.Option(min=1, help="Sessions a round; else one a filing.")]
Tokens = Annotated[int, typer.Option(min=200, help="Tokens of each filing.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests in flight.")]
Rate = Annotated[float, typer.Option(min=0, help="Sessions that arrive a second; inf: all at once.")]
Think = Annotated[float, typer.Option(min=0, help="Mean seconds between an answer and the next turn.")]
Passages = Annotated[
    float, typer.Option(min=0, max=1, help="Share of follow-up turns that bring retrieved passages.")
]
Switch = Annotated[float, typer.Option(min=0, max=1, help="Share of sessions that change filings half-way.")]
AnswerTokens = Annotated[int, typer.Option(min=1, help="Tokens of each answer.")]
Rounds = Annotated[int, typer.Option(min=1, max=1000, help="Rounds, each with filings of its own.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed asks the same.")]
Memory = Annotated[str, typer.Option(help="Memory of each cache beside vLLM's own.")]
KvCacheTokens = Annotated[
    int | None, typer.Option(min=1, help="Tokens of vLLM's own cache; else what requests in flight need.")
]
Dtype = Annotated[str, typer.Option(help="What the model computes in.")]
LmcachePython = Annotated[
    Path | None, typer.Option(help="Python of an environment with vLLM and LMCache: docs/benchmarks.md.")
]
Filings = Annotated[Path | None, typer.Option(help="A folder of filings (*.txt) instead of generated ones.")]
Json = Annotated[Path | None, typer.Option("--output", "--json", help="Write the figures, as JSON, to this file.")]
Plot = Annotated[Path | None, typer.Option(help="Draw a picture into this file.")]


def serve(
    model: ModelArgument = None,
    arguments: VllmArguments = None,
    system: SystemOption = "plain,ragkv",
    url: UrlOption = None,
    documents: Documents = 4,
    turns: Turns = 5,
    sessions: Sessions = None,
    tokens: Tokens = 3000,
    concurrency: Concurrency = 2,
    rate: Rate = math.inf,
    think: Think = 0.0,
    passages: Passages = 0.0,
    switch: Switch = 0.0,
    answer_tokens: AnswerTokens = 32,
    rounds: Rounds = 3,
    seed: Seed = 0,
    memory: Memory = "2GiB",
    kv_cache_tokens: KvCacheTokens = None,
    dtype: Dtype = "auto",
    lmcache_python: LmcachePython = None,
    filings: Filings = None,
    json_file: Json = None,
    plot: Plot = None,
) -> None:
    """Chats about filings on whole servers, side by side: TTFT by turn, throughput, hits, memory.

    Example: ragkv bench serve MODEL --documents 8 --output FILE -- --tensor-parallel-size 2
    """
    from ragkv.benchmarks.serve import Options, run
    from ragkv.benchmarks.serve_workload import Shape

    named, more = _split(model, arguments or [])
    run(
        Options(
            Shape(
                documents, turns, sessions, tokens, concurrency, rate, think, passages, switch, answer_tokens, seed
            ),
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


def compare(
    old: Annotated[Path, typer.Argument(help="A report of `ragkv bench serve`.")],
    new: Annotated[Path, typer.Argument(help="Another one, of the same systems.")],
    tolerance: Annotated[float, typer.Option(min=0, help="Smaller differences, as shares, are none.")] = 0.05,
    fail: Annotated[bool, typer.Option("--fail", help="Exit with status 3 where something got worse.")] = False,
    json_file: Json = None,
) -> None:
    """Whether two reports of `ragkv bench serve` differ by more than the noise.

    Example: ragkv bench compare before.json after.json --fail
    """
    from ragkv.benchmarks.serve_compare import run

    raise typer.Exit(run(old, new, tolerance=tolerance, fail=fail, json_file=json_file))


def _split(model: str | None, arguments: list[str]) -> tuple[str | None, tuple[str, ...]]:
    """Model and vLLM's arguments: where no model is named, the first of these stands in its place."""
    if model is not None and model.startswith("-"):
        return None, (model, *arguments)
    return model, tuple(arguments)
