"""The documentation: it builds, says what the code says, and every command in it is run somewhere."""

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from doc_commands import PAGES, ROOT, commands, unknown
from ragkv.cli import app
from ragkv.config.settings import keys
from ragkv.config.sources import FILE_VARIABLE
from ragkv.kvstore.codec import Header, encode
from ragkv.kvstore.metrics import METRICS
from ragkv.kvstore.stores.disk import DiskStore

ALL = [command for page in PAGES for command in commands(page)]
SHOWN = [command for command in ALL if not command.inline]
# Run by this file, in a folder with what they name.
HERE = (
    r"ragkv config (check|show|import)\b(?!.*\|)",
    r"ragkv store (ls|show|verify|rm|stats) DIR\b(?!.*\|)",
    r"ragkv observe up\b",
    r"python -c ",
)
VARIABLES = {f"RAGKV_{key.replace('.', '_')}".upper() for key in keys()} | {FILE_VARIABLE}
# Commands that tests of their own run.
ELSEWHERE = (
    r"make (demo|test|docs)",
    r"ragkv (bench|config|control|demo|doctor|ingest|observe check|serve|simulate|store|top|--version)\b",
    r"vllm serve ",
    r"prometheus --config.file=",
    r"curl -s http://localhost:8000/metrics \| grep ragkv_",
    r"curl http://localhost:8000/v1/completions .*cache_salt",
)


def place(text):
    """The command without variables before it."""
    return re.sub(r"^([A-Z_][A-Z0-9_]*=\S+ +)*", "", text)


def is_run_here(command):
    return any(re.match(pattern, place(command.text)) for pattern in HERE)


@pytest.fixture(scope="module")
def make_docs():
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_reference_is_that_of_the_settings(make_docs):
    assert make_docs.PAGE.read_text(encoding="utf-8") == make_docs.page(), "run: python scripts/make_docs.py"


def test_the_reference_has_every_setting_with_its_limits(make_docs):
    text = make_docs.page()
    assert re.findall(r"^\| `([a-z_.]+)`<br>", text, re.MULTILINE) == list(keys())
    rows = {line.split("`")[1]: line.split(" | ") for line in text.splitlines() if line.startswith("| `")}
    assert rows["memory.capacity"][1:4] == ["size", "`4GiB`", "at least 1MiB"]
    assert rows["redis.timeout"][1:4] == ["number", "`1.0`", "above 0, at most 60"]
    assert rows["disk.write"][1:4] == ["name", "`through`", "`through`, `back`"]
    assert rows["disk.path"][1:4] == ["text", "none", "an absolute path of a folder"]
    assert "`adaptive`, `arc`" in rows["memory.policy"][3]
    assert "<br>`RAGKV_FUSION_RECOMPUTE_RATIO`" in rows["fusion.recompute_ratio"][0]
    assert all(len(row) == 5 and row[3] for row in rows.values())


def test_the_site_builds_without_a_warning_and_asks_nobody(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    pytest.importorskip("mkdocstrings_handlers.python", reason="mkdocstrings-python is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").glob("*.html"))
    assert len(pages) > len(PAGES) - 1  # and one for what is not found
    for page in pages:
        loaded = re.findall(r"<(?:script|link|img)\b[^>]*(?:src|href)=\"?(https?:[^\"\s>]+)", page.read_text())
        assert not loaded, page.name
    for page, name in (("api", "ragkv.rag.prompt"), ("contracts", "ragkv.kvstore.cache.KVCache.lookup")):
        assert f'id="{name}"' in (tmp_path / "site" / f"{page}.html").read_text(), "made from the docstring"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_variables_and_metrics_in_the_text_exist(page):
    text = page.read_text(encoding="utf-8")
    sections = "|".join({key.split(".")[0] for key in keys()})
    named = set(re.findall(rf"`({sections})\.([a-z_]+)(?::[^`]*)?`", text))
    assert {".".join(each) for each in named} <= {*keys(), "fusion.png"}
    assert set(re.findall(r"\bRAGKV_[A-Z_]+\b", text)) <= VARIABLES
    metrics = {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bragkv_[a-z_]+[a-z]\b", text)}
    assert metrics <= {*METRICS}, metrics - METRICS.keys()


def test_bytes_of_a_token_are_computed_right():
    rows = re.findall(
        r"^\| .* \| (\d+) \| (\d+) \| (\d+) \| (\d) \| ([\d,]+) bytes \| ([\d,]+) \|$",
        (ROOT / "docs" / "operations.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert len(rows) == 4
    for *figures, token, fitting in rows:
        layers, heads, width, element = map(int, figures)
        size = 2 * layers * heads * width * element
        assert (int(token.replace(",", "")), int(fitting.replace(",", ""))) == (size, 32 * 2**30 // size)


@pytest.mark.parametrize("command", ALL, ids=str)
def test_ragkv_knows_every_command_and_option(command):
    if command.words[0] == "ragkv" or command.words[:2] == ["python", "-m"]:
        assert unknown(command.words) is None
    assert {name for name in command.variables if name.startswith("RAGKV_")} <= VARIABLES


@pytest.mark.parametrize("command", SHOWN, ids=str)
def test_every_command_is_run_or_says_what_it_needs(command):
    text = place(command.text)
    assert command.marked or is_run_here(command) or any(re.match(pattern, text) for pattern in ELSEWHERE)


def test_no_rule_is_left_over():
    texts = [place(command.text) for command in SHOWN]
    for pattern in [*HERE, *ELSEWHERE]:
        assert any(re.match(pattern, text) for text in texts), pattern


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """A folder with what the commands name: settings, LMCache's, a model's, and the folder of a disk tier."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("RAGKV_")]:
        monkeypatch.delenv(name)
    settings = f"memory: {{capacity: 2MiB}}\ndisk: {{path: {tmp_path}/cache}}\n"
    for name in ("ragkv.yaml", "FILE"):
        (tmp_path / name).write_text(settings)
    (tmp_path / "lmcache.yaml").write_text("chunk_size: 256\nmax_local_cpu_size: 0.01\n")
    model = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    (tmp_path / "config.json").write_text(json.dumps(model))
    header = Header(bytes(16), b"k" * 16, bytes(16), b"text" * 3, 0, False, (2, 3), "bfloat16", 1.5e9)
    with contextlib.closing(DiskStore(tmp_path / "DIR")) as store:
        store.put(b"k" * 16, encode(header, [bytes(header.raw_bytes)]))
    return tmp_path


@pytest.mark.parametrize("command", [each for each in SHOWN if is_run_here(each)], ids=str)
def test_commands_run(sandbox, monkeypatch, command):
    words = command.words
    if "--output" in words:
        (sandbox / words[words.index("--output") + 1]).unlink(missing_ok=True)
    if words[0] == "python":
        done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, f"{2 * 30 * 3 * 64 * 2}\n")
        return
    words = [(b"k" * 4).hex() if word == "KEY" else word.strip("[]") for word in words]
    done = CliRunner().invoke(app, words[1:], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert done.stdout.strip()
