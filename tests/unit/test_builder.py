"""The scheduler side put together: sizes from the settings, tiers that cannot be had, the trace."""

import json
import logging

import pytest
import torch

from engine_config import caches, config, spec
from ragkv.config import Settings
from ragkv.connectors.vllm import builder
from ragkv.connectors.vllm.builder import make_cache, make_recorder
from ragkv.connectors.vllm.error_boundary import Faults
from ragkv.connectors.vllm.identity import examine
from ragkv.connectors.vllm.sizes import memory_pages, page_shapes
from ragkv.errors import LayoutError
from ragkv.kvstore import metrics as m
from ragkv.kvstore.chunking import Chunker, TokenChain, TokenStructure
from ragkv.kvstore.keys import as_tokens
from ragkv.kvstore.metrics import Metrics
from ragkv.kvstore.prefix_tree import Chunk

SHAPE = examine(config(), caches(spec()))  # 3 layers, 2 heads of 64, bfloat16, 2 ranks
SPACE = b"namespace of one"


def page_bytes(tokens):
    return tokens * SHAPE.geometry.token_bytes * SHAPE.ranks


def test_pages_of_an_engine():
    (page,) = page_shapes(Settings(memory={"page_tokens": 5}), SHAPE)
    assert (page.ranks, page.layers, page.page_tokens, page.row_elements, page.itemsize) == (2, 3, 5, 128, 2)
    assert page.dtype == "bfloat16"
    assert page.page_bytes == page_bytes(5)
    raw = examine(config(), caches(spec(dtype=torch.uint8)))
    assert page_shapes(Settings(), raw)[0].page_bytes == page_bytes(16) // 2


def test_memory_holds_whole_pages_and_at_least_one_chunk():
    def pages(capacity, **chunks):
        settings = Settings(memory={"capacity": capacity}, chunks=chunks)
        return memory_pages(settings, page_shapes(settings, SHAPE))

    size = page_bytes(16)
    assert pages(50 * size) == pages(50 * size + size - 1) == 50
    assert pages(2**20 + 5 * size, max_tokens=256) >= 16
    with pytest.raises(LayoutError) as caught:
        pages(2**20, max_tokens=10_000)
    assert str(caught.value) == (
        f"memory.capacity = 1048576 holds {2**20 // size} pages of {size} bytes; "
        "one chunk of chunks.max_tokens needs 625"
    )


def cache_of(metrics=None, **settings):
    settings = Settings(memory={"capacity": "2MiB"}, **settings)
    pages, metrics = page_shapes(settings, SHAPE), metrics or Metrics()
    buffer = bytearray(memory_pages(settings, pages) * pages[0].page_bytes)
    return make_cache(settings, pages, buffer, 64, metrics, Faults(metrics))


def test_there_is_a_device_tier_where_its_capacity_holds_a_page():
    assert cache_of().memory.device is None
    size = page_bytes(16) // SHAPE.ranks  # a worker's share of a page
    assert cache_of(device={"capacity": size - 1}).memory.device is None
    assert cache_of(device={"capacity": 7 * size}).memory.device.pages == 7


def test_tokens_far_from_the_start_cost_more():
    memory, root = cache_of().memory, Chunk(b"namespace", None, b"")
    assert memory.cost(Chunk(b"first", root, bytes(4 * 10))) == 10.0
    after = Chunk(b"after", Chunk(b"parent", root, bytes(4 * 12 * 64)), bytes(4 * 10))
    assert memory.cost(after) == 20.0, "where attention costs as much as the rest"


def test_a_disk_that_cannot_be_had_is_told_and_done_without(tmp_path, caplog):
    file = tmp_path / "file"
    file.write_text("no folder")
    with caplog.at_level(logging.WARNING, "vllm.ragkv"):
        cache = cache_of(disk={"path": str(file)})
    (record,) = caplog.records
    assert f"disk.path = {file}" in record.getMessage() and "runs without a disk tier" in record.getMessage()
    assert cache.close(0.0)


def test_a_disk_tier_reports_itself(tmp_path):
    metrics = Metrics()
    cache = cache_of(metrics, disk={"path": str(tmp_path / "kv"), "capacity": "3MiB"})
    cache.tick()
    assert metrics.drain()["gauges"][m.CAPACITY_BYTES + m.SEPARATOR + m.DISK] == 3 * 2**20
    assert cache.close(30.0)


# --- the trace ---


def chain_of(tokens, named=()):
    chain = TokenChain(SPACE, Chunker(16, 20, 32, TokenStructure.of([])), named)
    chain.extend(as_tokens(tokens))
    return chain


@pytest.fixture
def metrics():
    return Metrics()


def recorder_to(file, metrics):
    return make_recorder(Settings(trace={"file": str(file)}), Faults(metrics))


def test_without_a_file_nothing_is_recorded(metrics):
    assert make_recorder(Settings(), Faults(metrics)) is None


def test_every_prompt_is_a_line_of_all_its_chunks(tmp_path, metrics):
    recorder = recorder_to(tmp_path / "trace", metrics)
    whole = chain_of([1] * 64, [64])
    assert whole.ends[-1] == 64, "this one has no open tail"
    for chain in (chain_of(range(100)), chain_of(range(100)), whole, chain_of([5])):
        recorder.record(SPACE, chain)
    recorder.close()
    recorder.close()
    _, *lines = map(json.loads, (tmp_path / "trace").read_text().splitlines())
    assert [sum(line["tokens"]) for line in lines] == [100, 100, 64, 1]
    assert all(len(line["keys"]) == len(line["tokens"]) and min(line["tokens"]) > 0 for line in lines)
    assert lines[0]["keys"] == lines[1]["keys"] and len(set(lines[0]["keys"])) > 3
    assert lines[2]["keys"][0] == lines[2]["keys"][1], "equal chunks have equal names wherever they stand"


def test_a_file_that_cannot_be_written_is_told_and_done_without(tmp_path, metrics, caplog):
    with caplog.at_level(logging.WARNING, "vllm.ragkv"):
        assert recorder_to(tmp_path, metrics) is None
        assert recorder_to(tmp_path / "missing" / "trace", metrics) is None
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"ragkv: trace.file = {path}".split(":")[0] for path in (tmp_path, tmp_path / "missing")
    ]
    assert all("no trace is written" in record.getMessage() for record in caplog.records)


def test_a_trace_stops_at_the_first_trouble(tmp_path, metrics, monkeypatch):
    recorder, asked = recorder_to(tmp_path / "trace", metrics), []

    def full(self, seconds, chunks):
        asked.append(chunks)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(builder.TraceWriter, "record", full)
    for _ in range(3):
        recorder.record(SPACE, chain_of(range(40)))
    assert len(asked) == 1
    assert metrics.drain()["counters"] == {m.ERRORS + m.SEPARATOR + "trace": 1}
    recorder.close()
