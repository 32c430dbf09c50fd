"""The memory that can back shared memory: of the machine, and within the limits of this process's control groups.

Shared memory counts towards the group of whoever touches it first: more than the limit allows is not refused but
ends in a killed process. Limits of all parents hold too; with version 1 they may be mounted out of sight, and then
the group itself says the smallest. Whatever cannot be read bounds nothing.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
MOST_RESERVE = 1 << 30
_DEEPEST = 64


class Backing(NamedTuple):
    """Bytes that can be had, less a reserve, and who says so."""

    bytes: int
    source: str


@dataclass(frozen=True)
class _Version:
    """The files of one version of control groups."""

    limit: str
    usage: str
    cache: tuple[str, str]  # in memory.stat: what is given up as soon as there is need
    hierarchy: str | None


_ONE = _Version(
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
    "hierarchical_memory_limit",
)
_TWO = _Version("memory.max", "memory.current", ("inactive_file", "active_file"), None)


def backing(proc: Path = PROC) -> Backing | None:
    """The memory that can be had now, a sixteenth (at most 1 GiB) set aside; None: nobody says."""
    found = [each for each in (_machine(proc), *_groups(proc)) if each is not None]
    if not found:
        return None
    least = min(found)
    return Backing(max(0, least.bytes - min(least.bytes // 16, MOST_RESERVE)), least.source)


def _machine(proc: Path) -> Backing | None:
    fields = _fields(proc / "meminfo")
    if "MemAvailable" not in fields:
        return None
    return Backing(1024 * (fields["MemAvailable"] + fields.get("SwapFree", 0)), "this machine's memory")


def _groups(proc: Path) -> Iterator[Backing]:
    """What every group above this process has left."""
    paths = _paths(proc)
    for version, root, mount in _mounts(proc):
        path = paths.get(version)
        if path is None:
            continue
        folder, beyond = mount, path.removeprefix(root.rstrip("/"))
        if (path + "/").startswith(root.rstrip("/") + "/") and ".." not in beyond:
            folder = mount / beyond.strip("/")
        if not folder.is_dir():  # the group of another namespace: what is mounted here is ours
            folder = mount
        for _ in range(_DEEPEST):
            left = _left(folder, version)
            if left is not None:
                yield left
            if folder == mount:
                break
            folder = folder.parent


def _left(folder: Path, version: _Version) -> Backing | None:
    limit = _number(folder / version.limit)
    stat = _fields(folder / "memory.stat")
    limits = [each for each in (limit, stat.get(version.hierarchy or "")) if each is not None]
    if not limits:
        return None
    used = max(0, (_number(folder / version.usage) or 0) - sum(stat.get(name, 0) for name in version.cache))
    return Backing(max(0, min(limits) - used), f"the memory limit in {folder / version.limit}")


def _paths(proc: Path) -> dict[_Version, str]:
    """Where this process stands, by version."""
    found = {}
    for line in _lines(proc / "self" / "cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            found[_TWO] = path
        elif "memory" in controllers.split(","):
            found[_ONE] = path
    return found


def _mounts(proc: Path) -> Iterator[tuple[_Version, str, Path]]:
    """Version, root and place of each mounted hierarchy that may limit memory."""
    for line in _lines(proc / "self" / "mountinfo"):
        before, _, after = line.partition(" - ")
        where, what = before.split(" "), after.split(" ")
        if len(where) < 5 or len(what) < 3:
            continue
        root, place = (re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), text) for text in where[3:5])
        if what[0] == "cgroup2":
            yield _TWO, root, Path(place)
        elif what[0] == "cgroup" and "memory" in what[2].split(","):
            yield _ONE, root, Path(place)


def _number(path: Path) -> int | None:
    """The one number of a file; None where it has none (no limit is "max")."""
    lines = _lines(path)
    return int(lines[0]) if lines and re.fullmatch(r"[0-9]{1,30}", lines[0].strip()) else None


def _fields(path: Path) -> dict[str, int]:
    """Names and numbers of a file, a line each."""
    found = (re.fullmatch(r"([\w()]+):?\s+([0-9]{1,30})(?: kB)?", line.strip()) for line in _lines(path))
    return {each[1]: int(each[2]) for each in found if each is not None}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
