"""Values in Redis or Valkey: one server, a master that Sentinel watches, or a cluster.

A value lies as a string under `<prefix><key in hex>`, and is written with its time to live by one SET. What the
server evicts, expires or flushes is a miss. Batches are pipelined, never transactions.
"""

import contextlib
import os
import re
import ssl
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import redis
from redis.exceptions import RedisClusterException

from ragkv.errors import ConfigError, StoreError
from ragkv.kvstore.stores.contract import KEY_BYTES, Buffer, Capabilities, Entry, Store
from ragkv.kvstore.stores.redis_clients import Client, Command, ask, connect, disconnect, holder, masters
from ragkv.kvstore.stores.redis_url import parse_location

PREFIX = "ragkv:1:"
MAX_VALUE_BYTES = 64 << 20
LARGEST_BULK = 512 << 20  # proto-max-bulk-len, as servers come
GETS_AT_ONCE = 16
BYTES_AT_ONCE = 64 << 20
KEYS_AT_ONCE = 1024
ROOM_STEPS = 8
LONGEST_TTL = 10 * 365 * 86400
LONGEST_WAIT = 3600

_REFUSED = (redis.AuthenticationError, redis.exceptions.AuthorizationError, redis.exceptions.BusyLoadingError)
_REFUSALS = ("MISCONF", "NOREPLICAS", "DENIED")


