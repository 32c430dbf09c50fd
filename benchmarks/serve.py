"""Serving, side by side: several servers are asked the same chats about filings, and their times set against
each other.

All stand on one machine, and all but the one that plays rest. In each round every system plays the same sessions,
the order going round, so that whatever else the machine does is shared by all. Rounds have texts of their own.
"""

import asyncio
import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from rich.console import Console

from ragkv import rag
from ragkv.benchmarks.model import natural_dtype
from ragkv.benchmarks.report import write_json
from ragkv.benchmarks.serve_client import KEY_VARIABLE, Sample, play, request_client
from ragkv.benchmarks.serve_report import Played, report, table
from ragkv.benchmarks.serve_setup import (
    CPU_BLOCK,
    GPU_BLOCK,
    Model,
    Work,
    cache_blocks,
    check_arguments,
    describe_machine,
    make_work,
    on_cpu,
    passed,
    server_cut,
    size,
    version,
)
from ragkv.benchmarks.serve_systems import LMCACHE, SYSTEMS, Setup, System, lmcache_versions, standing
from ragkv.benchmarks.serve_workload import Shape
from ragkv.benchmarks.server import terminated_kindly
from ragkv.errors import ConfigError, RagKVError

WEIGH_SECONDS = 1.0
WEIGH_REST = 100  # times as long as weighing took: it takes from what is timed, and most from large caches

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What `ragkv bench serve` was asked for. `urls`: servers that run already, as NAME=URL, instead of `systems`;
    `memory`: of each cache beside vLLM's own; `kv_cache_tokens`: of that; `arguments`: more for vLLM."""

    shape: Shape
    systems: tuple[str, ...] = ("plain", "ragkv")
    urls: tuple[str, ...] = ()
    model: str | None = None
    rounds: int = 3
    filings: Path | None = None
    memory: str = "2GiB"
    kv_cache_tokens: int | None = None
    dtype: str = "auto"
    lmcache_python: Path | None = None
    arguments: tuple[str, ...] = ()
    json_file: Path | None = None
    plot: Path | None = None


def run(options: Options) -> dict[str, Any]:
    """Start what is to play, play, print tables, write the report. RagKVError, ValueError: one line for people."""
    console = Console()
    for file in filter(None, (options.json_file, options.plot)):  # before hours of work
        if file.is_dir():
            raise ConfigError(f"{file} is a folder; allowed: a file to write")
        file.parent.mkdir(parents=True, exist_ok=True)

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    with terminated_kindly():
        made = _of_urls(options, say) if options.urls else _of_systems(options, say)
    write_json(options.json_file, made)
    console.print(table(made))
    if options.plot is not None:
        from ragkv.benchmarks.serve_picture import draw

        draw(made, options.plot)
    return made


def _of_systems(options: Options, say: Say) -> dict[str, Any]:
    """The report of servers that are started here."""
    names = check_systems(options.systems)
    check_arguments(options.arguments)
    memory = size("memory", options.memory)
    model = Model(options.model, say)
    work = make_work(options.shape, options.rounds, options.filings, model.cut)
    cpu = on_cpu()
    block = int(passed(options.arguments, "--block-size") or (CPU_BLOCK if cpu else GPU_BLOCK))
    longest = model.longest(work, options.shape.answer_tokens)
    blocks = cache_blocks(longest, block, options.shape, options.kv_cache_tokens)
    config = _config(options) | {
        "systems": list(names),
        "memory_bytes": memory,
        "kv_cache_tokens": (blocks - 1) * block,
        "block_size": block,
        "longest_tokens": longest,
        "vllm_arguments": list(options.arguments),
        "ragkv_variables": sorted(name for name in os.environ if name.startswith("RAGKV_")),
    }
    with _logs() as logs:
        setup = Setup(
            model=model.path,
            name=model.name,
            memory=memory,
            blocks=blocks,
            block_size=block,
            longest=longest,
            logs=logs,
            cpu=cpu,
            dtype=options.dtype,
            arguments=options.arguments,
            lmcache_python=options.lmcache_python,
        )
        if options.kv_cache_tokens is None and options.shape.session_count <= options.shape.concurrency:
            say("no session has to wait, so vLLM's own cache holds them all: more --documents would tell more")
        if config["ragkv_variables"]:
            say(f"ragkv's settings come from the environment too: {', '.join(config['ragkv_variables'])}")
        say(f"starting {', '.join(names)}")
        with standing(names, setup, say) as (systems, skipped):
            played = play_rounds(systems, work, options.shape, say)
    environment = describe_machine(cpu) | {"model": model.name, "dtype": natural_dtype(options.dtype, cpu)}
    if options.lmcache_python and any(system.name == LMCACHE for system in systems):
        environment |= lmcache_versions(options.lmcache_python)
    return report(environment, config, played, systems[0].name, skipped)


