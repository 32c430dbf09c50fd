"""Reading traces of either format, and generating them."""

import hashlib
import json
from collections import Counter

import pytest

from ragkv.benchmarks.traces import Trace, as_blocks, generate_trace, load_trace, read_trace
from ragkv.benchmarks.workloads import KINDS, generate
from ragkv.errors import ConfigError

HEADER = '{"format": "ragkv-trace", "version": 1}'
A, B = "a" * 32, "b" * 32
GOLDEN = {
    "conversation": "fe65f39febaa91c3",
    "rag": "d571939106cf1193",
    "scan": "a2d3f6b09d4af3b8",
    "shift": "43b47ab28f251f42",
    "mixture": "2214127a1611f475",
}


def line(keys, tokens):
    return json.dumps({"seconds": 1, "keys": keys, "tokens": tokens})


def test_mooncakes_format(tmp_path):
    path = tmp_path / "trace.jsonl"
    requests = [[46, 7, 9], [46, 7], [], [9]]
    path.write_text("".join(json.dumps({"timestamp": 0, "hash_ids": ids}) + "\n" for ids in requests))
    assert read_trace(path) == Trace(str(path), [[0, 1, 2], [0, 1], [], [2]], [1, 1, 1], "blocks")


def test_blank_lines_and_a_missing_last_newline_do_not_matter(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('\n{"hash_ids": [1]}\r\n  \n{"hash_ids": [2]}')
    assert read_trace(path).requests == [[0], [1]]


def test_a_prefix_is_not_its_content():
    trace = Trace("", [[0, 1], [1], [0, 1, 1]], [5, 6])
    blocks = as_blocks(trace)
    assert blocks.requests == [[0, 1], [2], [0, 1, 3]]
    assert blocks.weights == [5, 6, 6, 6] and blocks.chained and blocks.references == 6
    content = as_blocks(trace, "content")
    assert content.requests == trace.requests and content.weights == [5, 6] and not content.chained
    with pytest.raises(ConfigError, match=r"semantics = 'both'; allowed: prefix, content"):
        as_blocks(trace, "both")


@pytest.mark.parametrize(
    ("lines", "number", "words"),
    [
        ([b"hello", b""], 1, "no JSON"),
        ([b"\xff\xfe", b""], 1, "no JSON"),
        ([b"[" * 100_000, b""], 1, "no JSON"),
        ([b"[1]"], 1, "unknown format; allowed: .*ragkv-trace.*hash_ids"),
        ([b'{"prompt": "x"}'], 1, "unknown format"),
        ([b'{"hash_ids": [1]}', b'{"hash_ids": [1', b'{"hash_ids": [1]}'], 2, "no JSON; allowed: one JSON object"),
        ([b'{"hash_ids": [1]}', b'{"timestamp": 2}'], 2, "allowed: .*hash_ids"),
        ([b'{"hash_ids": [1, "2"]}'], 1, "allowed: .*hash_ids"),
        ([b'{"hash_ids": [true]}'], 1, "allowed: .*hash_ids"),
        ([b'{"hash_ids": 3}'], 1, "allowed: .*hash_ids"),
        ([b'{"hash_ids": [1]}', HEADER.encode()], 2, "allowed: .*hash_ids"),
        ([HEADER.replace("1", "2").encode()], 1, "version 2; allowed: 'ragkv-trace', 1"),
        ([HEADER.encode(), line([A], []).encode()], 2, "32 hex digits"),
        ([HEADER.encode(), line([A[1:]], [1]).encode()], 2, "32 hex digits"),
        ([HEADER.encode(), line([A.upper()], [1]).encode()], 2, "32 hex digits"),
        ([HEADER.encode(), line([A], [0]).encode()], 2, "a number >= 1"),
        ([HEADER.encode(), line([A], [1.5]).encode()], 2, "a number >= 1"),
        ([HEADER.encode(), b"7"], 2, "32 hex digits"),
        ([HEADER.encode(), line([A], [5]).encode(), line([B, A], [5, 6]).encode()], 3, "6 tokens .*allowed: 5"),
    ],
)
def test_a_broken_line_is_named(tmp_path, lines, number, words):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ConfigError, match=rf"bad\.jsonl, line {number}: .*{words}") as caught:
        read_trace(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"\n\n", HEADER.encode(), b'{"hash_ids": []}', b'{"hash_'])
def test_a_file_without_requests_is_refused(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"trace = .*empty\.jsonl: .*; allowed: a file"):
        read_trace(path)


@pytest.mark.parametrize("source", ["generated:", "generated:rags", "generated:rag:x", "generated:rag:-1"])
def test_an_unknown_kind_is_refused(source):
    with pytest.raises(ConfigError, match=rf"trace = '{source}'; allowed: .*conversation, rag, scan"):
        load_trace(source)


@pytest.mark.parametrize("kind", KINDS)
def test_generated_traces_are_the_same_everywhere(kind):
    trace = load_trace(f"generated:{kind}:3")
    assert trace.name == f"generated:{kind}:3" and len(trace.requests) == 4000
    assert trace == generate_trace(kind, 3) != generate_trace(kind, 4)
    assert generate(kind, 3, 50) == generate(kind, 3, 60)[:50]
    assert hashlib.sha256(json.dumps(generate(kind, 1, 500)).encode()).hexdigest()[:16] == GOLDEN[kind]
    assert load_trace(f"generated:{kind}") == generate_trace(kind, 0)


def test_what_the_kinds_are_made_of():
    talks = generate("conversation", 0, 2000)
    continued = sum(
        any(talk[: len(old)] == old for old in talks[max(0, n - 300) : n]) for n, talk in enumerate(talks)
    )
    assert continued > 0.6 * len(talks), "most requests go on with a talk"
    assert len({talk[0] for talk in talks}) == 3, "over three system prompts"
    for kind in ("rag", "scan", "shift"):
        assert len({request[0] for request in generate(kind, 0, 500)}) == 1, "one system prompt"
    rag = as_blocks(generate_trace("rag")), as_blocks(generate_trace("rag"), "content")
    assert len(rag[0].weights) > 2 * len(rag[1].weights), "the same documents in varying order"
    early, late = (
        Counter(request[4] for request in generate("shift", 0, 1000)[part]).most_common(5)
        for part in (slice(0, 500), slice(500, 1000))
    )
    assert not {block for block, _ in early} & {block for block, _ in late}, "popularity moves"
