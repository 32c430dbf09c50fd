"""The trace of what an engine was asked: which chunks, of how many tokens, when. No text, and no key of ours.

A file of JSON lines. A header names the format; every other line is one request:

    {"format": "ragkv-trace", "version": 1}
    {"seconds": 12.345, "keys": ["6f1d…", "03ab…"], "tokens": [83, 128]}

`seconds` is the caller's time, `keys` and `tokens` the prompt's chunks in order. Equal keys mean equal content. A
key is the content key hashed anew (keyed BLAKE2b) with a salt that is never written, so keys say nothing about
texts, not even to those who can guess them. The lengths do: who has a long text can find its row of chunk lengths.
Each writer has its own salt: a file that a second one continued has a second header, and no reuse across it.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

FORMAT, VERSION = "ragkv-trace", 1
HEADER = {"format": FORMAT, "version": VERSION}
KEY_BYTES = 16
BUFFER_BYTES, BUFFER_SECONDS = 2**16, 10.0
LINE = f'{{"seconds": number, "keys": [{2 * KEY_BYTES} hex digits each], "tokens": [a number >= 1 for each key]}}'


class TraceWriter:
    """Appends to a trace file, or begins one (mode 0600). Not thread-safe.

    Lines are written when they are 64 KiB together or span 10 seconds, and at `close`; never synced. OSError:
    the disk's, from any method; what stood in the buffer is lost then, the file ends at a whole line (as far as
    the disk lets it), and the writer may be used on. FileExistsError: a file that is no trace. BlockingIOError:
    another writer has the file open. `salt`: at most 64 bytes; random where None.
    """

    def __init__(self, path: Path, salt: bytes | None = None) -> None:
        self._salt = os.urandom(32) if salt is None else salt
        self._lines: list[bytes] = []
        self._bytes = 0
        self._since: float | None = None
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.open(path, flags, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._size = _whole_lines(self._file, path)
            os.ftruncate(self._file, self._size)
            self._add(HEADER)
            self._flush()
        except BaseException:
            os.close(self._file)
            raise

    def record(self, seconds: float, chunks: Sequence[tuple[bytes, int]]) -> None:
        """Note one request: content key and count of tokens of each chunk of its prompt, in order."""
        keys = [blake2b(key, digest_size=KEY_BYTES, key=self._salt).hexdigest() for key, _ in chunks]
        self._add({"seconds": round(seconds, 3), "keys": keys, "tokens": [int(tokens) for _, tokens in chunks]})
        if self._since is None:
            self._since = seconds
        if self._bytes >= BUFFER_BYTES or seconds - self._since >= BUFFER_SECONDS:
            self._flush()

    def close(self) -> None:
        """Write what is left and let the file go. A second call does nothing."""
        if self._file < 0:
            return
        try:
            self._flush()
        finally:
            file, self._file = self._file, -1
            os.close(file)

    def _add(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        self._lines.append(line)
        self._bytes += len(line)

    def _flush(self) -> None:
        left = memoryview(b"".join(self._lines))
        size = self._size + len(left)
        self._lines, self._bytes, self._since = [], 0, None
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise
        self._size = size


def parse(entry: object) -> list[tuple[str, int]] | None:
    """The chunks (key, tokens) of one line's JSON value, None for a header. ValueError says what is wrong."""
    if not isinstance(entry, dict):
        raise ValueError(f"allowed: {LINE}")
    if "format" in entry:
        if (entry["format"], entry.get("version")) != (FORMAT, VERSION):
            raise ValueError(
                f"format {entry['format']!r}, version {entry.get('version')!r}; allowed: {FORMAT!r}, {VERSION}"
            )
        return None
    keys, tokens = entry.get("keys"), entry.get("tokens")
    if not (isinstance(keys, list) and isinstance(tokens, list) and len(keys) == len(tokens)):
        raise ValueError(f"allowed: {LINE}")
    if not all(isinstance(key, str) and _is_hex(key) for key in keys):
        raise ValueError(f"allowed: {LINE}")
    if not all(type(each) is int and each >= 1 for each in tokens):
        raise ValueError(f"allowed: {LINE}")
    return list(zip(keys, tokens, strict=True))


def _is_hex(key: str) -> bool:
    return len(key) == 2 * KEY_BYTES and set(key) <= set("0123456789abcdef")


def _whole_lines(file: int, path: Path) -> int:
    """Size of a trace file up to its last whole line. FileExistsError: it is something else."""
    size = os.fstat(file).st_size
    if not size:
        return 0
    head = os.pread(file, 4096, 0).split(b"\n")[0]
    try:
        ours = parse(json.loads(head)) is None
    except ValueError:
        ours = False
    if not ours:
        raise FileExistsError(f"{path}: exists, and does not begin like a trace of version {VERSION}")
    end = size
    while end:
        start = max(0, end - 2**16)
        at = os.pread(file, end - start, start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0
