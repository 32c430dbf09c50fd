"""What an engine may meet where it starts: in the system, in the model's folder, in its tiers. It serves."""

import errno
import logging
import os
import subprocess
from types import SimpleNamespace

import prometheus_client
import pytest

from ragkv.connectors.vllm import identity
from ragkv.connectors.vllm.connector import RagKVConnector
from ragkv.errors import ConfigError, StoreError
from ragkv.kvstore import metrics as m
from ragkv.kvstore import segment
from ragkv.kvstore.backing import backing
from ragkv.kvstore.metrics import Metrics
from ragkv.kvstore.stores import folder as folder_module
from ragkv.kvstore.stores.disk import DiskStore
from whole_start import Engine, alone, refusals, serves


@pytest.fixture(autouse=True)
def nothing_else(monkeypatch, caplog):
    caplog.set_level(logging.WARNING, "vllm.ragkv")
    with alone(monkeypatch):
        yield


@pytest.fixture
def mounted(tmp_path):
    """Makes a file system for a test, and unmounts it."""
    made = []

    def mount(options):
        place = tmp_path / f"mount{len(made)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("file systems are mounted here: needs root, and the right to mount")
        made.append(place)
        return place

    yield mount
    for place in made:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def shared_memory(monkeypatch):
    """Has the engine's shared memory lie elsewhere."""

    def move(folder):
        monkeypatch.setattr(segment, "FOLDER", folder)
        for function in (segment.available_bytes, segment.sweep, segment.Segment.__init__):
            monkeypatch.setattr(function, "__defaults__", (folder,))

    return move


def serves_aside(engine, caplog, *words):
    """The engine starts without reuse, one line says why, and it serves."""
    scheduler, worker = engine.start()
    assert scheduler.scheduler_side is None
    (line,) = set(refusals(caplog))
    assert "\n" not in line and all(word in line for word in words), line
    serves(scheduler, worker)


def serves_with_reuse(engine):
    scheduler, worker = engine.start()
    assert scheduler.scheduler_side is not None
    serves(scheduler, worker)
    return scheduler


# --- shared memory ---


def test_no_shared_memory_at_all(shared_memory, tmp_path, caplog):
    shared_memory(tmp_path / "missing")
    serves_aside(Engine(None), caplog, "shared memory", "missing")


def test_shared_memory_that_is_a_file(shared_memory, tmp_path, caplog):
    (tmp_path / "file").touch()
    shared_memory(tmp_path / "file")
    serves_aside(Engine(None), caplog, "shared memory", "file")


def test_tiny_shared_memory_stops_a_start_and_once_started_no_more(shared_memory, mounted, caplog):
    shared_memory(mounted("size=512k"))
    with pytest.raises(ConfigError, match=r"memory\.capacity"):
        Engine(None).start()
    engine = Engine(None)
    object.__setattr__(engine.config.kv_transfer_config, "_ragkv_room_checked", True)  # it was there a moment ago
    serves_aside(engine, caplog, "do not fit into")


def test_shared_memory_without_inodes(shared_memory, mounted, caplog):
    place = mounted("size=8m,nr_inodes=2")
    (place / "theirs").touch()
    shared_memory(place)
    serves_aside(Engine(None), caplog, "shared memory")


@pytest.mark.parametrize("options", ["size=8m,noexec,nosuid,nodev", "size=8m,ro"])
def test_how_shared_memory_is_mounted(shared_memory, mounted, caplog, options):
    shared_memory(mounted(options))
    if "noexec" in options:
        serves_with_reuse(Engine(None))
    else:
        serves_aside(Engine(None), caplog, "Read-only file system")


# --- /proc ---


