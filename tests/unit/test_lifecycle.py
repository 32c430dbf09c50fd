"""The end of an engine: what is said at the start, and when writing down begins."""

import signal
from types import SimpleNamespace

import pytest

from ragkv.config import load
from ragkv.connectors.vllm.lifecycle import KILL_MARGIN, StopNotice, lost_at_stop, watch_stop
from ragkv.preflight import shutdown_seconds

DISK = {"disk": {"path": "/somewhere"}}


def settings(extra=None, **placement):
    return load({**(extra or {}), "placement": placement}, {}).settings


def config(timeout=0):
    return SimpleNamespace() if timeout is None else SimpleNamespace(shutdown_timeout=timeout)


@pytest.mark.parametrize(
    ("timeout", "extra", "flush", "words"),
    [
        (0, DISK, 5.0, ["kills the engine at once", "what still waits", "--shutdown-timeout 15"]),
        (
            0,
            {"disk": {"path": "/x", "write": "back"}},
            5.5,
            ["all that only memory holds", "--shutdown-timeout 16"],
        ),
        (0, {"redis": {"url": "redis://h", "write": "back"}}, 5.0, ["all that only memory holds"]),
        (0, {"store": {"name": "s3", "write": "back"}}, 5.0, ["all that only memory holds"]),
        (3, DISK, 5.0, ["after 3 s, sooner than placement.flush = 5 s"]),
        (5, DISK, 5.0, None),
        (15, DISK, 5.0, None),
        (0, {}, 5.0, None),  # memory alone ends with the engine
        (0, {"disk": {"write": "back"}}, 5.0, None),  # no path, no tier
        (0, DISK, 0.0, None),  # asked to write nothing down
        (None, DISK, 5.0, None),  # a vLLM without the setting
    ],
)
def test_what_a_stop_would_lose(timeout, extra, flush, words):
    lost = lost_at_stop(config(timeout), settings(extra, flush=flush))
    assert (lost is None) == (words is None)
    assert all(each in lost for each in words or ())


def test_the_warning_is_given_at_start(caplog, monkeypatch):
    monkeypatch.setattr("ragkv.connectors.vllm.lifecycle.logger.propagate", True)
    watch_stop(config(), settings(DISK))
    assert "--shutdown-timeout" in caplog.text
    caplog.clear()
    watch_stop(config(), settings())
    assert not caplog.records


def test_what_is_advised_leaves_time_for_writing():
    for flush in (0.1, 5.0, 600.0):
        found = settings(flush=flush)
        assert shutdown_seconds(found) >= flush + KILL_MARGIN


@pytest.fixture
def handlers():
    """Handlers as vLLM's engine sets them, and what they were told."""
    told = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, lambda number, frame: told.append(number))
    yield told
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_writing_begins_when_only_it_has_time_left(handlers, number):
    now = [100.0]
    notice = StopNotice(20, 5, lambda: now[0])
    notice.listen()
    now[0] = 1000.0
    assert not notice.due(), "nobody asked"
    signal.raise_signal(number)
    assert handlers == [number], "vLLM's own handler is called"
    assert not notice.due()
    now[0] += 20 - 5 - KILL_MARGIN - 0.5
    assert not notice.due()
    signal.raise_signal(number)  # asking again does not move the end
    now[0] += 0.5
    assert notice.due()


def test_too_short_a_timeout_leaves_no_time_to_wait(handlers):
    notice = StopNotice(3, 5, lambda: 0.0)
    notice.listen()
    assert not notice.due()
    signal.raise_signal(signal.SIGTERM)
    assert notice.due()


def test_an_engine_inside_a_program_is_not_ended_by_its_interrupt():
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        StopNotice(20, 5).listen()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("timeout", "extra"), [(0, DISK), (20, {})])
def test_nothing_is_listened_for_where_nothing_can_be_done(handlers, timeout, extra):
    before = signal.getsignal(signal.SIGTERM)
    watch_stop(config(timeout), settings(extra))
    assert signal.getsignal(signal.SIGTERM) is before
    watch_stop(config(20), settings(DISK))
    assert signal.getsignal(signal.SIGTERM) is not before
