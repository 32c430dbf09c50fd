"""The disk store beyond the contract: permissions, strangers in the folder, faults, and what a crash leaves."""

import contextlib
import errno
import fcntl
import os
import socket
from types import SimpleNamespace

import pytest

from disk_folder import keeping_descriptors, mode, names, raising, reason
from ragkv.errors import StoreError
from ragkv.kvstore.stores.contract import Room
from ragkv.kvstore.stores.disk import DiskStore
from ragkv.kvstore.stores.folder import MOST_QUARANTINED, QUARANTINE, Folder, value_name
from ragkv.testing.stores import CALLS, key

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


def test_folder_and_files_are_for_us_alone(tmp_path):
    before = os.umask(0)
    try:
        with contextlib.closing(DiskStore(tmp_path / "deep" / "store")) as store:
            store.put(KEY, [b"value"])
            store.reject(KEY, "checksum")
            store.put(KEY, [b"value"])
        folder = tmp_path / "deep" / "store"
        assert mode(folder) == mode(folder / QUARANTINE) == 0o700
        assert mode(folder / value_name(KEY)) == 0o600
        assert store.warning is None
    finally:
        os.umask(before)


def test_room_is_that_of_the_file_system(store, folder, monkeypatch):
    system = os.statvfs(folder)
    monkeypatch.setattr(os, "fstatvfs", lambda descriptor: system)
    room = store.room()
    assert room.free == store.free_bytes() == system.f_bavail * system.f_frsize > 0
    assert room.total == system.f_blocks * system.f_frsize >= room.free
    assert (room.files, room.all_files) == (system.f_favail if system.f_files else None, system.f_files)
    store.close()
    assert reason(store.room) == "closed"


def test_a_file_system_may_not_say_how_much_it_has(store, monkeypatch):
    says = {"f_bavail": 5, "f_frsize": 10, "f_blocks": 7, "f_files": 0, "f_favail": 0}
    monkeypatch.setattr(os, "fstatvfs", lambda descriptor: SimpleNamespace(**says))
    assert store.room() == Room(50, 70), "no inodes that it could run out of"
    says["f_blocks"] = 0
    assert store.room() is None


def test_a_folder_open_to_others_is_used_as_it_is_with_a_warning(tmp_path):
    tmp_path.chmod(0o755)
    with contextlib.closing(DiskStore(tmp_path)) as store:
        assert store.warning == f"{tmp_path} is open to others (mode 0755); better: chmod 700 {tmp_path}"
        store.put(KEY, [b"value"])
    assert mode(tmp_path) == 0o755 and mode(tmp_path / value_name(KEY)) == 0o600


def test_a_folder_of_somebody_else_is_used_with_a_warning(folder, monkeypatch):
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with contextlib.closing(DiskStore(folder)) as store:
        assert store.warning.startswith(f"{folder} belongs to uid {folder.stat().st_uid}")
        store.put(KEY, [b"value"])
        assert store.get(KEY) == b"value", "whose our files are is found out, not guessed"


def make_link(path):
    target = path.parent / "target"
    target.write_bytes(b"not a value")
    path.symlink_to(target)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as plain:
        here = os.open(path.parent, os.O_RDONLY)  # the path itself may be too long for an address
        plain.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)


STRANGERS = {
    "a link": make_link,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a socket": make_socket,
}


@pytest.mark.parametrize("make", STRANGERS.values(), ids=STRANGERS.keys())
def test_a_stranger_under_a_values_name_is_no_value(folder, store, make):
    path = folder / value_name(KEY)
    make(path)
    before = path.lstat()
    assert store.get(KEY) is None
    assert store.contains([KEY]) == [False] and list(store.scan()) == []
    assert store.delete([KEY]) == 0
    store.reject(KEY, "checksum")
    assert os.path.samestat(path.lstat(), before)


def test_a_put_replaces_a_link_and_not_what_it_points_to(folder, store):
    make_link(folder / value_name(KEY))
    store.put(KEY, [b"value"])
    assert store.get(KEY) == b"value" and (folder / "target").read_bytes() == b"not a value"


def test_a_put_over_a_folder_is_an_error(folder, store):
    (folder / value_name(KEY)).mkdir()
    assert reason(store.put, KEY, [b"value"]) == "io"
    assert names(folder) == [value_name(KEY)]


@pytest.fixture
def others(folder, store, monkeypatch):
    """A store of the same folder, to which what `store` writes is somebody else's."""
    monkeypatch.setattr(Folder, "probe", lambda self: setattr(self, "owner", os.geteuid() + 1))
    with contextlib.closing(DiskStore(folder)) as opened:
        yield opened


def test_files_of_others_are_no_values(folder, store, others):
    store.put(KEY, [b"forged"])
    store = others
    assert store.get(KEY) is None and store.contains([KEY]) == [False]
    assert list(store.scan()) == [] and store.delete([KEY]) == 0
    assert (folder / value_name(KEY)).read_bytes() == b"forged"


@pytest.mark.parametrize("ours", [True, False])
def test_a_file_that_we_may_not_read_is_a_miss_where_it_is_not_ours(store, others, monkeypatch, ours):
    store.put(KEY, [b"value"])
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", raising(errno.EACCES))
        if ours:
            assert reason(store.get, KEY) == "refused"
        else:
            assert others.get(KEY) is None


