"""`ragkv serve`: the command that it makes, what it refuses, and that it becomes the server."""

import importlib.metadata
import importlib.util
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ragkv.cli.serve import OURS, prepare
from ragkv.config import load
from ragkv.errors import RagKVError

RAGKV = str(Path(sys.executable).parent / "ragkv")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "ragkv.yaml"
    path.write_text("memory: {capacity: 3MiB}\n")
    return path


def transfer(launch):
    return json.loads(launch.command[launch.command.index("--kv-transfer-config") + 1])


def read_by_vllm(launch):
    return load(transfer(launch).get("kv_connector_extra_config"), launch.environment).settings


def test_the_settings_reach_vllm_in_another_folder(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    launch = prepare("some/model", ["--port", "8001"], Path("ragkv.yaml"), {"HOME": "/root"})
    monkeypatch.chdir("/")
    assert transfer(launch) == {
        "kv_connector": "RagKVConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"config": str(file)},
    }
    assert read_by_vllm(launch).memory.capacity == 3 << 20
    assert launch.command[-2:] == ("--port", "8001") and launch.environment["HOME"] == "/root"


def test_without_a_file_nothing_but_the_connector_is_named():
    launch = prepare("some/model", [], None, {"RAGKV_MEMORY_CAPACITY": "4MiB"})
    assert "kv_connector_extra_config" not in transfer(launch)
    assert read_by_vllm(launch).memory.capacity == 4 << 20


def test_the_option_is_stronger_than_the_variable_and_other_variables_than_both(file, tmp_path):
    weaker = tmp_path / "weaker.yaml"
    weaker.write_text("memory: {capacity: 9MiB}\ndisk: {capacity: 9MiB}\n")
    environ = {"RAGKV_CONFIG": str(weaker), "RAGKV_DISK_CAPACITY": "5MiB"}
    assert read_by_vllm(prepare("m", [], None, environ)).memory.capacity == 9 << 20
    settings = read_by_vllm(prepare("m", [], file, environ))
    assert (settings.memory.capacity, settings.disk.capacity) == (3 << 20, 5 << 20)


def test_passwords_stay_out_of_the_command(tmp_path):
    path = tmp_path / "secret.yaml"
    path.write_text("memory: {capacity: 3MiB}\nredis: {url: 'redis://:hunter2@host'}\n")
    launch = prepare("m", [], path, {})
    assert "hunter2" not in " ".join(launch.command)
    assert read_by_vllm(launch).redis.url == "redis://:hunter2@host"


@pytest.mark.parametrize(
    "argument",
    [
        *OURS,
        "--kv-transfer-config={}",
        "--kv_transfer_config",
        "--kv-transfer-config.kv_role=kv_producer",
        "--kv-tr",
        "--kv_offloading_size=4",
    ],
)
def test_what_would_contradict_is_refused(argument):
    with pytest.raises(RagKVError, match="allowed: not here") as caught:
        prepare("m", ["--port", "1", argument], None, {"RAGKV_MEMORY_CAPACITY": "4MiB"})
    assert argument.partition("=")[0] in str(caught.value) and "\n" not in str(caught.value)


def test_like_options_go_through():
    arguments = ["--kv-cache-dtype", "fp8", "--kv-cache-memory-bytes=1", "-tp", "2", "--kv"]
    environ = {"RAGKV_MEMORY_CAPACITY": "4MiB", "VLLM_PLUGINS": "other,ragkv"}
    assert prepare("m", arguments, None, environ).command[-6:] == tuple(arguments)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RAGKV_MEMORY_CAPACITY": "lots"}, "memory.capacity = 'lots'"),
        ({"RAGKV_MEMORY_CAPACITY": "900TiB"}, "shared memory has free"),
        ({"RAGKV_MEMORY_CAPACITY": "4MiB", "RAGKV_REDIS_URL": "http://host"}, "redis.url"),
        ({"RAGKV_CONFIG": "/nowhere.yaml"}, "/nowhere.yaml"),
        ({"RAGKV_MEMORY_CAPACITY": "4MiB", "VLLM_PLUGINS": "other"}, "VLLM_PLUGINS = 'other'"),
    ],
)
def test_what_cannot_be_is_refused(environ, words):
    with pytest.raises(RagKVError) as caught:
        prepare("m", [], None, environ)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_without_vllm(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RagKVError, match="vLLM is not installed"):
        prepare("m", [], None, {"RAGKV_MEMORY_CAPACITY": "4MiB"})


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (True, ("-m", "vllm.entrypoints.cli.main", "serve", "m")),
        (False, ("-m", "vllm.entrypoints.openai.api_server", "--model", "m")),
    ],
)
def test_vllms_own_command_where_it_starts(monkeypatch, named, expected):
    def version(name):
        if not named:
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    launch = prepare("m", [], None, {"RAGKV_MEMORY_CAPACITY": "4MiB"})
    assert launch.command[:5] == (sys.executable, *expected)


DISK = {"RAGKV_MEMORY_CAPACITY": "4MiB", "RAGKV_DISK_PATH": "/somewhere"}


def stop_options(arguments=(), **environ):
    return [each for each in prepare("m", list(arguments), None, DISK | environ).command if "shut" in each]


def test_vllm_gets_time_to_write_down_what_waits():
    command = prepare("m", ["--port", "1"], None, DISK | {"RAGKV_PLACEMENT_FLUSH": "7.5"}).command
    assert command[command.index("--shutdown-timeout") + 1] == "18"


