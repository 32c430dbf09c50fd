"""The admission contract: whether a key that is not kept yet is worth its place. Apart from eviction.

`AdmissionPolicy.admit` is asked once for every chance to keep a key; to have asked counts as having seen it.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable


class AdmissionPolicy(ABC):
    """Bounded memory, constant time a call, no clock. Weight and cost as in `EvictionPolicy`."""

    @abstractmethod
    def admit(self, key: Hashable, weight: int = 1, cost: float = 1.0) -> bool:
        """Whether to keep `key` now."""


class Always(AdmissionPolicy):
    """Everything is worth keeping."""

    def admit(self, key: Hashable, weight: int = 1, cost: float = 1.0) -> bool:
        return True
