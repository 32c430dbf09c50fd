"""One engine's shared-memory segment: a file in /dev/shm, mapped by the scheduler side and all workers.

Every process that maps a segment holds a shared `flock` on it for as long as it lives, so that a lock nobody
holds means that nobody lives: `sweep` removes what a killed engine left, and never what a living one uses.
The kernel lets go of locks however a process dies.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import stat
from pathlib import Path

from ragkv.errors import SegmentError

FOLDER = Path("/dev/shm")
PREFIX = "ragkv-"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def available_bytes(folder: Path = FOLDER) -> int:
    """Bytes that a new segment could have there now. SegmentError: no such folder."""
    try:
        stats = os.statvfs(folder)
    except OSError as error:
        raise SegmentError(f"shared memory: {folder} cannot be used: {error.strerror}") from error
    return stats.f_bavail * stats.f_frsize


def segment_path(name: str, folder: Path = FOLDER) -> Path:
    """Where the segment of that name lies; the name is one path component."""
    if not name or "/" in name or "\0" in name or name in {".", ".."}:
        raise SegmentError(f"shared memory: {name!r} is no segment name")
    return folder / f"{PREFIX}{name}"


def sweep(folder: Path = FOLDER) -> list[str]:
    """Remove all segments that no living process holds; their file names."""
    gone = []
    for path in sorted(folder.glob(f"{PREFIX}*")):
        with contextlib.suppress(OSError):  # not ours to open, or another sweeper was quicker
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if _lock_alone(descriptor) and _lies_at(path, descriptor):
                    path.unlink()
                    gone.append(path.name)
            finally:
                os.close(descriptor)
    return gone


class Segment:
    """`size` bytes shared under `name`. Who finds nobody there makes it anew, of zeros; its memory is
    reserved at once, so that a full /dev/shm is an error here and not a bus error later. `populate` maps its
    pages at once too, for who will touch them all (a fault a page costs more than the copy into it)."""

    def __init__(self, name: str, size: int, folder: Path = FOLDER, *, populate: bool = False) -> None:
        flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if populate else 0)
        self.path = segment_path(name, folder)
        self.size = size
        try:
            self._descriptor = _join(self.path, size)
            try:
                self.buffer = mmap.mmap(self._descriptor, size, flags=flags)
            except BaseException:
                _leave(self.path, self._descriptor)
                raise
        except OSError as error:
            text = f"{self.path}: {error.strerror}"
            if error.errno in (errno.ENOSPC, errno.EFBIG):
                text = f"{size} bytes do not fit into {folder}, which has {available_bytes(folder)} free"
            raise SegmentError(f"shared memory: {text}") from error

    @property
    def identity(self) -> tuple[str, int, int]:
        """Boot id, device and inode: equal in two processes only if they map the same memory (on two machines
        device and inode may well be equal)."""
        found = os.fstat(self._descriptor)
        return BOOT_ID.read_text().strip(), found.st_dev, found.st_ino

    def unlink(self) -> None:
        """Remove the name, once all who shall map the segment have done so. From then on the kernel frees the
        memory when the last of them ends, however it ends."""
        with contextlib.suppress(OSError):
            if _lies_at(self.path, self._descriptor):
                self.path.unlink()

    def close(self, *, unlink: bool = False) -> None:
        """Unmap; remove the file if told to, or if no one else holds it. Safe to call twice.

        Views of `buffer` that still live keep the mapping (not the file) until they go.
        """
        if self._descriptor < 0:
            return
        with contextlib.suppress(BufferError):
            self.buffer.close()
        _leave(self.path, self._descriptor, unlink=unlink)
        self._descriptor = -1


def _join(path: Path, size: int) -> int:
    """The file at `path`, opened, with the lock that says we live. Who can lock it alone sizes it, and
    the others wait for that."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise SegmentError(f"shared memory: {path} is not a file")
            if _lock_alone(descriptor):
                os.ftruncate(descriptor, 0)
                os.posix_fallocate(descriptor, 0, size)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if _lies_at(path, descriptor):
                found = os.fstat(descriptor).st_size
                if found != size:
                    raise SegmentError(f"shared memory: {path} has {found} bytes, not {size}")
                return descriptor
        except BaseException:
            _leave(path, descriptor)
            raise
        os.close(descriptor)  # swept between open and lock


def _leave(path: Path, descriptor: int, *, unlink: bool = False) -> None:
    """Close the file, and remove it if told to or if no one else holds it."""
    with contextlib.suppress(OSError):
        if (unlink or _lock_alone(descriptor)) and _lies_at(path, descriptor):
            path.unlink()
    os.close(descriptor)


def _lock_alone(descriptor: int) -> bool:
    """Lock a file against all others; False, and no lock at all, where one of them has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lies_at(path: Path, descriptor: int) -> bool:
    """Whether `path` still names this file, and it is a plain one."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(found.st_mode) and os.path.samestat(os.fstat(descriptor), found)
