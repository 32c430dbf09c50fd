"""Eviction policies that other packages bring, by entry point."""

import sys

import pytest
from typer.testing import CliRunner

from ragkv.cli import app
from ragkv.config import Settings
from ragkv.policies import LRU, make_policy, policy_names

MODULE = """
from ragkv.policies import LRU

class Newest(LRU):
    "Named by an installed package."

def broken():
    raise OSError("no licence")
"""
POINTS = """
[ragkv.policies]
newest = a_package:Newest
lru = a_package:Newest
broken = a_package:broken
number = a_package:int
gone = a_package:Gone
"""


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    """A package that is installed for the time of a test."""
    info = tmp_path / "a_package-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a-package\nVersion: 1\n")
    (info / "entry_points.txt").write_text(POINTS)
    (tmp_path / "a_package.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("a_package", None)


def test_it_is_used_where_a_setting_names_it():
    settings = Settings(memory={"policy": "newest"}, disk={"policy": "newest"})
    made = make_policy(settings.memory.policy)
    assert type(made).__name__ == "Newest" and isinstance(made, LRU)
    made.insert("a")
    assert made.evict(1) == ["a"]


def test_it_is_loaded_only_then():
    assert Settings().memory.policy == "lru" and type(make_policy("lru")) is LRU, "ours goes before theirs"
    assert "a_package" not in sys.modules


def test_the_names_that_are_allowed():
    assert policy_names() == ["adaptive", "arc", "broken", "gone", "lfu", "lru", "newest", "number"]
    with pytest.raises(ValueError, match="allowed: adaptive, arc, broken, gone, lfu, lru, newest, number"):
        Settings(memory={"policy": "mru"})


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("broken", OSError, "no licence"),
        ("gone", AttributeError, "Gone"),
        ("number", ValueError, r"policy: 'number' \(a_package:int\) makes a int, no EvictionPolicy"),
    ],
)
def test_what_it_does_wrong_is_told(name, error, message, tmp_path):
    if name == "number":
        (tmp_path / "a_package.py").write_text("int = int")
    with pytest.raises(error, match=message):
        make_policy(name)


def test_config_check_tries_it(tmp_path):
    file = tmp_path / "ragkv.yaml"
    file.write_text("memory: {capacity: 1MiB, policy: newest}\n")
    good = CliRunner().invoke(app, ["config", "check", str(file)])
    assert good.exit_code == 0, good.output
    file.write_text("memory: {capacity: 1MiB, policy: broken}\n")
    bad = CliRunner().invoke(app, ["config", "check", str(file)])
    said = " ".join(bad.output.split())
    assert bad.exit_code == 1 and "memory.policy = 'broken': OSError: no licence" in said, bad.output
