"""Stores around a store: what passes through, late or broken. For tests and drills."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import TypeVar

from ragkv.errors import StoreError
from ragkv.kvstore.stores.contract import Buffer, Entry, Room, Store

T = TypeVar("T")


class WrapperStore(Store):
    """Hands every call on to `inner`; all but `room` and `close` pass through `_pass`."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.name = inner.name
        self.capabilities = inner.capabilities

    def get(self, key: bytes) -> Buffer | None:
        return self._pass("get", lambda: self.inner.get(key), None)

    def get_many(self, keys: Sequence[bytes]) -> list[Buffer | None]:
        return self._pass("get_many", lambda: self.inner.get_many(keys), [None] * len(keys))

    def put(self, key: bytes, parts: Sequence[Buffer]) -> None:
        self._pass("put", lambda: self.inner.put(key, parts), None)

    def put_many(self, items: Sequence[tuple[bytes, Sequence[Buffer]]]) -> None:
        self._pass("put_many", lambda: self.inner.put_many(items), None)

    def delete(self, keys: Iterable[bytes]) -> int:
        return self._pass("delete", lambda: self.inner.delete(keys), 0)

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return self._pass("contains", lambda: self.inner.contains(keys), [False] * len(keys))

    def scan(self) -> Iterator[Entry]:
        nothing: Iterator[Entry] = iter(())
        yield from self._pass("scan", self.inner.scan, nothing)

    def touch(self, keys: Sequence[bytes]) -> None:
        self._pass("touch", lambda: self.inner.touch(keys), None)

    def reject(self, key: bytes, reason: str) -> None:
        self._pass("reject", lambda: self.inner.reject(key, reason), None)

    def room(self) -> Room | None:
        return self.inner.room()

    def make_room(self, key: bytes, size: int) -> int:
        return self._pass("make_room", lambda: self.inner.make_room(key, size), 0)

    def close(self) -> None:
        self.inner.close()

    def _pass(self, method: str, call: Callable[[], T], nothing: T) -> T:
        """The result of `call`; `nothing`: what the method returns where nothing is there."""
        return call()


class LatencyStore(WrapperStore):
    """Waits `seconds` before every call, once for a batch, as a round trip does."""

    def __init__(self, inner: Store, seconds: float, wait: Callable[[float], object] = time.sleep) -> None:
        super().__init__(inner)
        self._seconds, self._wait = seconds, wait

    def _pass(self, method: str, call: Callable[[], T], nothing: T) -> T:
        self._wait(self._seconds)
        return call()


class Fault(Enum):
    """What can go wrong with a call. FAIL: StoreError("io"), and nothing done. TIMEOUT: done, and then
    StoreError("timeout"). LOSE: nothing done, and the answer of an empty store. A value that was read comes back
    FLIP: with one bit flipped; CUT: without its second half; WRONG: as the value read before it."""

    FAIL = "fail"
    TIMEOUT = "timeout"
    LOSE = "lose"
    FLIP = "flip"
    CUT = "cut"
    WRONG = "wrong"


Plan = Callable[[str, int], Fault | None]


def on_calls(faults: Mapping[tuple[str, int], Fault]) -> Plan:
    """A plan from a table: (method, how many calls of it came before) to fault."""
    return lambda method, number: faults.get((method, number))


def now_and_then(share: float, seed: int, faults: Sequence[Fault] = tuple(Fault)) -> Plan:
    """A plan that hits a share of all calls, the same ones for the same seed."""

    def plan(method: str, number: int) -> Fault | None:
        chance = random.Random(f"{seed} {method} {number}")
        return chance.choice(faults) if chance.random() < share else None

    return plan


class FaultyStore(WrapperStore):
    """Breaks calls as `plan` says, which may be replaced at any time. Calls are counted by method from 0 on;
    `get_many` and `put_many` are that many calls of `get` and `put`. `close` always works."""

    def __init__(self, inner: Store, plan: Plan) -> None:
        super().__init__(inner)
        self.plan = plan
        self._calls: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._last: Buffer = b""

    def get(self, key: bytes) -> Buffer | None:
        fault = self._next("get")
        value = self._break("get", fault, lambda: self.inner.get(key), None)
        if value is None:
            return None
        before, self._last = self._last, value
        return _spoil(value, fault, before)

    def get_many(self, keys: Sequence[bytes]) -> list[Buffer | None]:
        return [self.get(key) for key in keys]

    def put_many(self, items: Sequence[tuple[bytes, Sequence[Buffer]]]) -> None:
        for key, parts in items:
            self.put(key, parts)

    def _pass(self, method: str, call: Callable[[], T], nothing: T) -> T:
        return self._break(method, self._next(method), call, nothing)

    def _next(self, method: str) -> Fault | None:
        with self._lock:
            number = self._calls[method]
            self._calls[method] += 1
        return self.plan(method, number)

    def _break(self, method: str, fault: Fault | None, call: Callable[[], T], nothing: T) -> T:
        if fault is Fault.FAIL:
            raise StoreError("io", f"{self.name}: {method} fails, as planned")
        if fault is Fault.LOSE:
            return nothing
        result = call()
        if fault is Fault.TIMEOUT:
            raise StoreError("timeout", f"{self.name}: {method} took too long, as planned")
        return result


def _spoil(value: Buffer, fault: Fault | None, before: Buffer) -> Buffer:
    if fault is Fault.FLIP and len(value):
        spoiled = bytearray(value)
        spoiled[len(spoiled) // 2] ^= 1
        return spoiled
    if fault is Fault.CUT:
        return value[: len(value) // 2]
    return before if fault is Fault.WRONG else value
