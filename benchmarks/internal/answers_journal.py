"""The questions that a run of `bench answers` has finished, in a file of JSON lines, so that it can be resumed.

The first line has the settings and the machine; each other line one question. A line that was cut off, where a run
was killed, is dropped.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Journal:
    """`finished`: by number, what the file had and what was added. Without a path, nothing is written."""

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        """Read or begin the file. ValueError: it is of other settings, or no such file; it is left as it is."""
        self._path = path
        self.finished: dict[int, Row] = {}
        if path is None:
            return
        settings = json.loads(json.dumps(settings))
        lines = _whole_lines(path)
        if lines:
            _check(path, _parse(path, 1, lines[0], "settings")["settings"], settings)
            for number, line in enumerate(lines[1:], 2):
                row = _parse(path, number, line, "number")
                self.finished[row["number"]] = row
            with path.open("rb+") as file:
                file.truncate(sum(map(len, lines)))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_line({"settings": settings}))

    def add(self, row: Row) -> None:
        """A question is finished; its row is on the disk when this returns."""
        self.finished[row["number"]] = row
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write(_line(row))
                file.flush()
                os.fsync(file.fileno())


def _whole_lines(path: Path) -> list[bytes]:
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    if len(lines) == 1 and not lines[0].startswith(b'{"settings": '[: len(lines[0])]):
        _parse(path, 1, lines[0], "settings")
    return [line + b"\n" for line in lines[:-1]]


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _parse(path: Path, number: int, line: bytes, field: str) -> Row:
    try:
        row: Row = json.loads(line)
        if field in row:
            return row
    except (ValueError, TypeError):
        pass
    raise ValueError(f"{path}, line {number}: expected a JSON object with {field!r}, got {line[:80]!r}")


def _check(path: Path, was: Any, now: Mapping[str, Any]) -> None:
    for name in [*now, *(name for name in was if name not in now)]:
        if was.get(name) != now.get(name):
            raise ValueError(
                f"{path} is of a run with {name} = {was.get(name)!r}, this one has {now.get(name)!r}: "
                "give the same, or another file"
            )
