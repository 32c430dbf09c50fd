"""What is remembered of keys that are gone: a 64-bit mark each, a bounded number of them."""

from collections import OrderedDict
from collections.abc import Hashable
from hashlib import blake2b

MASK = (1 << 64) - 1


def mark(key: Hashable) -> int:
    """64 uniform bits that stand for `key`, the same in every process.

    A key is bytes, str or int, or has such a key in its attribute `key` (a chunk, compared by identity: made
    anew, it bears the same mark). TypeError: anything else.
    """
    if isinstance(key, int):  # splitmix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators")
        bits = (key + 0x9E3779B97F4A7C15) & MASK
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
        return bits ^ (bits >> 31)
    if isinstance(key, bytes):
        return int.from_bytes(blake2b(key, digest_size=8).digest(), "little")
    if isinstance(key, str):
        return int.from_bytes(blake2b(key.encode(), digest_size=8, person=b"str").digest(), "little")
    named = getattr(key, "key", None)
    if not isinstance(named, int | bytes | str):
        raise TypeError(f"key {key!r}; allowed: bytes, str, int, or an object with such an attribute `key`")
    return mark(named)


class Ghosts:
    """Marks of evicted keys in the order of their going, each with its weight."""

    __slots__ = ("_marks", "weight")

    def __init__(self) -> None:
        self._marks: OrderedDict[int, int] = OrderedDict()
        self.weight = 0

    def __len__(self) -> int:
        return len(self._marks)

    def __contains__(self, bits: int) -> bool:
        return bits in self._marks

    def add(self, bits: int, weight: int) -> None:
        """Remember a mark, as the youngest."""
        self.discard(bits)
        self._marks[bits] = weight
        self.weight += weight

    def discard(self, bits: int) -> bool:
        """Forget a mark; whether it was known."""
        weight = self._marks.pop(bits, 0)
        self.weight -= weight
        return weight > 0

    def trim(self, weight: int, count: int) -> None:
        """Forget the oldest until the rest weigh at most `weight` and are at most `count`."""
        while self._marks and (self.weight > weight or len(self._marks) > count):
            self.weight -= self._marks.popitem(last=False)[1]
