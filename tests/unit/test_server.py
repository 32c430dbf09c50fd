"""A server's life: started, waited for, put to rest, weighed, stopped, and gone with who started it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fake_server
from ragkv.benchmarks import server as module
from ragkv.benchmarks.engine import descendants
from ragkv.benchmarks.server import Server, ServerError, fetch, free_port

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture
def started(tmp_path):
    """Starts servers, and stops them in the end."""
    servers = []

    def start(**told):
        port = free_port()
        servers.append(Server(fake_server.command(port, **told), port, tmp_path / "log", {"WITH": "love"}))
        return servers[-1]

    yield start
    for each in servers:
        each.close()


def state(pid):
    """As ps shows it; Z where it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def become(wanted, pids):
    """Wait until all are in one of some states: what a signal does takes a moment."""
    deadline = time.monotonic() + 10
    while not all(state(pid) in wanted for pid in pids):
        assert time.monotonic() < deadline, [state(pid) for pid in pids]
        os.sched_yield()


def test_it_is_waited_for_until_it_is_well(started):
    server = started(unwell=2).wait(30)
    assert server.ready() and server.alive
    assert fetch(f"{server.url}/version") == '{"version": "9"}'
    assert "starting" in server.last_lines()
    assert b"WITH=love" in Path(f"/proc/{server.pid}/environ").read_bytes().split(b"\0")


def test_one_that_ends_first_is_an_error_that_shows_its_log(started):
    server = started(dies="no such model")
    with pytest.raises(ServerError, match=r"status 1\nstarting\nno such model"):
        server.wait(30)
    assert not server.alive
    with pytest.raises(ServerError, match="has ended"):
        server.ready()


def test_one_that_takes_too_long_is_an_error(started):
    with pytest.raises(ServerError, match="did not answer within 0 s"):
        started(unwell=10**9).wait(0)


def test_one_that_answers_in_the_place_of_another_does_not_count(started, tmp_path):
    port = started().wait(30).port
    late = Server(fake_server.command(port), port, tmp_path / "other")
    with late, pytest.raises(ServerError, match="Address already in use"):
        os.waitid(os.P_PID, late.pid, os.WEXITED | os.WNOWAIT)
        late.wait(30)


def test_what_cannot_be_run_is_an_error(tmp_path):
    with pytest.raises(ServerError, match=r"/no/such/python cannot be run: No such file"):
        Server(["/no/such/python"], 1, tmp_path / "log")


def test_all_its_processes_rest_and_wake(started):
    server = started(child=True).wait(30)
    (child,) = descendants(server.pid)
    server.rest()
    server.rest()
    become("T", [server.pid, child])
    assert server.alive
    server.wake()
    become("SR", [server.pid, child])
    assert server.ready()


def test_its_weight_is_that_of_all_its_processes(started):
    def weight(pid):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))

    server = started(child=True).wait(30)
    server.rest()
    become("T", [server.pid, *descendants(server.pid)])
    alone, together = weight(server.pid), server.memory_bytes()
    assert together > alone > 2**20
    assert together == pytest.approx(alone + weight(*descendants(server.pid)), rel=0.05)
    server.close()
    assert server.memory_bytes() == 0


@pytest.mark.parametrize("resting", [False, True])
@pytest.mark.parametrize("deaf", [False, True])
def test_nothing_of_it_is_left_when_it_is_closed(started, monkeypatch, deaf, resting):
    monkeypatch.setattr(module, "STOP_SECONDS", 0.05 if deaf else 20)
    server = started(child=True, deaf=deaf).wait(30)
    everyone = [server.pid, *descendants(server.pid)]
    if resting:
        server.rest()
    server.close()
    become("Z", everyone)
    server.close()
    with pytest.raises(ServerError, match=f"status {-signal.SIGKILL if deaf else -signal.SIGTERM}\n"):
        server.ready()


def test_it_ends_with_the_process_that_started_it_however_that_ends(tmp_path):
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(TESTS)!r})
import fake_server
from pathlib import Path
from ragkv.benchmarks.server import Server, free_port
port = free_port()
server = Server(fake_server.command(port, deaf=True), port, Path({str(tmp_path / "log")!r})).wait(30)
print(port, flush=True)
sys.stdin.read()
os.kill(os.getpid(), signal.SIGKILL)
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe) as starter:
        connection = socket.create_connection(("127.0.0.1", int(starter.stdout.readline())), timeout=30)
        starter.stdin.close()
        with connection, contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b"", "the server closed it, by ending"
    assert starter.returncode == -signal.SIGKILL


def test_a_proxy_is_passed_by(started, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert started().wait(30).ready()
