"""What is started for each system, and what becomes of one that cannot be."""

import json
import sys
import urllib.request
from pathlib import Path

import pytest
import torch

import fake_server
from ragkv.benchmarks import serve_systems as module
from ragkv.benchmarks.serve_systems import (
    LMCACHE,
    SYSTEMS,
    Setup,
    System,
    SystemSkipped,
    cause,
    lmcache_command,
    lmcache_versions,
    standing,
    start,
    transfer,
    vllm_command,
    vllm_environment,
)
from ragkv.benchmarks.server import Server, ServerError, free_port
from ragkv.config import load
from ragkv.errors import RagKVError

PYTHON = Path(sys.executable)


def setup(folder, **more):
    given = {"model": "org/model", "name": "model", "memory": 2**31, "blocks": 55, "block_size": 128}
    return Setup(**given | {"longest": 3300, "logs": folder, "cpu": True} | more)


def option(command, name):
    return command[command.index(name) + 1]


def test_systems_differ_in_their_connector_alone(tmp_path):
    given = setup(tmp_path, arguments=("--seed", "7", "--dtype", "float32"))
    commands = {}
    for name in SYSTEMS:
        command = vllm_command(PYTHON, given, 8000, transfer(name, given.memory, 5555))
        if "--kv-transfer-config" in command:
            place = command.index("--kv-transfer-config")
            connector = json.loads(command.pop(place + 1))
            command.pop(place)
            assert connector["kv_role"] == "kv_both"
        else:
            connector = {"kv_connector": None}
        commands[name] = command, connector["kv_connector"]
    assert len({tuple(command) for command, _ in commands.values()}) == 1
    assert [connector for _, connector in commands.values()] == [
        None,
        "RagKVConnector",
        "RagKVConnector",
        "OffloadingConnector",
        "LMCacheMPConnector",
    ]
    command, _ = commands["plain"]
    assert option(command, "--num-gpu-blocks-override") == "55" and option(command, "--block-size") == "128"
    assert option(command, "--max-model-len") == "3300" and "--enforce-eager" in command
    assert command[-4:] == ["--seed", "7", "--dtype", "float32"], "the user's arguments win"


@pytest.mark.parametrize(
    ("asked", "cpu", "has_bfloat16", "given"),
    [
        ("auto", True, False, "float32"),
        ("auto", True, True, "auto"),
        ("auto", False, False, "auto"),
        ("bfloat16", True, False, "bfloat16"),
    ],
)
def test_a_cpu_without_bfloat16_computes_in_float32(tmp_path, monkeypatch, asked, cpu, has_bfloat16, given):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bfloat16)
    command = vllm_command(PYTHON, setup(tmp_path, dtype=asked, cpu=cpu), 8000, None)
    assert option(command, "--dtype") == given


def test_on_a_gpu_vllm_keeps_its_defaults_and_shares_the_memory(tmp_path):
    given = setup(tmp_path, cpu=False, block_size=16)
    assert "--enforce-eager" not in vllm_command(PYTHON, given, 1, None)
    assert "--gpu-memory-utilization" not in vllm_command(PYTHON, given, 1, None)
    assert option(vllm_command(PYTHON, given, 1, None, 0.45), "--gpu-memory-utilization") == "0.45"
    assert "VLLM_CPU_OMP_THREADS_BIND" not in vllm_environment(given)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_users_variables_do_not_change_what_is_compared(faked, tmp_path, monkeypatch, name):
    given = setup(tmp_path, memory=3 * 2**30, lmcache_python=PYTHON)
    started = []

    class Started:
        def __init__(self, command, port, log, environment, health=""):
            started.append(environment)

        def wait(self):
            return self

    monkeypatch.setattr(module, "Server", Started)
    monkeypatch.setattr(module, "lmcache_versions", lambda python: {})
    start(name, given)
    if not name.startswith("ragkv"):
        assert not any(variable.startswith("RAGKV") for each in started for variable in each)
        return
    users = {"RAGKV_MEMORY_CAPACITY": "7GiB", "RAGKV_FUSION_ENABLED": str(name == "ragkv")}
    settings = load(transfer(name, given.memory)["kv_connector_extra_config"], users | started[0]).settings
    assert settings.memory.capacity == 3 * 2**30 and settings.fusion.enabled == (name == "ragkv+fusion")


@pytest.mark.parametrize(("block", "chunk"), [(128, 128), (16, 128), (48, 144), (256, 256)])
def test_other_caches_get_as_much_memory_and_lmcaches_chunks_are_whole_blocks(tmp_path, block, chunk):
    assert transfer("vllm-offload", 2**30)["kv_connector_extra_config"] == {"cpu_bytes_to_use": 2**30}
    given = setup(tmp_path, memory=3 * 2**29, block_size=block)
    command = lmcache_command(PYTHON, given, 1, 2, "shared")
    assert option(command, "--l1-size-gb") == "1.5" and option(command, "--chunk-size") == str(chunk)
    assert option(command, "--supported-transfer-mode") == "engine_driven"
    assert option(command, "--shm-name") == "shared"
    assert "--shm-name" not in lmcache_command(PYTHON, setup(tmp_path, cpu=False), 1, 2, "shared")


