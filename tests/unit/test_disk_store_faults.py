"""The disk store when calls fail, disks are full, and others use the folder too."""

import contextlib
import errno
import os
import random
import stat
import subprocess
import sys
import threading

import pytest

from disk_folder import keeping_descriptors, names, raising, reason
from ragkv.kvstore.stores import buffers, disk
from ragkv.kvstore.stores.buffers import MOST_FREE, BufferPool
from ragkv.kvstore.stores.disk import POOLED_BYTES, DiskStore
from ragkv.kvstore.stores.folder import value_name
from ragkv.testing.stores import key

KEY = key(1)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def store(folder):
    with contextlib.closing(DiskStore(folder)) as opened:
        yield opened


@pytest.fixture(autouse=True)
def no_descriptor_is_lost():
    with keeping_descriptors():
        yield


@pytest.mark.parametrize(
    "number, expected",
    [
        (errno.ENOSPC, "full"),
        (errno.EDQUOT, "full"),
        (errno.EROFS, "refused"),
        (errno.EACCES, "refused"),
        (errno.EPERM, "refused"),
        (errno.ESTALE, "gone"),
        (errno.EIO, "io"),
        (errno.EMFILE, "io"),
    ],
)
@pytest.mark.parametrize("failing", ["open", "writev", "utime", "rename"])
def test_a_failed_put_leaves_the_old_value_and_nothing_else(folder, store, monkeypatch, failing, number, expected):
    store.put(KEY, [b"old"])
    with monkeypatch.context() as patch:
        patch.setattr(os, failing, raising(number))
        assert reason(store.put, KEY, [b"new"]) == expected
    assert store.get(KEY) == b"old" and names(folder) == [value_name(KEY)]


@pytest.mark.parametrize("failing", ["read", "readv", "fstat"])
def test_a_failed_read_is_an_error(store, monkeypatch, failing):
    store.put(KEY, [bytes(POOLED_BYTES if failing == "readv" else 10)])
    with monkeypatch.context() as patch:
        patch.setattr(os, failing, raising(errno.EIO))
        assert reason(store.get, KEY) == "io"


def test_a_value_that_no_memory_holds_is_an_error(folder, store):
    (folder / value_name(KEY)).touch()
    os.truncate(folder / value_name(KEY), 1 << 43)
    assert reason(store.get, KEY) == "io"


FULL_DISK = """
import sys
from pathlib import Path
from ragkv.errors import StoreError
from ragkv.kvstore.stores.disk import DiskStore
folder = Path(sys.argv[1])
store = DiskStore(folder / "store")
for number in range(100):
    try:
        store.put(bytes([number]) * 16, [bytes(100_000)])
    except StoreError as full:
        reason = full.reason
        break
print(reason, number, len(list(store.scan())), len(list(folder.glob("store/*"))))
store.delete([bytes([0]) * 16])
store.put(bytes([0]) * 16, [bytes(50_000)])
print(len(store.get(bytes([0]) * 16)))
"""


def test_a_disk_that_is_really_full(tmp_path):
    script = 'mount -t tmpfs -o size=1m none "$0" && exec "$1" -c "$2" "$0"'
    command = ["unshare", "--mount", "sh", "-c", script, str(tmp_path), sys.executable, FULL_DISK]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if "permission denied" in done.stderr.lower() or "not permitted" in done.stderr.lower():
        pytest.skip("mounting needs more rights")
    assert done.stdout.split() == ["full", "10", "10", "10", "50000"], done.stderr


def test_short_writes_and_reads_are_gone_on_with(store, monkeypatch):
    """The kernel may take or give less than asked for."""
    value = random.Random(1).randbytes(5000)
    writev, read, readv = os.writev, os.read, os.readv

    def short(views):
        return [memoryview(views[0])[:7]] if len(views[0]) else views[:3]

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", lambda descriptor, views: writev(descriptor, short(views)))
        patch.setattr(os, "read", lambda descriptor, size: read(descriptor, min(size, 9)))
        patch.setattr(os, "readv", lambda descriptor, views: readv(descriptor, short(views)))
        store.put(KEY, [value[:10], b"", value[10:11], value[11:]])
        assert store.get(KEY) == value
        patch.setattr(disk, "POOLED_BYTES", 1)
        assert bytes(store.get(KEY)) == value


