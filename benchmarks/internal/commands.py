"""Commands that `ragkv bench` has in a clone only. Each imports its program late."""

from pathlib import Path
from typing import Annotated

import typer

from ragkv.options import DtypeOption, FilingsOption, OutputOption, PlotOption, one_of, some_of

SELECTIONS = "none,random,first_tokens,deviation,query,query_deviation,full"
TIERS = ("disk", "redis")

app = typer.Typer(no_args_is_help=True, help="Measure and fuzz ragkv, in a clone.")


@app.command(epilog="Example: ragkv bench stall --tokens 6000 --output stall.json")
def stall(
    tokens: Annotated[int, typer.Option(min=200, max=7000, help="Tokens that the other request loads.")] = 6000,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Documents, each loaded and prefilled once.")] = 5,
    filings: FilingsOption = None,
    json_file: OutputOption = None,
) -> None:
    """The longest gap in a running answer while another request is loaded, or prefilled by plain vLLM."""
    from ragkv.benchmarks.internal.stall import run

    run(tokens, rounds, filings, json_file)


@app.command(epilog="Example: ragkv bench hints --tokens 6000 --output hints.json")
def hints(
    tokens: Annotated[int, typer.Option(min=400, max=7000, help="Tokens of the prompt that brings hints.")] = 6000,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Pairs of each kind of hints.")] = 9,
    filings: FilingsOption = None,
    json_file: OutputOption = None,
) -> None:
    """The longest gap in a running answer while the worst hints come, against the same prompt without them."""
    from ragkv.benchmarks.internal.hints import run

    run(tokens, rounds, filings, json_file)


@app.command(epilog="Example: ragkv bench soak --minutes 30 --output soak.json")
def soak(
    minutes: Annotated[float, typer.Option(min=0.1, help="How long each server is under load.")] = 30,
    turn: Annotated[float, typer.Option(min=1, help="Seconds of a turn; the servers take turns.")] = 60,
    model: Annotated[Path | None, typer.Option(help="A model's folder, instead of SmolLM2.")] = None,
    json_file: OutputOption = None,
) -> None:
    """Whether a server with all tiers stays as it is under load: memory, descriptors, threads, what tiers hold."""
    from ragkv.benchmarks.internal.soak import run

    run(minutes, turn, model, json_file)


@app.command(epilog="Example: ragkv bench restart --tier redis")
def restart(
    tier: Annotated[
        str, typer.Option(help="What outlives the engine: disk or redis.", autocompletion=one_of(TIERS))
    ] = "disk",
    tokens: Annotated[int, typer.Option(min=200, max=7000, help="Tokens of each document.")] = 3000,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Documents.")] = 8,
    redis: Annotated[str | None, typer.Option(help="URL of a server, instead of one of its own.")] = None,
    filings: FilingsOption = None,
    json_file: OutputOption = None,
) -> None:
    """TTFT and hits of a second engine, from what a first one left."""
    from ragkv.benchmarks.internal.restart import run

    run(tier, tokens, rounds, filings, redis, json_file)


@app.command(epilog="Example: ragkv bench fingerprint --model ~/models/SmolLM2-135M-Instruct")
def fingerprint(
    model: Annotated[Path | None, typer.Option(help="A folder with *.safetensors; the demo's model.")] = None,
    json_file: OutputOption = None,
) -> None:
    """What it costs to know a model's weights: a full look at them, and the samples of a running engine."""
    from ragkv.benchmarks.internal.fingerprint import run

    run(None if model is None else model.expanduser(), json_file)


@app.command(epilog="Example: ragkv bench plan --tokens 100000 --chunks 1000000")
def plan(
    tokens: Annotated[int, typer.Option(min=1000, help="Tokens of the prompt.")] = 100_000,
    chunks: Annotated[int, typer.Option(min=1000, help="Chunks in the catalogue.")] = 1_000_000,
    json_file: OutputOption = None,
) -> None:
    """Time to plan a long prompt against a large catalogue."""
    from ragkv.benchmarks.internal.plan import run

    run(tokens, chunks, json_file)


@app.command(epilog="Example: ragkv bench tiers --tier disk --folder /var/cache")
def tiers(
    tier: Annotated[
        str, typer.Option(help="Which: disk, redis, or both.", autocompletion=some_of(TIERS))
    ] = "disk,redis",
    folder: Annotated[Path | None, typer.Option(help="On the disk to measure.")] = None,
    redis: Annotated[str | None, typer.Option(help="URL of a server; else one is started.")] = None,
    json_file: OutputOption = None,
) -> None:
    """Bytes a second of the disk and Redis tiers, beside plain reads and writes."""
    from ragkv.benchmarks.internal.tiers import run

    run(tier.split(","), folder, redis, json_file)


