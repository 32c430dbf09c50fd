"""What a private store holds: keys, sizes, a byte budget, a policy. No bytes pass through."""

import sys
from collections.abc import Hashable, Iterable

from ragkv.kvstore.stores.contract import Entry
from ragkv.policies import EvictionPolicy


class Index:
    """Which keys a private store holds, within `capacity` bytes and `most` keys (but for the ancestors of a new
    one). Keys of a chain go from its tail on."""

    def __init__(self, capacity: int, policy: EvictionPolicy[Hashable]) -> None:
        self.capacity = capacity
        self.most = sys.maxsize
        self.used = 0
        self._policy = policy
        self._sizes: dict[bytes, int] = {}
        self._gone: set[bytes] = set()  # lost, but parents of keys that are not: the policy still counts them

    def __contains__(self, key: bytes) -> bool:
        return key in self._sizes and key not in self._gone

    def __len__(self) -> int:
        return len(self._sizes) - len(self._gone)

    def keys(self) -> set[bytes]:
        """All keys that are there."""
        return self._sizes.keys() - self._gone

    def add(self, key: bytes, size: int, parent: bytes | None, cost: float) -> list[bytes] | None:
        """Enter a key, new or anew; the keys that had to go for it, or None (and no change) where none may."""
        if key in self._gone:  # still counted, as large as it was
            self._gone.discard(key)
            return []
        size = max(1, size)  # as the policy weighs it
        if size > self.capacity or self.most < 1 or key in self._sizes:
            return None
        above = parent if parent in self._sizes else None
        if above is not None:
            self._policy.pin(above)
        victims = self._policy.evict(self.used + size - self.capacity)
        if victims is not None:
            victims += self._beyond(self.most - 1, len(victims))
        if above is not None:
            self._policy.unpin(above)
        if victims is None:
            return None
        gone = [self._forget(victim) for victim in victims]
        self._policy.insert(key, above, size, cost)
        self._sizes[key] = size
        self.used += size
        return gone

    def resize(self, capacity: int, most: int) -> list[bytes]:
        """From now on keep within `capacity` bytes, and `most` keys; the keys that had to go for it."""
        self.capacity, self.most = capacity, most
        victims = self._policy.evict(self.used - capacity) or []
        victims += self._beyond(most, len(victims))
        return [self._forget(victim) for victim in victims]

    def drop(self, key: bytes) -> None:
        """Forget a key that is not there any more; no matter if it is known."""
        if key not in self._sizes:
            return
        try:
            self._policy.remove(key)
        except ValueError:  # it has children
            self._gone.add(key)
        else:
            self._forget(key)

    def touch(self, keys: Iterable[bytes]) -> None:
        """Note a use of a chain, root first."""
        for key in keys:
            if key in self:
                self._policy.touch(key)

    def adopt(self, entries: Iterable[Entry]) -> list[bytes]:
        """Enter what was found, longest unused first; the keys that had to go for it."""
        victims: list[bytes] = []
        for entry in sorted(entries, key=lambda entry: entry.used):
            if entry.key not in self:
                gone = self.add(entry.key, entry.size, None, 1.0)
                victims += [entry.key] if gone is None else gone
        return [key for key in victims if key not in self]

    def check_integrity(self) -> None:
        """Raise AssertionError where sizes, budget and policy contradict each other."""
        self._policy.check_integrity()
        assert self.used == sum(self._sizes.values()) <= self.capacity
        assert len(self._policy) == len(self._sizes) and self._gone <= self._sizes.keys()

    def _beyond(self, most: int, gone: int) -> list[Hashable]:
        """Evict, of the keys that are left without `gone`, down to `most`, or as far as keys may go."""
        victims: list[Hashable] = []
        while len(self._sizes) - gone - len(victims) > most and (one := self._policy.evict(1)):
            victims += one
        return victims

    def _forget(self, key: Hashable) -> bytes:
        assert isinstance(key, bytes)
        self.used -= self._sizes.pop(key)
        self._gone.discard(key)
        return key
