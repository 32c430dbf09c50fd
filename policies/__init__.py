"""Pure decisions: which key goes next.

A policy holds keys and an order, nothing else: no values, clocks, logs or metrics.
`make_policy` builds one by its registered name.
"""

from collections.abc import Callable
from typing import Any

from ragkv.policies.contract import EvictionPolicy
from ragkv.policies.lfu import LFU
from ragkv.policies.lru import LRU

POLICIES: dict[str, Callable[[], EvictionPolicy[Any]]] = {"lru": LRU, "lfu": LFU}


def make_policy(name: str) -> EvictionPolicy[Any]:
    """A new, empty policy; ValueError names the registered ones when `name` is not among them."""
    try:
        return POLICIES[name]()
    except KeyError:
        raise ValueError(f"policy: {name!r} is not one of {', '.join(sorted(POLICIES))}") from None


__all__ = ["LFU", "LRU", "POLICIES", "EvictionPolicy", "make_policy"]
