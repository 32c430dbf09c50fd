"""Does a server with ragkv stay as it is, however long it works?

Plain vLLM and vLLM with ragkv and all its tiers take turns under the same load (`soak_load`); the
one that does not play is stopped. After each turn, when all is answered, a server is read: memory, descriptors,
threads, what its tiers hold. vLLM's own memory grows too for a while, so that of ragkv is compared with it; all
else must not grow at all once it has warmed up, and no request may fail.
"""

import functools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from ragkv.benchmarks.internal.redis_server import Server as Redis
from ragkv.benchmarks.internal.redis_server import find_server
from ragkv.benchmarks.internal.soak_load import Users
from ragkv.benchmarks.model import ensure_model
from ragkv.benchmarks.report import write_json
from ragkv.benchmarks.serve_setup import CPU_BLOCK, GPU_BLOCK, on_cpu
from ragkv.benchmarks.serve_systems import PLAIN, RAGKV, Setup, vllm_command, vllm_environment
from ragkv.benchmarks.server import Server, free_port, terminated_kindly
from ragkv.config.settings import format_size
from ragkv.kvstore import metrics as m
from ragkv.scrape import scrape

USERS = 4
NAME, LONGEST, BLOCKS = "soak", 2048, 24  # of vLLM's own cache: so few that everything is evicted all the time
MEMORY, DEVICE, DISK, REDIS = 128 << 20, 32 << 20, 256 << 20, 128 << 20  # bytes
GROWTH = 0.05  # that memory may grow more than plain vLLM's, from the middle third of the turns to the last
SPARE = 2  # descriptors, threads: two moments differ by so much


@dataclass(frozen=True)
class Reading:
    """A server behind one of its turns. Sizes in bytes; `minutes`: under load so far."""

    minutes: float
    requests: int
    failed: int
    memory: int
    descriptors: int
    threads: int
    disk: int = 0
    files: int = 0
    redis: int = 0
    keys: int = 0
    errors: int = 0


class Player:
    """One of the two servers, and its users, who ask for the model `name`. `read_tiers`: what lower tiers hold."""

    def __init__(
        self, server: Server, name: str, vocabulary: int, read_tiers: Callable[[], dict[str, int]]
    ) -> None:
        self.server, self._users = server, Users(server.url, name, vocabulary, USERS)
        self._read_tiers, self._minutes = read_tiers, 0.0
        self.readings: list[Reading] = []

    def play(self, seconds: float) -> None:
        """One turn."""
        self.server.wake()
        self._users.ask_for(seconds)
        self._minutes += seconds / 60
        tally, (descriptors, threads) = self._users.tally, self.server.counts()
        errors = scrape(self.server.url).total(m.ERRORS)
        self.readings.append(
            Reading(
                self._minutes,
                tally.answered + tally.left,
                tally.failed.total(),
                self.server.memory_bytes(),
                descriptors,
                threads,
                errors=int(errors),
                **self._read_tiers(),
            )
        )
        self.server.rest()

    @property
    def complaints(self) -> list[str]:
        """What failed requests were told."""
        return [f"{count} x {said}" for said, count in self._users.tally.failed.most_common(5)]


def run(minutes: float, turn_s: float, model: Path | None, json_file: Path | None) -> dict[str, Any]:
    """Play both for so many minutes each, in turns; print a table, write the report. Exit status 1 where something
    is not flat or failed."""
    console = Console()
    readings, report = play(minutes, turn_s, model or ensure_model(progress=console.print), console)
    console.print(table(readings))
    console.print("\n".join(report["findings"]) or "Flat.", highlight=False)
    write_json(json_file, report)
    if report["findings"]:
        raise typer.Exit(1)
    return report


