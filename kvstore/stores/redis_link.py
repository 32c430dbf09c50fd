"""Connections to Redis servers that keep a deadline, over redis-py's pools.

redis-py's time limits hold for each read from a socket, begin anew with every byte that trickles in, and do not
hold for name resolution. Here one call has one deadline, `CLOCK`, which everything that may block obeys.
"""

import contextlib
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import redis
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection
from redis.retry import Retry

from ragkv.kvstore.stores.contract import Buffer

READ_BYTES = 128 * 1024
SMALL_BYTES = 4096

# What says that a server cannot be reached, or has not answered in time.
UNREACHABLE = (redis.ConnectionError, redis.TimeoutError, TimeoutError)


class Address(NamedTuple):
    """Where a server listens: a host (a name or an IP address) and a port, or a socket's path and 0."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}" if self.port else host


class Clock(threading.local):
    """By when the call that this thread is in has to end; by `time.monotonic`."""

    deadline = 0.0

    def left(self) -> float:
        """Seconds, more than 0. TimeoutError: none."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("out of time")
        return left

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """End what is done inside after so many seconds, or when the call around it must end."""
        before = self.deadline
        end = time.monotonic() + seconds
        self.deadline = min(before, end) if before else end
        try:
            yield
        finally:
            self.deadline = before


CLOCK = Clock()


class TimedSocket:
    """A socket whose reads and writes end by the clock, however the bytes trickle."""

    def __init__(self, plain: socket.socket) -> None:
        self._plain = plain
        self._blocks = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)

    def settimeout(self, seconds: float | None) -> None:
        """Only whether it blocks is up to redis-py."""
        self._blocks = seconds != 0
        self._plain.settimeout(seconds)

    def recv(self, *arguments: Any) -> bytes:
        self._arm()
        return self._plain.recv(*arguments)

    def recv_into(self, *arguments: Any) -> int:
        self._arm()
        return self._plain.recv_into(*arguments)

    def sendall(self, data: Buffer) -> None:
        left = memoryview(data)
        while left:
            self._arm()
            left = left[self._plain.send(left) :]

    def _arm(self) -> None:
        if self._blocks:
            self._plain.settimeout(CLOCK.left())


class _Timed(AbstractConnection):
    """What a class of connections needs for its sockets to be timed; stands first among the bases."""

    def _connect(self) -> Any:
        return TimedSocket(super()._connect())  # type: ignore[no-untyped-call, safe-super]


class _Resolving(redis.Connection):
    """Resolves names by the clock, and gives each address that a name has its share of the time."""

    def _connect(self) -> Any:
        found = resolve(self.host, self.port)
        error: OSError = OSError("the name has no address")
        for index, (family, kind, protocol, _, address) in enumerate(found):
            plain = socket.socket(family, kind, protocol)
            try:
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                plain.settimeout(CLOCK.left() / (len(found) - index))
                plain.connect(address)
                plain.settimeout(CLOCK.left())
            except OSError as failed:
                plain.close()
                error = failed
            else:
                return plain
        raise error


class TcpConnection(_Timed, _Resolving):
    """redis:// by the clock."""


class TlsConnection(_Timed, redis.SSLConnection, _Resolving):
    """rediss:// by the clock: the handshake too, since the socket that it starts on has a time limit."""


class UnixConnection(_Timed, redis.UnixDomainSocketConnection):
    """unix:// by the clock."""


_lookups: dict[tuple[int, str, int], Future[list[Any]]] = {}


def resolve(host: str, port: int) -> list[Any]:
    """`getaddrinfo`, which knows no time limit: for a name it runs on a thread that is left behind where time runs
    out, and that later calls wait for. OSError, TimeoutError."""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    key = os.getpid(), host, port
    mine: Future[list[Any]] = Future()
    asked = _lookups.setdefault(key, mine)
    if asked is mine:
        threading.Thread(target=_look_up, args=(key, mine), name="ragkv-resolve", daemon=True).start()
    return asked.result(CLOCK.left())


