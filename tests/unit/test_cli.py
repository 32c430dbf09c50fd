"""The command line as a whole: light to start, with an example in every help, completion and exit statuses."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

import ragkv
from ragkv import cli
from ragkv.benchmarks.compared import COMPARED
from ragkv.errors import RagKVError
from ragkv.options import one_of, some_of

RAGKV = Path(sys.executable).parent / "ragkv"
HEAVY = {"torch", "vllm", "transformers", "matplotlib", "redis", "opentelemetry"}


def commands(group=None, path=()):
    """Every command with its words, groups left out."""
    group = group or typer.main.get_command(cli.app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = {" ".join(words): command for words, command in commands()}


def run(*arguments, **environ):
    path = {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}
    env = {"PATH": "/usr/bin:/bin", "COLUMNS": "200", "TERM": "dumb", **path, **environ}
    return subprocess.run([RAGKV, *arguments], capture_output=True, text=True, env=env)


def examples(command):
    text = f"{command.help}\n{command.epilog}"
    return re.findall(r"^\s*(?:Example: )?(ragkv .+)$", text, re.MULTILINE)


def test_all_commands_are_here():
    assert {
        "demo", "simulate", "serve", "doctor", "top", "ingest", "config check", "config show", "config import",
        "store ls", "store show", "store verify", "store rm", "store stats", "bench serve", "bench compare",
        "observe up", "observe check", "control",
    } <= COMMANDS.keys()  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_examples_that_parse(name):
    command = COMMANDS[name]
    found = examples(command)
    assert found, f"ragkv {name} --help shows no example"
    for line in found:
        words = shlex.split(line)[1:]
        assert words[: len(name.split())] == name.split(), line
        command.make_context(name, words[len(name.split()) :])  # a usage error where an option is none


def test_help_shows_the_examples():
    text = " ".join(run("doctor", "--help").stdout.split())
    assert "ragkv doctor --quick --json" in text and "Exit status: 1 when something prevents reuse" in text


def test_help_loads_nothing_heavy():
    code = "import sys, ragkv.cli; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert HEAVY.isdisjoint(done.stdout.split())


@pytest.mark.parametrize(
    ("error", "status"), [(RagKVError("one line"), 1), (ValueError("bad input"), 1), (OSError("no disk"), 1)]
)
def test_errors_are_one_line(monkeypatch, capsys, error, status):
    def fail():
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == status and capsys.readouterr().err.strip() == str(error)


def test_wrong_usage_is_status_2():
    done = run("top", "--interval", "never")
    assert done.returncode == 2 and "--interval" in done.stderr


def test_the_version_is_told():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"ragkv {ragkv.__version__}\n")


@pytest.mark.parametrize("words", [(), ("config",), ("config", "check"), ("bench", "serve"), ("serve",)])
def test_h_is_help(words):
    done = run(*words, "-h")
    assert done.returncode == 0 and "Usage: ragkv" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_options_mean_the_same_everywhere(name):
    options = {option: each for each in COMMANDS[name].params for option in each.opts}
    if "--json" in options:  # prints, or is the older name of what names a file
        assert options["--json"].is_flag or "--output" in options["--json"].opts
    assert "--file" not in options or options["--file"].hidden
    if name in ("serve", "doctor", "config check", "config show"):
        assert "--config" in options


def test_completion_of_names():
    policies = some_of(COMPARED)
    assert policies("lfu,l") == ["lfu,lru"]
    assert policies("w") == ["wtinylfu"] and "lru" in policies("")
    assert one_of(("prefix", "content"))("") == ["content", "prefix"]


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("ragkv doc", ["doctor"]),
        ("ragkv simulate trace --policy lfu,ad", ["lfu,adaptive"]),
        ("ragkv simulate trace --semantics c", ["content"]),
        ("ragkv bench serve --system plain,rag", ["plain,ragkv", "plain,ragkv+fusion"]),
        ("ragkv store s", ["show", "stats"]),
    ],
)
def test_the_shell_is_told(typed, offered):
    words = typed.split(" ")
    done = run(_RAGKV_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD=str(len(words) - 1))
    assert done.stdout.split() == offered


def test_completion_can_be_installed():
    """What a shell is to load; which shell it is, --install-completion sees from its parents."""
    assert "_RAGKV_COMPLETE=complete_bash" in run(_RAGKV_COMPLETE="source_bash").stdout


def test_json_is_json(tmp_path):
    done = run("config", "show", "--json", RAGKV_MEMORY_CAPACITY="4MiB")
    assert done.returncode == 0 and "memory" in json.dumps(json.loads(done.stdout))
