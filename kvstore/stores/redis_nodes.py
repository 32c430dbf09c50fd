"""Which Redis server holds a key: the only one, the master that Sentinel names, or the cluster's for its slot."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from ragkv.kvstore.stores.redis_link import CLOCK, UNREACHABLE, Address, Pools

T = TypeVar("T")


class Nodes(ABC):
    """What is learned is kept until `forget`. Every method may ask servers, and raises what `Pools.ask` does."""

    @abstractmethod
    def holders(self, keys: Sequence[bytes]) -> list[Address]:
        """The server for each key, named as on the server."""

    @abstractmethod
    def masters(self) -> list[Address]:
        """All servers that hold keys."""

    def forget(self) -> None:  # noqa: B027
        """What was learned proved wrong."""

    def close(self) -> None:  # noqa: B027
        """Let go of connections of its own."""


class SingleNode(Nodes):
    """Always the same server."""

    def __init__(self, address: Address) -> None:
        self._address = address

    def holders(self, keys: Sequence[bytes]) -> list[Address]:
        return [self._address] * len(keys)

    def masters(self) -> list[Address]:
        return [self._address]


class SentinelNodes(Nodes):
    """The master of `service`, as the first of some Sentinels to answer has it; they are reached by `pools`."""

    def __init__(self, sentinels: Sequence[Address], service: str, pools: Pools) -> None:
        self._sentinels = list(sentinels)
        self._service = service
        self._pools = pools
        self._master: Address | None = None

    def holders(self, keys: Sequence[bytes]) -> list[Address]:
        return self.masters() * len(keys)

    def masters(self) -> list[Address]:
        master = self._master
        if master is not None:
            return [master]
        answered, found = first_answer(self._sentinels, self._ask)
        self._sentinels = unique([answered, *self._sentinels])
        self._master = found
        return [found]

    def forget(self) -> None:
        self._master = None

    def close(self) -> None:
        self._pools.close()

    def _ask(self, sentinel: Address) -> Address:
        found = self._pools.ask(sentinel, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service)
        if not found:
            raise redis.ConnectionError(f"the Sentinel at {sentinel} knows no master of {self._service!r}")
        return Address(found[0].decode(), int(found[1]))


class ClusterNodes(Nodes):
    """The cluster's masters by slot, as the first of its nodes to answer has them. `pools` are the store's own."""

    def __init__(self, addresses: Sequence[Address], pools: Pools) -> None:
        self._given = self._known = list(addresses)
        self._pools = pools
        self._slots: list[Address | None] | None = None

    def holders(self, keys: Sequence[bytes]) -> list[Address]:
        slots = self._table()
        return [_served(slots[slot], slot) for slot in map(key_slot, keys)]

    def masters(self) -> list[Address]:
        return _masters(self._table())

    def forget(self) -> None:
        self._slots = None

    def _table(self) -> list[Address | None]:
        slots = self._slots
        if slots is not None:
            return slots
        answered, found = first_answer(self._known, self._ask)
        self._known = unique([answered, *_masters(found), *self._given])
        self._slots = found
        return found

    def _ask(self, node: Address) -> list[Address | None]:
        slots: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        for first, last, master, *_ in self._pools.ask(node, "CLUSTER", "SLOTS"):
            host = master[0].decode() if master[0] else node.host  # a node that does not know its own address
            slots[first : last + 1] = [Address(host, int(master[1]))] * (last + 1 - first)
        return slots


def _masters(slots: Sequence[Address | None]) -> list[Address]:
    return [address for address in unique(slots) if address is not None]


def _served(address: Address | None, slot: int) -> Address:
    if address is None:
        raise redis.ConnectionError(f"no node of the cluster serves slot {slot}")
    return address


def first_answer(addresses: Sequence[Address], ask: Callable[[Address], T]) -> tuple[Address, T]:
    """Ask one after the other, each for its share of the time: who answered, and what. The last one's error where
    none answers."""
    error: Exception | None = None
    for index, address in enumerate(addresses):
        try:
            with CLOCK.within(CLOCK.left() / (len(addresses) - index)):
                return address, ask(address)
        except UNREACHABLE as failed:
            error = failed
    assert error is not None
    raise error


def unique(items: Iterable[T]) -> list[T]:
    """Without repetitions, in the order of first appearance."""
    return list(dict.fromkeys(items))


def redirection(answer: Any, asked: Address) -> tuple[Address, bool] | None:
    """Where a cluster's answer sends a command, and whether only this once (ASK); None: nowhere."""
    if not isinstance(answer, redis.exceptions.AskError):
        return None
    once = not isinstance(answer, redis.exceptions.MovedError)
    return Address(answer.host or asked.host, answer.port), once
