"""Control of a running engine: real HTTP on loopback, and what the toy engine's scheduler side does with it."""

import http.client
import json
import socket

import pytest
from typer.testing import CliRunner

from hand_lanes import Lower
from ragkv.cli import app
from ragkv.config import Settings
from ragkv.connectors.vllm import control as module
from ragkv.connectors.vllm.control import Control, open_control
from ragkv.connectors.vllm.error_boundary import logger
from ragkv.errors import ConfigError
from ragkv.preflight import read_settings
from toy_engine import Engine, text

TOKEN = "a token of no use".replace(" ", "-")


@pytest.fixture
def controlled():
    """Engines, each with its control, which is served."""
    opened = []

    def control(cache, clock):
        opened.append(Control(cache, clock))
        opened[-1].serve("0", TOKEN)
        return opened[-1]

    def make(**more):
        return Engine(control=control, **more), opened[-1]

    yield make
    for each in opened:
        each.close()


@pytest.fixture
def control(controlled):
    return controlled()[1]


@pytest.fixture
def token_file(tmp_path):
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    return file


def ask(control, method, path, token=TOKEN):
    connection = http.client.HTTPConnection("127.0.0.1", control.port, timeout=30)
    connection.request(method, path, headers={"Authorization": f"Bearer {token}"} if token else {})
    answer = connection.getresponse()
    told = answer.status, json.loads(answer.read())
    connection.close()
    return told


def test_off_and_on(controlled):
    engine, control = controlled()
    first, second = text(1, 100), text(2, 100)
    engine.run(first)
    assert engine.run(first) > 0
    status, told = ask(control, "POST", "/off")
    assert status == 200 and (told["loads"], told["stores"]) == (False, False)
    assert not engine.run(first)
    engine.run(second)
    ask(control, "POST", "/on")
    assert engine.run(first) > 0, "what was stored before is still there"
    assert not engine.run(second), "nothing was stored meanwhile"
    assert engine.run(second) > 0
    engine.check()


def test_what_is_under_way_ends_well_when_it_is_switched_off(controlled):
    engine, control = controlled()
    prompt = text(1, 100)
    engine.run(prompt)
    engine.request(prompt)
    engine.step()  # promised, and its load is ordered
    ask(control, "POST", "/off")
    engine.settle()
    engine.check()


def test_drain_stores_no_more_and_still_serves(controlled):
    engine, control = controlled(lowers=[Lower(through=False)])
    first = text(1, 100)
    engine.run(first)
    assert not len(engine.lowers[0].values.values), "written only when memory evicts"
    assert ask(control, "POST", "/drain")[1]["flushing"]
    engine.settle()
    told = ask(control, "GET", "/stats")[1]
    assert not told["flushing"] and not told["stores"] and told["loads"]
    index = engine.lowers[0].index
    kept = {"values": len(index), "bytes": index.used}
    assert told["tiers"]["disk"] == {"queued_bytes": 0, "resting": [], **kept}
    assert told["tiers"]["disk"]["values"] == told["chunks"] > 0
    assert engine.run(first) > 0
    second = text(2, 100)
    engine.run(second)
    assert not engine.run(second)
    engine.restart()
    assert engine.run(first) > 0, "the next engine finds it"


def test_a_flush_keeps_an_idle_engine_stepping_until_it_has_ended(controlled):
    engine, control = controlled(lowers=[Lower(through=False)])
    engine.run(text(1, 100))
    engine.lowers[0].writes.hangs = True
    ask(control, "POST", "/flush")
    assert not engine.side.has_pending_work, "it begins with the next step"
    engine.settle()
    assert engine.side.has_pending_work and ask(control, "GET", "/stats")[1]["flushing"]
    engine.lowers[0].writes.hangs = False
    engine.settle()
    assert not engine.side.has_pending_work and not ask(control, "GET", "/stats")[1]["flushing"]