def _of_urls(options: Options, say: Say) -> dict[str, Any]:
    """The report of servers that run already. The first one's tokenizer cuts the texts for all."""
    named = [_named(text) for text in options.urls]
    if len({name for name, _ in named}) < len(named):
        raise ConfigError(f"url = {', '.join(options.urls)}; allowed: each with a name of its own, as NAME=URL")
    clients = {name: rag.Server(url, api_key=os.environ.get(KEY_VARIABLE)) for name, url in named}
    for client in clients.values():
        client.model = options.model or str(client.models()[0]["id"])
    systems = [System(name, client.url, str(client.model)) for name, client in clients.items()]
    first = clients[systems[0].name]
    versions = {name: _version(client) for name, client in clients.items()}
    work = make_work(options.shape, options.rounds, options.filings, server_cut(first))
    played = play_rounds(systems, work, options.shape, say)
    environment = {"ragkv": version("ragkv"), "vllm": versions, "model": first.model}
    return report(environment, _config(options) | {"systems": list(clients)}, played, systems[0].name)


def _version(client: rag.Server) -> str | None:
    """vLLM's, where it says so; somebody else's server may not."""
    try:
        return str(client.call("/version")["version"])
    except (RagKVError, KeyError):
        return None


def check_systems(names: Sequence[str]) -> tuple[str, ...]:
    """The names, if all are known and none comes twice. ConfigError says what is allowed."""
    if not names or set(names) - set(SYSTEMS) or len(set(names)) < len(names):
        raise ConfigError(f"system = {','.join(names)}; allowed: each once, of {', '.join(SYSTEMS)}")
    return tuple(names)


def play_rounds(systems: Sequence[System], work: Work, shape: Shape, say: Say) -> list[Played]:
    """Warm all up, then play all rounds. In each one another system begins. All must be at rest, and are after."""
    request_client()  # imports vLLM: not while anything is timed
    for system in systems:
        _Play(system).round(work.warm_up, shape, -1)
    plays = {system.name: _Play(system) for system in systems}
    for number, sessions in enumerate(work.rounds):
        begin = number % len(systems)
        for system in [*systems[begin:], *systems[:begin]]:
            samples, seconds = plays[system.name].round(sessions, shape, number)
            failed = sum(sample.error is not None for sample in samples)
            errors = f", {failed} failed" if failed else ""
            say(
                f"round {number + 1} of {len(work.rounds)}, {system.name}: {len(samples)} requests in "
                f"{seconds:.1f} s{errors}"
            )
            if not system.alive:
                say(f"{system.name} has ended; see {', '.join(str(server.log) for server in system.servers)}")
    return [each.played() for each in plays.values()]


class _Play:
    """What one system does, round by round."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._samples: list[Sample] = []
        self._seconds = 0.0
        self._tokens: Counter[str] = Counter()
        self._peak: int | None = None

    def round(self, sessions: list[Any], shape: Shape, number: int) -> tuple[list[Sample], float]:
        """Its samples, and the seconds that it took."""
        system = self._system
        system.wake()
        try:
            before = system.tokens()
            with Scale(system, threading.Event()) as scale:
                began = time.perf_counter()
                samples = asyncio.run(play(system.url, system.model, sessions, shape, number))
                seconds = time.perf_counter() - began
            if (after := system.tokens()) and before:  # both answered
                self._tokens += after - before
        finally:
            system.rest()
        self._samples += samples
        self._seconds += seconds
        if scale.peak is not None:
            self._peak = max(scale.peak, self._peak or 0)
        return samples, seconds

    def played(self) -> Played:
        hits = {source: count for source, count in sorted(self._tokens.items()) if source}
        return Played(self._system.name, self._samples, self._seconds, hits, self._tokens[""], self._peak)


class Scale:
    """Weighs a system's processes now and then, in a thread, until `done`. `peak`: bytes, the most that was
    seen."""

    def __init__(self, system: System, done: threading.Event) -> None:
        self._system, self._done = system, done
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak: int | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._weigh()

    def _watch(self) -> None:
        pause = WEIGH_SECONDS
        while not self._done.wait(pause):
            began = time.perf_counter()
            self._weigh()
            pause = max(WEIGH_SECONDS, WEIGH_REST * (time.perf_counter() - began))

    def _weigh(self) -> None:
        weight = self._system.memory_bytes()
        if weight is not None:
            self.peak = max(weight, self.peak or 0)


def _config(options: Options) -> dict[str, Any]:
    """What decides the requests, and how many of each there are."""
    filings = options.filings.name if options.filings else "generated"
    return asdict(options.shape) | {"rounds": options.rounds, "texts": filings}


def _named(text: str) -> tuple[str, str]:
    """Name and address from NAME=URL, or from a URL alone, which is called after its host."""
    name, sign, url = text.partition("=")
    if sign and "/" not in name:
        return name, url
    return urlsplit(text).netloc or text, text


@contextlib.contextmanager
def _logs() -> Iterator[Path]:
    """A folder for logs. Those that tell of a fault stay, unless the user wanted an end of it all."""
    folder = Path(tempfile.mkdtemp(prefix="ragkv-bench-serve-"))
    try:
        yield folder
    except (KeyboardInterrupt, SystemExit):
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # where it is empty
