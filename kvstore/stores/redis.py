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
from typing import Any

import redis

from ragkv.errors import ConfigError, StoreError
from ragkv.kvstore.stores.contract import KEY_BYTES, Buffer, Capabilities, Entry, Store
from ragkv.kvstore.stores.redis_link import (
    CLOCK,
    Address,
    Command,
    Pools,
    TcpConnection,
    TlsConnection,
    UnixConnection,
)
from ragkv.kvstore.stores.redis_nodes import ClusterNodes, Nodes, SentinelNodes, SingleNode, redirection
from ragkv.kvstore.stores.redis_url import Location, parse_location

PREFIX = "ragkv:1:"
MAX_VALUE_BYTES = 64 << 20
LARGEST_BULK = 512 << 20  # proto-max-bulk-len, as servers come
GETS_AT_ONCE = 16
BYTES_AT_ONCE = 64 << 20
KEYS_AT_ONCE = 1024
ROOM_STEPS = 8
LONGEST_TTL = 10 * 365 * 86400
LONGEST_CALL = 3600
ROUNDS = 4

_KINDS = {"tcp": TcpConnection, "tls": TlsConnection, "unix": UnixConnection}
_REFUSED = (redis.AuthenticationError, redis.exceptions.AuthorizationError, redis.exceptions.BusyLoadingError)
_REFUSALS = ("MISCONF", "NOREPLICAS", "DENIED")