def test_a_flush_that_cannot_end_is_given_up(controlled):
    engine, control = controlled(lowers=[Lower(through=False)])
    engine.run(text(1, 100))
    engine.lowers[0].writes.hangs = True
    ask(control, "POST", "/flush")
    engine.settle()
    engine.pass_time(61)
    engine.settle()
    assert not engine.side.has_pending_work and not control.flushing
    engine.lowers[0].writes.hangs = False


@pytest.mark.parametrize("token", ["", "wrong", TOKEN + "x", "é"])
def test_without_the_token_nothing_happens(control, token):
    headers = {"Authorization": f"Bearer {token}".encode()} if token else {}
    connection = http.client.HTTPConnection("127.0.0.1", control.port, timeout=30)
    connection.request("POST", "/off", headers=headers)
    assert connection.getresponse().status == 401
    connection.close()
    assert control.loads and control.stores


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/off"), ("POST", "/stats"), ("POST", "/"), ("POST", "/off/")]
)
def test_what_is_unknown_is_told(control, method, path):
    status, told = ask(control, method, path)
    assert status == 404 and "allowed: GET /stats; POST /off, /on" in told["error"] and control.loads


def test_a_client_that_hangs_or_talks_nonsense_holds_nobody_up(control, monkeypatch):
    monkeypatch.setattr(module.Handler, "timeout", 0.05)
    with socket.create_connection(("127.0.0.1", control.port)) as silent:
        assert ask(control, "GET", "/stats")[0] == 200
        silent.sendall(b"")
    with socket.create_connection(("127.0.0.1", control.port)) as rude:
        rude.sendall(b"\x00" * 1000 + b"\r\n\r\n")
    assert ask(control, "GET", "/stats")[0] == 200


def test_a_port_that_is_taken_is_a_line_in_the_log(control, token_file, caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    given = {"listen": str(control.port), "token_file": str(token_file)}
    assert open_control(Settings.model_validate({"control": given}), Engine().cache) is None
    assert "the engine runs without control" in caplog.text and TOKEN not in caplog.text


@pytest.mark.parametrize("content", [None, "", "short", "with a space in it, and long", "\x00" * 40])
def test_a_token_that_cannot_be_is_a_line_in_the_log(tmp_path, caplog, monkeypatch, content):
    monkeypatch.setattr(logger, "propagate", True)
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content)
    assert (
        open_control(
            Settings.model_validate({"control": {"listen": "0", "token_file": str(file)}}), Engine().cache
        )
        is None
    )
    assert "the engine runs without control" in caplog.text


def test_it_is_off_by_default():
    assert open_control(Settings(), Engine().cache) is None


@pytest.mark.parametrize("listen", ["", "x", "70000", "host:", True, 1.5, "http://host:1"])
def test_an_address_that_cannot_be_is_refused(listen):
    with pytest.raises(ConfigError, match=r"control.listen = .* allowed: a port, or HOST:PORT"):
        read_settings({"control": {"listen": listen, "token_file": "/x"}}, {})


def test_no_address_without_a_token():
    with pytest.raises(ConfigError, match=r"allowed: together with control\.token_file"):
        read_settings({"control": {"listen": 8900}}, {})


def test_the_command(control, token_file):
    url = f"http://127.0.0.1:{control.port}"

    def run(*words, token=token_file):
        return CliRunner().invoke(app, ["control", *words, "--url", url, "--token-file", str(token)])

    assert run("off").exit_code == 0 and not control.loads
    assert run("on").exit_code == 0 and control.loads
    on = {"loads": True, "stores": True, "flushing": False}
    assert json.loads(run("stats", "--json").output) == {**on, "chunks": 0, "tiers": {}}
    late = run("flush", "--timeout", "0")
    assert late.exit_code == 1 and "not all is written after 0 s" in str(late.exception)
    assert "allowed: off, on, flush, drain, stats" in str(run("stop").exception)
    token_file.write_text("another one")
    assert ": 401: " in str(run("stats").exception)
    control.close()
    assert "refused" in str(run("stats").exception)
