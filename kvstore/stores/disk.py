"""Values as files of one folder, which several engines may share.

A value lies in `<key in hex>.kv`. It is written under another name, then renamed: it is there whole or not at all.
"""

import contextlib
import errno
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ragkv.errors import StoreError
from ragkv.kvstore.stores import buffers
from ragkv.kvstore.stores.buffers import BufferPool
from ragkv.kvstore.stores.contract import Buffer, Capabilities, Entry, Room, Store
from ragkv.kvstore.stores.folder import Folder

TOUCH_STEP_NS = 1_000
POOLED_BYTES = 1 << 20  # below, allocating costs little
_MOST_PARTS = os.sysconf("SC_IOV_MAX")
_REASONS = {
    errno.ENOSPC: "full",
    errno.EDQUOT: "full",
    errno.EROFS: "refused",
    errno.EACCES: "refused",
    errno.EPERM: "refused",
    errno.ENOENT: "gone",
    errno.ENOTDIR: "gone",
    errno.ESTALE: "gone",
}


class DiskStore(Store):
    """One file a value in `folder`, which is made (mode 0700) where there is none, but only at start.

    Only plain files of our own user count; links, and what is named otherwise, are left alone. With `fsync` what
    was acknowledged outlives a power failure, else the death of the process. What others may do to the folder
    stands in `warning`. StoreError: the folder cannot be had, or not be written to.
    """

    name = "disk"
    capabilities = Capabilities(durable=True, shared=True)

    def __init__(self, folder: Path, *, fsync: bool = False) -> None:
        self.folder = folder
        self._fsync = fsync
        self._faults = _Faults(folder)
        self._pool = BufferPool()
        with self._faults:
            folder.parent.mkdir(parents=True, exist_ok=True)
            if not folder.exists():
                folder.mkdir(mode=0o700, exist_ok=True)
            self._opened: Folder | None = Folder(folder, owner=os.geteuid())
            self.warning = self._opened.warning()
            self._opened.probe()
            self._opened.sweep()

    def get(self, key: bytes) -> Buffer | None:
        folder = self._folder()
        with self._faults:
            descriptor = folder.open(key)
            if descriptor < 0:
                folder.check()
                return None
            try:
                size = folder.size(descriptor)
                return None if size is None else _read_all(descriptor, size, self._pool)
            finally:
                os.close(descriptor)

    def put(self, key: bytes, parts: Sequence[Buffer]) -> None:
        folder = self._folder()
        with self._faults:
            folder.check()
            name, descriptor = folder.create(key)
            try:
                _write_all(descriptor, parts)
                now = time.time_ns()
                os.utime(descriptor, ns=(now, now))
                if self._fsync:
                    os.fsync(descriptor)
                folder.publish(name, key)
            except BaseException:
                with contextlib.suppress(OSError):
                    folder.remove(name)
                raise
            finally:
                os.close(descriptor)
            if self._fsync:
                os.fsync(folder.descriptor)

    def delete(self, keys: Iterable[bytes]) -> int:
        folder = self._folder()
        with self._faults:
            folder.check()
            return sum(folder.delete(key) for key in keys)

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        folder = self._folder()
        with self._faults:
            folder.check()
            return [folder.holds(key) for key in keys]

    def scan(self) -> Iterator[Entry]:
        """As the contract has it; `size` counts the blocks that a file occupies."""
        folder = self._folder()
        with self._faults:
            folder.check()
            for key, found in folder.values():
                yield Entry(key, max(found.st_size, 512 * found.st_blocks), found.st_mtime)

    def touch(self, keys: Sequence[bytes]) -> None:
        folder = self._folder()
        now = time.time_ns()
        with self._faults:
            folder.check()
            for index, key in enumerate(keys):
                folder.stamp(key, now - index * TOUCH_STEP_NS)

    def reject(self, key: bytes, reason: str) -> None:
        """Move the value into the folder `quarantine`, which keeps the newest 16; where that fails, delete it."""
        folder = self._folder()
        with self._faults:
            folder.check()
            if folder.holds(key):
                try:
                    folder.quarantine(key, reason)
                except OSError:
                    folder.delete(key)

    def room(self) -> Room | None:
        """As the file system has it; None for one that says nothing. One that makes inodes as it needs them says
        that it has none."""
        folder = self._folder()
        try:
            system = os.fstatvfs(folder.descriptor)
        except OSError:  # whether values can be written and read, these will tell
            return None
        if not system.f_blocks:
            return None
        files = system.f_favail if system.f_files else None
        return Room(system.f_bavail * system.f_frsize, system.f_blocks * system.f_frsize, files, system.f_files)

    def close(self) -> None:
        self._opened = None

    def _folder(self) -> Folder:
        folder = self._opened
        if folder is None:
            raise StoreError("closed", f"disk: {self.folder}: the store is closed")
        return folder


class _Faults:
    """Turns operating system errors into `StoreError`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            reason = _REASONS.get(error.errno or 0, "io")
            raise StoreError(reason, f"disk: {self._folder}: {error.strerror or error}") from error
        if isinstance(error, MemoryError):  # a file of absurd size
            raise StoreError("io", f"disk: {self._folder}: no memory for a value") from error


def _read_all(descriptor: int, size: int, pool: BufferPool) -> Buffer:
    """A file's first `size` bytes, or as many as there are."""
    if not POOLED_BYTES <= size <= buffers.SIZE:
        value = os.read(descriptor, size)
        while len(value) < size and (more := os.read(descriptor, size - len(value))):
            value += more
        return value
    buffer = pool.take(size)
    filled = os.readv(descriptor, [buffer])
    while filled < size and (more_bytes := os.readv(descriptor, [buffer[filled:]])):
        filled += more_bytes
    return buffer[:filled].toreadonly()


def _write_all(descriptor: int, parts: Sequence[Buffer]) -> None:
    views = [memoryview(part).cast("B") for part in parts]
    start = 0
    while start < len(views):
        written = os.writev(descriptor, views[start : start + _MOST_PARTS])
        while start < len(views) and written >= len(views[start]):
            written -= len(views[start])
            start += 1
        if written:
            views[start] = views[start][written:]
