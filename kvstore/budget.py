"""What a storage tier holds, and how much it may hold: what was set, or what there is less a reserve, whichever is
the smaller. No bytes pass through."""

import sys
from collections.abc import Callable, Hashable, Iterable

from ragkv.kvstore.stores.contract import Entry, Room
from ragkv.policies import EvictionPolicy

LOOK_SECONDS = 5.0  # between two looks at what there is, and at most one eviction for what looks have found
PATIENCE_SECONDS = 60.0  # without a refusal, before a budget that refusals made small grows again
SHARE = 64  # a refusal takes at least one in so many bytes
MOST_RESERVE, MOST_FILES = 1 << 30, 1000  # left to others: bytes, files


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

    def held(self, keys: Iterable[bytes]) -> set[bytes]:
        """Those of `keys` that are there."""
        return {key for key in keys if key in self}

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


class Budget:
    """Keeps an index within what was set (its capacity), what the backend says there is (`seen`), and what it
    refuses, as by a quota that nothing tells of (`refused`); after refusals it is tried now and then whether there
    is more again, by steps that double. Every method gives the keys that had to go. `clock`: seconds that never
    run backwards; `say`: for a line when there is less than was set, and each time that this has halved."""

    def __init__(self, index: Index, clock: Callable[[], float], say: Callable[[str], None]) -> None:
        self.wanted = index.capacity
        self._index, self._clock, self._say = index, clock, say
        self._there = self._ceiling = self._told = self.wanted
        self._most, self._told_files = sys.maxsize, False
        self._step = 0
        self._next_step = self._next_look = self._next_cut = clock()

    def seen(self, room: Room, held: int, values: int) -> list[bytes]:
        """The backend was looked at while it held `held` bytes of ours, in `values` values."""
        self._there, self._most = there(room, held, values)
        return self._apply(at_once=False)

    def refused(self, room: Room | None, held: int, values: int, size: int) -> list[bytes]:
        """A value of `size` bytes found no room. `room`: as seen behind that, if it could be, with `held` bytes in
        `values` values of ours."""
        used = self._index.used
        if room is not None:
            self._there, self._most = there(room, held, values)
        if room is None or (self._there > used and self._most > len(self._index)):  # it does not say why
            self._step = max(size, used // SHARE)
            self._ceiling = max(size, min(self._index.capacity, used) - self._step)
            self._next_step = self._clock() + PATIENCE_SECONDS
        return self._apply(at_once=True)

    def grow(self) -> list[bytes]:
        """Allow more where enough time has gone by without a refusal. Call it now and then."""
        if self._ceiling >= self.wanted or self._clock() < self._next_step:
            return []
        self._ceiling += self._step
        self._step *= 2
        self._next_step = self._clock() + PATIENCE_SECONDS
        return self._apply(at_once=False)

    def look(self) -> bool:
        """Whether it is time to look at the backend again; then that begins."""
        if self._clock() < self._next_look:
            return False
        self._next_look = self._clock() + LOOK_SECONDS
        return True

    def _apply(self, *, at_once: bool) -> list[bytes]:
        """The index takes no more from now on, and evicts what is too much, where that is due: a file system may
        tell only after a while that what was deleted is free."""
        capacity, most = min(self.wanted, self._there, self._ceiling), self._most
        self._tell(capacity, most)
        used, values = self._index.used, len(self._index)
        if not at_once and (capacity < used or most < values):
            if self._clock() < self._next_cut:
                capacity, most = max(capacity, used), max(most, values)
            else:
                self._next_cut = self._clock() + LOOK_SECONDS
        return self._index.resize(capacity, most)

    def _tell(self, capacity: int, most: int) -> None:
        rest = "what was not used for long goes, and it grows again when there is more"
        if capacity < self._told:
            self._told = capacity // 2
            self._say(f"room for {capacity >> 20} MiB of {self.wanted >> 20} MiB: that is its budget now; {rest}")
        if most <= len(self._index) and not self._told_files:
            self._told_files = True
            self._say(f"room for no more than {max(0, most)} files: {rest}")


def there(room: Room, held: int, values: int) -> tuple[int, int]:
    """Bytes and values that may be held where so many are: all but a twentieth of the bytes, at most 1 GiB, and of
    the files, at most 1000."""
    size = held + room.free - min(room.total // 20, MOST_RESERVE)
    if room.files is None:
        return max(0, size), sys.maxsize
    return max(0, size), max(0, values + room.files - max(1, min(room.all_files // 20, MOST_FILES)))