def test_what_is_named_otherwise_is_left_alone(folder):
    folder.mkdir()
    hexadecimal = key(0xABC).hex()
    strange = [
        "README",
        ".kv",
        "quarantined",
        f"{hexadecimal}",
        f"{hexadecimal}.kv.bak",
        f"{hexadecimal[:-1]}.kv",
        f"{hexadecimal}00.kv",
        f"{hexadecimal.upper()}.kv",
        f"{hexadecimal}.tmp",
        f"{hexadecimal}.0123.tmp",
        "note.tmp",
    ]
    for name in strange:
        (folder / name).write_bytes(b"mine")
    with contextlib.closing(DiskStore(folder)) as store:
        assert list(store.scan()) == []
    assert names(folder) == sorted(strange)


def test_a_start_removes_what_dead_writers_left_only(folder, store):
    living, descriptor = Folder(folder, None).create(KEY)
    dead = f"{KEY.hex()}.{'0' * 16}.tmp"
    (folder / dead).write_bytes(b"half a val")
    link = f"{KEY.hex()}.{'1' * 16}.tmp"
    (folder / link).symlink_to(dead)
    DiskStore(folder).close()
    assert names(folder) == sorted([living, link])
    os.close(descriptor)
    DiskStore(folder).close()
    assert names(folder) == [link]


def test_a_file_swept_before_its_lock_is_made_anew(folder, store, monkeypatch):
    real, swept = fcntl.flock, []

    def flock(descriptor, how):
        if how == fcntl.LOCK_EX and not swept:
            swept.extend(names(folder))
            (folder / swept[0]).unlink()
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    store.put(KEY, [b"value"])
    assert swept and store.get(KEY) == b"value" and names(folder) == [value_name(KEY)]


def test_a_file_system_without_locks_will_do(folder, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", raising(errno.ENOLCK))
    folder.mkdir()
    writing = f"{KEY.hex()}.{'0' * 16}.tmp"
    (folder / writing).write_bytes(b"perhaps still written")
    with contextlib.closing(DiskStore(folder)) as store:
        store.put(KEY, [b"value"])
        assert store.get(KEY) == b"value"
    assert names(folder) == sorted([writing, value_name(KEY)])


def test_the_order_of_use_outlives_the_process(folder, store):
    keys = [bytes([number]) * 16 for number in range(5)]
    store.put_many([(key, [b"value"]) for key in keys])
    store.touch([keys[3], keys[1], keys[4]])
    with contextlib.closing(DiskStore(folder)) as again:
        used = {entry.key: entry.used for entry in again.scan()}
    assert sorted([keys[1], keys[3], keys[4]], key=used.__getitem__) == [keys[4], keys[1], keys[3]]


def test_a_size_counts_the_blocks(folder, store):
    store.put(KEY, [b"x"])
    os.sync()
    (entry,) = store.scan()
    assert entry.size == max(1, 512 * (folder / value_name(KEY)).stat().st_blocks)


def test_rejected_values_go_to_quarantine(folder, store):
    store.put(KEY, [b"bad"])
    store.reject(KEY, "check/sum\n..")
    assert names(folder) == [QUARANTINE]
    assert (folder / QUARANTINE / f"{KEY.hex()}.check-sum---").read_bytes() == b"bad"


def test_quarantine_keeps_the_newest(folder, store):
    keys = [bytes([number]) * 16 for number in range(MOST_QUARANTINED + 5)]
    for each in keys:
        store.put(each, [b"bad"])
        store.reject(each, "checksum")
    assert names(folder / QUARANTINE) == [f"{each.hex()}.checksum" for each in keys[5:]]
    assert Folder(folder, None).quarantined() == MOST_QUARANTINED


@pytest.mark.parametrize("make", [lambda path: path.write_bytes(b"a file"), lambda path: path.symlink_to("/")])
def test_where_there_is_no_quarantine_the_bad_is_deleted(folder, store, make):
    make(folder / QUARANTINE)
    store.put(KEY, [b"bad"])
    store.reject(KEY, "checksum")
    assert store.get(KEY) is None and names(folder) == [QUARANTINE]
    assert Folder(folder, None).quarantined() == 0


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_vanished_folder_is_gone_and_not_made_anew(folder, store, call):
    store.put(KEY, [b"value"])
    (folder / value_name(KEY)).unlink()
    folder.rmdir()
    assert reason(call, store) == "gone"
    assert not folder.exists()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_another_folder_in_its_place_is_not_ours(folder, store, call):
    """As when a disk is unmounted, and the mount point beneath appears."""
    aside = folder.rename(folder.with_name("aside"))
    folder.mkdir()
    assert reason(call, store) == "gone"
    assert names(folder) == names(aside) == []
    folder.rmdir()
    aside.rename(folder)
    store.put(KEY, [b"value"])
    assert store.get(KEY) == b"value", "it is back"


def test_what_is_no_folder_is_refused_in_a_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        assert reason(DiskStore, path) in {"gone", "io"}
        with pytest.raises(StoreError, match=rf"disk: {path}: (Not a directory|File exists)"):
            DiskStore(path)
