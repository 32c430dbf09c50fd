"""`kill -9` at any point of a write to disk: what was acknowledged is found, and nothing wrong is served."""

import contextlib
import fcntl
import functools
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ragkv.kvstore.codec import Header, decode, encode
from ragkv.kvstore.stores.disk import DiskStore

KILLS = 80
KEYS, TENSORS = 8, 24
MOST_ACKNOWLEDGED = 12

# Forks a writer for each line of its input. The writer puts payloads without end, and says so of each; the lines
# of one that was killed stand in the pipe before the line that tells of its death.
WRITERS = """
import os, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
import test_kill
from ragkv.kvstore.stores.disk import DiskStore

for number in range(test_kill.TENSORS):
    test_kill.tensor(number)  # made here once, so that the writers do nothing but write

def write(seed, call, when, folder):
    store = DiskStore(Path(folder))
    number = 0
    while True:
        if call != "-" and number == test_kill.KEYS:
            test_kill.set_trap(call, when)
        store.put(test_kill.key(seed, number), test_kill.payload(seed, number))
        os.write(1, b"put %d\\n" % number)
        number += 1

for line in sys.stdin:
    seed, call, when, folder = line.rstrip("\\n").split(" ", 3)
    child = os.fork()
    if not child:
        try:
            write(int(seed), call, when, folder)
        except BaseException as error:
            os.write(1, f"error {error!r}\\n".encode())
        finally:
            os._exit(1)
    os.write(1, b"started %d\\n" % child)
    os.waitpid(child, 0)
    os.write(1, b"dead\\n")
"""
TRAPS = [
    *(
        (call, when)
        for call in ("open", "flock", "fstat", "writev", "utime", "rename")
        for when in ("before", "after")
    ),
    ("writev", "half"),
    ("close", "before"),
]
REPLACED = {("rename", "after"), ("close", "before")}


def set_trap(name, when):
    """Let this process be killed at the next call of a system call."""
    module = fcntl if name == "flock" else os
    real = getattr(module, name)

    def trapped(*arguments, **named):
        if when == "half":
            descriptor, parts = arguments
            real(descriptor, [b"".join(parts)[: sum(map(len, parts)) // 2]])
        elif when == "after":
            real(*arguments, **named)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, name, trapped)


def key(seed, number):
    """Keys come again, so that values are replaced too."""
    return seed.to_bytes(8, "big") + (number % KEYS).to_bytes(8, "big")


@functools.cache
def tensor(number):
    chance = random.Random(number)
    return chance.randbytes(int(2 ** chance.uniform(3, 21)))


def payload(seed, number):
    raw = tensor(number % TENSORS)
    header = Header(bytes(16), key(seed, number), bytes(16), b"1234", number, False, (len(raw),), "uint8", 1.0)
    return encode(header, [raw])


class Writers:
    """The process that forks writers, one at a time."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRITERS, str(Path(__file__).parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            text=True,
        )
        self.child = None
        self.acknowledged = -1

    def start(self, folder, seed, call="-", when="-"):
        self.child, self.acknowledged = None, -1
        self.process.stdin.write(f"{seed} {call} {when} {folder}\n")
        self.process.stdin.flush()
        while self.child is None:
            self.read()

    def read(self):
        """Take in one line; False: the writer is dead."""
        word, _, rest = self.process.stdout.readline().partition(" ")
        assert word in ("put", "started", "dead\n"), f"{word} {rest}"
        if word == "put":
            assert int(rest) == self.acknowledged + 1
            self.acknowledged = int(rest)
        elif word == "started":
            self.child = int(rest)
        return word != "dead\n"

    def kill(self):
        os.kill(self.child, signal.SIGKILL)
        self.wait()

    def wait(self):
        while self.read():
            pass
        self.child = None

    def stop(self):
        self.process.communicate()


@pytest.fixture(scope="module")
def all_writers():
    started = [Writers(), Writers()]
    yield started
    for each in started:
        each.stop()


@pytest.fixture
def writers(all_writers):
    yield all_writers
    for each in all_writers:
        if each.child is not None:
            each.kill()


def check(store, seed, acknowledged):
    """Every key holds the last value that was acknowledged, or the one that was being put under it."""
    for slot in range(KEYS):
        last = acknowledged - (acknowledged - slot) % KEYS
        allowed = {number for number in (last, last + KEYS) if 0 <= number <= acknowledged + 1}
        value = store.get(key(seed, slot))
        if value is None:
            assert last < 0, f"writer {seed}: value {last} was acknowledged, and is gone"
            continue
        header, _ = decode(value)
        assert header.position in allowed
        assert bytes(value) == b"".join(payload(seed, header.position))


def temporary(folder, seed):
    return [path.name for path in folder.glob("*.tmp") if path.name.startswith(seed.to_bytes(8, "big").hex())]


@pytest.mark.parametrize("call, when", TRAPS)
def test_a_writer_killed_at_each_system_call(tmp_path, writers, call, when):
    """While it replaces a value; the store itself makes the calls `open` and `fstat` before its file is there."""
    writer = writers[0]
    writer.start(tmp_path, 1, call, when)
    writer.wait()
    assert writer.acknowledged == KEYS - 1
    with contextlib.closing(DiskStore(tmp_path)) as store:
        assert temporary(tmp_path, 1) == []
        check(store, 1, writer.acknowledged)
        assert decode(store.get(key(1, 0)))[0].position == (KEYS if (call, when) in REPLACED else 0)


@pytest.mark.slow
def test_writers_killed_at_random_points(tmp_path, writers):
    """Another writer goes on all the time, and the store is opened, and so swept, beside it."""
    chance = random.Random(7)
    witness, victims = writers
    witness.start(tmp_path, 0)
    left = 0
    for seed in range(1, KILLS + 1):
        victims.start(tmp_path, seed)
        wanted = chance.randrange(MOST_ACKNOWLEDGED)
        while victims.acknowledged < wanted - 1:
            victims.read()
        for _ in range(chance.randrange(10_000)):
            pass  # on into the next put, by a part of it
        victims.kill()
        left += len(temporary(tmp_path, seed))
        with contextlib.closing(DiskStore(tmp_path)) as store:
            assert temporary(tmp_path, seed) == []
            check(store, seed, victims.acknowledged)
            store.delete([key(seed, slot) for slot in range(KEYS)])
        for _ in range(10):
            assert witness.read()
    witness.kill()
    assert left, "no kill hit a writer at its work"
    with contextlib.closing(DiskStore(tmp_path)) as store:
        check(store, 0, witness.acknowledged)
        assert temporary(tmp_path, 0) == []
