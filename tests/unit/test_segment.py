"""The shared segment, with real processes: who makes it, who removes it, and what a sweep leaves alone."""

import os
import signal
import subprocess
import sys

import pytest

from ragkv.errors import SegmentError
from ragkv.kvstore import segment as segment_module
from ragkv.kvstore.segment import PREFIX, Segment, available_bytes, segment_path, sweep

SIZE = 1 << 16

# Opens a segment, says how that went, then obeys: one command a line.
HOLDER = """
import sys
from pathlib import Path
from ragkv.errors import SegmentError
from ragkv.kvstore.segment import Segment
name, size, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
sys.stdin.readline()
try:
    segment = Segment(name, size, folder)
except SegmentError as error:
    print("error", error, flush=True)
    sys.exit()
print("open", flush=True)
for line in sys.stdin:
    word, *rest = line.split()
    if word == "write":
        segment.buffer[int(rest[0])] = int(rest[1])
    elif word == "read":
        print(segment.buffer[int(rest[0])], flush=True)
        continue
    elif word == "close":
        segment.close()
    print("done", flush=True)
"""


class Holder:
    """A process that holds a segment. It opens it when told to, and answers each command with a line."""

    def __init__(self, name, folder, size=SIZE):
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, name, str(size), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            text=True,
        )

    def send(self, command):
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def answer(self):
        return self.process.stdout.readline().strip()

    def ask(self, command):
        self.send(command)
        return self.answer()

    def stop(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def holder(tmp_path):
    started = []

    def start(name="engine", size=SIZE, opened=True):
        started.append(Holder(name, tmp_path, size))
        if opened:
            assert started[-1].ask("open") == "open"
        return started[-1]

    yield start
    for each in started:
        each.stop()


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_first_makes_it_and_all_see_the_same_bytes(tmp_path):
    first = Segment("engine", SIZE, tmp_path)
    assert first.path == segment_path("engine", tmp_path) and first.path.stat().st_size == SIZE
    assert first.path.stat().st_mode & 0o777 == 0o600
    assert len(first.buffer) == SIZE and not any(first.buffer[:])
    assert first.path.stat().st_blocks * 512 >= SIZE, "the memory is reserved at once"
    first.buffer[17] = 42
    second = Segment("engine", SIZE, tmp_path)
    assert second.buffer[17] == 42
    second.buffer[18] = 43
    assert first.buffer[18] == 43
    first.close()
    assert files(tmp_path) == [f"{PREFIX}engine"] and second.buffer[17] == 42
    second.close()
    assert files(tmp_path) == []


def test_segments_of_two_engines_do_not_meet(tmp_path):
    one, two = Segment("one", SIZE, tmp_path), Segment("two", 2 * SIZE, tmp_path)
    one.buffer[0] = 1
    assert two.buffer[0] == 0
    one.close()
    assert files(tmp_path) == [f"{PREFIX}two"]
    two.close()


@pytest.mark.parametrize("size", [SIZE // 2, 2 * SIZE, 1])
def test_another_size_is_refused_and_harms_nobody(tmp_path, size):
    first = Segment("engine", SIZE, tmp_path)
    with pytest.raises(SegmentError, match=rf"{SIZE} bytes, not {size}"):
        Segment("engine", size, tmp_path)
    assert first.path.stat().st_size == SIZE
    assert sweep(tmp_path) == [], "the one that holds it lives"
    first.close()
    assert files(tmp_path) == []


def test_what_nobody_holds_is_made_anew(tmp_path):
    path = segment_path("engine", tmp_path)
    path.write_bytes(b"x" * 3 * SIZE)
    made = Segment("engine", SIZE, tmp_path)
    assert path.stat().st_size == SIZE and not any(made.buffer[:])
    made.close()


def test_close_twice_and_with_living_views(tmp_path):
    made = Segment("engine", SIZE, tmp_path)
    view = memoryview(made.buffer)
    made.close()
    made.close()
    assert files(tmp_path) == []
    view[0] = 1
    assert view[0] == 1


def test_close_can_remove_what_others_hold(tmp_path):
    first, second = Segment("engine", SIZE, tmp_path), Segment("engine", SIZE, tmp_path)
    first.close(unlink=True)
    assert files(tmp_path) == []
    second.buffer[0] = 1
    heir = Segment("engine", SIZE, tmp_path)
    assert heir.buffer[0] == 0
    second.close()
    second.close(unlink=True)
    assert files(tmp_path) == [f"{PREFIX}engine"], "an heir of the same name is another's"
    heir.close()


def test_the_last_process_to_close_removes_it(tmp_path, holder):
    mine, other = Segment("engine", SIZE, tmp_path), holder()
    assert other.ask("write 5 99") == "done" and mine.buffer[5] == 99
    mine.close()
    assert files(tmp_path) == [f"{PREFIX}engine"]
    assert other.ask("read 5") == "99"
    assert other.ask("close") == "done"
    assert files(tmp_path) == []


def test_a_sweep_takes_the_killed_and_leaves_the_living(tmp_path, holder):
    living, killed = holder("living"), holder("killed")
    assert sweep(tmp_path) == []
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.process.wait()
    assert files(tmp_path) == [f"{PREFIX}killed", f"{PREFIX}living"]
    assert sweep(tmp_path) == [f"{PREFIX}killed"]
    assert living.ask("read 0") == "0"
    assert sweep(tmp_path) == [] and files(tmp_path) == [f"{PREFIX}living"]


def test_a_sweep_takes_what_was_never_filled(tmp_path):
    segment_path("empty", tmp_path).touch()
    assert sweep(tmp_path) == [f"{PREFIX}empty"]


def test_a_sweep_leaves_what_is_not_ours(tmp_path):
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    (tmp_path / "vllm_offload").write_bytes(b"foreign")
    (tmp_path / f"{PREFIX}link").symlink_to(target)
    (tmp_path / f"{PREFIX}broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / f"{PREFIX}folder").mkdir()
    os.mkfifo(tmp_path / f"{PREFIX}pipe")
    before = files(tmp_path)
    assert sweep(tmp_path) == []
    assert files(tmp_path) == before and target.read_bytes() == b"precious"


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_what_is_no_file_is_refused_and_left(tmp_path, kind):
    path, target = segment_path("engine", tmp_path), tmp_path / "target"
    target.write_bytes(b"precious")
    {"link": lambda: path.symlink_to(target), "folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}[kind]()
    with pytest.raises(SegmentError, match=f"{PREFIX}engine"):
        Segment("engine", SIZE, tmp_path)
    assert files(tmp_path) == [f"{PREFIX}engine", "target"] and target.read_bytes() == b"precious"


def test_too_little_space_names_both_sizes(tmp_path):
    size = 1 << 60
    with pytest.raises(SegmentError, match=rf"{size} bytes do not fit into {tmp_path}, which has \d+ free"):
        Segment("engine", size, tmp_path)
    assert files(tmp_path) == []


def test_too_little_shared_memory_names_both_sizes():
    name = f"test-{os.getpid()}"
    with pytest.raises(SegmentError, match=r"bytes do not fit into /dev/shm, which has \d+ free"):
        Segment(name, available_bytes() + (1 << 40))
    assert not segment_path(name).exists()


def test_what_cannot_be_mapped_is_removed(tmp_path, monkeypatch):
    def no_memory(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(segment_module.mmap, "mmap", no_memory)
    with pytest.raises(SegmentError, match="Cannot allocate memory"):
        Segment("engine", SIZE, tmp_path)
    assert files(tmp_path) == []


def test_a_missing_folder_is_named(tmp_path):
    folder = tmp_path / "nowhere"
    with pytest.raises(SegmentError, match="nowhere"):
        available_bytes(folder)
    with pytest.raises(SegmentError, match="nowhere"):
        Segment("engine", SIZE, folder)
    assert sweep(folder) == []


@pytest.mark.parametrize("size", [0, -1])
def test_a_segment_needs_a_size(tmp_path, size):
    with pytest.raises(SegmentError):
        Segment("engine", size, tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/", "../up", "a\0b"])
def test_a_name_is_one_path_component(tmp_path, name):
    with pytest.raises(SegmentError, match="no segment name"):
        segment_path(name, tmp_path)
    with pytest.raises(SegmentError, match="no segment name"):
        Segment(name, SIZE, tmp_path)


def test_a_name_may_be_too_long(tmp_path):
    with pytest.raises(SegmentError, match="too long"):
        Segment("x" * 300, SIZE, tmp_path)


def test_many_processes_may_open_it_at_once(tmp_path, holder):
    holders = [holder(opened=False) for _ in range(5)]
    for each in holders:
        each.send("open")
    assert [each.answer() for each in holders] == ["open"] * 5
    for number, each in enumerate(holders):
        assert each.ask(f"write {number} {number + 1}") == "done"
    assert [holders[0].ask(f"read {number}") for number in range(5)] == list("12345")
    for each in holders:
        each.send("close")
    assert [each.answer() for each in holders] == ["done"] * 5
    assert files(tmp_path) == []


def test_of_two_sizes_at_once_one_wins(tmp_path, holder):
    holders = [holder(size=SIZE * (1 + number % 2), opened=False) for number in range(4)]
    for each in holders:
        each.send("open")
    answers = [each.answer() for each in holders]
    size = segment_path("engine", tmp_path).stat().st_size
    assert size in (SIZE, 2 * SIZE)
    won = [SIZE * (1 + number % 2) == size for number in range(4)]
    assert [answer == "open" for answer in answers] == won
    assert all("bytes, not" in answer for answer, win in zip(answers, won, strict=True) if not win)


def test_two_maps_of_one_segment_are_known_as_one(tmp_path):
    first, second, other = (Segment(name, SIZE, tmp_path) for name in ("engine", "engine", "other"))
    assert first.identity == second.identity != other.identity
    first.unlink()
    first.unlink()
    assert files(tmp_path) == [other.path.name]
    first.buffer[:5] = b"still"
    assert second.buffer[:5] == b"still"
    later = Segment("engine", SIZE, tmp_path)
    assert later.identity != first.identity
    first.close(), second.close()
    assert later.path.name in files(tmp_path), "closing takes no other segment's name"
    later.close(), other.close()
    assert files(tmp_path) == []
