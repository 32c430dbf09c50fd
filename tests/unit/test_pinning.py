"""Host memory is registered piece by piece, CUDA's errors are taken out, and all is undone in the end."""

import ctypes

import pytest
import torch

from fake_cudart import Runtime
from ragkv.connectors.vllm import pinning
from ragkv.connectors.vllm.pinning import find_runtime, piece_pages, pin

PAGE = 48


@pytest.fixture
def elements(monkeypatch):
    monkeypatch.setattr(pinning, "PIECE_BYTES", 3 * PAGE + 7)
    return torch.zeros(8 * PAGE // 2, dtype=torch.int16)


def test_pieces_are_whole_pages_and_all_of_the_memory(elements):
    assert piece_pages(PAGE) == 3 and piece_pages(1000) == 1
    runtime = Runtime()
    pinned = pin(elements, PAGE, runtime)
    at = elements.data_ptr()
    assert pinned.ok and runtime.pieces == {at: 3 * PAGE, at + 3 * PAGE: 3 * PAGE, at + 6 * PAGE: 2 * PAGE}
    pinned.release()
    assert not runtime.pieces and not pinned.ok
    pinned.release()
    assert runtime.last == 0, "the second time nothing is asked of CUDA"


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_failure_leaves_no_error_behind_and_nothing_pinned(elements, which, caplog):
    runtime = Runtime({which: 2})
    pinned = pin(elements, PAGE, runtime)
    assert not pinned.ok and not runtime.pieces
    assert runtime.last == 0, "the next kernel would raise it"
    assert runtime.calls == which + 1, "no more is tried"
    assert len(caplog.records) == 1 and "CUDA error 2" in caplog.text


def test_a_second_engine_in_the_process_finds_it_registered_and_does_not_undo_it(elements):
    runtime = Runtime()
    first, second = pin(elements, PAGE, runtime), pin(elements, PAGE, runtime)
    assert first.ok and second.ok and runtime.last == 0
    second.release()
    assert len(runtime.pieces) == 3, "they are the first's"
    first.release()
    assert not runtime.pieces


def test_memory_that_cuda_has_forgotten_meanwhile_is_no_error(elements):
    runtime = Runtime()
    pinned = pin(elements, PAGE, runtime)
    runtime.pieces.clear()
    pinned.release()
    assert runtime.last == 0


def test_without_a_runtime_nothing_is_pinned_and_it_is_said(elements, monkeypatch, caplog):
    monkeypatch.setattr(pinning, "find_runtime", lambda: None)
    pinned = pin(elements, PAGE)
    assert not pinned.ok and "not found" in caplog.text
    pinned.release()


def test_the_runtime_is_the_one_in_this_process(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(ctypes, "CDLL", lambda path: opened.append(path) or "library")
    maps = tmp_path / "maps"
    lines = [
        "7f00-7f01 r-xp 00000000 08:01 1  /usr/lib/libc.so.6",
        "7f02-7f03 r-xp 00000000 08:01 2  /site packages/cu13/lib/libcudart.so.13",
        "7f03-7f04 rw-p 00000000 08:01 2  /site packages/cu13/lib/libcudart.so.13",
        "7f05-7f06 rw-p 00000000 00:00 0 ",
    ]
    maps.write_text("\n".join(lines))
    assert find_runtime(maps) == "library" and opened == ["/site packages/cu13/lib/libcudart.so.13"]
    maps.write_text("\n".join([*lines[:1], "7f07-7f08 r--p 0 08:01 3  /libcudart/libother.so"]))
    assert find_runtime(maps) is None
    assert find_runtime(tmp_path / "missing") is None