@pytest.mark.parametrize("pooled", [False, True])
def test_a_file_that_shrinks_meanwhile_comes_short(folder, store, monkeypatch, pooled):
    store.put(KEY, [b"0123456789"])
    fstat = os.fstat

    def before_it_shrank(descriptor):
        found = fstat(descriptor)
        os.truncate(folder / value_name(KEY), 4)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", before_it_shrank)
        patch.setattr(disk, "POOLED_BYTES", 1 if pooled else POOLED_BYTES)
        assert bytes(store.get(KEY)) == b"0123"


@pytest.mark.parametrize("size", [POOLED_BYTES - 1, POOLED_BYTES, buffers.SIZE, buffers.SIZE + 1])
def test_values_around_the_bounds_of_a_buffer(store, size):
    value = random.Random(size).randbytes(1024) * (size // 1024) + bytes(size % 1024)
    store.put(KEY, [value])
    found = store.get(KEY)
    assert found == value
    assert memoryview(found).readonly


def test_a_buffer_is_used_again_only_when_nobody_looks_at_it():
    pool = BufferPool()
    one = pool.take(100)
    part = one[10:20]
    one[:] = b"1" * 100
    del one
    two = pool.take(100)
    two[:] = b"2" * 100
    assert part == b"1" * 10 and pool.free == 0
    del part
    assert pool.free == 1
    three = pool.take(50)
    assert three == b"1" * 50 and two == b"2" * 100 and pool.free == 0


def test_a_pool_keeps_a_few_buffers_only():
    pool = BufferPool()
    taken = [pool.take(1) for _ in range(MOST_FREE + 3)]
    assert pool.free == 0
    taken.clear()
    assert pool.free == MOST_FREE


@pytest.mark.parametrize("fsync", [False, True])
def test_fsync_of_file_then_name_then_folder(folder, monkeypatch, fsync):
    calls = []
    real_fsync, real_rename = os.fsync, os.rename

    def spy_fsync(descriptor):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        real_fsync(descriptor)

    def spy_rename(*arguments, **named):
        calls.append("rename")
        real_rename(*arguments, **named)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "rename", spy_rename)
    with contextlib.closing(DiskStore(folder, fsync=fsync)) as store:
        store.put(KEY, [b"value"])
    assert calls == (["file", "rename", "folder"] if fsync else ["rename"])


def test_a_call_that_runs_during_close_ends_well(store, monkeypatch):
    """The folder's descriptor lives as long as the call, so that it never means another file."""
    store.put(KEY, [b"value"])
    reached, closed = threading.Event(), threading.Event()
    real = os.open

    def slow_open(*arguments, **named):
        reached.set()
        assert closed.wait(60)
        return real(*arguments, **named)

    values = []
    monkeypatch.setattr(os, "open", slow_open)
    thread = threading.Thread(target=lambda: values.append(store.get(KEY)))
    thread.start()
    assert reached.wait(60)
    store.close()
    closed.set()
    thread.join()
    assert values == [b"value"]


CHURN = """
import random, sys
from pathlib import Path
from ragkv.kvstore.stores.disk import DiskStore
chance = random.Random(int(sys.argv[2]))
wholes = [bytes([letter]) * (1000 + 300_000 * letter) for letter in range(5)]
print("ready", flush=True)
sys.stdin.readline()
for _ in range(40):
    store = DiskStore(Path(sys.argv[1]))
    for _ in range(10):
        key = bytes([chance.randrange(3)]) * 16
        what = chance.random()
        if what < 0.4:
            store.put(key, [chance.choice(wholes)])
        elif what < 0.8:
            assert store.get(key) in [None, *wholes]
        elif what < 0.9:
            store.touch([key])
            list(store.scan())
        else:
            store.delete([key]) if what < 0.95 else store.reject(key, "checksum")
    store.close()
print("done", flush=True)
"""


def test_several_processes_share_a_folder(folder):
    """They put, read, delete and reject the same keys, and open the store, and so sweep, again and again."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CHURN, str(folder), str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for seed in range(3)
    ]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 3
    outputs = []
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        outputs.append(process.communicate()[0])
    assert outputs == ["done\n"] * 3
    assert not list(folder.glob("*.tmp"))
