"""What a tier is given to do, and what it has done on its threads: plain functions of a store, which touch none of
the tier's books."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ragkv.errors import PayloadError, StoreError
from ragkv.kvstore.stores.contract import Buffer, Entry, Room, Store

EXPIRED = "expired"  # a payload that was good
ROOM = 8  # values for which room is made at once, so that not each is sent twice


@dataclass(frozen=True, slots=True)
class Write:
    """A payload to be kept. `make` is called once the tier has taken it, and gives what makes the parts on the
    writing thread. `size`, `cost`: for the budget. `replaces`: in the place of what is there under that key."""

    key: bytes
    parent: bytes | None
    size: int
    cost: float
    make: Callable[[], Callable[[], Sequence[Buffer]]]
    replaces: bool = False


@dataclass(frozen=True, slots=True)
class Wanted:
    """A payload to be read: `accept` makes of it what the caller needs, on a reading thread, or raises
    PayloadError: then the store shall never give it again."""

    key: bytes
    accept: Callable[[Buffer], Any]


def scan(store: Store) -> tuple[list[Entry], Room | None]:
    """What is there, and what could be there still."""
    return list(store.scan()), store.room()


def read(store: Store, wanted: Sequence[tuple[bytes, Callable[[Buffer], Any]]]) -> tuple[list[Any], int]:
    """For each key what its function made of the payload, None, or the PayloadError; and the bytes read."""
    found: list[Any] = []
    size = 0
    for (key, accept), value in zip(wanted, store.get_many([key for key, _ in wanted]), strict=True):
        if value is None:
            found.append(None)
            continue
        size += len(value)
        try:
            found.append(accept(value))
        except PayloadError as error:
            found.append(error)
            with contextlib.suppress(StoreError):  # it does not concern the others; the index forgets it anyway
                if error.reason == EXPIRED:
                    store.delete([key])
                else:
                    store.reject(key, error.reason)
    return found, size


def put(
    store: Store, key: bytes, size: int, parts: Callable[[], Sequence[Buffer]], *, ask: bool, make_room: bool
) -> tuple[Room | None, int]:
    """Write a value; the room there is then, if anybody knows, and how many values were removed for it. `ask`:
    where it is there already, touch it. `make_room`: a store that is full shall remove what it has."""
    removed = 0
    if ask and store.contains([key])[0]:
        store.touch([key])  # another engine was quicker; equal keys are equal bytes
        return store.room(), removed
    made = parts()
    try:
        store.put(key, made)
    except StoreError as error:
        if error.reason == "full" and make_room:
            with contextlib.suppress(StoreError):  # then it is as full as it was
                removed = store.make_room(key, ROOM * size)
        if not removed:
            raise
        store.put(key, made)
    return store.room(), removed
