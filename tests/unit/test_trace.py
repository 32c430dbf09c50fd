"""The trace that an engine records: what is in the file, what is not, and a disk that fails."""

import json
import stat
import subprocess
import sys

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from ragkv.benchmarks.traces import read_trace
from ragkv.kvstore.trace import BUFFER_BYTES, TraceWriter, parse

KEYS = [bytes([n]) * 16 for n in range(8)]
HEADER = '{"format":"ragkv-trace","version":1}\n'


def written(path, *requests, salt=b"salt"):
    """A trace of requests of (key number, tokens)."""
    writer = TraceWriter(path, salt)
    for seconds, request in enumerate(requests):
        writer.record(seconds, [(KEYS[key], tokens) for key, tokens in request])
    writer.close()
    return path


@given(st.lists(st.lists(st.integers(0, 7), max_size=6), min_size=1, max_size=12).filter(any))
@settings(max_examples=40, deadline=None)
def test_what_is_recorded_is_read(tmp_path_factory, requests):
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    trace = read_trace(written(path, *([(key, 10 + key) for key in request] for request in requests)))
    names = {}
    expected = [[names.setdefault(key, len(names)) for key in request] for request in requests]
    assert (trace.requests, trace.unit) == (expected, "tokens")
    assert trace.weights == [10 + key for key in names]


def test_neither_keys_nor_the_salt_can_be_found_in_the_file(tmp_path):
    salt = b"\x01\x02 secret salt"
    text = written(tmp_path / "a", [(0, 5), (1, 6)], salt=salt).read_text()
    other = written(tmp_path / "b", [(0, 5), (1, 6)], salt=b"another").read_text()
    names = [set(json.loads(each.splitlines()[1])["keys"]) for each in (text, other)]
    assert len(names[0]) == 2 and not names[0] & names[1]
    for secret in (KEYS[0], KEYS[1], salt):
        assert secret.hex() not in text and repr(secret)[2:-1] not in text


def test_writers_choose_their_own_salts(tmp_path):
    first, second = (written(tmp_path / name, [(0, 5)], salt=None).read_text() for name in "ab")
    assert first.splitlines()[0] == second.splitlines()[0] == HEADER.strip()
    assert first.splitlines()[1] != second.splitlines()[1]


def test_only_the_owner_may_read_it(tmp_path):
    assert stat.S_IMODE(written(tmp_path / "trace", [(0, 1)]).stat().st_mode) == 0o600


@pytest.mark.parametrize("lost", range(1, 60))
def test_a_tail_that_was_not_written_to_its_end_is_left_out(tmp_path, lost):
    path = written(tmp_path / "trace", [(0, 5), (1, 6)], [(0, 5)])
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    path.write_bytes(whole[: -min(lost, last)])
    kept = [[0, 1], [0]] if lost == 1 else [[0, 1]]  # all but the newline is still a line
    assert read_trace(path).requests == kept
    again = TraceWriter(path, b"salt")
    again.record(0, [(KEYS[1], 6)])
    again.close()
    assert read_trace(path).requests == [[0, 1], [1]], "a writer goes on behind the last whole line"


def test_a_second_writer_goes_on_with_a_salt_of_its_own(tmp_path):
    path = tmp_path / "trace"
    for _ in range(2):
        written(path, [(0, 5)], salt=None)
    assert path.read_text().count(HEADER) == 2
    assert read_trace(path).requests == [[0], [1]]


def test_lines_are_held_back_until_there_are_enough(tmp_path):
    path = tmp_path / "trace"
    writer = TraceWriter(path)
    writer.record(0.0, [(KEYS[0], 5)])
    writer.record(9.9, [(KEYS[0], 5)])
    assert path.read_text() == HEADER
    writer.record(10.0, [(KEYS[0], 5)])
    assert len(path.read_text().splitlines()) == 4
    long = [(KEYS[0], 5)] * (BUFFER_BYTES // 30)
    writer.record(10.1, long)
    assert len(path.read_text().splitlines()) == 5
    writer.record(10.2, [(KEYS[0], 5)])
    writer.close()
    writer.close()
    assert len(path.read_text().splitlines()) == 6


@pytest.mark.parametrize("content", ["text\n", "[]\n", '{"hash_ids":[1]}\n', HEADER.replace("1", "2"), HEADER[:9]])
def test_a_file_that_is_no_trace_is_left_alone(tmp_path, content):
    path = tmp_path / "notes"
    path.write_text(content)
    with pytest.raises(FileExistsError, match=r"notes: exists"):
        TraceWriter(path)
    assert path.read_text() == content


def test_one_writer_at_a_time(tmp_path):
    writer = TraceWriter(tmp_path / "trace")
    with pytest.raises(BlockingIOError):
        TraceWriter(tmp_path / "trace")
    writer.close()
    TraceWriter(tmp_path / "trace").close()


def test_links_are_not_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="link"):
        TraceWriter(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


FULL = """
import resource, sys
from pathlib import Path
from ragkv.kvstore.trace import TraceWriter
writer = TraceWriter(Path(sys.argv[1]))
chunks = [(bytes(16), 5)] * 20
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
failed = 0
for number in range(300):
    try:
        writer.record(0.0, chunks)
    except OSError:
        failed += 1
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
writer.record(0.0, chunks)
writer.close()
print(failed)
"""


def test_a_full_disk_raises_and_leaves_whole_lines(tmp_path):
    path = tmp_path / "trace"
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1
    lines = path.read_text().splitlines()
    assert [parse(json.loads(line)) is None for line in lines] == [True] + [False] * (len(lines) - 1)
    assert 50 < len(lines) < 301 and path.read_bytes().endswith(b"\n")
