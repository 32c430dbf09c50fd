"""A server in a process of its own, such as vLLM's: started, waited for, put to rest, weighed and stopped.

Several stand side by side on one machine: those that rest are stopped (SIGSTOP), since idle engines spin. A server
ends with the process that started it, however that ends. Linux only: what belongs to a server is read from /proc.
"""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from ragkv.errors import RagKVError

HOST = "127.0.0.1"
START_SECONDS = 600.0
STOP_SECONDS = 20.0
KILL_SECONDS = 20.0
POLL_SECONDS = 0.1
PING_SECONDS = 5.0
MOST_BYTES = 64 << 20  # of an answer
LOG_LINES = 25

# Waits for the end of its standard input, which the process that started the server alone holds open.
WATCHDOG = 'read -r _; kill -s KILL -- "-$1"'


class ServerError(RagKVError):
    """A server did not start, died, or does not answer; the text shows the end of its log."""


def free_port() -> int:
    """A TCP port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def fetch(url: str, seconds: float = PING_SECONDS) -> str:
    """The text behind a URL, past any proxy. OSError where it cannot be had."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url, timeout=seconds) as answer:
        text: str = answer.read(MOST_BYTES).decode("utf-8", "replace")
        return text


class Server:
    """Starts at once; use as a context manager, or `close` it.

    `command`: what to run, with `environment` added to this process's own. `port`: where it will listen, on
    loopback. `log`: the file that takes all it prints. `health`: the path that answers once it is ready.
    ServerError where the command cannot be run.
    """

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        log: Path,
        environment: Mapping[str, str] | None = None,
        health: str = "/health",
    ) -> None:
        self.port, self.log = port, log
        self._health = health
        self._resting = False
        with log.open("wb") as output:
            try:
                self._process = subprocess.Popen(
                    list(command),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **(environment or {})},
                    start_new_session=True,  # so that Ctrl-C reaches us alone
                )
            except OSError as error:
                raise ServerError(f"{command[0]} cannot be run: {error.strerror or error}") from None
        watch = ["sh", "-c", WATCHDOG, "sh", str(self.pid)]
        self._watchdog = subprocess.Popen(watch, stdin=subprocess.PIPE, start_new_session=True)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """Of the first process; also the id of the group and session of all of them."""
        return self._process.pid

    def wait(self, seconds: float = START_SECONDS) -> Self:
        """Until the server answers. ServerError where it dies first, or takes longer."""
        deadline = time.monotonic() + seconds
        while not self.ready():
            if time.monotonic() > deadline:
                raise ServerError(f"the server did not answer within {seconds:g} s\n{self.last_lines()}")
            time.sleep(POLL_SECONDS)
        return self

    def ready(self) -> bool:
        """Whether it answers now; one that rests does not. ServerError where it has ended."""
        try:
            fetch(self.url + self._health)
            healthy = True
        except (OSError, http.client.HTTPException):
            healthy = False
        if (status := self._process.poll()) is not None:  # then somebody else may have answered
            raise ServerError(f"the server has ended, with status {status}\n{self.last_lines()}")
        return healthy

    @property
    def alive(self) -> bool:
        """Whether its first process has not ended; also of one that rests."""
        return self._process.poll() is None

    def last_lines(self, count: int = LOG_LINES) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-count:])

    def rest(self) -> None:
        """Stop every process where it stands: it keeps its memory and takes no time. Safe to call twice."""
        self._resting = True
        stopped: set[int] = set()
        while more := set(self._processes()) - stopped:  # one may have been started meanwhile
            _signal(more, signal.SIGSTOP)
            stopped |= more

    def wake(self) -> None:
        """Let it go on. Safe to call twice."""
        if self._resting:
            _signal(self._processes(), signal.SIGCONT)
            self._resting = False

    def memory_bytes(self) -> int:
        """Memory of all its processes; what they share among them, or with others, is divided (PSS)."""
        return sum(map(_proportional_bytes, self._processes()))

    def counts(self) -> tuple[int, int]:
        """Open descriptors and threads of all its processes."""
        folders = [Path(f"/proc/{pid}") for pid in self._processes()]
        descriptors, threads = (sum(_entries(each / what) for each in folders) for what in ("fd", "task"))
        return descriptors, threads

    def close(self) -> None:
        """Stop everything: kindly first, after `STOP_SECONDS` by force. What a driver holds even then is
        left after `KILL_SECONDS`. Safe to call twice."""
        if self._watchdog.returncode is not None:
            return
        self.wake()
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            deadline = time.monotonic() + KILL_SECONDS  # a driver may hold one that was killed
            while (left := self._processes()) and time.monotonic() <= deadline:
                _signal(left, signal.SIGKILL)
                time.sleep(POLL_SECONDS / 10)
            self._process.poll()
            self._watchdog.kill()
            self._watchdog.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _processes(self) -> list[int]:
        """Those of the server's session, and all that descend from them."""
        found = _living()
        tree = {pid for pid, (_, session) in found.items() if session == self.pid}
        while more := {pid for pid, (parent, _) in found.items() if parent in tree} - tree:
            tree |= more
        return sorted(tree)


@contextlib.contextmanager
def terminated_kindly() -> Iterator[None]:
    """Where the process is told to end (SIGTERM), what it started is stopped first."""

    def leave(*_: object) -> None:
        sys.exit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _living() -> dict[int, tuple[int, int]]:
    """Parent and session of every process, by its id, but for zombies."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent, _, session, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
            if state != "Z":
                found[int(folder.name)] = int(parent), int(session)
    return found


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _proportional_bytes(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError):  # it may have ended
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def _entries(folder: Path) -> int:
    try:
        return sum(1 for _ in folder.iterdir())
    except OSError:  # the process has ended
        return 0