def test_variables_of_the_user_win(tmp_path, monkeypatch):
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {0, 3})
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    assert vllm_environment(setup(tmp_path))["VLLM_CPU_OMP_THREADS_BIND"] == "0,3"
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "5")
    assert "VLLM_CPU_OMP_THREADS_BIND" not in vllm_environment(setup(tmp_path))
    monkeypatch.setenv("VLLM_API_KEY", "hush")
    assert vllm_environment(setup(tmp_path))["VLLM_API_KEY"] == "", "else every request is refused"
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert "HF_HUB_OFFLINE" not in vllm_environment(setup(tmp_path))
    assert vllm_environment(setup(tmp_path, model=str(tmp_path)))["HF_HUB_OFFLINE"] == "1"


def test_lmcache_without_its_environment_is_skipped(tmp_path, monkeypatch):
    with pytest.raises(SystemSkipped, match="--lmcache-python ITS/bin/python"):
        start(LMCACHE, setup(tmp_path))
    with pytest.raises(SystemSkipped, match="/no/python is no Python that runs"):
        start(LMCACHE, setup(tmp_path, lmcache_python=Path("/no/python")))
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -I "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(SystemSkipped, match="LMCache and vLLM not installed there"):
        lmcache_versions(bare)


def test_the_cause_of_an_end_is_the_last_error_before_what_followed():
    log = """
(EngineCore pid=7) \x1b[31mERROR\x1b[0m 11-21 [core.py:1] torch.OutOfMemoryError: first
(EngineCore pid=7) ERROR 11-21 [core.py:2] Exception: offloading is \x1b[1mnot\x1b[0m supported
(EngineCore pid=7) INFO: it goes on
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. Failed: {}
"""
    assert cause(log) == "Exception: offloading is not supported"
    assert cause("all is well\n") is None


@pytest.fixture
def faked(monkeypatch):
    """`vllm_command` runs fake servers; what each is told, by the name of its connector."""
    told = {}

    def command(python, setup, port, transfer_config, share=None):
        connector = transfer_config["kv_connector"] if transfer_config else "plain"
        return fake_server.command(port, **told.get(connector, {}))

    monkeypatch.setattr(module, "vllm_command", command)
    return told


def test_those_that_start_rest_and_those_that_do_not_are_skipped(faked, tmp_path):
    faked["OffloadingConnector"] = {"dies": "ValueError: no room"}
    said = []
    names = ["vllm-offload", "plain", "lmcache", "ragkv"]
    with standing(names, setup(tmp_path), said.append, 30) as (systems, skipped):
        assert [system.name for system in systems] == ["plain", "ragkv"]
        assert all(system.alive for system in systems)
        with pytest.raises(OSError, match="timed out"):
            module.fetch(f"{systems[0].url}/health", 0.2)
        systems[1].wake()
        assert systems[1].ready()
    assert not any(system.alive for system in systems)
    assert [each["system"] for each in skipped] == ["vllm-offload", "lmcache"]
    log = tmp_path / "vllm-offload.log"
    assert skipped[0]["why"] == f"ValueError: no room ({log})"
    assert "--lmcache-python" in skipped[1]["why"]
    assert sorted(said) == sorted(f"{each['system']} is skipped: {each['why']}" for each in skipped)
    assert list(tmp_path.iterdir()) == [log], "logs of those that went well are gone"


@pytest.mark.parametrize("dies", [None, "OSError: no shared memory"])
def test_lmcaches_server_is_up_before_its_engine(faked, tmp_path, monkeypatch, dies):
    given, ports = setup(tmp_path, lmcache_python=PYTHON), []
    monkeypatch.setattr(module, "lmcache_versions", lambda python: {})
    vllm = module.vllm_command

    def server(python, setup, port, http_port, shared):
        ports.append(port)
        return fake_server.command(http_port, unwell=1, dies=dies)

    def engine(python, setup, port, transfer_config, share=None):
        assert transfer_config["kv_connector_extra_config"]["lmcache.mp.port"] == ports[0]
        ports.append(port)
        return vllm(python, setup, port, transfer_config, share)

    monkeypatch.setattr(module, "lmcache_command", server)
    monkeypatch.setattr(module, "vllm_command", engine)
    if dies:
        with pytest.raises(RagKVError, match=dies), standing(["lmcache"], given, print, 30):
            pytest.fail("nothing stands")
        assert len(ports) == 1
        return
    with standing(["lmcache"], given, print, 30) as ((system,), _):
        assert system.url.endswith(f":{ports[1]}") and len(system.servers) == 2
        assert [path.parent for path in system.leftovers] == [module.SHARED_MEMORY]
    assert not system.alive and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("told", "seconds", "why"),
    [
        ({"dies": "ValueError: no room"}, 30, r"none of the systems could be started: ValueError: no room \(/"),
        ({"unwell": 10**9}, 0, "did not answer within 0 s"),
    ],
)
def test_it_is_an_error_if_none_starts(faked, tmp_path, told, seconds, why):
    faked["plain"] = told
    with pytest.raises(RagKVError, match=why), standing(["plain"], setup(tmp_path), print, seconds):
        pytest.fail("nothing stands")


