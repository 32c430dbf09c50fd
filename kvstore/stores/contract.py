"""The storage contract: values of bytes under keys of 16 bytes.

A miss is a result (None, False), never an error; an error (`StoreError`) says that the backend could not answer.
Stores decide nothing: no budget, no policy, no retry. Every method is synchronous, and may be called from several
threads at once; concurrency lives in `ragkv.kvstore.io_pool`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Buffer = bytes | bytearray | memoryview
KEY_BYTES = 16


class Entry(NamedTuple):
    """What `scan` finds: `size` in bytes of the value (with all that it occupies, as far as the backend knows),
    `used`: seconds since the epoch of the last `put` or `touch`, 0.0 where the backend does not know."""

    key: bytes
    size: int
    used: float


class Room(NamedTuple):
    """What the place where values lie could still take: `free` of `total` bytes, and `files` more values of
    `all_files` (None: it does not count them)."""

    free: int
    total: int
    files: int | None = None
    all_files: int = 0


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do. `durable`: what was put outlives the process. `shared`: others may put and delete
    under the same keys, so that only the backend knows what is there. `evicts`: it drops values by itself.
    `batched`: `get_many` and `put_many` cost less than as many single calls."""

    durable: bool = False
    shared: bool = False
    evicts: bool = False
    batched: bool = False


class Store(ABC):
    """One backend. Values are opaque; a value is either there whole or not at all, for every reader, always.

    Every method raises `StoreError` where the backend cannot answer, `scan` when it is iterated over; nothing
    raises anything else for keys of 16 bytes. After `close` all but `close` raise `StoreError("closed")`. A value
    of no bytes is a value.
    """

    name: str
    capabilities: Capabilities

    @abstractmethod
    def get(self, key: bytes) -> Buffer | None:
        """The value, or None. The caller may keep the buffer, and must not write into it."""

    def get_many(self, keys: Sequence[bytes]) -> list[Buffer | None]:
        """The values, in the order of `keys`."""
        return [self.get(key) for key in keys]

    @abstractmethod
    def put(self, key: bytes, parts: Sequence[Buffer]) -> None:
        """Keep the concatenation of `parts` under `key`, in the place of what was there. On return it is
        acknowledged: as durable as the backend promises. After an error the old value or none is there."""

    def put_many(self, items: Sequence[tuple[bytes, Sequence[Buffer]]]) -> None:
        """Keep several. After an error any of them may be there."""
        for key, parts in items:
            self.put(key, parts)

    @abstractmethod
    def delete(self, keys: Iterable[bytes]) -> int:
        """Remove values; how many of them were there."""

    @abstractmethod
    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of `keys` are there, in order."""

    @abstractmethod
    def scan(self) -> Iterator[Entry]:
        """All entries, in no order. What is put or deleted meanwhile may or may not appear."""

    @abstractmethod
    def touch(self, keys: Sequence[bytes]) -> None:
        """Note a use of a chain's keys, from its root on: the root counts as used last. Only a hint; unknown keys
        are passed over, and a backend that keeps no order does nothing."""

    def reject(self, key: bytes, reason: str) -> None:
        """What was read under `key` proved bad: never give it again. Default: delete it."""
        self.delete([key])

    def room(self) -> Room | None:
        """What the place where values lie could still take; None: the backend does not know."""
        return None

    def free_bytes(self) -> int | None:
        """Bytes that the place where values lie could still take; None: the backend does not know."""
        room = self.room()
        return None if room is None else room.free

    def make_room(self, key: bytes, size: int) -> int:
        """Remove values that were not used for long, so that one of `size` bytes finds room under `key`, in a
        backend that knows its values itself; how many it removed. Default: none."""
        return 0

    @abstractmethod
    def close(self) -> None:
        """Let all resources go. Safe to call twice."""
