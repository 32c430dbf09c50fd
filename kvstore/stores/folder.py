"""The folder of a disk store: names, plain files, and who may be writing just now.

Everything goes through the folder's descriptor, so that a folder that vanished is never made anew by accident.
A writer holds a `flock` on the file it writes: a temporary file that nobody locks is what a killed writer left.
Errors are `OSError`s; a missing or replaced folder is ENOENT.
"""

import contextlib
import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path

SUFFIX = ".kv"
QUARANTINE, MOST_QUARANTINED = "quarantine", 16
_VALUE = re.compile(r"[0-9a-f]{32}\.kv")
_TEMPORARY = re.compile(r"[0-9a-f]{32}\.[0-9a-f]{16}\.tmp")
_FOLDER = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # the last: never wait for a pipe's writer
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_NOT_OURS = {errno.ENOENT, errno.ELOOP, errno.ENXIO}  # nothing, a link, a socket


def value_name(key: bytes) -> str:
    """The name of the file that holds the value of `key`."""
    return key.hex() + SUFFIX


class Folder:
    """An open folder. Its descriptor is closed once nobody holds the object any more, so that no call in another
    thread ever works with a number that means something else by now. `owner`: whose files count, None: all."""

    def __init__(self, path: Path, owner: int | None) -> None:
        self.path = path
        self.owner = owner
        self.descriptor = os.open(path, _FOLDER)
        self._found = os.fstat(self.descriptor)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self.descriptor)

    def check(self) -> None:
        """Raise where the path names another folder by now, or none."""
        if not os.path.samestat(self.path.stat(), self._found):
            raise FileNotFoundError(errno.ENOENT, "another folder lies there now")

    def warning(self) -> str | None:
        """What is wrong with the folder's owner or permissions, in a line."""
        mode = stat.S_IMODE(self._found.st_mode)
        if self._found.st_uid != os.geteuid():
            return f"{self.path} belongs to uid {self._found.st_uid}, who can remove what is kept there"
        if mode & 0o077:
            return f"{self.path} is open to others (mode {mode:04o}); better: chmod 700 {self.path}"
        return None

    def strange(self) -> str | None:
        """The name of something here, where nothing here is of a store's; None also for an empty folder."""
        found: str | None = None
        with os.scandir(self.descriptor) as entries:
            for entry in entries:
                name = entry.name
                if name == QUARANTINE or _VALUE.fullmatch(name) or _TEMPORARY.fullmatch(name):
                    return None
                found = found if found is not None or name == "lost+found" else name
        return found

    def probe(self) -> None:
        """Find out whether files can be made here, and whose they are then (on NFS root may become nobody)."""
        name, descriptor = self.create(bytes(16))
        self.owner = os.fstat(descriptor).st_uid
        os.close(descriptor)
        self.remove(name)

    def open(self, key: bytes) -> int:
        """A descriptor for reading what lies under a value's name; -1 where there is nothing."""
        try:
            return os.open(value_name(key), _READ, dir_fd=self.descriptor)
        except PermissionError:
            if self.holds(key):
                raise
            return -1  # somebody else's
        except OSError as error:
            if error.errno not in _NOT_OURS:
                raise
            return -1

    def size(self, descriptor: int) -> int | None:
        """Bytes of an open value, None where it is none of ours."""
        found = os.fstat(descriptor)
        return found.st_size if self._is_ours(found) else None

    def holds(self, key: bytes) -> bool:
        """Whether there is a value of that key."""
        try:
            found = os.stat(value_name(key), dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return self._is_ours(found)

    def create(self, key: bytes) -> tuple[str, int]:
        """Name and descriptor of a new temporary file, locked."""
        while True:
            name = f"{key.hex()}.{os.urandom(8).hex()}.tmp"
            descriptor = os.open(name, _CREATE, 0o600, dir_fd=self.descriptor)
            with contextlib.suppress(OSError):  # a file system without locks: nothing is swept there either
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                return name, descriptor
            os.close(descriptor)  # swept between open and lock

    def publish(self, name: str, key: bytes) -> None:
        """Give a temporary file the name of its value."""
        os.rename(name, value_name(key), src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def remove(self, name: str) -> bool:
        """Remove a file; whether it was there."""
        try:
            os.unlink(name, dir_fd=self.descriptor)
        except FileNotFoundError:
            return False
        return True

    def delete(self, key: bytes) -> bool:
        """Remove a value of ours; whether it was there."""
        return self.holds(key) and self.remove(value_name(key))

    def stamp(self, key: bytes, nanoseconds: int) -> None:
        """Set a value's time of last use, where there is such a value."""
        with contextlib.suppress(FileNotFoundError, PermissionError):
            times = (nanoseconds, nanoseconds)
            os.utime(value_name(key), ns=times, dir_fd=self.descriptor, follow_symlinks=False)

    def values(self) -> Iterator[tuple[bytes, os.stat_result]]:
        """Keys of all values of ours, with what the file system knows of them."""
        for name, found in _list(self.descriptor, _VALUE):
            if self._is_ours(found):
                yield bytes.fromhex(name.removesuffix(SUFFIX)), found

    def temporaries(self) -> Iterator[tuple[str, os.stat_result]]:
        """Names of the files that are being written, or were when their writer was killed."""
        return _list(self.descriptor, _TEMPORARY)

    def sweep(self) -> int:
        """Remove what dead writers left; how many files."""
        return sum(self._sweep(name) for name, _ in list(self.temporaries()))

    def quarantine(self, key: bytes, reason: str) -> None:
        """Move a value to where it is not found, and keep only the newest of what is there."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(QUARANTINE, 0o700, dir_fd=self.descriptor)
        there = os.open(QUARANTINE, _FOLDER | os.O_NOFOLLOW, dir_fd=self.descriptor)
        try:
            self.stamp(key, time.time_ns())
            name = f"{key.hex()}.{re.sub('[^a-z_]', '-', reason)[:32]}"
            os.rename(value_name(key), name, src_dir_fd=self.descriptor, dst_dir_fd=there)
            by_age = sorted(_list(there), key=lambda each: each[1].st_mtime_ns, reverse=True)
            for old, _ in by_age[MOST_QUARANTINED:]:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(old, dir_fd=there)
        finally:
            os.close(there)

    def quarantined(self, *, remove: bool = False) -> int:
        """How many values lie, or lay, in quarantine; `remove`: and are removed."""
        try:
            there = os.open(QUARANTINE, _FOLDER | os.O_NOFOLLOW, dir_fd=self.descriptor)
        except OSError:
            return 0
        try:
            names = [name for name, _ in _list(there)]
            for name in names if remove else ():
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=there)
            return len(names)
        finally:
            os.close(there)

    def _sweep(self, name: str) -> bool:
        with contextlib.suppress(OSError):  # not ours to open, being written, or another sweeper was quicker
            descriptor = os.open(name, _READ, dir_fd=self.descriptor)
            try:
                if self._is_ours(os.fstat(descriptor)):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return self.remove(name)
            finally:
                os.close(descriptor)
        return False

    def _is_ours(self, found: os.stat_result) -> bool:
        return stat.S_ISREG(found.st_mode) and self.owner in (None, found.st_uid)


def _list(folder: int, pattern: re.Pattern[str] | None = None) -> Iterator[tuple[str, os.stat_result]]:
    own = os.open(".", _FOLDER, dir_fd=folder)  # a descriptor's copies share one position
    try:
        with os.scandir(own) as entries:
            for entry in entries:
                if pattern is None or pattern.fullmatch(entry.name):
                    try:
                        found = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    yield entry.name, found
    finally:
        os.close(own)
