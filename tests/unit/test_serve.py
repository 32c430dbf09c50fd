"""The serving benchmark: who plays when, what is counted, and how it ends."""

import json
import os
import signal
import threading
from collections import Counter
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import fake_server
from ragkv.benchmarks import serve as module
from ragkv.benchmarks import serve_systems
from ragkv.benchmarks.serve import Options, check_systems, play_rounds, run
from ragkv.benchmarks.serve_client import Sample
from ragkv.benchmarks.serve_setup import make_work
from ragkv.benchmarks.serve_systems import System
from ragkv.benchmarks.serve_workload import Shape
from ragkv.benchmarks.server import Server, free_port
from ragkv.cli import app, bench
from ragkv.errors import ConfigError

SMALL = Shape(filings=2, turns=2, tokens=200, answer_tokens=3, concurrency=1)


class Fake(System):
    """A system whose counters grow by ten tokens a request, of which four are hits."""

    def __init__(self, name, events):
        super().__init__(name, f"http://{name}", "m")
        self.events = events
        self.counted = Counter({"": 1000, "host": 500, "disk": 0})
        self.weights = iter(range(100, 10_000))
        self.awake = False

    def rest(self):
        self.awake = False

    def wake(self):
        self.awake = True

    def memory_bytes(self):
        return next(self.weights)

    def tokens(self):
        assert self.awake
        return self.counted.copy()


@pytest.fixture
def fakes(monkeypatch):
    """Three systems, and what was played on which; each request takes no time."""
    events = []
    systems = [Fake(name, events) for name in "abc"]

    async def play(url, model, sessions, shape, number):
        (system,) = [each for each in systems if each.awake]
        assert url == system.url and model == "m"
        events.append((system.name, number, [turn for session in sessions for turn in session.turns]))
        requests = [(session, turn) for session in sessions for turn in session.turns]
        system.counted += Counter({"": 10 * len(requests), "host": 4 * len(requests)})
        return [
            Sample(number, session.id, turn.number, turn.kind, 1.0, 1.0, 2.0, 10, 3, None, 0.0)
            for session, turn in requests
        ]

    monkeypatch.setattr(module, "play", play)
    monkeypatch.setattr(module, "request_client", lambda: None)
    return systems, events


def cut(text, tokens):
    return text[:tokens]


def test_all_play_the_same_and_another_begins_each_round(fakes):
    systems, events = fakes
    work = make_work(SMALL, 4, None, cut)
    played = play_rounds(systems, work, SMALL, print)
    order = [(name, number) for name, number, _ in events]
    assert order[:3] == [("a", -1), ("b", -1), ("c", -1)], "the warm-up"
    rounds = ["".join(name for name, number in order if number == each) for each in range(4)]
    assert rounds == ["abc", "bca", "cab", "abc"]
    for number in range(-1, 4):
        asked = [turns for _, played_in, turns in events if played_in == number]
        assert len(asked) == 3 and asked[0] == asked[1] == asked[2]
    assert not any(system.awake for system in systems)
    assert [each.system for each in played] == ["a", "b", "c"]


def test_the_warm_up_is_not_counted(fakes):
    systems, _ = fakes
    work = make_work(SMALL, 2, None, cut)
    (first, *_) = play_rounds(systems, work, SMALL, print)
    requests = 2 * 2 * 2
    assert len(first.samples) == requests and {sample.round for sample in first.samples} == {0, 1}
    assert first.prompt_tokens == 10 * requests and first.hit_tokens == {"host": 4 * requests}
    assert first.peak_memory_bytes == next(systems[0].weights) - 1, "the last of a growing weight"
    assert first.wall_s > 0


def test_metrics_that_cannot_be_had_once_do_not_count(fakes):
    systems, _ = fakes
    tokens, asked = systems[0].tokens, iter(range(100))
    systems[0].tokens = lambda: Counter() if next(asked) == 2 else tokens()  # before the first round
    (first, *_) = play_rounds(systems, make_work(SMALL, 2, None, cut), SMALL, print)
    assert first.prompt_tokens == 10 * 4 and first.hit_tokens == {"host": 4 * 4}, "those of the second"


def test_weighing_takes_little_of_the_time(fakes, monkeypatch):
    systems, _ = fakes
    clock, pauses = [0.0], []

    class Done(threading.Event):
        def wait(self, pause):
            pauses.append(pause)
            return len(pauses) == 3

    def heavy():
        clock[0] += 0.5
        return 7

    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    systems[0].memory_bytes = heavy
    with module.Scale(systems[0], Done()) as scale:
        pass
    assert pauses == [1.0, 50.0, 50.0] and scale.peak == 7


