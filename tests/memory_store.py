"""Values in this process's memory: for tests and simulations."""

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

from ragkv.errors import StoreError
from ragkv.kvstore.stores.contract import Buffer, Capabilities, Entry, Store

TOUCH_STEP = 1e-6


class MemoryStore(Store):
    """A dict behind a lock. `values`: what is kept, each with the time of its last use."""

    name = "memory"
    capabilities = Capabilities()

    def __init__(self) -> None:
        self.values: dict[bytes, tuple[bytes, float]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def get(self, key: bytes) -> Buffer | None:
        with self._open() as values:
            found = values.get(key)
        return None if found is None else found[0]

    def put(self, key: bytes, parts: Sequence[Buffer]) -> None:
        value = b"".join(parts)
        with self._open() as values:
            values[key] = value, time.time()

    def delete(self, keys: Iterable[bytes]) -> int:
        with self._open() as values:
            return sum(values.pop(key, None) is not None for key in keys)

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        with self._open() as values:
            return [key in values for key in keys]

    def scan(self) -> Iterator[Entry]:
        with self._open() as values:
            entries = [Entry(key, len(value), used) for key, (value, used) in values.items()]
        yield from entries

    def touch(self, keys: Sequence[bytes]) -> None:
        now = time.time()
        with self._open() as values:
            for index, key in enumerate(keys):
                if key in values:
                    values[key] = values[key][0], now - index * TOUCH_STEP

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self.values.clear()

    @contextlib.contextmanager
    def _open(self) -> Iterator[dict[bytes, tuple[bytes, float]]]:
        with self._lock:
            if self._closed:
                raise StoreError("closed", "memory: the store is closed")
            yield self.values
