"""The admission contract: whether a key that is not stored yet is worth storing. Independent of eviction.

Ask about every key that could be stored, also about the descendants of a declined key, which cannot be stored:
each question counts as a use. Otherwise a chain would be seen only one key deeper each time.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable

from ragkv.policies.ghosts import Ghosts, mark
from ragkv.policies.sketch import FrequencySketch


class AdmissionPolicy(ABC):
    """Whether keys are worth storing. Needs bounded memory, constant time for a call, and no clock; the same calls
    give the same results in every process. Weight, cost and keys are as in `EvictionPolicy`.
    `ragkv.testing.admission` tests this contract."""

    @abstractmethod
    def admit(self, key: Hashable, weight: int = 1, cost: float = 1.0) -> bool:
        """Whether to store `key` now."""


class Always(AdmissionPolicy):
    """Admits every key."""

    def admit(self, key: Hashable, weight: int = 1, cost: float = 1.0) -> bool:
        return True


class SecondSight(AdmissionPolicy):
    """Admits a key that was asked about before, if it is among the last `remembered` keys that were new then.

    For tiers that wear: most content is requested only once (Maggs, Sitaraman: "Algorithmic Nuggets in Content
    Delivery", CCR 2015, section 4, "cache on second hit"). ValueError: `remembered` below 1.
    """

    def __init__(self, remembered: int = 1 << 17) -> None:
        self._remembered = positive("remembered", remembered)
        self._seen = Ghosts()

    def admit(self, key: Hashable, weight: int = 1, cost: float = 1.0) -> bool:
        bits = mark(key)
        again = bits in self._seen
        self._seen.add(bits, 1)
        self._seen.trim(self._remembered, self._remembered)
        return again


class Frequency(AdmissionPolicy):
    """Admits a key that was recently asked about `least` times (1 to 15), this time included.

    Counts are halved after about every `remembered` questions (TinyLFU; see `FrequencySketch`). Memory: 8 bytes
    for each of `remembered`. At most one in thirty new keys is mistaken for one seen before. ValueError:
    `remembered` below 1, or `least` outside of its range.
    """

    def __init__(self, remembered: int = 1 << 16, least: int = 2) -> None:
        self._sketch = FrequencySketch(2 * positive("remembered", remembered), sample=0.5)
        if not 1 <= least <= FrequencySketch.MOST:
            raise ValueError(f"least = {least!r}; allowed: 1 to {FrequencySketch.MOST}")
        self._least = least

    def admit(self, key: Hashable, weight: int = 1, cost: float = 1.0) -> bool:
        return self._sketch.add(mark(key)) >= self._least


class Costly(AdmissionPolicy):
    """Admits a key whose cost per weight is at or above a threshold: the running quantile of all questions, so
    that about the cheapest `share` of them (above 0, below 1) is declined.

    The threshold rises by `STEP * share` of itself with each question above it and falls by `STEP * (1 - share)`
    with each below (stochastic approximation of a quantile: Robbins, Monro 1951; Tierney 1983). If all keys have
    the same cost per weight, all are admitted. ValueError: `share` outside of its range.
    """

    STEP = 0.05

    def __init__(self, share: float = 0.25) -> None:
        if not 0 < share < 1:
            raise ValueError(f"share = {share!r}; allowed: above 0 and below 1")
        self._share = share
        self._threshold = 0.0

    def admit(self, key: Hashable, weight: int = 1, cost: float = 1.0) -> bool:
        density = cost / weight
        threshold = self._threshold or density
        if density > threshold:
            self._threshold = min(density, threshold * (1 + self.STEP * self._share))
        else:
            self._threshold = max(density, threshold * (1 - self.STEP * (1 - self._share)))
        return density >= threshold


def positive(name: str, value: int) -> int:
    """`value` if it is at least 1, otherwise ValueError."""
    if value < 1:
        raise ValueError(f"{name} = {value!r}; allowed: 1 or more")
    return value
