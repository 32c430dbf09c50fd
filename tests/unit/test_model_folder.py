"""Which model a benchmark runs on: a folder, or a GGUF file that is converted once."""

import os

import pytest

from ragkv.benchmarks import model
from ragkv.benchmarks.model import ModelError, model_folder

COMPLETE = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def converted(monkeypatch, tmp_path):
    """What was converted, with conversions that only write the files' names."""
    found = []

    def convert(gguf, folder, single_digits):
        folder.mkdir()
        for name in COMPLETE:
            (folder / name).write_text(gguf.name)
        found.append((gguf, single_digits))

    monkeypatch.setattr(model, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(model, "convert_gguf", convert)
    return found


def test_a_folder_is_taken_as_it_is(tmp_path, converted):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.gguf").write_text("")
    assert model_folder(tmp_path) == tmp_path.resolve() and not converted


def test_a_gguf_file_is_converted_once(tmp_path, converted):
    gguf = tmp_path / "in" / "qwen.gguf"
    gguf.parent.mkdir()
    gguf.write_text("one")
    folder = model_folder(gguf, print)
    assert folder.parent == tmp_path / "cache" / "models" and folder.name.startswith("qwen-")
    assert model_folder(gguf.parent) == folder
    assert converted == [(gguf, False)], "cutting digits apart is SmolLM2's"
    os.utime(gguf, ns=(1, 1))
    assert model_folder(gguf) != folder, "another file of the same name"
    assert sorted(each.name for each in folder.parent.iterdir()) == sorted(
        [folder.name, model_folder(gguf).name]
    ), "nothing half made is left"


@pytest.mark.parametrize("names", [[], ["a.gguf", "b.gguf"], ["a.bin"]])
def test_a_folder_without_one_model_is_refused(tmp_path, converted, names):
    for name in names:
        (tmp_path / name).write_text("")
    with pytest.raises(ModelError, match=r"expected a folder with a config.json or one \*.gguf file"):
        model_folder(tmp_path)
    with pytest.raises(ModelError):
        model_folder(tmp_path / "nowhere.gguf")


def test_none_is_the_demonstrations(monkeypatch, tmp_path):
    monkeypatch.setattr(model, "ensure_model", lambda progress: tmp_path)
    assert model_folder(None) == tmp_path
