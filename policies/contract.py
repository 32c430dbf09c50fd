"""The eviction contract.

Keys form chains: a key may name a parent, and is worthless without it (a chunk of KV is only an exact
prefix behind all chunks before it). So a parent outlives its children, whatever the policy's own order says.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class EvictionPolicy(ABC, Generic[K]):
    """An order over keys, each with a weight in units of the caller's choice (pages, bytes, one).

    A caller may rely on: every method but `evict` takes constant time, amortised, for a chain touched or pinned
    from its root on; `evict` takes time in proportion to its victims, and to the logarithm of what is tracked.
    Memory is bounded by a constant times what is tracked, and the same calls give the same answers in every
    process. A policy that remembers keys that are gone knows them by `ghosts.mark`: let keys be bytes, str, int,
    or objects that have such a key in an attribute `key`. Wrong use (an unknown key, a second insert, a
    removal that would orphan a child) raises and changes nothing.
    """

    @abstractmethod
    def insert(self, key: K, parent: K | None = None, weight: int = 1, cost: float = 1.0) -> None:
        """Track `key`, as just used. `cost`: what it would take to make its value anew (seconds, or any unit that
        is the same for all keys); most policies pass it over. KeyError: unknown parent. ValueError: known key,
        weight below 1, or cost not above 0."""

    @abstractmethod
    def touch(self, key: K) -> None:
        """Note a use of `key`. Callers touch a chain from its root on. KeyError: unknown key."""

    @abstractmethod
    def remove(self, key: K) -> None:
        """Forget `key`, pinned or not. KeyError: unknown key. ValueError: it has children."""

    @abstractmethod
    def pin(self, key: K) -> None:
        """Keep `key`, and with it all its ancestors, until as many `unpin` calls. KeyError: unknown key."""

    @abstractmethod
    def unpin(self, key: K) -> None:
        """Take back one `pin`. KeyError: unknown key. ValueError: not pinned."""

    @abstractmethod
    def evict(self, weight: int) -> list[K] | None:
        """Forget and return keys that weigh at least `weight` together, in the order of their going.

        Atomic: None, and no change, where the keys that may go weigh less. Never a pinned key, never a key
        with a child that stays. Takes no more keys than it needs in its order. `weight` <= 0 gives [].
        """

    @property
    @abstractmethod
    def evictable(self) -> int:
        """Weight of all keys that `evict` may take."""

    @abstractmethod
    def __contains__(self, key: object) -> bool: ...

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise AssertionError where the inner state contradicts itself (for tests; linear time)."""
