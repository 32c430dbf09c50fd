"""The storage contract: values of bytes under keys of 16 bytes.

A miss is a result (None, False), never an error. An error (`StoreError`) means that the backend could not answer.
A store decides nothing: it has no budget, no policy, no retry. Every method is synchronous, and may be called from
several threads at once; all threads are in `ragkv.kvstore.io_pool`. `ragkv.testing.stores` tests this contract.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Buffer = bytes | bytearray | memoryview
KEY_BYTES = 16


class Entry(NamedTuple):
    """One result of `scan`. `size`: bytes of the value, with its overhead if the backend knows it. `used`: time of
    the last `put` or `touch`, in seconds since the epoch; 0.0: unknown."""

    key: bytes
    size: int
    used: float


class Room(NamedTuple):
    """Free space of a backend: `free` of `total` bytes, and `files` of `all_files` values (None: unknown)."""

    free: int
    total: int
    files: int | None = None
    all_files: int = 0


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do. `durable`: values outlive the process. `shared`: other processes may put and delete
    the same keys, so only the backend knows which values exist. `evicts`: it removes values by itself. `batched`:
    `get_many` and `put_many` cost less than the same number of single calls."""

    durable: bool = False
    shared: bool = False
    evicts: bool = False
    batched: bool = False


class Store(ABC):
    """One backend. Values are opaque bytes. For every reader, a value is always either complete or absent. A value
    may have 0 bytes; a large one may be refused (`StoreError("too_large")`), but not one of 8 MiB.

    Every method raises `StoreError` if the backend cannot answer (`scan`: during the iteration), and no other
    error for keys of 16 bytes. After `close`, whatever would read or write values raises `StoreError("closed")`.
    `name`: of the backend, in lower case.
    """

    name: str
    capabilities: Capabilities

    @abstractmethod
    def get(self, key: bytes) -> Buffer | None:
        """The value, or None if there is none. The caller may keep the buffer, but must not write to it."""

    def get_many(self, keys: Sequence[bytes]) -> list[Buffer | None]:
        """As `get`, in the order of `keys`."""
        return [self.get(key) for key in keys]

    @abstractmethod
    def put(self, key: bytes, parts: Sequence[Buffer]) -> None:
        """Store the concatenation of `parts` under `key`, and replace an older value. On return, the value is as
        durable as the backend promises. After an error, the old value or none exists. `parts`: any number of
        contiguous buffers with items of any format; the store neither changes nor keeps them."""

    def put_many(self, items: Sequence[tuple[bytes, Sequence[Buffer]]]) -> None:
        """Store several values; of a key that is named twice, the last one. After an error, any of them may
        exist."""
        for key, parts in items:
            self.put(key, parts)

    @abstractmethod
    def delete(self, keys: Iterable[bytes]) -> int:
        """Remove values. Returns how many of them existed, each counted once."""

    @abstractmethod
    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Whether a value exists, for each of `keys`, in order."""

    @abstractmethod
    def scan(self) -> Iterator[Entry]:
        """All entries, each once, in no particular order. Values put or deleted during the scan may or may not
        appear; they do not keep the scan from its end."""

    @abstractmethod
    def touch(self, keys: Sequence[bytes]) -> None:
        """Record a use of a chain's keys, given from its root on: the root counts as used last, every other key
        before its parent. A hint only: unknown keys are ignored, and a backend without an order of use does
        nothing."""

    def reject(self, key: bytes, reason: str) -> None:
        """The value under `key` failed a check (`reason`): never return it again. The key may be put again.
        Default: delete it."""
        self.delete([key])

    def room(self) -> Room | None:
        """Free space; None: the backend does not know."""
        return None

    def free_bytes(self) -> int | None:
        """Free bytes; None: the backend does not know."""
        room = self.room()
        return None if room is None else room.free

    def make_room(self, key: bytes, size: int) -> int:
        """Remove some values that were not used for long, to make room for `size` bytes under `key`. For backends
        that know their values themselves. Returns how many were removed. Default: 0."""
        return 0

    @abstractmethod
    def close(self) -> None:
        """Release all resources. May be called twice."""
