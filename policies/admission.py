"""The admission contract: whether a key that is not kept yet is worth its place. Apart from eviction.

Ask about every key that could be kept, also behind one of the same chain that was declined and so cannot be: to
be asked is to be seen. Else a chain would be seen one key deeper each time.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable

from ragkv.policies.ghosts import Ghosts, mark
from ragkv.policies.sketch import FrequencySketch


class AdmissionPolicy(ABC):
    """Bounded memory, constant time a call, no clock; the same answers in every process. Weight and cost as in
    `EvictionPolicy`. Keys are bytes, str, int, or objects with such an attribute `key` (see `ghosts.mark`)."""

    @abstractmethod
    def admit(self, key: Hashable, weight: int = 1, cost: float = 1.0) -> bool:
        """Whether to keep `key` now."""


class Always(AdmissionPolicy):
    """Everything is worth keeping."""

    def admit(self, key: Hashable, weight: int = 1, cost: float = 1.0) -> bool:
        return True


class SecondSight(AdmissionPolicy):
    """Worth keeping is what was asked about before, and among the last `remembered` keys that were new then.

    For tiers that wear: most content is seen once only (Maggs, Sitaraman: "Algorithmic Nuggets in Content
    Delivery", CCR 2015, section 4, "cache on second hit").
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
    """Worth keeping is what was asked about `least` times of late (1 to 15), this time included.

    Of late: counts are halved after every `remembered` questions or so (TinyLFU; see `FrequencySketch`). It takes
    8 bytes for each, and one in thirty new keys, or fewer, for one that was seen.
    """

    def __init__(self, remembered: int = 1 << 16, least: int = 2) -> None:
        self._sketch = FrequencySketch(2 * positive("remembered", remembered), sample=0.5)
        if not 1 <= least <= FrequencySketch.MOST:
            raise ValueError(f"least = {least!r}; allowed: 1 to {FrequencySketch.MOST}")
        self._least = least

    def admit(self, key: Hashable, weight: int = 1, cost: float = 1.0) -> bool:
        return self._sketch.add(mark(key)) >= self._least


class Costly(AdmissionPolicy):
    """Worth keeping is what costs enough to make anew for the place it takes: cost per weight at or above a
    threshold, the running quantile of all questions, so that about the cheapest `share` of them is declined.

    The threshold rises by `STEP * share` of itself with each question above it and falls by `STEP * (1 - share)`
    with each below (stochastic approximation of a quantile: Robbins, Monro 1951; Tierney 1983). Where all cost
    the same for their weight, all are kept.
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
    """`value`, where it is at least 1, else ValueError."""
    if value < 1:
        raise ValueError(f"{name} = {value!r}; allowed: 1 or more")
    return value