def test_one_that_never_answers_is_stopped_before_others_play(monkeypatch, tmp_path):
    events = []

    class Dumb(Standing):
        def ready(self):
            return self.name == "plain"

    monkeypatch.setattr(module, "start", lambda name, setup, share=None: Dumb(name, events))
    with standing(["ragkv", "plain"], setup(tmp_path), print, 0) as (systems, skipped):
        assert [system.name for system in systems] == ["plain"]
        assert "did not answer within 0 s" in skipped[0]["why"]
        assert ("close", "ragkv") in events and ("close", "plain") not in events


def test_lmcaches_server_does_not_outlive_a_failure_to_start_its_engine(monkeypatch, tmp_path):
    started = []

    def begin(*arguments, **more):
        started.append(Server(*arguments, **more))
        return started[-1]

    monkeypatch.setattr(module, "Server", begin)
    monkeypatch.setattr(module, "lmcache_versions", lambda python: {})
    monkeypatch.setattr(module, "lmcache_command", lambda p, s, port, http, name: fake_server.command(http))
    with pytest.raises(ServerError, match="/no/python cannot be run"):
        start(LMCACHE, setup(tmp_path, lmcache_python=Path("/no/python")))
    assert len(started) == 1 and not started[0].alive


def test_all_are_stopped_whatever_happens(faked, tmp_path):
    with pytest.raises(KeyboardInterrupt), standing(["plain", "ragkv"], setup(tmp_path), print, 30) as (found, _):
        raise KeyboardInterrupt
    assert [system.alive for system in found] == [False, False]


def test_the_log_of_one_that_ended_while_it_played_stays(faked, tmp_path):
    with standing(["plain", "ragkv"], setup(tmp_path), print, 30) as (systems, _):
        systems[0].servers[0].close()
    assert [path.name for path in tmp_path.iterdir()] == ["plain.log"]


class Standing(System):
    """A system without servers, which notes what is done with it."""

    def __init__(self, name, events):
        super().__init__(name, "", "")
        self.events = events
        events.append(("start", name))

    def ready(self):
        return True

    def rest(self):
        self.events.append(("rest", self.name))

    def close(self):
        self.events.append(("close", self.name))


@pytest.mark.parametrize("cpu", [True, False])
def test_on_a_gpu_one_starts_after_the_other(monkeypatch, tmp_path, cpu):
    events, shares = [], []

    def begin(name, setup, share=None):
        shares.append(share)
        return Standing(name, events)

    monkeypatch.setattr(module, "start", begin)
    with standing(["plain", "ragkv"], setup(tmp_path, cpu=cpu), print) as (systems, _):
        assert [system.name for system in systems] == ["plain", "ragkv"]
    (a, b, c, d), ends = [kind for kind, _ in events[:4]], events[4:]
    assert (a, b, c, d) == (("start", "start", "rest", "rest") if cpu else ("start", "rest", "start", "rest"))
    assert ends == [("close", "ragkv"), ("close", "plain")]
    assert shares == ([None, None] if cpu else [0.45, 0.45])


def test_those_who_call_rest_first_and_wake_last():
    events = []

    class One:
        def __init__(self, name):
            self.name = name

        def rest(self):
            events.append(f"{self.name} rests")

        def wake(self):
            events.append(f"{self.name} wakes")

        def memory_bytes(self):
            return 10

    system = System("lmcache", "", "", [One("cache"), One("engine")])
    system.rest()
    system.wake()
    assert events == ["engine rests", "cache rests", "cache wakes", "engine wakes"]
    assert system.memory_bytes() == 20
    assert System("remote", "", "").memory_bytes() is None


def test_what_a_system_leaves_is_removed(tmp_path):
    left = tmp_path / "shared"
    left.touch()
    system = System("lmcache", "", "", [], [left])
    system.close()
    system.close()
    assert not left.exists()


def test_tokens_are_read_from_the_metrics(tmp_path):
    port = free_port()
    with Server(fake_server.command(port, hits=60), port, tmp_path / "log") as server:
        system = System("plain", server.wait(30).url, "m", [server])
        assert system.tokens() == {"": 0, "host": 0, "disk": 0}
        urllib.request.urlopen(f"{server.url}/v1/chat/completions", b'{"max_tokens": 1}').close()
        assert system.tokens() == {"": 100, "host": 60, "disk": 0}
    assert system.tokens() == {}, "nobody answers"