@app.command(epilog="Example: ragkv bench fuzz --engine --prompts 1000 --seed 1")
def fuzz(
    engine: Annotated[bool, typer.Option("--engine", help="Fuzz an engine with ragkv instead.")] = False,
    inputs: Annotated[int, typer.Option(min=1, help="Harmed payloads to try.")] = 1_000_000,
    prompts: Annotated[int, typer.Option(min=1, help="With --engine: prompts to ask.")] = 1000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same inputs.")] = 0,
    only: Annotated[int | None, typer.Option(min=0, help="With --engine: play this episode alone.")] = None,
    faults: Annotated[
        float, typer.Option(min=0, max=1, help="With --engine: share of the disk tier's calls that go wrong.")
    ] = 0.02,
    copy_faults: Annotated[
        float, typer.Option(min=0, max=1, help="With --engine: share of copies to and from the engine that fail.")
    ] = 0.0,
    fusion: Annotated[bool, typer.Option("--fusion", help="With --engine: fuse, all moved tokens anew.")] = False,
    windows: Annotated[bool, typer.Option("--windows", help="With --engine: some layers have windows.")] = False,
    json_file: OutputOption = None,
) -> None:
    """Give harmed payloads to the codec: it must refuse them. With --engine: ask an engine with ragkv thousands of
    prompts, under evictions, preemptions, aborts and faults: it must answer as plain vLLM does."""
    if not engine:
        from ragkv.benchmarks.internal.fuzz import run

        run(inputs, seed, json_file)
        return
    from ragkv.benchmarks.internal.engine_fuzz import FuzzOptions
    from ragkv.benchmarks.internal.engine_fuzz_report import run as run_engines

    run_engines(FuzzOptions(prompts, seed, only, faults, copy_faults, fusion, windows), json_file)


@app.command(epilog="Example: ragkv bench fusion --selections query --ratios 0.15 --trials 5")
def fusion(
    selections: Annotated[
        str,
        typer.Option(help="Which tokens are computed again.", autocompletion=some_of(SELECTIONS.split(","))),
    ] = SELECTIONS,
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
    dtype: DtypeOption = "auto",
    filings: FilingsOption = None,
    json_file: OutputOption = None,
    plot: PlotOption = None,
) -> None:
    """Quality and TTFT of fused passages against full prefill. Lists are separated by commas."""
    from ragkv.benchmarks.internal.fusion import run
    from ragkv.benchmarks.internal.fusion_trials import Shape

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


@app.command(epilog="Example: ragkv bench order --questions 50")
def order(
    pool: Annotated[int, typer.Option(min=2, max=1000, help="Passages that may be retrieved.")] = 40,
    passages: Annotated[int, typer.Option(min=2, max=64, help="Passages of a question.")] = 6,
    tokens: Annotated[int, typer.Option(min=16, max=4000, help="Tokens of each passage.")] = 500,
    questions: Annotated[int, typer.Option(min=1, max=10_000, help="Questions, each asked in both orders.")] = 200,
    zipf: Annotated[float, typer.Option(min=0, max=5, help="Popularity falls as rank ** -this.")] = 1.2,
    past: Annotated[int, typer.Option(min=0, max=100_000, help="Retrievals before the questions.")] = 400,
    chains: Annotated[int, typer.Option(min=0, max=10_000, help="Likely chains of them that are stored.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the log.")] = 0,
    dtype: DtypeOption = "auto",
    filings: FilingsOption = None,
    json_file: OutputOption = None,
) -> None:
    """Exact tokens and TTFT of retrieved passages, in the order given and in stored order."""
    from ragkv.benchmarks.internal.order import Log, run

    run(Log(pool, passages, questions, zipf, past, chains, seed), tokens, dtype, filings, json_file)


@app.command(epilog="Example: ragkv bench answers --questions 100 --finished answers.jsonl --plot answers.png")
def answers(
    model: Annotated[
        Path | None, typer.Option(help="A model's folder, a GGUF file or a folder with one, instead of SmolLM2.")
    ] = None,
    questions: Annotated[int, typer.Option(min=1, max=10_000, help="Each is asked with every setting.")] = 100,
    selections: Annotated[
        str,
        typer.Option(help="Which tokens are computed again.", autocompletion=some_of(SELECTIONS.split(","))),
    ] = SELECTIONS,
    ratios: Annotated[str, typer.Option(help="How many of them, as shares.")] = "0.05,0.1,0.15,0.2,0.3",
    passages: Annotated[int, typer.Option(min=2, max=100, help="Passages of a prompt.")] = 6,
    passage_tokens: Annotated[int, typer.Option(min=64, max=3500, help="Tokens of each passage.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same questions.")] = 0,
    dtype: DtypeOption = "auto",
    filings: FilingsOption = None,
    finished: Annotated[
        Path | None, typer.Option(help="Keep finished questions in this file; the same settings go on with it.")
    ] = None,
    json_file: OutputOption = None,
    plot: PlotOption = None,
) -> None:
    """Exact match, F1 and TTFT of fused passages against full prefill, over questions with known answers."""
    from ragkv.benchmarks.internal.answers import Options, run

    options = Options(
        selections=selections,
        ratios=ratios,
        questions=questions,
        passages=passages,
        passage_tokens=passage_tokens,
        seed=seed,
        dtype=dtype,
        model=model,
        filings=filings,
    )
    run(options, finished, json_file, plot)