def play(
    minutes: float, turn_s: float, model: Path, console: Console
) -> tuple[dict[str, list[Reading]], dict[str, Any]]:
    """The readings, by server, and the report."""
    turns = max(6, round(minutes * 60 / turn_s))
    with terminated_kindly(), ExitStack() as stack:
        players = start_both(stack, model, console)
        console.print(f"{turns} turns of {turn_s:g} s for each of {', '.join(players)}, {USERS} users")
        for number in range(turns):
            for player in players.values():
                player.play(turn_s)
            if (number + 1) % max(1, turns // 6) == 0:
                console.print(f"{players[RAGKV].readings[-1]}", highlight=False)
        readings = {name: player.readings for name, player in players.items()}
        return readings, {
            "model": model.name,
            "turn_s": turn_s,
            "readings": {name: [asdict(each) for each in readings[name]] for name in readings},
            "failed": {name: player.complaints for name, player in players.items()},
            "findings": judge(readings),
        }


def judge(readings: Mapping[str, Sequence[Reading]]) -> list[str]:
    """What is not as it must be, a line each: of the first third of the turns nothing is asked but that no request
    failed."""
    found = []
    for name, each in readings.items():
        if each[-1].failed:
            found.append(f"{name}: {each[-1].failed} requests failed")
    own = readings[RAGKV]
    middle, last = own[len(own) // 3 : -(len(own) // 3)], own[-(len(own) // 3) :]
    for what in ("descriptors", "threads"):
        before, after = (max(getattr(each, what) for each in part) for part in (middle, last))
        if after > before + SPARE:
            found.append(f"{RAGKV}: {what} grow, from {before} to {after}")
    for what, most in (("disk", DISK), ("redis", REDIS)):
        if (held := max(getattr(each, what) for each in own)) > most:
            found.append(f"{RAGKV}: {format_size(held)} in {what}, which may hold {format_size(most)}")
    plain, grown = growth(readings[PLAIN]), growth(own)
    if grown > max(plain, 0.0) + GROWTH:
        found.append(
            f"{RAGKV}: memory grows by {grown:.1%} from the middle third to the last, plain by {plain:.1%}"
        )
    return found


def growth(readings: Sequence[Reading]) -> float:
    """Of memory, from the middle third of the turns to the last, by medians; 0.1 is a tenth more."""
    third = len(readings) // 3
    before, after = (
        statistics.median(each.memory for each in part) for part in (readings[third:-third], readings[-third:])
    )
    return after / before - 1


def table(readings: Mapping[str, Sequence[Reading]]) -> Table:
    """Both servers at the end of their first turn, of each third, and of all."""
    shown = Table(title="Servers at rest between their turns")
    columns = (
        "minutes",
        "requests",
        "failed",
        "memory",
        "descriptors",
        "threads",
        "disk",
        "files",
        "Redis",
        "keys",
        "errors",
    )
    for column in ("", *columns):
        shown.add_column(column, justify="right")
    for name, each in readings.items():
        for place in (0, len(each) // 3, 2 * len(each) // 3, -1):
            row = each[place]
            sizes = {what: format_size(getattr(row, what) >> 20 << 20) for what in ("memory", "disk", "redis")}
            values = asdict(row) | sizes | {"minutes": f"{row.minutes:.1f}"}
            shown.add_row(name, *(str(value) for value in values.values()))
    return shown


def start_both(stack: ExitStack, model: Path, console: Console) -> dict[str, Player]:
    """Start both and wait for them, one after the other; they rest."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ragkv-soak-")))
    redis = stack.enter_context(Redis(maxmemory=REDIS, policy="allkeys-lru")) if find_server() else None
    if redis is None:
        console.print("without a Redis tier: no server was found")
    settings: dict[str, Any] = {
        "memory": {"capacity": format_size(MEMORY)},
        "device": {"capacity": format_size(DEVICE)},
        "disk": {"path": str(folder / "disk"), "capacity": format_size(DISK)},
        "fusion": {"enabled": True},
    }
    if redis is not None:
        settings["redis"] = {"url": redis.url}
    cpu = on_cpu()
    setup = Setup(
        model=str(model),
        name=NAME,
        memory=MEMORY,
        blocks=BLOCKS,
        block_size=CPU_BLOCK if cpu else GPU_BLOCK,
        longest=LONGEST,
        logs=folder,
        cpu=cpu,
    )
    connector = {"kv_connector": "RagKVConnector", "kv_role": "kv_both", "kv_connector_extra_config": settings}
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    players = {}
    for name, transfer in ((PLAIN, None), (RAGKV, connector)):
        port = free_port()
        command = vllm_command(Path(sys.executable), setup, port, transfer, None if cpu else 0.45)
        console.print(f"starting {name}")
        server = stack.enter_context(Server(command, port, folder / f"{name}.log", vllm_environment(setup)))
        server.wait().rest()
        tiers = folder / "disk" if name == RAGKV else None
        players[name] = Player(
            server, NAME, vocabulary, functools.partial(read_tiers, tiers, redis if tiers else None)
        )
    return players


def read_tiers(folder: Path | None, redis: Redis | None) -> dict[str, int]:
    """What lower tiers hold, in bytes of values and in number."""
    found: dict[str, int] = {}
    if folder is not None:
        sizes = []
        for path in folder.rglob("*.kv"):
            with suppress(FileNotFoundError):  # evicted since it was listed
                sizes.append(path.stat().st_size)
        found |= {"disk": sum(sizes), "files": len(sizes)}
    if redis is not None:
        client = redis.client()
        keys = [key for key in client.scan_iter(count=1000) if client.type(key) == b"string"]
        found |= {"redis": sum(client.strlen(key) for key in keys), "keys": len(keys)}
    return found
