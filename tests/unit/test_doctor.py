"""`ragkv doctor`: each fault is put where it would be found, and must be named in one line."""

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
from abc import abstractmethod
from pathlib import Path
from types import SimpleNamespace

import pytest
import redis

from metrics_server import serving_metrics
from ragkv import checks, preflight
from ragkv.benchmarks.internal.redis_server import Server
from ragkv.checks import check_disk, check_files, check_memory, check_redis, check_settings, check_vllm
from ragkv.cli import doctor
from ragkv.cli.doctor import check_server, check_versions, examine
from ragkv.config import load
from ragkv.connectors.vllm.doctor_probe import TOKENS, judge_engine, judge_interface, judge_version
from ragkv.kvstore.backing import Backing
from ragkv.kvstore.stores.contract import Room
from redis_server import needs_server

RAGKV = str(Path(sys.executable).parent / "ragkv")
MIB = 1 << 20
BLOCKED = """
import sys
class Blocks:
    def find_spec(self, name, path=None, target=None):
        if name == "vllm":
            raise ModuleNotFoundError("No module named 'vllm'", name="vllm")
sys.meta_path.insert(0, Blocks())
"""


def settings(**sections):
    return load(sections, environ={}).settings


def only(findings, status):
    """The one finding, which says it in one line."""
    (found,) = findings
    assert found.status == status and "\n" not in found.said + found.todo, found
    assert bool(found.todo) == (status != "ok")
    return found


# --- vLLM ---


@pytest.fixture
def with_vllm(tmp_path):
    """Findings where `vllm` is a package of that text."""

    def check(text="", sitecustomize="", **options):
        folder = tmp_path / "site"
        (folder / "vllm").mkdir(parents=True)
        (folder / "vllm" / "__init__.py").write_text(text)
        (folder / "sitecustomize.py").write_text(sitecustomize)
        return check_vllm(True, {**os.environ, "PYTHONPATH": str(folder)}, **options)

    return check


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sitecustomize": BLOCKED}, "vLLM is not installed in this environment"),
        ({"text": "__version__ = '0.24.1'"}, "vLLM 0.24.1 is too old"),
        ({"text": "raise OSError('libcudart.so: cannot open')"}, "cannot be imported: OSError: libcudart.so"),
        ({"text": "import os, signal; print('last words'); os.kill(os.getpid(), signal.SIGSEGV)"}, "SIGSEGV"),
        ({"text": "import signal; signal.pause()", "seconds": 0.5}, "within 0.5 s"),
    ],
    ids=["missing", "too old", "not imported", "crashes", "silent"],
)
def test_a_vllm_that_does_not_do(with_vllm, given, words):
    found = only(with_vllm(**given), "fail")
    assert words in found.said and ("sitecustomize" not in given or "pip install" in found.todo)


def test_vllm_too_new_is_tried_all_the_same(with_vllm):
    version, interface = with_vllm("__version__ = '0.99.0'")
    assert (version.status, interface.status) == ("warn", "fail")
    assert "newer" in version.said and "0.32" in version.todo
    assert "ModuleNotFoundError: No module named 'vllm.distributed'" in interface.said


def test_the_settings_stay_out_of_the_try(with_vllm, monkeypatch):
    monkeypatch.setenv("RAGKV_MEMORY_CAPACITY", "900TiB")
    version = "import os; __version__ = '0.24.%d' % sum(name.startswith('RAGKV_') for name in os.environ)"
    assert only(with_vllm(version), "fail").said == "vLLM 0.24.0 is too old"


LEAVING = """
import subprocess
left = subprocess.Popen(["sleep", "600"])
__version__ = f"0.24.{left.pid}"
"""


def test_what_vllm_leaves_running_is_ended_and_not_waited_for(with_vllm):
    pid = int(only(with_vllm(LEAVING, seconds=60.0), "fail").said.split(".")[2].split()[0])
    with contextlib.suppress(ProcessLookupError):  # gone
        assert select.select([os.pidfd_open(pid)], [], [], 60.0)[0]


@pytest.mark.parametrize(
    ("version", "status"),
    [
        *((version, "ok") for version in ("0.25.1", "0.31.0", "0.32.0", "0.32.7rc1")),
        *((version, "fail") for version in ("0.24.99", "0.3.0")),
        *((version, "warn") for version in ("0.33.0.dev12+gabc", "1.0", "dev")),
    ],
)
def test_versions_of_vllm(version, status):
    assert only([judge_version(version)], status).said.startswith(f"vLLM {version}")


