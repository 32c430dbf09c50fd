"""Weights that are known by their files: all bytes of them, under whatever name."""

import hashlib
import json
import os
from types import SimpleNamespace

import pytest

from ragkv.connectors.vllm.files import Files, adapter_files, model_files
from ragkv.connectors.vllm.identity import Namespaces

SIZE = 300_000


def write(folder, change=None, name="adapter_model.safetensors", config=None):
    folder.mkdir(exist_ok=True)
    content = bytearray(range(250)) * (SIZE // 250)
    if change is not None:
        content[change] ^= 1
    beside = folder / "new"
    beside.write_bytes(content)
    beside.replace(folder / name)
    (folder / "adapter_config.json").write_text(
        json.dumps({"r": 4, "base_model_name_or_path": "a"} | (config or {}))
    )


def lora(path, number=1, **features):
    return SimpleNamespace(
        **{"lora_name": "mine", "lora_int_id": number, "lora_path": str(path), "load_inplace": False} | features
    )


def request(adapter):
    return SimpleNamespace(prompt_embeds=None, lora_request=adapter, mm_features=[], cache_salt=None)


def name(adapter, spaces=None):
    return (spaces or Namespaces(b"e" * 16)).of(request(adapter))


@pytest.mark.parametrize("place", [0, 1, 70_000, 149_999, 229_001, SIZE - 1])
def test_any_byte_of_an_adapter_counts(tmp_path, place):
    write(tmp_path / "a")
    before = name(lora(tmp_path / "a"))
    write(tmp_path / "a", change=place)
    assert before is not None and name(lora(tmp_path / "a")) not in (None, before)


def test_neither_name_nor_number_nor_folder_of_an_adapter_counts(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b", config={"base_model_name_or_path": "elsewhere", "revision": "main"})
    others = [lora(tmp_path / "b", 2), lora(tmp_path / "b", 3, lora_name="other")]
    assert {name(each) for each in others} == {name(lora(tmp_path / "a"))}
    write(tmp_path / "b", config={"r": 8})
    assert name(lora(tmp_path / "b")) != name(lora(tmp_path / "a")), "its scaling"


def test_an_adapter_in_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "mine")
    first = name(lora("~/mine"))
    assert first is not None and first == name(lora(tmp_path / "mine"))
    write(tmp_path / "mine", change=150_000)
    assert name(lora("~/mine")) not in (None, first)


def test_an_adapter_that_changes_under_its_name_is_left_alone_for_good(tmp_path):
    write(tmp_path / "a")
    spaces, adapter = Namespaces(b"e" * 16), lora(tmp_path / "a")
    first = name(adapter, spaces)
    assert first is not None and name(adapter, spaces) == first
    write(tmp_path / "a", change=7)
    assert name(adapter, spaces) is None
    assert name(lora(tmp_path / "a", 2), spaces) not in (None, first)
    write(tmp_path / "a")
    assert name(adapter, spaces) is None, "nobody knows which of them was loaded"


def test_a_replaced_link_is_another_adapter(tmp_path):
    """As in a hub's cache, whose snapshots are links."""
    for folder, change in (("a", None), ("b", 5)):
        write(tmp_path / folder, change=change)
    link, spaces = tmp_path / "link", Namespaces(b"e" * 16)
    link.symlink_to(tmp_path / "a")
    assert name(lora(link), spaces) == name(lora(tmp_path / "a"))
    link.unlink()
    link.symlink_to(tmp_path / "b")
    assert name(lora(link), spaces) is None


@pytest.mark.parametrize("path", ["org/adapter", "s3://bucket/adapter", "/no/such/folder"])
def test_an_adapter_that_lies_nowhere_here_is_left_alone(path):
    assert name(lora(path)) is None


def test_an_adapter_loaded_in_place_is_left_alone_from_then_on(tmp_path):
    write(tmp_path / "a")
    spaces = Namespaces(b"e" * 16)
    assert name(lora(tmp_path / "a"), spaces) is not None
    assert not spaces.replaced
    assert name(lora(tmp_path / "a", load_inplace=True), spaces) is None and spaces.replaced
    spaces.settle_replaced()
    assert name(lora(tmp_path / "a"), spaces) is None and not spaces.replaced


def test_an_adapter_first_seen_in_place_is_left_alone_too(tmp_path):
    """vLLM keeps what it has loaded when the same number is asked for, whatever the files hold by then."""
    write(tmp_path / "a")
    spaces = Namespaces(b"e" * 16)
    assert name(lora(tmp_path / "a", load_inplace=True), spaces) is None
    write(tmp_path / "a", change=5)
    assert name(lora(tmp_path / "a"), spaces) is None and not spaces.replaced


def test_an_adapter_whose_files_were_only_touched_is_the_same(tmp_path):
    write(tmp_path / "a")
    spaces, mine = Namespaces(b"e" * 16), lora(tmp_path / "a")
    first = name(mine, spaces)
    os.utime(tmp_path / "a" / "adapter_model.safetensors", ns=(5, 5))
    os.link(tmp_path / "a" / "adapter_model.safetensors", tmp_path / "backup")
    assert name(mine, spaces) == name(mine, spaces) == first is not None and not spaces.replaced


def test_an_adapter_that_was_not_loaded_changes_nothing(tmp_path):
    write(tmp_path / "a")
    spaces, mine = Namespaces(b"e" * 16), lora(tmp_path / "a")
    first = name(mine, spaces)
    spaces.note_adapter(lora(tmp_path / "none", load_inplace=True))
    spaces.adapter_failed()
    assert name(mine, spaces) == first is not None and not spaces.replaced


def test_an_adapter_loaded_in_place_of_another_leaves_both_alone(tmp_path):
    """A request that waits still names the old one's folder, and is computed by the new."""
    write(tmp_path / "old"), write(tmp_path / "new", change=5)
    spaces = Namespaces(b"e" * 16)
    spaces.note_adapter(lora(tmp_path / "old"))
    assert name(lora(tmp_path / "old"), spaces) is not None
    spaces.note_adapter(lora(tmp_path / "new", load_inplace=True))
    assert spaces.replaced
    assert name(lora(tmp_path / "old"), spaces) is None is name(lora(tmp_path / "new"), spaces)


def test_files_are_read_once_while_their_stamp_is_the_same(tmp_path, monkeypatch):
    write(tmp_path / "a")
    read, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: read.append(file.name) or digest(file, kind))
    files, found = Files(), adapter_files(str(tmp_path / "a"))
    first = files.fingerprint(found)
    assert files.fingerprint(found) == first and len(read) == 1, "not read again"
    model = tmp_path / "a" / "adapter_model.safetensors"
    before = model.stat()
    with model.open("r+b") as stream:
        stream.write(b"x")
    os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert files.fingerprint(found) != first is not None, "though it has the time of before"
    assert read == [str(model)] * 2
    assert files.fingerprint([]) is None


