"""Stores that other packages bring, by entry point: the example of the docs, its suite, and what may go wrong."""

import importlib
import json
import logging
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ragkv.checks import check_policies, check_store
from ragkv.cli import app
from ragkv.config import Settings
from ragkv.connectors.vllm.announcing import Announcer
from ragkv.connectors.vllm.builder import make_cache
from ragkv.connectors.vllm.error_boundary import Faults
from ragkv.errors import ConfigError
from ragkv.kvstore import metrics as m
from ragkv.kvstore.io_pool import Write
from ragkv.kvstore.metrics import Metrics
from ragkv.kvstore.pages import PageShape
from ragkv.kvstore.stores.installed import make_store, store_names
from ragkv.preflight import has_lower_tier, read_settings
from ragkv.testing.stores import StoreTests

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "tiers.md").read_text(encoding="utf-8")
SECTION = PAGE[PAGE.index("## A store of your own") : PAGE.index("## When a tier fails")]
MODULE, SUITE = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
(TOML,) = re.findall(r"```toml\n(.*?)```", SECTION, re.DOTALL)
(YAML,) = re.findall(r"```yaml\n(.*?)```", SECTION, re.DOTALL)
POINTS = TOML.replace('project.entry-points."ragkv.stores"', "ragkv.stores").replace('"', "")
MORE = """
class Evicting(DictStore):
    capabilities = Capabilities(shared=True, evicts=True)

class Kept(DictStore):
    made = []

    def __init__(self):
        super().__init__()
        self.made.append(self)

class Stubborn(DictStore):
    def close(self):
        raise OSError("it does not end")

class Forgetful(DictStore):
    def put(self, key, parts):
        pass

class Unfinished(Store):
    pass

def broken():
    raise OSError("no licence")
"""
MORE_POINTS = """
evicting = a_package:Evicting
kept = a_package:Kept
stubborn = a_package:Stubborn
forgetful = a_package:Forgetful
unfinished = a_package:Unfinished
broken = a_package:broken
gone = a_package:Gone
number = builtins:int

[ragkv.policies]
broken = a_package:broken
"""
SHAPE = PageShape(ranks=1, layers=1, page_tokens=16, row_elements=8, itemsize=4, dtype="float32")
KEY = b"k" * 16


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    """A package that is installed for the time of a test."""
    info = tmp_path / "a_package-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a-package\nVersion: 1\n")
    (info / "entry_points.txt").write_text(POINTS + MORE_POINTS)
    (tmp_path / "a_package.py").write_text(MODULE + MORE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("a_package", None)


class TestTheExampleOfTheDocs(StoreTests):
    def open_store(self, folder):
        return importlib.import_module("a_package").DictStore()


def test_the_suite_of_the_docs_is_this_one():
    names = {}
    exec(SUITE, names)
    suite = names["TestDictStore"]
    assert issubclass(suite, StoreTests) and suite().open_store(None).name == "dict"


def cache_of(metrics=None, **store):
    settings, metrics = Settings(memory={"capacity": "1MiB"}, store=store), metrics or Metrics()
    return make_cache(settings, [SHAPE], bytearray(64 * SHAPE.page_bytes), 64, metrics, Faults(metrics))


def test_it_is_the_last_tier_where_a_setting_names_it(tmp_path):
    file = tmp_path / "ragkv.yaml"
    file.write_text(f"memory: {{capacity: 1MiB}}\ndisk: {{path: {tmp_path}/kv}}\n{YAML}")
    settings, metrics = read_settings(file=file, environ={}).settings, Metrics()
    assert has_lower_tier(settings) and settings.store.options == {"note": "mine"}
    cache = make_cache(settings, [SHAPE], bytearray(64 * SHAPE.page_bytes), 64, metrics, Faults(metrics))
    assert [(tier.name, tier.bit) for tier in cache.tiers] == [(m.DISK, 1), (m.STORE, 4)]
    cache.tick()
    gauges = metrics.drain()["gauges"]
    assert gauges[m.CAPACITY_BYTES + m.SEPARATOR + m.STORE] == 2**30
    assert gauges[m.SEPARATOR.join((m.TIER_STATE, m.STORE, "read"))] == 0
    assert cache.close(30.0)


def test_it_is_imported_only_then():
    assert cache_of().tiers == () and not has_lower_tier(Settings())
    assert "dict" in store_names() and "a_package" not in sys.modules


def test_chunks_are_written_to_it():
    cache = cache_of(name="kept")
    (tier,) = cache.tiers
    assert tier.write(Write(KEY, None, 5, 1.0, lambda: lambda: [b"a chu", b"nk"]), lambda ok: None)
    assert cache.close(30.0)
    (store,) = sys.modules["a_package"].Kept.made
    assert store.values == {KEY: b"a chunk"} and store.closed


def test_one_that_evicts_keeps_its_own_books():
    cache = cache_of(name="evicting")
    (tier,) = cache.tiers
    assert tier.index is None and tier.knows(KEY) is None, "it is asked"
    assert cache.close(30.0)
    cache = cache_of(name="dict")
    (tier,) = cache.tiers
    assert tier.index.capacity == 64 << 30 and tier.knows(KEY) is False
    assert cache.close(30.0)


WRONG = [
    ({"name": "broken"}, "OSError: no licence"),
    ({"name": "gone"}, "AttributeError: "),
    ({"name": "unfinished"}, "TypeError: Can't instantiate abstract class Unfinished"),
    ({"name": "number"}, "ValueError: store: 'number' (builtins:int) makes a int, no Store with capabilities"),
    ({"name": "dict", "options": {"size": 3}}, "TypeError: DictStore.__init__() got an unexpected keyword"),
]


@pytest.mark.parametrize(("store", "error"), WRONG, ids=[store["name"] for store, _ in WRONG])
def test_one_that_cannot_be_made_is_told_and_done_without(store, error, caplog):
    with caplog.at_level(logging.WARNING, "vllm.ragkv"):
        cache = cache_of(**store)
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith(f"ragkv: store.name = {store['name']}: {error}")
    assert said.endswith("; the engine runs without a store tier")
    assert cache.tiers == () and cache.close(0.0)
    (found,) = check_store(Settings(store=store))
    assert found.status == "fail" and f"store.name = {store['name']!r}: {error}" in found.said


def test_one_that_cannot_be_closed_ends_all_the_same():
    metrics = Metrics()
    assert cache_of(metrics, name="stubborn").close(30.0)
    assert metrics.drain()["counters"][m.ERRORS + m.SEPARATOR + "store tier: close"] == 1


def test_a_name_that_no_package_has(monkeypatch):
    with pytest.raises(ConfigError) as caught:
        read_settings({}, {"RAGKV_STORE_NAME": "s3"})
    names = "broken, dict, evicting, forgetful, gone, kept, number, stubborn, unfinished"
    assert str(caught.value) == f"ragkv: store.name = 's3' (from RAGKV_STORE_NAME): allowed: {names}"
    with pytest.raises(ValueError, match=f"store: 's3' is not one of {names}"):
        make_store("s3", {})
    monkeypatch.setattr("ragkv.preflight.store_names", list)
    with pytest.raises(ConfigError, match=r"allowed: none, since no installed package has an entry point of the"):
        read_settings({"store": {"name": "s3"}}, {})


def test_config_check_tries_it(tmp_path):
    file = tmp_path / "ragkv.yaml"

    def check(name):
        file.write_text(f"memory: {{capacity: 1MiB}}\nstore: {{name: {name}, options: {{note: hunter2}}}}\n")
        done = CliRunner().invoke(app, ["config", "check", str(file), "--json"])
        assert "hunter2" not in done.output
        (found,) = (each for each in json.loads(done.output)["findings"] if each["check"] == "store")
        return done.exit_code, found["said"]

    assert check("dict") == (0, "dict: keeps what is written")
    assert check("forgetful") == (1, "store.name = 'forgetful': it does not keep what is written")


def test_its_policy_is_tried_too():
    (found,) = check_policies(Settings(store={"name": "dict", "policy": "broken"}))
    assert found.status == "fail" and found.said == "store.policy = 'broken': OSError: no licence"


def test_the_start_names_it(caplog):
    settings = Settings(memory={"capacity": "1MiB"}, store={"name": "dict"})
    cache = cache_of(name="dict")
    with caplog.at_level(logging.INFO, "vllm.ragkv"):
        Announcer(settings, cache).started(bytes(16), 1, None)
    assert re.search(r"; store dict of 64GiB \((0 values, 0B found|still being listed)\); ", caplog.text)
    assert cache.close(30.0)