@pytest.mark.parametrize("option", ["json_file", "plot"])
def test_a_file_that_cannot_be_written_is_told_first(tmp_path, option):
    with pytest.raises(ConfigError, match="is a folder; allowed: a file to write"):
        run(Options(SMALL, urls=("http://127.0.0.1:1",), **{option: tmp_path}))


def test_one_that_fails_rests_all_the_same(fakes, monkeypatch):
    systems, _ = fakes

    async def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "play", interrupted)
    with pytest.raises(KeyboardInterrupt):
        play_rounds(systems, make_work(SMALL, 1, None, cut), SMALL, print)
    assert not systems[0].awake


def test_the_command_names_every_system():
    assert bench.SYSTEMS == serve_systems.SYSTEMS


@pytest.mark.parametrize("names", [[""], ["plain", "other"], ["plain", "plain"], []])
def test_systems_are_known_and_come_once(names):
    with pytest.raises(ConfigError, match=r"system = .*; allowed: each once, of plain, ragkv, ragkv\+fusion"):
        check_systems(names)


@pytest.fixture
def remote(tmp_path):
    """Two servers that run already."""
    ports = [free_port(), free_port()]
    servers = [Server(fake_server.command(port, hits=25), port, tmp_path / f"{port}") for port in ports]
    yield [server.wait(30).url for server in servers]
    for server in servers:
        server.close()