def model(folder, length=2048):
    return SimpleNamespace(model=str(folder), revision=None, max_model_len=length)


def test_a_model_that_cannot_be_looked_at_is_known_by_its_files(tmp_path):
    seen = set()
    for folder, change in (("a", None), ("b", None), ("c", 150_000)):
        write(tmp_path / folder, change, "model.safetensors")
        spaces = Namespaces(b"e" * 16)
        assert spaces.set_weights_of_files(model(tmp_path / folder), "auto")
        seen.add(name(None, spaces))
    assert len(seen) == 2
    assert spaces.set_weights_of_files(model(tmp_path / "c", 4096), "auto") and name(None, spaces) not in seen
    for load_format, folder in (("dummy", "a"), ("auto", "missing"), ("tensorizer", "a")):
        assert not spaces.set_weights_of_files(model(tmp_path / folder), load_format)


def test_a_model_in_one_file_is_that_file(tmp_path):
    write(tmp_path / "a", name="model.gguf")
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    file = tmp_path / "a" / "model.gguf"
    assert model_files(model(file), "auto") == model_files(model(tmp_path / "a"), "auto") == [file]


def test_an_adapter_edited_between_its_load_and_its_first_request_is_left_alone(tmp_path):
    folder, spaces, mine = tmp_path / "a", Namespaces(b"e" * 16), lora(tmp_path / "a")
    write(folder)
    spaces.note_adapter(mine)
    loaded = name(mine, spaces)
    assert loaded is not None and loaded == name(mine)
    spaces = Namespaces(b"e" * 16)
    spaces.note_adapter(mine)
    write(folder, change=12345)
    assert name(mine, spaces) is None, "nobody knows which of the two the engine has"
    assert name(mine) not in (None, loaded)


def test_noting_an_adapter_that_is_none_raises_nothing():
    spaces = Namespaces(b"e" * 16)
    spaces.note_adapter(None)
    spaces.note_adapter(lora("no/such/adapter"))
    assert name(lora("no/such/adapter"), spaces) is None
