"""Pure decisions: which key goes next, and which is worth keeping.

A policy holds keys and an order, nothing else: no values, clocks, logs or metrics.
`make_policy` and `make_admission` build one by its registered name.
"""

from collections.abc import Callable
from typing import Any

from ragkv.policies.adaptive import Adaptive
from ragkv.policies.admission import AdmissionPolicy, Always, Costly, Frequency, SecondSight
from ragkv.policies.arc import ARC
from ragkv.policies.contract import EvictionPolicy
from ragkv.policies.fifo import FIFO
from ragkv.policies.gdsf import GDSF
from ragkv.policies.lfu import LFU
from ragkv.policies.lru import LRU
from ragkv.policies.priority import Prioritized
from ragkv.policies.s3fifo import S3FIFO
from ragkv.policies.tinylfu import WTinyLFU

POLICIES: dict[str, Callable[[], EvictionPolicy[Any]]] = {
    "adaptive": Adaptive,
    "arc": ARC,
    "fifo": FIFO,
    "gdsf": GDSF,
    "lfu": LFU,
    "lru": LRU,
    "s3fifo": S3FIFO,
    "wtinylfu": WTinyLFU,
}

ADMISSIONS: dict[str, Callable[[], AdmissionPolicy]] = {
    "always": Always,
    "cost": Costly,
    "frequency": Frequency,
    "second-sight": SecondSight,
}


def make_policy(name: str) -> EvictionPolicy[Any]:
    """A new, empty policy; ValueError names the registered ones when `name` is not among them."""
    if name not in POLICIES:
        raise ValueError(f"policy: {name!r} is not one of {', '.join(sorted(POLICIES))}")
    return POLICIES[name]()


def make_admission(name: str) -> AdmissionPolicy:
    """A new admission policy; ValueError names the registered ones when `name` is not among them."""
    if name not in ADMISSIONS:
        raise ValueError(f"admission: {name!r} is not one of {', '.join(sorted(ADMISSIONS))}")
    return ADMISSIONS[name]()


__all__ = [
    "ADMISSIONS",
    "ARC",
    "FIFO",
    "GDSF",
    "LFU",
    "LRU",
    "POLICIES",
    "S3FIFO",
    "Adaptive",
    "AdmissionPolicy",
    "Always",
    "Costly",
    "EvictionPolicy",
    "Frequency",
    "Prioritized",
    "SecondSight",
    "WTinyLFU",
    "make_admission",
    "make_policy",
]