def _look_up(key: tuple[int, str, int], asked: Future[list[Any]]) -> None:
    try:
        asked.set_result(socket.getaddrinfo(*key[1:], type=socket.SOCK_STREAM))
    except (OSError, UnicodeError) as error:
        asked.set_exception(OSError(f"cannot resolve {key[1]!r}: {error}"))
    finally:
        _lookups.pop(key, None)


class Packer:
    """Commands in Redis' protocol (RESP 2). Arguments are text, numbers, buffers, or lists of buffers that make up
    one argument; what is large goes out as it lies, without a copy."""

    def pack(self, *arguments: Any) -> list[Buffer]:
        """Pieces to send one after the other, as `redis.Connection.pack_commands` wants them."""
        pieces: list[Buffer] = []
        head = b"*%d\r\n" % len(arguments)
        for argument in arguments:
            parts = [_flat(part) for part in (argument if isinstance(argument, list) else [argument])]
            size = sum(map(len, parts))
            head += b"$%d\r\n" % size
            if size <= SMALL_BYTES:
                head += b"".join(parts)
            else:
                pieces += [head, *parts]
                head = b""
            head += b"\r\n"
        return [*pieces, head]


def _flat(argument: Any) -> memoryview:
    if isinstance(argument, str | int):
        argument = str(argument).encode()
    view = memoryview(argument)
    return view.cast("B") if view.c_contiguous else memoryview(view.tobytes())


Command = tuple[Any, ...]


class Pools:
    """Connections to like servers, up to `most` for each; `options` are redis-py's for one connection."""

    def __init__(
        self,
        kind: type[AbstractConnection],
        options: Mapping[str, Any],
        seconds: float,
        most: int,
    ) -> None:
        self._kind = kind
        self._options = {
            **options,
            "protocol": 2,
            "socket_timeout": seconds,
            "socket_connect_timeout": seconds,
            "socket_read_size": READ_BYTES,
            "retry": Retry(NoBackoff(), 0),
            "command_packer": Packer(),
        }
        self._most = most
        self._pools: dict[Address, redis.ConnectionPool] = {}
        self._closed = False

    def ask(self, address: Address, *command: Any) -> Any:
        """One answer; `redis.ResponseError` where that is one."""
        answer = self.exchange({address: [command]})[address][0]
        if isinstance(answer, redis.ResponseError):
            raise answer
        return answer

    def exchange(self, batches: Mapping[Address, Sequence[Command]]) -> dict[Address, list[Any]]:
        """The answers of each server to its commands; everything is sent before the first answer is read. A
        `redis.ResponseError` is an answer too. UNREACHABLE and other `redis.RedisError`s: nothing is known."""
        taken: list[tuple[redis.ConnectionPool, Any]] = []
        whole = False
        try:
            for address, commands in batches.items():
                pool = self._pool(address)
                taken.append((pool, pool.get_connection()))
                connection = taken[-1][1]
                connection.send_packed_command(connection.pack_commands(commands))
            answers = {
                address: [_answer(connection) for _ in batches[address]]
                for address, (_, connection) in zip(batches, taken, strict=True)
            }
            whole = True
            return answers
        finally:
            for pool, connection in taken:
                if not whole or self._closed:
                    connection.disconnect()
                pool.release(connection)

    def close(self) -> None:
        """Close what is idle now, and what is in use once it no longer is."""
        self._closed = True
        for pool in list(self._pools.values()):
            pool.disconnect(inuse_connections=False)

    def _pool(self, address: Address) -> redis.ConnectionPool:
        pool = self._pools.get(address)
        if pool is None:
            host, port = address
            where = {"host": host, "port": port} if port else {"path": host}
            made = redis.ConnectionPool(self._kind, self._most, **where, **self._options)
            pool = self._pools.setdefault(address, made)
        return pool


def _answer(connection: Any) -> Any:
    try:
        return connection.read_response()
    except redis.ResponseError as error:
        return error