def test_servers_that_run_already_are_played_and_left_alone(remote, tmp_path):
    file, picture = tmp_path / "a.json", tmp_path / "a.png"
    words = ["--url", f"old={remote[0]}", "--url", remote[1], "--json", str(file), "--plot", str(picture)]
    words += ["--documents", "2", "--turns", "3", "--tokens", "300", "--rounds", "2", "--answer-tokens", "4"]
    ended = CliRunner().invoke(app, ["bench", "serve", *words], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    report = json.loads(file.read_text())
    assert [each["system"] for each in report["systems"]] == ["old", remote[1].removeprefix("http://")]
    for each in report["systems"]:
        assert each["requests"] == 2 * 2 * 3 and each["errors"] == 0
        assert each["prompt_tokens"] == 100 * 12 and each["hit_tokens"] == {"host": 25 * 12}
        assert each["followup_ttft_s"]["n"] == 8 and each["peak_memory_bytes"] is None
    assert report["environment"]["model"] == "m" and set(report["environment"]["vllm"].values()) == {"9"}
    assert report["config"]["filings"] == 2 and report["config"]["rounds"] == 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert serve_systems.fetch(f"{remote[0]}/version")
    same = CliRunner().invoke(app, ["bench", "compare", str(file), str(file), "--fail"])
    assert same.exit_code == 0 and "no difference" in same.output


def test_a_server_that_does_not_tell_its_version_is_played_too(tmp_path):
    port = free_port()
    with Server(fake_server.command(port, version=None), port, tmp_path / "log") as server:
        report = run(Options(SMALL, urls=(f"a={server.wait(30).url}",), rounds=1))
    assert report["environment"]["vllm"] == {"a": None} and report["systems"][0]["errors"] == 0


def test_servers_have_names_of_their_own(remote):
    with pytest.raises(ConfigError, match="allowed: each with a name of its own, as NAME=URL"):
        run(Options(SMALL, urls=(f"a={remote[0]}", f"a={remote[1]}")))


class Words:
    """A model without a tokenizer."""

    path, name = "org/model", "m"

    def __init__(self, asked, say):
        pass

    cut = staticmethod(cut)

    def longest(self, work, answer_tokens):
        return 1000 + answer_tokens


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine on which every vLLM is a fake server; gives the setups that were made."""
    setups = []

    def command(python, setup, port, transfer_config, share=None):
        setups.append(setup)
        connector = transfer_config["kv_connector"] if transfer_config else "plain"
        return fake_server.command(
            port,
            hits={"RagKVConnector": 90}.get(connector, 0),
            dies="Exception: not here" if connector == "OffloadingConnector" else None,
        )

    monkeypatch.setattr(serve_systems, "vllm_command", command)
    monkeypatch.setattr(module, "Model", Words)
    monkeypatch.setattr(module, "on_cpu", lambda: True)
    logs = tmp_path / "logs"
    monkeypatch.setattr(module.tempfile, "mkdtemp", lambda prefix: logs.mkdir() or str(logs))
    return setups


def test_systems_side_by_side(machine, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("RAGKV_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAGKV_CONFIG", "/hush.yaml")
    file = tmp_path / "a.json"
    words = ["--system", "plain,vllm-offload,ragkv", "--documents", "2", "--turns", "2", "--tokens", "200"]
    words += ["--rounds", "2", "--memory", "64MiB", "--json", str(file), "--", "--enforce-eager"]
    ended = CliRunner().invoke(app, ["bench", "serve", *words], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    report = json.loads(file.read_text())
    assert report["baseline"] == "plain"
    assert [each["system"] for each in report["systems"]] == ["plain", "ragkv"]
    assert [each["hit_fraction"] for each in report["systems"]] == [0, 0.9]
    assert all(each["peak_memory_bytes"] > 2**20 and each["errors"] == 0 for each in report["systems"])
    assert [each["system"] for each in report["skipped"]] == ["vllm-offload"]
    assert "not here" in report["skipped"][0]["why"]
    assert "vllm-offload is skipped: Exception: not here" in ended.output
    assert report["environment"]["model"] == "m" and report["environment"]["cores"] == len(os.sched_getaffinity(0))
    assert report["config"]["kv_cache_tokens"] == 2 * 10 * 128 and report["config"]["block_size"] == 128
    assert report["config"]["memory_bytes"] == 2**26
    assert report["config"]["ragkv_variables"] == ["RAGKV_CONFIG"] and "hush" not in file.read_text()
    assert "come from the environment too: RAGKV_CONFIG" in ended.output
    setup = machine[0]
    assert setup.arguments == ("--enforce-eager",) and setup.blocks == 2 * 10 + 1 and setup.longest == 1032
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["vllm-offload.log"]


@pytest.mark.parametrize(("concurrency", "told"), [(1, False), (2, True)])
def test_nothing_is_left_where_all_went_well(machine, tmp_path, capsys, concurrency, told):
    run(Options(replace(SMALL, concurrency=concurrency), rounds=1))
    assert not (tmp_path / "logs").exists()
    assert ("vLLM's own cache holds them all" in capsys.readouterr().out) == told


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit, signal.SIGTERM])
def test_an_end_that_was_wanted_leaves_nothing(machine, monkeypatch, tmp_path, ending):
    stood, before = [], signal.getsignal(signal.SIGTERM)

    def stopped(systems, *_):
        stood.extend(systems)
        if ending is signal.SIGTERM:
            os.kill(os.getpid(), ending)
        raise ending

    monkeypatch.setattr(module, "play_rounds", stopped)
    with pytest.raises((KeyboardInterrupt, SystemExit)) as caught:
        run(Options(SMALL, systems=("plain", "vllm-offload", "ragkv")))
    assert ending is not signal.SIGTERM or caught.value.code == 143
    assert len(stood) == 2 and not any(system.alive for system in stood)
    assert not (tmp_path / "logs").exists(), "nor the log of what could not start"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_system_that_ends_while_it_plays_is_told_and_its_log_kept(machine, monkeypatch, tmp_path, capsys):
    play_rounds = module.play_rounds

    def ended(systems, *more):
        systems[0].servers[0].close()
        return play_rounds(systems, *more)

    monkeypatch.setattr(module, "play_rounds", ended)
    report = run(Options(SMALL, systems=("plain",), rounds=1))
    assert report["systems"][0]["errors"] == report["systems"][0]["requests"] == 4
    log = tmp_path / "logs" / "plain.log"
    assert f"plain has ended; see {log}" in capsys.readouterr().out and log.exists()


@pytest.mark.parametrize(
    ("words", "model", "arguments"),
    [
        ([], None, ()),
        (["m"], "m", ()),
        (["m", "--", "--a", "1"], "m", ("--a", "1")),
        (["--", "--a", "1"], None, ("--a", "1")),
    ],
)
def test_the_model_and_vllms_arguments_are_told_apart(monkeypatch, words, model, arguments):
    asked = []
    monkeypatch.setattr(module, "run", asked.append)
    ended = CliRunner().invoke(app, ["bench", "serve", "--system", "plain,lmcache", "--rate", "2", *words])
    assert ended.exit_code == 0, ended.output
    assert asked[0].model == model and asked[0].arguments == arguments
    assert asked[0].systems == ("plain", "lmcache") and asked[0].shape == Shape(rate=2.0)