class RedisStore(Store):
    """Connects at the first call, and again whenever needed.

    `url`: see `ragkv.kvstore.stores.redis_url`. `ttl_seconds`: how long a value lives after its last put or touch;
    None: until the server evicts it. `timeout_seconds`: how long each wait may take: for a free connection, for
    connecting, for the next bytes. What bounds a call as a whole is the tier, which gives up waiting for it.
    `max_connections`: calls at a time, each with one connection to each server that it needs. ConfigError:
    settings that are not allowed.

    A value of another type under one of our keys is a miss to `get`, and is replaced by `put`. What is lost when
    a connection breaks is tried once more; no call changes anything by being repeated, but `delete` may count less
    than it removed.
    """

    name = "redis"
    capabilities = Capabilities(durable=True, shared=True, evicts=True, batched=True)

    def __init__(
        self,
        url: str,
        *,
        ttl_seconds: int | None = None,
        max_value_bytes: int = MAX_VALUE_BYTES,
        timeout_seconds: float = 1.0,
        prefix: str = PREFIX,
        max_connections: int = 8,
    ) -> None:
        self._location = parse_location(url)
        _check_whole("max_value_bytes", max_value_bytes, LARGEST_BULK)
        _check_whole("max_connections", max_connections, 1000)
        if ttl_seconds is not None:
            _check_whole("ttl_seconds", ttl_seconds, LONGEST_TTL)
        if not 0 < timeout_seconds <= LONGEST_WAIT:
            raise _unfit("timeout_seconds", timeout_seconds, f"more than 0 and up to {LONGEST_WAIT}")
        if re.fullmatch(r"[!-z|~]{1,64}", prefix) is None:  # { } would put a cluster's keys into one slot
            raise _unfit("prefix", prefix, "1 to 64 printable ASCII characters but space, { and }")
        self._expiry: tuple[Any, ...] = () if ttl_seconds is None else ("EX", ttl_seconds)
        self._largest = max_value_bytes
        self._seconds = timeout_seconds
        self._prefix = prefix.encode()
        self._most = max_connections
        self._closed = False
        self._hands: dict[str, int] = {}  # by server, where the search for values to remove goes on
        self._session = _Session(os.getpid(), threading.BoundedSemaphore(max_connections))

    def __repr__(self) -> str:
        return f"RedisStore({self._location.text!r})"

    def get(self, key: bytes) -> Buffer | None:
        return self.get_many([key])[0]

    def get_many(self, keys: Sequence[bytes]) -> list[Buffer | None]:
        with self._call() as client:
            found: list[Buffer | None] = []
            for some in _windows(keys, GETS_AT_ONCE):
                found += [_value(answer) for answer in ask(client, [("GET", self._key(key)) for key in some])]
            return found

    def put(self, key: bytes, parts: Sequence[Buffer]) -> None:
        self.put_many([(key, parts)])

    def put_many(self, items: Sequence[tuple[bytes, Sequence[Buffer]]]) -> None:
        """Nothing is sent where one value is too large."""
        sizes = [sum(memoryview(part).nbytes for part in parts) for _, parts in items]
        for size in sizes:
            if size > self._largest:
                raise StoreError("too_large", f"{self._at}: {size} bytes are more than {self._largest}")
        with self._call() as client:
            commands: list[Command] = []
            waiting = 0
            for (key, parts), size in zip(items, sizes, strict=True):
                if commands and (waiting + size > BYTES_AT_ONCE or len(commands) == KEYS_AT_ONCE):
                    _expect_no_error(ask(client, commands))
                    commands, waiting = [], 0
                commands.append(("SET", self._key(key), _joined(parts), *self._expiry))
                waiting += size
            _expect_no_error(ask(client, commands))

    def delete(self, keys: Iterable[bytes]) -> int:
        return sum(self._each("UNLINK", list(keys)))

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [answer == 1 for answer in self._each("EXISTS", keys)]

    def scan(self) -> Iterator[Entry]:
        """Sizes are what the server spends on a value. Needs Redis 6."""
        with self._call() as client:
            servers = masters(client)
        seen: set[bytes] = set()
        for server in servers:
            cursor = 0
            while True:
                with self._call():
                    cursor, names = self._scan_step(server, cursor)
                    entries = self._entries(server, [name for name in names if name not in seen])
                seen.update(names)
                yield from entries
                if cursor == 0:
                    break

    def touch(self, keys: Sequence[bytes]) -> None:
        """Begin the values' time to live anew; without one, nothing."""
        self._opened()
        if self._expiry:
            self._each("EXPIRE", keys[::-1], self._expiry[1])

    def make_room(self, key: bytes, size: int) -> int:
        """Remove values of ours on the server that holds `key`, which evicts nothing itself: in a few steps over
        its keys, which go on from call to call, the longer unused half of those found (of any, where it does not
        say how long), until `size` bytes are free."""
        removed = 0
        with self._call() as client:
            server = holder(client, self._key(key))
            where = server.connection_pool.connection_kwargs
            place = f"{where.get('host')}:{where.get('port')}"
            for _ in range(ROOM_STEPS):
                self._hands[place], names = self._scan_step(server, self._hands.get(place, 0))
                going, sizes = [], 0
                for entry in self._idlest(server, self._entries(server, names)):
                    if sizes >= size:
                        break
                    going.append(("UNLINK", self._key(entry.key)))
                    sizes += entry.size
                answers = ask(server, going)
                _expect_no_error(answers)
                removed, size = removed + sum(answers), size - sizes
                if size <= 0:
                    break
        return removed

    def close(self) -> None:
        """Calls on their way end as they would have."""
        self._closed = True
        session = self._session
        if session.pid == os.getpid() and session.client is not None:  # a fork leaves its parent's alone
            disconnect(session.client)

    @property
    def _at(self) -> str:
        return f"redis: {self._location.text}"

    def _key(self, key: bytes) -> bytes:
        return self._prefix + key.hex().encode()

    def _each(self, name: str, keys: Sequence[bytes], *arguments: Any) -> list[Any]:
        """The answers to one command for every key."""
        answers = []
        with self._call() as client:
            for some in _windows(keys, KEYS_AT_ONCE):
                answers += ask(client, [(name, self._key(key), *arguments) for key in some])
                _expect_no_error(answers)
        return answers

    def _scan_step(self, server: redis.Redis, cursor: int) -> tuple[int, list[bytes]]:
        """The next cursor, and names that may be ours, each once."""
        pattern = re.sub(rb"([*?\[\]\\^])", rb"\\\1", self._prefix) + b"?" * (2 * KEY_BYTES)
        command = ("SCAN", cursor, "MATCH", pattern, "COUNT", KEYS_AT_ONCE, "TYPE", "string")
        answers = ask(server, [command])
        _expect_no_error(answers)
        ((after, names),) = answers
        return int(after), list(dict.fromkeys(names))

    def _idlest(self, server: redis.Redis, entries: Sequence[Entry]) -> list[Entry]:
        """The longer unused half, longest unused first."""
        told = ask(server, [("OBJECT", "IDLETIME", self._key(entry.key)) for entry in entries])
        idle = [each if isinstance(each, int) else 0 for each in told]  # a refusal, where it may not be asked
        order = sorted(range(len(entries)), key=lambda place: -idle[place])
        return [entries[place] for place in order[: -(-len(entries) // 2)]]

    def _entries(self, server: redis.Redis, names: Sequence[bytes]) -> list[Entry]:
        sizes = ask(server, [("MEMORY", "USAGE", name, "SAMPLES", 0) for name in names])
        _expect_no_error(sizes)
        found = []
        for name, size in zip(names, sizes, strict=True):
            key = _unhex(name[len(self._prefix) :])
            if size is not None and self._key(key) == name:  # else gone meanwhile, or somebody's
                found.append(Entry(key, size, 0.0))
        return found

    @contextlib.contextmanager
    def _call(self) -> Iterator[Client]:
        """Take a turn; every fault becomes a StoreError."""
        session = self._opened()
        try:
            if not session.gate.acquire(timeout=self._seconds):
                raise TimeoutError("no connection became free")
            try:
                if session.client is None:
                    session.client = connect(self._location, self._seconds, self._most)
                yield session.client
            finally:
                session.gate.release()
                if self._closed and session.client is not None:
                    disconnect(session.client)
        except (redis.RedisError, RedisClusterException, OSError) as error:
            raise self._fault(error) from None

    def _opened(self) -> "_Session":
        """After a fork, one's own: the parent's connections are never used."""
        if self._closed:
            raise StoreError("closed", f"{self._at}: the store is closed")
        if self._session.pid != os.getpid():
            self._session = _Session(os.getpid(), threading.BoundedSemaphore(self._most))
        return self._session

    def _fault(self, error: Exception) -> StoreError:
        text = " ".join(str(error).split()) or type(error).__name__
        for secret in self._location.secrets:
            text = text.replace(secret, "...")
        return StoreError(_reason(error), f"{self._at}: {text[:300]}")


@dataclass
class _Session:
    """What a store shares among the threads of one process."""

    pid: int
    gate: threading.BoundedSemaphore
    client: Client | None = None


def _check_whole(name: str, value: int, most: int) -> None:
    if not isinstance(value, int) or not 1 <= value <= most:
        raise _unfit(name, value, f"a whole number from 1 to {most}")


def _unfit(name: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"redis: {name} = {value!r} is not {allowed}")


def _windows(items: Sequence[bytes], size: int) -> Iterator[Sequence[bytes]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _unhex(name: bytes) -> bytes:
    try:
        return bytes.fromhex(name.decode("ascii"))
    except ValueError:
        return b""


def _joined(parts: Sequence[Buffer]) -> bytes:
    views = [memoryview(part) for part in parts]
    return b"".join(view if view.c_contiguous else view.tobytes() for view in views)


def _value(answer: Any) -> Buffer | None:
    """A value of another type is somebody else's: nothing of ours is there."""
    if isinstance(answer, redis.ResponseError):
        if str(answer).startswith("WRONGTYPE"):
            return None
        raise answer
    found: Buffer | None = answer
    return found


def _expect_no_error(answers: Sequence[Any]) -> None:
    for answer in answers:
        if isinstance(answer, redis.ResponseError):
            raise answer


def _broken(error: BaseException) -> bool:
    """Whether a connection broke or was refused, which a server that was restarted or replaced may mend."""
    refused = isinstance(error, _REFUSED) or isinstance(error.__context__, ssl.SSLError)
    return isinstance(error, redis.ConnectionError) and not refused


def _reason(error: BaseException) -> str:
    if isinstance(error, RedisClusterException):  # no node answers, or none serves the slot
        return "gone" if error.__cause__ is None else _reason(error.__cause__)
    if isinstance(error, redis.TimeoutError | TimeoutError):
        return "timeout"
    if isinstance(error, redis.exceptions.OutOfMemoryError):
        return "full"
    if _broken(error) or isinstance(error, redis.exceptions.ClusterDownError):
        return "gone"
    refusals = (redis.ConnectionError, redis.ReadOnlyError, redis.exceptions.NoPermissionError)
    if isinstance(error, refusals) or str(error).startswith(_REFUSALS):
        return "refused"
    return "io"