def test_the_interface_of_this_vllm():
    base = pytest.importorskip("vllm.distributed.kv_transfer.kv_connector.v1.base").KVConnectorBase_V1
    from ragkv.connectors.vllm.connector import RagKVConnector

    assert only([judge_interface(base, RagKVConnector)], "ok").said

    class WithDuty(base):
        @abstractmethod
        def new_duty(self): ...

    class Ours(RagKVConnector, WithDuty):
        pass

    assert "new_duty" in only([judge_interface(WithDuty, Ours)], "fail").said

    class OtherCall(base):
        def get_num_new_matched_tokens(self, request, num_computed_tokens, blocks):
            return 0, False

    said = only([judge_interface(OtherCall, RagKVConnector)], "fail").said
    assert "get_num_new_matched_tokens(self, request, num_computed_tokens, blocks)" in said

    without = SimpleNamespace(**{name: None for name in dir(base) if name != "get_finished"})
    assert "no get_finished" in only([judge_interface(without, RagKVConnector)], "fail").said


def test_what_a_small_engine_showed():
    assert only([judge_engine([], TOKENS - 1)], "ok")
    assert "0 came back" in only([judge_engine([], 0)], "fail").said
    said = only([judge_engine(["elements and addresses do not match one to one"], 0)], "fail").said
    assert said == "unknown KV layout: elements and addresses do not match one to one"