def test_a_system_without_entries_in_proc(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(segment, "BOOT_ID", tmp_path / "proc" / "boot_id")
    serves_aside(Engine(None), caplog, "boot_id")
    assert backing(tmp_path / "proc") is None


def test_entries_of_proc_that_may_not_be_read(tmp_path):
    for name in ("meminfo", "self/mountinfo", "self/cgroup"):
        (tmp_path / name).mkdir(parents=True)  # a folder: reading it fails for root, too
    assert backing(tmp_path) is None


# --- the model ---


def broken_link(folder):
    (folder / "model.safetensors").symlink_to(folder / "gone")


def folder_for_a_file(folder):
    (folder / "model.safetensors").mkdir()


@pytest.mark.parametrize("spoil", [broken_link, folder_for_a_file])
def test_a_model_folder_that_cannot_be_read(tmp_path, caplog, spoil):
    spoil(tmp_path)
    engine = Engine(None)
    engine.config.model_config.model = str(tmp_path)
    serves_with_reuse(engine)
    assert [line for line in caplog.messages if "the model's weights cannot be looked at" in line], caplog.text


@pytest.mark.parametrize(
    "told",
    [{1: 2, "rope_theta": 3}, {"a": {(1, 2): 3}}, None, [], RuntimeError("no such config")],
    ids=["mixed keys", "a tuple as key", "nothing", "a list", "an error"],
)
def test_a_configuration_of_odd_types(caplog, told):
    def to_dict():
        if isinstance(told, Exception):
            raise told
        return told

    engine = Engine(None)
    engine.config.model_config.hf_config = SimpleNamespace(to_dict=to_dict)
    serves_aside(engine, caplog)


def test_a_configuration_that_holds_itself(caplog):
    told = {}
    told["inner"] = told
    engine = Engine(None)
    engine.config.model_config.hf_config = SimpleNamespace(to_dict=lambda: told)
    serves_aside(engine, caplog, "Circular")


@pytest.mark.parametrize("size", [None, "576", [576]])
def test_a_hidden_size_that_is_no_number(caplog, size):
    engine = Engine(None)
    engine.config.model_config.get_hidden_size = lambda: size
    serves_aside(engine, caplog, "TypeError")


def test_a_vocabulary_of_odd_numbers():
    odd = {"a": 1, "b": 10**12, "c": -1, "d": None, "e": "7", b"\n\n": 2, 5: 3}
    found, good = (identity.token_structure(each) for each in (odd, {"a": 1, b"\n\n": 2, "5": 3}))
    assert {name: list(value) for name, value in vars(found).items()} == {
        name: list(value) for name, value in vars(good).items()
    }


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), ValueError("no such tokenizer")])
def test_a_tokenizer_that_cannot_be_had(monkeypatch, caplog, error):
    def fail(_):
        raise error

    monkeypatch.setattr("vllm.tokenizers.cached_tokenizer_from_config", fail)
    engine = Engine(None)
    engine.config.model_config.skip_tokenizer_init = False
    serves_aside(engine, caplog, str(error))


# --- tiers: the engine does without them, and reuses ---


@pytest.mark.parametrize("path", ["/a\0b", "/proc/ragkv/kv", "/dev/null/kv", f"/{'x' * 300}"])
def test_a_folder_and_a_trace_that_cannot_be(caplog, path):
    serves_with_reuse(Engine(None, disk={"path": path}, trace={"file": path}))
    assert "the engine runs without a disk tier" in caplog.text and "no trace is written" in caplog.text


def test_a_folder_on_a_file_system_that_is_read_only(mounted, caplog):
    serves_with_reuse(Engine(None, disk={"path": f"{mounted('size=1m,ro')}/kv"}))
    assert "Read-only file system; the engine runs without a disk tier" in caplog.text


def test_a_file_system_that_becomes_read_only(tmp_path, monkeypatch):
    store = DiskStore(tmp_path / "kv")
    store.put(bytes(16), [b"value"])
    opened = os.open

    def refuse(name, flags, *rest, **more):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(name, flags, *rest, **more)

    monkeypatch.setattr(folder_module.os, "open", refuse)
    with pytest.raises(StoreError, match="Read-only") as caught:
        store.put(bytes(15) + b"1", [b"value"])
    assert caught.value.reason == "refused" and store.get(bytes(16)) == b"value"


def test_a_full_file_system_at_start(mounted, caplog):
    place = mounted("size=1m,nr_inodes=3")
    (place / "kv").mkdir()
    (place / "theirs").touch()  # the last inode
    serves_with_reuse(Engine(None, disk={"path": f"{place}/kv"}))
    assert "No space left on device; the engine runs without a disk tier" in caplog.text


# --- metrics, in the process of the API server ---


def test_metrics_whose_names_are_taken(caplog):
    registry = prometheus_client.CollectorRegistry()
    kinds = (prometheus_client.Counter, prometheus_client.Gauge, prometheus_client.Histogram)
    types = {kind: lambda kind=kind, **given: kind(registry=registry, **given) for kind in kinds}
    config = SimpleNamespace(kv_transfer_config=None)
    first, second = (RagKVConnector.build_prom_metrics(config, types, ["engine"], {0: ["0"]}) for _ in range(2))
    for metrics in (first, second):
        counted = Metrics()
        counted.count(m.STORED_TOKENS, 3)
        metrics.observe(counted.drain())
    assert registry.get_sample_value(m.STORED_TOKENS, {"engine": "0"}) == 3
    assert "Duplicated timeseries in CollectorRegistry" in caplog.text
