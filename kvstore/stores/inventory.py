"""What lies in a disk store's folder, for people: by headers alone, or with every byte read and checked.

Works beside the engines that use the folder; what they put or delete meanwhile may or may not be seen. Tokens are
counted, never shown.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ragkv.errors import PayloadError, StoreError
from ragkv.kvstore.codec import Header, decode, header_end, read_header
from ragkv.kvstore.stores.folder import Folder

FIRST_BYTES = 4096  # holds the header of a chunk of up to 900 tokens


class Value(NamedTuple):
    """A value's file: `size` in bytes, `used`: seconds since the epoch. `header` is None where `fault` says why
    the value cannot be served: a reason as of `PayloadError`, "key" (another key's payload), "refused" or "io"."""

    key: bytes
    size: int
    used: float
    header: Header | None
    fault: str | None


@dataclass(slots=True)
class Totals:
    """Sums over a folder. `window_bytes`: of values of layers with windows. `oldest` and `newest`: times of last
    use, 0.0 where there is nothing. `bad`: values with a header or a size that cannot be."""

    files: int = 0
    bytes: int = 0
    window_bytes: int = 0
    tokens: int = 0
    namespaces: int = 0
    bad: int = 0
    oldest: float = 0.0
    newest: float = 0.0
    quarantined: int = 0
    temporary: int = 0


class Inventory:
    """A folder that is there; nothing is made in it. Files count whoever they belong to. StoreError: it cannot be
    read, or is no folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._errors():
            self._folder = Folder(path, owner=None)
            strange = self._folder.strange()
        if strange is not None:
            raise StoreError("io", f"{path}: no folder of ragkv's: it holds {strange!r}, and nothing of ragkv's")

    def values(self, *, whole: bool = False) -> Iterator[Value]:
        """All values, the last used first, each read when it is asked for: up to its header, or `whole`."""
        with self._errors():
            files = [(found.st_mtime, key) for key, found in self._folder.values()]
        for _, key in sorted(files, reverse=True):
            value = self.value(key, whole=whole)
            if value is not None:
                yield value

    def value(self, key: bytes, *, whole: bool = False) -> Value | None:
        """One value, read up to its header, or `whole`; None: it is not there (any more)."""
        try:
            descriptor = self._folder.open(key)
        except PermissionError:
            return Value(key, 0, 0.0, None, "refused")
        if descriptor < 0:
            return None
        try:
            found = os.fstat(descriptor)
            header, fault = _read(descriptor, key, found.st_size, whole=whole)
            return Value(key, found.st_size, found.st_mtime, header, fault)
        finally:
            os.close(descriptor)

    def resolve(self, text: str) -> bytes:
        """The one key whose hexadecimal form begins with `text`. ValueError: there is none, or several."""
        if re.fullmatch(r"[0-9a-f]{1,32}", text) is None:
            raise ValueError(f"KEY = {text!r}; allowed: up to 32 hexadecimal digits")
        with self._errors():
            keys = [key for key, _ in self._folder.values() if key.hex().startswith(text)]
        if len(keys) != 1:
            raise ValueError(f"KEY = {text!r}; {len(keys) or 'no'} values in {self.path} begin with that")
        return keys[0]

    def remove(self, key: bytes) -> bool:
        """Remove a value; whether it was there."""
        with self._errors():
            return self._folder.delete(key)

    def quarantine(self, key: bytes, reason: str) -> None:
        """Move a value to where no engine finds it."""
        with self._errors(), contextlib.suppress(FileNotFoundError):
            self._folder.quarantine(key, reason)

    def quarantined(self, *, remove: bool = False) -> int:
        """How many values lie, or lay, in quarantine; `remove`: and are removed."""
        with self._errors():
            return self._folder.quarantined(remove=remove)

    def totals(self) -> Totals:
        """Sums, by the headers."""
        totals, namespaces = Totals(), set()
        for value in self.values():
            totals.files += 1
            totals.bytes += value.size
            totals.newest = max(totals.newest, value.used)
            totals.oldest = min(totals.oldest or value.used, value.used)
            if value.header is None:
                totals.bad += 1
            else:
                totals.tokens += value.header.token_count
                totals.window_bytes += value.size if value.header.plane else 0
                namespaces.add(value.header.namespace)
        totals.namespaces = len(namespaces)
        totals.quarantined = self._folder.quarantined()
        totals.temporary = sum(1 for _ in self._folder.temporaries())
        return totals

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError("io", f"{self.path}: {error.strerror}") from error


def _read(descriptor: int, key: bytes, size: int, *, whole: bool) -> tuple[Header | None, str | None]:
    """The header of an open file, and None; or None, and what is wrong with it."""
    try:
        first = os.read(descriptor, size if whole else min(size, FIRST_BYTES))
        if whole:
            header, _ = decode(first)
        else:
            end = header_end(first)
            if end > len(first):
                first += os.read(descriptor, end - len(first))
            header, expected = read_header(first)
            if size != expected:
                return None, "truncated" if size < expected else "size"
    except PayloadError as error:
        return None, error.reason
    except OSError:
        return None, "io"
    return (header, None) if header.address == key else (None, "key")