class RedisStore(Store):
    """Connects at the first call, and again whenever needed.

    `url`: see `ragkv.kvstore.stores.redis_url`. `ttl_seconds`: how long a value lives after its last put or touch;
    None: until the server evicts it. `timeout_seconds`: how long a call may take as a whole, connecting and
    waiting for a free connection included. `max_connections`: calls at a time, each with one connection to each
    server that it needs. ConfigError: settings that cannot be.

    A value of another type under one of our keys is a miss to `get`, and is replaced by `put`. What is lost when
    a connection breaks is tried once more, within the same time; no call changes anything by being repeated, but
    `delete` may count less than it removed.
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
        if not 0 < timeout_seconds <= LONGEST_CALL:
            raise _unfit("timeout_seconds", timeout_seconds, f"more than 0 and up to {LONGEST_CALL}")
        if re.fullmatch(r"[!-z|~]{1,64}", prefix) is None:  # { } would put a cluster's keys into one slot
            raise _unfit("prefix", prefix, "1 to 64 printable ASCII characters but space, { and }")
        self._expiry: tuple[Any, ...] = () if ttl_seconds is None else ("EX", ttl_seconds)
        self._largest = max_value_bytes
        self._seconds = timeout_seconds
        self._prefix = prefix.encode()
        self._most = max_connections
        self._closed = False
        self._hands: dict[Address, int] = {}  # where looking for what may go stands, on each server
        self._session = _Session(self._location, timeout_seconds, max_connections)

    def __repr__(self) -> str:
        return f"RedisStore({self._location.text!r})"

    def get(self, key: bytes) -> Buffer | None:
        return self.get_many([key])[0]

    def get_many(self, keys: Sequence[bytes]) -> list[Buffer | None]:
        with self._call() as session:
            found: list[Buffer | None] = []
            for some in _windows(keys, GETS_AT_ONCE):
                found += [_value(answer) for answer in session.run([("GET", self._key(key)) for key in some])]
            return found

    def put(self, key: bytes, parts: Sequence[Buffer]) -> None:
        self.put_many([(key, parts)])

    def put_many(self, items: Sequence[tuple[bytes, Sequence[Buffer]]]) -> None:
        """Nothing is sent where one value is too large."""
        sizes = [sum(memoryview(part).nbytes for part in parts) for _, parts in items]
        for size in sizes:
            if size > self._largest:
                raise StoreError("too_large", f"{self._at}: {size} bytes are more than {self._largest}")
        with self._call() as session:
            commands: list[Command] = []
            waiting = 0
            for (key, parts), size in zip(items, sizes, strict=True):
                if commands and (waiting + size > BYTES_AT_ONCE or len(commands) == KEYS_AT_ONCE):
                    _expect_no_error(session.run(commands))
                    commands, waiting = [], 0
                commands.append(("SET", self._key(key), list(parts), *self._expiry))
                waiting += size
            _expect_no_error(session.run(commands))

    def delete(self, keys: Iterable[bytes]) -> int:
        return sum(self._each("UNLINK", list(keys)))

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [answer == 1 for answer in self._each("EXISTS", keys)]

    def scan(self) -> Iterator[Entry]:
        """Sizes are what the server spends on a value. Each step may take `timeout_seconds`. Needs Redis 6."""
        with self._call() as session:
            masters = session.nodes.masters()
        seen: set[bytes] = set()
        for master in masters:
            cursor: Any = 0
            while True:
                with self._call() as session:
                    cursor, names = session.pools.ask(master, *self._scan_step(cursor))
                    fresh = [name for name in dict.fromkeys(names) if name not in seen]
                    entries = self._entries(session, master, fresh)
                seen.update(names)
                yield from entries
                if int(cursor) == 0:
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
        with self._call() as session:
            (server,) = session.nodes.holders([self._key(key)])
            for _ in range(ROOM_STEPS):
                cursor, names = session.pools.ask(server, *self._scan_step(self._hands.get(server, 0)))
                self._hands[server] = int(cursor)
                found = self._entries(session, server, list(dict.fromkeys(names)))
                going, sizes = [], 0
                for entry in self._idlest(session, server, found):
                    if sizes >= size:
                        break
                    going.append(("UNLINK", self._key(entry.key)))
                    sizes += entry.size
                answers = session.pools.exchange({server: going})[server] if going else []
                _expect_no_error(answers)
                removed, size = removed + sum(answers), size - sizes
                if size <= 0:
                    break
        return removed

    def close(self) -> None:
        """Calls on their way end as they would have."""
        self._closed = True
        if self._session.pid == os.getpid():  # a fork leaves its parent's alone
            self._session.close()

    @property
    def _at(self) -> str:
        return f"redis: {self._location.text}"

    def _key(self, key: bytes) -> bytes:
        return self._prefix + key.hex().encode()

    def _each(self, name: str, keys: Sequence[bytes], *arguments: Any) -> list[Any]:
        """The answers to one command for every key."""
        answers = []
        with self._call() as session:
            for some in _windows(keys, KEYS_AT_ONCE):
                answers += session.run([(name, self._key(key), *arguments) for key in some])
                _expect_no_error(answers)
        return answers

    def _scan_step(self, cursor: Any) -> Command:
        pattern = re.sub(rb"([*?\[\]\\^])", rb"\\\1", self._prefix) + b"?" * (2 * KEY_BYTES)
        return "SCAN", cursor, "MATCH", pattern, "COUNT", KEYS_AT_ONCE, "TYPE", "string"

    def _idlest(self, session: "_Session", server: Address, entries: Sequence[Entry]) -> list[Entry]:
        """The longer unused half, longest unused first."""
        commands = [("OBJECT", "IDLETIME", self._key(entry.key)) for entry in entries]
        told = session.pools.exchange({server: commands})[server] if commands else []
        idle = [each if isinstance(each, int) else 0 for each in told]  # a refusal, where it may not be asked
        order = sorted(range(len(entries)), key=lambda place: -idle[place])
        return [entries[place] for place in order[: -(-len(entries) // 2)]]

    def _entries(self, session: "_Session", master: Address, names: Sequence[bytes]) -> list[Entry]:
        commands = [("MEMORY", "USAGE", name, "SAMPLES", 0) for name in names]
        sizes = session.pools.exchange({master: commands})[master] if commands else []
        _expect_no_error(sizes)
        found = []
        for name, size in zip(names, sizes, strict=True):
            key = _unhex(name[len(self._prefix) :])
            if size is not None and self._key(key) == name:  # else gone meanwhile, or somebody's
                found.append(Entry(key, size, 0.0))
        return found

    @contextlib.contextmanager
    def _call(self) -> Iterator["_Session"]:
        """Take a turn, by the clock; every fault becomes a StoreError."""
        try:
            with CLOCK.within(self._seconds), self._opened().turn() as session:
                yield session
        except (redis.RedisError, OSError) as error:
            raise self._fault(error) from None

    def _opened(self) -> "_Session":
        """After a fork, one's own: the parent's connections are never used."""
        if self._closed:
            raise StoreError("closed", f"{self._at}: the store is closed")
        if self._session.pid != os.getpid():
            self._session = _Session(self._location, self._seconds, self._most)
        return self._session

    def _fault(self, error: Exception) -> StoreError:
        text = " ".join(str(error).split()) or type(error).__name__
        for secret in self._location.secrets:
            text = text.replace(secret, "...")
        return StoreError(_reason(error), f"{self._at}: {text[:300]}")


class _Session:
    """What a store shares among the threads of one process."""

    def __init__(self, location: Location, seconds: float, most: int) -> None:
        self.pid = os.getpid()
        kind = _KINDS[location.transport]
        self.pools = Pools(kind, location.options, seconds, most)
        self.nodes: Nodes = SingleNode(location.addresses[0])
        if location.kind == "sentinel":
            sentinels = Pools(kind, location.sentinel_options, seconds, most)
            self.nodes = SentinelNodes(location.addresses, location.service, sentinels)
        elif location.kind == "cluster":
            self.nodes = ClusterNodes(location.addresses, self.pools)
        self._gate = threading.BoundedSemaphore(most)

    @contextlib.contextmanager
    def turn(self) -> Iterator["_Session"]:
        if not self._gate.acquire(timeout=CLOCK.left()):
            raise TimeoutError("no connection became free")
        try:
            yield self
        finally:
            self._gate.release()

    def close(self) -> None:
        self.pools.close()
        self.nodes.close()

    def run(self, commands: Sequence[Command]) -> list[Any]:
        """The answers to commands whose second word is the key, wherever these lie; what went astray is sent
        again. `redis.ResponseError`s are answers; other errors of redis-py's are raised."""
        answers: list[Any] = [None] * len(commands)
        if not commands:
            return answers
        left = list(range(len(commands)))
        sent_on: dict[int, tuple[Address, bool]] = {}
        for round_ in range(ROUNDS):
            try:
                left = self._send(commands, left, sent_on, answers)
            except redis.RedisError as error:
                self.nodes.forget()
                if round_ or not _broken(error):
                    raise
                sent_on.clear()
            if not left:
                break
        return answers

    def _send(
        self,
        commands: Sequence[Command],
        left: list[int],
        sent_on: dict[int, tuple[Address, bool]],
        answers: list[Any],
    ) -> list[int]:
        """One round for the commands in `left`; which of them have to be sent again, and in `sent_on` where to."""
        holders = self.nodes.holders([commands[index][1] for index in left])
        batches: dict[Address, list[tuple[int, Command]]] = {}
        for index, holder in zip(left, holders, strict=True):
            address, asking = sent_on.pop(index, (holder, False))
            batch = batches.setdefault(address, [])
            batch += [(-1, ("ASKING",))] if asking else []
            batch.append((index, commands[index]))
        found = self.pools.exchange({at: [command for _, command in batch] for at, batch in batches.items()})
        again = []
        for address, batch in batches.items():
            for (index, _), answer in zip(batch, found[address], strict=True):
                if index < 0:
                    continue
                answers[index] = answer
                target = redirection(answer, address)
                if target is not None:
                    sent_on[index] = target
                if target is not None or isinstance(answer, redis.ReadOnlyError):
                    again.append(index)
                    self.nodes.forget()
        return again


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


def _broken(error: Exception) -> bool:
    """Whether a connection broke or was refused, which a server that was restarted or replaced may mend."""
    refused = isinstance(error, _REFUSED) or isinstance(error.__context__, ssl.SSLError)
    return isinstance(error, redis.ConnectionError) and not refused


def _reason(error: Exception) -> str:
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
