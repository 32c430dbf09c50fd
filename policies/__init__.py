"""Pure decisions: which key goes next, and which is worth keeping.

A policy holds keys and an order, nothing else: no values, clocks, logs or metrics.
`make_policy` and `make_admission` build one by its name. Installed packages may bring eviction policies of their
own, by an entry point of the group `ragkv.policies`: a name, and what makes an empty `EvictionPolicy` when called
without arguments.
"""

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ragkv.policies.adaptive import Adaptive
from ragkv.policies.admission import AdmissionPolicy, Always, Costly, Frequency, SecondSight
from ragkv.policies.arc import ARC
from ragkv.policies.contract import EvictionPolicy
from ragkv.policies.lfu import LFU
from ragkv.policies.lru import LRU
from ragkv.policies.priority import Prioritized

GROUP = "ragkv.policies"  # of entry points
POLICIES: dict[str, Callable[[], EvictionPolicy[Any]]] = {
    "adaptive": Adaptive,
    "arc": ARC,
    "lfu": LFU,
    "lru": LRU,
}

ADMISSIONS: dict[str, Callable[[], AdmissionPolicy]] = {
    "always": Always,
    "cost": Costly,
    "frequency": Frequency,
    "second-sight": SecondSight,
}


def make_policy(name: str) -> EvictionPolicy[Any]:
    """A new, empty policy. ValueError: no policy has that name (it names those there are), or what an installed
    package has under it is none. Whatever else goes wrong in that package is raised as it is."""
    if name in POLICIES:
        return POLICIES[name]()
    if name not in (others := installed()):
        raise ValueError(f"policy: {name!r} is not one of {', '.join(policy_names())}")
    made = others[name].load()()
    if not isinstance(made, EvictionPolicy):
        raise ValueError(
            f"policy: {name!r} ({others[name].value}) makes a {type(made).__name__}, no EvictionPolicy"
        )
    return made


def installed() -> dict[str, EntryPoint]:
    """Policies of other packages, by name; ours go before theirs."""
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in POLICIES}


def policy_names() -> list[str]:
    """Names that `make_policy` knows."""
    return sorted({*POLICIES, *installed()})


def make_admission(name: str) -> AdmissionPolicy:
    """A new admission policy; ValueError names the registered ones when `name` is not among them."""
    if name not in ADMISSIONS:
        raise ValueError(f"admission: {name!r} is not one of {', '.join(sorted(ADMISSIONS))}")
    return ADMISSIONS[name]()


__all__ = [
    "ADMISSIONS",
    "ARC",
    "LFU",
    "LRU",
    "POLICIES",
    "Adaptive",
    "AdmissionPolicy",
    "Always",
    "Costly",
    "EvictionPolicy",
    "Frequency",
    "Prioritized",
    "SecondSight",
    "make_admission",
    "make_policy",
    "policy_names",
]
