"""Whatever goes wrong while vLLM builds the connector, the engine serves: every call made then fails once."""

import logging
import sys
import sysconfig
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.config import KVTransferConfig

import ragkv
from ragkv.connectors.vllm import NAME, lifecycle, plugin
from ragkv.errors import ConfigError, StoreError
from ragkv.kvstore import io_pool
from ragkv.kvstore.io_pool import Completions, Lane
from whole_start import Engine, alone, fresh_factory, refusals, serves

HOME = str(Path(ragkv.__file__).parent)  # links and all: as code is named
PACKAGES, LIBRARY = (sysconfig.get_paths()[name] for name in ("purelib", "stdlib"))
# What everything else stands on: plain assignments; and what vLLM itself calls, which hands on at once.
GIVEN = {
    "Metrics.__init__",
    "Faults.__init__",
    "WeightsWatch.__init__",
    "combine",
    "RagKVConnector.__init__",
    "RagKVConnector._begin_reuse",
    "RagKVConnector.set_xfer_handshake_metadata",
    "RagKVConnector.set_xfer_handshake_metadata.<locals>.<listcomp>",
    "guarded.<locals>.wrap.<locals>.call",
}
SYSTEM = {"posix", "fcntl", "mmap", "_io", "_signal", "_thread", "_socket"}


class Unforeseen(Exception):
    """What nobody could know."""


@pytest.fixture(autouse=True)
def nothing_else(monkeypatch):
    with alone(monkeypatch):
        yield


def ours(code):
    return code.co_filename.startswith(HOME) and code.co_qualname not in GIVEN


def asks_system(frame, event, argument):
    """Whether something is asked of the system, by ragkv, if perhaps through Python's library."""
    if event != "c_call" or getattr(argument, "__module__", None) not in SYSTEM or argument.__name__ == "fspath":
        return False
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGES) or not file.startswith(("<frozen", LIBRARY)) or "logging" in file:
            return file.startswith(HOME)
        frame = frame.f_back
    return False


def calls_of(run):
    """Functions of ragkv that a run calls on this thread, and what it asks of the system, by who asks."""
    functions, system = {}, {}

    def note(frame, event, argument):
        code = frame.f_code
        if event == "call" and ours(code):
            functions.setdefault((code.co_filename, code.co_qualname), code)
        if asks_system(frame, event, argument):
            system.setdefault((code.co_filename, code.co_qualname, argument.__name__), code)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return functions, system


def failing_function(code, run):
    """Run, and raise where that function is called for the first time. Whether it was."""
    hit = []

    def raise_there(frame, event, argument):
        if event == "call" and frame.f_code is code and not hit:
            hit.append(True)
            raise Unforeseen("of all\nthings")

    before = sys.gettrace()
    sys.settrace(raise_there)
    try:
        return run(), bool(hit)
    finally:
        sys.settrace(before)


def failing_system(code, name, error, run):
    """Run, and let one thing that is asked of the system for the first time fail. Whether it was asked."""
    hit = []

    def raise_there(frame, event, argument):
        if not hit and frame.f_code is code and asks_system(frame, event, argument) and argument.__name__ == name:
            hit.append(True)
            raise error

    sys.setprofile(raise_there)
    try:
        return run(), bool(hit)
    finally:
        sys.setprofile(None)


def started(folder, caplog):
    """A start to be made, with a folder of its own; what follows it."""
    folder.mkdir()
    engine = Engine(folder)
    caplog.clear()
    return engine


def checked(engine, pair, caplog):
    scheduler, worker = pair
    if scheduler.scheduler_side is None:
        assert refusals(caplog) and all("\n" not in line for line in refusals(caplog)), caplog.text
    serves(scheduler, worker)
    assert not engine.segment.exists()


def test_a_start_without_faults_reuses(tmp_path):
    scheduler, worker = Engine(tmp_path).start()
    assert scheduler.scheduler_side is not None and worker.worker_side is not None
    serves(scheduler, worker)