@pytest.mark.parametrize(
    "arguments", [["--shutdown-timeout", "3"], ["--shutdown_timeout=0"], ["--shut", "4"], ["--shutdown-timeout=9"]]
)
def test_the_users_own_time_is_kept(arguments):
    assert stop_options(arguments) == [each for each in arguments if "shut" in each]


@pytest.mark.parametrize("key", ["shutdown-timeout", "shutdown_timeout"])
@pytest.mark.parametrize("joined", [False, True])
def test_the_users_own_time_in_vllms_file_is_kept(tmp_path, key, joined):
    file = tmp_path / "vllm.yaml"
    option = [f"--config={file}"] if joined else ["--config", str(file)]
    assert stop_options(option) == ["--shutdown-timeout"], "a file that is not there says nothing"
    file.write_text("port: 1\n")
    assert stop_options(option) == ["--shutdown-timeout"]
    file.write_text(f"port: 1\n{key}: 3\n")
    assert stop_options(option) == []


def test_without_a_lower_tier_or_time_for_it_vllm_stops_as_ever():
    command = prepare("m", [], None, {"RAGKV_MEMORY_CAPACITY": "4MiB"}).command
    assert command[-3] == "--kv-transfer-config" and "--shutdown-timeout" not in command
    assert stop_options(RAGKV_PLACEMENT_FLUSH="0") == []


def test_a_vllm_that_does_not_know_the_option_is_not_given_it(tmp_path, monkeypatch):
    (tmp_path / "engine").mkdir()
    source = tmp_path / "engine" / "arg_utils.py"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=tmp_path / "__init__.py"))
    for text, known in (('"--other"', False), ('"--shutdown-timeout",', True)):
        source.write_text(text)
        assert bool(stop_options()) is known
    source.unlink()
    assert stop_options() == []


DETAILS = "--enable-prompt-tokens-details"


def details(*arguments):
    """What is put in before the user's own arguments."""
    command = prepare("m", arguments, None, {"RAGKV_MEMORY_CAPACITY": "4MiB"}).command
    return DETAILS in command[: len(command) - len(arguments)]


def test_answers_tell_what_was_hit_unless_the_user_says_otherwise(tmp_path):
    assert details() and details("--enable-prompt-embeds", "--port", "1")
    others = ("--no-enable-prompt-tokens-details", "--enable_prompt_tokens_details", "--enable-prompt-t")
    assert not any(details(said) for said in (DETAILS, *others))
    file = tmp_path / "vllm.yaml"
    for key in ("enable-prompt-tokens-details", "enable_prompt_tokens_details", "no-enable-prompt-tokens-details"):
        file.write_text(f"{key}: false\n")
        assert not details("--config", str(file))
    file.write_text("port: 1\n")
    assert details("--config", str(file))


def test_a_vllm_that_cannot_tell_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=tmp_path / "__init__.py"))
    assert not details()
    source = tmp_path / "entrypoints" / "openai" / "cli_args.py"  # where older versions have it
    source.parent.mkdir(parents=True)
    source.write_text("enable_prompt_tokens_details: bool = False")
    assert details()


def run(tmp_path, *arguments, **environ):
    env = {"PATH": "/usr/bin:/bin", "RAGKV_MEMORY_CAPACITY": "4MiB", "PYTHONPATH": str(tmp_path), **environ}
    return subprocess.run([RAGKV, *arguments], capture_output=True, text=True, env=env, cwd=tmp_path)


def test_a_dry_run_prints_what_a_shell_takes(file, tmp_path):
    done = run(
        tmp_path, "serve", "a model", "--served-model-name", "it's", "--config", "ragkv.yaml", "--dry-run",
        RAGKV_CONFIG="other.yaml",
    )  # fmt: skip
    words = shlex.split(done.stdout)
    assert done.returncode == 0 and words[:3] == ["env", "-u", "RAGKV_CONFIG"]
    assert "a model" in words and words[-2:] == ["--served-model-name", "it's"]


def test_exit_statuses(file, tmp_path):
    assert run(tmp_path, "serve").returncode == 2
    for words, said in (
        (("m", "--kv-transfer-config", "{}"), "--kv-transfer-config"),
        (("--port", "8001", "m", "--dry-run"), "MODEL = '--port'; allowed: the model first"),
    ):
        refused = run(tmp_path, "serve", *words)
        assert refused.returncode == 1 and len(refused.stderr.strip().splitlines()) == 1 and said in refused.stderr
    done = run(tmp_path, "serve", "m", "--dry-run", "--", "--config", "vllm.yaml")
    assert shlex.split(done.stdout)[-2:] == ["--config", "vllm.yaml"], "after two dashes all is vLLM's"


SERVER = """
import json, os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print(json.dumps({"pid": os.getpid(), "arguments": sys.argv[1:]}), flush=True)
signal.pause()
"""


def test_signals_and_exit_status_are_the_servers(file, tmp_path):
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(SERVER)
    (package.parent / "cli").mkdir()
    (package.parent / "cli" / "main.py").write_text(SERVER)
    for folder in (package, *package.parents[:2], package.parent / "cli"):
        (folder / "__init__.py").touch()
    command = [RAGKV, "serve", "m", "--config", str(file), "--port", "1"]
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as server:
        said = json.loads(server.stdout.readline())
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 7
    assert said["pid"] == server.pid and said["arguments"][-2:] == ["--port", "1"]
