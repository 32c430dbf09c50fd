"""The eviction contract.

Keys form chains: a key may have a parent, and is useless without it (a chunk of KV is part of a prefix only
together with all chunks before it). So a parent is never evicted before its children, whatever the policy's own
order is.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class EvictionPolicy(ABC, Generic[K]):
    """An order over keys, each with a weight in a unit of the caller's choice (pages, bytes, one).

    Every method but `evict` takes amortised constant time, for a chain that is touched or pinned from its root on.
    `evict` takes time proportional to its victims and to the logarithm of the number of keys. Memory is bounded by
    a constant times the number of keys. The same calls give the same results in every process. A policy that
    remembers evicted keys identifies them by `ghosts.mark`, so keys must be bytes, str, int, or objects that have
    such a value in an attribute `key`. Wrong use (an unknown key, a second insert, a removal that would orphan a
    child) raises an error and changes nothing. `ragkv.testing.policies` tests this contract, but for the times.
    """

    @abstractmethod
    def insert(self, key: K, parent: K | None = None, weight: int = 1, cost: float = 1.0) -> None:
        """Add `key`, as just used. `cost`: what it takes to recompute its value (in seconds, or any unit that is
        the same for all keys); most policies ignore it. KeyError: unknown parent. ValueError: known key, weight
        below 1, or cost not above 0."""

    @abstractmethod
    def touch(self, key: K) -> None:
        """Record a use of `key`. Callers touch a chain from its root on. KeyError: unknown key."""

    @abstractmethod
    def remove(self, key: K) -> None:
        """Remove `key`, pinned or not. KeyError: unknown key. ValueError: it has children."""

    @abstractmethod
    def pin(self, key: K) -> None:
        """Keep `key` and all its ancestors from eviction, until as many `unpin` calls. KeyError: unknown key."""

    @abstractmethod
    def unpin(self, key: K) -> None:
        """Undo one `pin`. KeyError: unknown key. ValueError: not pinned."""

    @abstractmethod
    def evict(self, weight: int) -> list[K] | None:
        """Remove and return keys of at least `weight` in total, in the order of their eviction.

        Atomic: returns None and changes nothing if all evictable keys together weigh less. Never evicts a pinned
        key, or a key before its children. Evicts no more keys than it needs, in its order. `weight` <= 0 gives [].
        """

    @property
    @abstractmethod
    def evictable(self) -> int:
        """The total weight of all keys that `evict` may return."""

    @abstractmethod
    def __contains__(self, key: object) -> bool: ...

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise AssertionError if the internal state is inconsistent. For tests; takes linear time."""