def test_the_driver_is_named_or_missed(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '570.1, NVIDIA H200\\n570.1, NVIDIA H200\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert "driver 570.1 (2 x NVIDIA H200)" in only([check_versions()], "ok").said
    monkeypatch.setattr(doctor, "DRIVER_SECONDS", 0.1)
    for fails in ("exit 9", "echo No devices were found", "exec sleep 600"):  # the last where the driver hangs
        program.write_text(f"#!/bin/sh\n{fails}\n")
        assert "nvidia-smi fails" in only([check_versions()], "warn").said
    program.unlink()
    assert "torch" in only([check_versions()], "ok").said


# --- the machine ---


@pytest.fixture
def shared_memory(monkeypatch):
    """Shared memory of that many bytes, of which half are free."""

    def have(size):
        stats = SimpleNamespace(f_bavail=size // 2 // 4096, f_blocks=size // 4096, f_frsize=4096)
        monkeypatch.setattr(os, "statvfs", lambda path: stats)

    return have


def test_shared_memory_too_small(shared_memory):
    shared_memory(64 * MIB)
    found = only([check_memory(settings(memory={"capacity": "33MiB"}))], "fail")
    assert found.said.startswith("memory.capacity = 33MiB: allowed: at most what shared memory has free, 32MiB")
    assert "--shm-size" in found.todo and "taken already" in found.todo
    assert only([check_memory(settings(memory={"capacity": "32MiB"}))], "ok")


def test_shared_memory_that_nothing_backs(shared_memory, monkeypatch):
    shared_memory(64 * MIB)
    monkeypatch.setattr(preflight, "backing", lambda: Backing(16 * MIB, "the memory limit in memory.max"))
    found = only([check_memory(settings(memory={"capacity": "32MiB"}))], "fail")
    assert "at most what the memory limit in memory.max leaves, 16MiB" in found.said
    for there in (None, Backing(32 * MIB, "this machine's memory")):
        monkeypatch.setattr(preflight, "backing", lambda there=there: there)
        assert only([check_memory(settings(memory={"capacity": "32MiB"}))], "ok")

    def fail(path):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "statvfs", fail)
    assert "/dev/shm" in only([check_memory(settings())], "fail").said


def disk(path, capacity="1MiB", speed_bytes=MIB):
    return check_disk(settings(disk={"path": str(path), "capacity": capacity}), speed_bytes)


def test_a_disk_folder_to_be_is_tried_and_not_left_behind(tmp_path):
    said = only(disk(tmp_path / "a" / "b"), "ok").said
    assert "free, 0B kept, writes" in said and "/s, reads" in said
    assert list(tmp_path.iterdir()) == []


def test_a_disk_folder_that_is_there_keeps_what_it_holds(tmp_path):
    tmp_path.chmod(0o700)
    (tmp_path / f"{'ab' * 16}.kv").write_bytes(bytes(5 * MIB))
    assert "5MiB kept" in only(disk(tmp_path, speed_bytes=0), "ok").said
    assert [file.name for file in tmp_path.iterdir()] == [f"{'ab' * 16}.kv"]


def test_a_disk_folder_open_to_others(tmp_path):
    tmp_path.chmod(0o755)
    good, bad = disk(tmp_path)
    assert (good.status, bad.status) == ("ok", "warn") and "0755" in bad.said and "chmod 700" in bad.todo


@pytest.mark.parametrize("below", ["", "kept"])
def test_a_disk_folder_that_cannot_be_written_to(tmp_path, below):
    (tmp_path / "file").write_text("in the way")
    found = only(disk(tmp_path / "file" / below if below else tmp_path / "file"), "fail")
    assert "cannot be written to" in found.said and str(tmp_path / "file") in found.said
    assert "disk.path" in found.todo
    assert only(disk("/proc/ragkv/kept"), "fail")


@pytest.mark.parametrize(
    ("room", "status", "words"),
    [
        (Room(1 << 20, 1 << 60, 10**6, 10**6), "warn", ["less than disk.capacity = 900TiB"]),
        (Room(1 << 60, 1 << 60, 105, 2000), "warn", ["room for 5 files", "inodes"]),
        (None, "ok", ["unknown free"]),
    ],
)
def test_the_room_of_a_disk(tmp_path, monkeypatch, room, status, words):
    monkeypatch.setattr(checks.DiskStore, "room", lambda self: room)
    found = disk(tmp_path / "kept", capacity="900TiB")[-1]
    assert found.status == status and all(word in found.said + found.todo for word in words)


def test_files_beside_the_tiers(tmp_path):
    token = tmp_path / "token"
    control = settings(control={"listen": "127.0.0.1:0", "token_file": str(token)})
    assert "No such file" in only(check_files(control), "fail").said
    token.write_text("short")
    assert "at least 16" in only(check_files(control), "fail").said
    token.write_text("x" * 16)
    assert check_files(control) == check_files(settings()) == []
    assert check_files(settings(trace={"file": str(tmp_path / "trace")})) == []
    missing = tmp_path / "none" / "trace"
    found = only(check_files(settings(trace={"file": str(missing)})), "fail")
    assert f"trace.file: {missing} cannot be written to" in found.said


def test_settings_that_cannot_be(tmp_path):
    file = tmp_path / "ragkv.yaml"
    file.write_text("memory: {capacity: lots}\n")
    found, none = check_settings(file, {})
    assert only([found], "fail").said.startswith("memory.capacity = 'lots'") and none is None
    found, none = check_settings(None, {"RAGKV_REDIS_URL": "ftp://:hunter2@host"})
    assert "redis.url" in only([found], "fail").said and "hunter2" not in found.said and none is None
    found, there = check_settings(None, {"RAGKV_MEMORY_CAPACITY": "4MiB"})
    assert found.said == "from RAGKV_MEMORY_CAPACITY" and there.memory.capacity == 4 * MIB
    assert check_settings(None, {})[0].said == "all defaults"
    assert "no disk tier" in only(check_disk(settings()), "ok").said
    assert "no Redis tier" in only(check_redis(settings()), "ok").said


# --- Redis ---


def test_redis_down():
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        found = only(check_redis(settings(redis={"url": f"redis://127.0.0.1:{taken.getsockname()[1]}"})), "fail")
    assert "127.0.0.1" in found.said and "start the server" in found.todo


@needs_server
def test_redis_as_it_should_be_and_as_it_should_not(monkeypatch):
    with Server(maxmemory=64 * MIB, policy="allkeys-lru") as server:
        answer, limits = check_redis(settings(redis={"url": server.url}))
        assert answer.status == "ok" and "median of 20" in answer.said
        assert limits.said == "maxmemory 64MiB, policy allkeys-lru"
        assert server.client().dbsize() == 0
        with monkeypatch.context() as patch:
            patch.setattr(checks, "SLOW_SECONDS", 0.0)
            assert check_redis(settings(redis={"url": server.url}))[0].status == "warn"
        server.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
        assert "ragkv removes chunks" in check_redis(settings(redis={"url": server.url}))[1].said
        server.ask("CONFIG", "SET", "maxmemory", "0")
        assert "no maxmemory" in check_redis(settings(redis={"url": server.url}))[1].said
        server.ask("CONFIG", "SET", "requirepass", "hunter2")
        found = only(check_redis(settings(redis={"url": server.url})), "fail")
        assert "user, password" in found.todo
        server.stop()
        found = only(check_redis(settings(redis={"url": server.url, "timeout": 0.2})), "fail")
        server.cont()
        assert "network" in found.todo


@needs_server
@pytest.mark.parametrize("told", [{}, {"maxmemory": "plenty"}, redis.ResponseError("unknown command 'INFO'")])
def test_a_redis_that_says_nothing_of_its_memory(monkeypatch, told):
    def info(self, section):
        if isinstance(told, Exception):
            raise told
        return told

    monkeypatch.setattr(redis.Redis, "info", info)
    with Server() as server:
        only(check_redis(settings(redis={"url": server.url})), "ok")


# --- a server ---

HEAD = "# TYPE ragkv_lookups_total counter\n# TYPE ragkv_errors_total counter\n"
AT_WORK = """vllm:request_success_total{finished_reason="stop"} 4.0
vllm:prompt_tokens_total 400.0
ragkv_hit_tokens_total{tier="memory"} 100.0
ragkv_capacity_bytes{tier="memory"} 1000.0
"""
FUSED = 'ragkv_fused_tokens_total{kind="reused"} 40.0\nragkv_fused_tokens_total{kind="gap"} 9.0\n'


@pytest.mark.parametrize(
    ("text", "statuses", "words"),
    [
        ("vllm:prompt_tokens_total 400.0\n", ["fail"], "without ragkv"),
        (HEAD, ["ok"], "0 requests"),
        (HEAD + AT_WORK, ["ok"], "4 requests, 25% of 400 prompt tokens"),
        (HEAD + AT_WORK + FUSED, ["ok"], "35% of 400 prompt tokens"),
        (HEAD + 'vllm:request_success_total{finished_reason="stop"} 4.0\n', ["fail"], "stood aside"),
        (HEAD + AT_WORK + 'ragkv_tier_state{tier="disk",side="read"} 2.0\n', ["ok", "warn"], "disk rests"),
        (HEAD + AT_WORK + 'ragkv_errors_total{kind="load"} 3.0\n', ["ok", "warn"], "load 3"),
        ("<html>", ["fail"], "not metrics"),
    ],
)
def test_servers(text, statuses, words):
    with serving_metrics(text) as server:
        findings = check_server(server.url)
    assert [each.status for each in findings] == statuses
    assert words in findings[-1].said and all("\n" not in each.said for each in findings)


@pytest.mark.parametrize(("text", "memory", "engine"), [(HEAD + AT_WORK, "warn", False), ("<html>", "fail", True)])
def test_beside_a_server_that_is_well_its_memory_is_not_asked_for_again(monkeypatch, text, memory, engine):
    tried = []
    monkeypatch.setattr(doctor, "check_vllm", lambda quick, environ: tried.append(not quick) or [])
    with serving_metrics(text) as server:
        findings = examine(None, server.url, False, {"RAGKV_MEMORY_CAPACITY": "900TiB"})
    assert {each.check: each.status for each in findings}["shared memory"] == memory
    assert tried == [engine]


def test_no_server():
    assert "no answer" in only(check_server("http://127.0.0.1:9"), "fail").said
    assert "allowed" in only(check_server("localhost:8000"), "fail").said


# --- the command ---


def test_the_command_names_every_cause_and_fails(tmp_path):
    (tmp_path / "vllm.py").write_text("__version__ = '0.24.0'\n")
    (tmp_path / "file").touch()
    (tmp_path / "ragkv.yaml").write_text(
        f"memory: {{capacity: 900TiB}}\ndisk: {{path: {tmp_path}/file/kept}}\nredis: {{url: 'redis://127.0.0.1:9'}}\n"
    )
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)}
    command = [RAGKV, "doctor", "--config", "ragkv.yaml", "--quick"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, env=env, cwd=tmp_path)
    found = {each["check"]: each for each in json.loads(done.stdout)}
    assert done.returncode == 1
    failed = [name for name, each in found.items() if each["status"] == "fail"]
    assert failed == ["vllm", "shared memory", "disk", "redis"]
    shown = subprocess.run(command, capture_output=True, text=True, env={**env, "COLUMNS": "300"}, cwd=tmp_path)
    assert shown.returncode == 1
    for name in failed:
        assert found[name]["said"] in shown.stdout and f"{name}: {found[name]['todo']}" in shown.stdout


def test_the_command_succeeds_where_only_warnings_are(tmp_path, monkeypatch):
    from ragkv import cli
    from ragkv.checks import Finding

    monkeypatch.setattr(doctor, "examine", lambda *_: [Finding("disk", "warn", "slow", "buy another")])
    monkeypatch.setattr(sys, "argv", ["ragkv", "doctor"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