@pytest.mark.slow
def test_whatever_function_of_ours_fails(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "vllm.ragkv")
    pairs = []
    functions, _ = calls_of(lambda: pairs.append(started(tmp_path / "first", caplog).start()))
    serves(*pairs[0])
    assert len(functions) > 100 and any("Segment.__init__" in name for _, name in functions)
    hits = 0
    for number, ((file, name), code) in enumerate(functions.items()):
        engine = started(tmp_path / str(number), caplog)
        try:
            pair, hit = failing_function(code, engine.start)
        except Exception as error:
            raise AssertionError(f"{name} in {file} stops the engine") from error
        hits += hit
        checked(engine, pair, caplog)
    assert hits > 0.9 * len(functions), "the tests' own faults are met"


@pytest.mark.slow
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(24, "Too many open files")])
def test_whatever_the_system_refuses(tmp_path, caplog, error):
    caplog.set_level(logging.WARNING, "vllm.ragkv")
    pairs = []
    _, system = calls_of(lambda: pairs.append(started(tmp_path / "first", caplog).start()))
    serves(*pairs[0])
    assert {"open", "flock", "statvfs", "fstat", "posix_fallocate"} <= {name for *_, name in system}
    for number, ((file, name, asked), code) in enumerate(system.items()):
        engine = started(tmp_path / str(number), caplog)
        try:
            pair, _ = failing_system(code, asked, error, engine.start)
        except Exception as stopped:
            raise AssertionError(f"{asked} in {name} in {file} stops the engine") from stopped
        checked(engine, pair, caplog)


def test_settings_that_cannot_be_stop_it_all_the_same(tmp_path):
    with pytest.raises(ConfigError, match=r"memory\.policy"):
        Engine(None, memory={"policy": "mru"}).start()


# --- threads, signals, the plug-in ---


def test_no_threads_are_no_tiers_and_no_stop(tmp_path, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    scheduler, worker = Engine(tmp_path).start()
    assert scheduler.scheduler_side is not None, "memory needs none"
    serves(scheduler, worker)


def test_a_lane_does_with_fewer_threads_and_tries_again(monkeypatch):
    completions, came, left = Completions(), [], [0]
    start = threading.Thread.start

    def refuse(self):
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        start(self)

    monkeypatch.setattr(io_pool.threading.Thread, "start", refuse)
    lane = Lane("test", 3, completions)
    lane.submit(lambda: 1, came.append)
    assert completions.drain(0.0) and isinstance(came[0].error, StoreError) and came[0].error.reason == "io"
    left[0] = 1
    lane.submit(lambda: 2, came.append)
    assert completions.drain(30.0) and came[1].value == 2
    assert lane.close(30.0)


def test_signals_that_cannot_be_set(tmp_path, monkeypatch):
    def refuse(number, handler):
        raise ValueError("signal only works in main thread of the main interpreter")

    handlers = dict.fromkeys(lifecycle.SIGNALS, print)
    fake = SimpleNamespace(signal=refuse, getsignal=handlers.get, default_int_handler=None)
    monkeypatch.setattr(lifecycle, "signal", fake)
    scheduler, worker = Engine(tmp_path).start()
    assert scheduler.scheduler_side is not None
    monkeypatch.undo()
    serves(scheduler, worker)


def test_an_engine_built_on_another_thread(tmp_path):
    made = []
    thread = threading.Thread(target=lambda: made.append(Engine(tmp_path).start()))
    thread.start(), thread.join(60)
    ((scheduler, worker),) = made
    assert scheduler.scheduler_side is not None
    serves(scheduler, worker)


@pytest.mark.parametrize("what", ["watch_workers", "check_settings", "read_settings", "check_room"])
def test_a_plugin_that_fails_stops_no_engine(monkeypatch, caplog, what):
    factory = fresh_factory(monkeypatch)

    def fail(*_):
        raise Unforeseen("of all things")

    monkeypatch.setattr(plugin, what, fail)
    transfer = KVTransferConfig(
        kv_connector=NAME, kv_role="kv_both", kv_connector_extra_config={"memory": {"capacity": "1MiB"}}
    )
    with caplog.at_level(logging.WARNING, "vllm.ragkv"):
        plugin.install()
        assert factory.get_connector_class(transfer).__name__ == NAME
    assert any("Unforeseen: of all things" in record.getMessage() for record in caplog.records)


def test_a_registry_that_vllm_has_no_more(monkeypatch, caplog):
    monkeypatch.setattr(plugin, "KVConnectorFactory", SimpleNamespace())
    with caplog.at_level(logging.WARNING, "vllm.ragkv"):
        plugin.install()
    assert "the plug-in is not at work" in caplog.text
