"""Eviction policies that `ragkv simulate` compares beside those that an engine offers."""

from collections.abc import Callable
from typing import Any

from ragkv.benchmarks.compared.fifo import FIFO
from ragkv.benchmarks.compared.gdsf import GDSF
from ragkv.benchmarks.compared.s3fifo import S3FIFO
from ragkv.benchmarks.compared.tinylfu import WTinyLFU
from ragkv.policies import POLICIES, EvictionPolicy, make_policy

ONLY_HERE: dict[str, Callable[[], EvictionPolicy[Any]]] = {
    "fifo": FIFO,
    "gdsf": GDSF,
    "s3fifo": S3FIFO,
    "wtinylfu": WTinyLFU,
}
COMPARED = ONLY_HERE | POLICIES


def make_compared(name: str) -> EvictionPolicy[Any]:
    """A new, empty policy. ValueError: no policy of that name."""
    return ONLY_HERE[name]() if name in ONLY_HERE else make_policy(name)


__all__ = ["COMPARED", "FIFO", "GDSF", "ONLY_HERE", "S3FIFO", "WTinyLFU", "make_compared"]
