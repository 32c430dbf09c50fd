"""Replay of a trace through tiers, one below the other, each with its own policy.

As production does it: a request is served from the first tier alone. A block that only a lower tier holds is
copied up (and stays below, as just used); what the first tier evicts is written to the next one, unless that
holds it or its admission declines, and so on down. Below the first tier, a parent counts where the tier holds it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ragkv.benchmarks.replay import STEP, Policy
from ragkv.benchmarks.traces import Blocks
from ragkv.policies.admission import AdmissionPolicy


class Tier:
    """Room for `capacity` in units of the trace's weights. `admission` is asked for each block not held yet."""

    def __init__(self, name: str, policy: Policy, capacity: int, admission: AdmissionPolicy | None = None) -> None:
        self.name, self.policy = name, policy
        self._free = capacity
        self._admission = admission

    def put(self, key: int, parent: int | None, weights: Sequence[int]) -> list[int] | None:
        """Take a block in; what had to go for it, or None where it was declined or finds no room."""
        weight, policy = weights[key], self.policy
        if self._admission is not None and not self._admission.admit(key, weight, weight):
            return None
        above = parent if parent in policy else None
        if above is not None:
            policy.pin(above)
        victims = policy.evict(weight - self._free)
        if victims is not None:
            self._free += sum(weights[victim] for victim in victims) - weight
            policy.insert(key, above, weight, weight)
        if above is not None:
            policy.unpin(above)
        return victims


@dataclass(frozen=True)
class Stacked:
    """Hits by tier, block references, and the seconds that the replay took."""

    hits: Sequence[int]
    references: int
    seconds: float


class Stack:
    """Tiers, first to last, that serve the requests of one trace."""

    def __init__(self, blocks: Blocks, tiers: Sequence[Tier]) -> None:
        self._tiers, self._weights, self._chained = tiers, blocks.weights, blocks.chained
        self._parents: dict[int, int] = {}
        for request in blocks.requests if blocks.chained else ():
            self._parents.update((key, parent) for parent, key in pairwise(request))

    def serve(self, request: Sequence[int]) -> list[int]:
        """Serve and store one request; the numbers of the tiers where its hits were."""
        first = self._tiers[0].policy
        found: list[int] = []
        held: int | None = None
        matching = True
        for key in request:
            holders = [n for n, tier in enumerate(self._tiers) if key in tier.policy] if matching else []
            for number in holders:
                self._tiers[number].policy.touch(key)
            if not holders and self._chained:
                matching = False
            if key not in first and not self._fetch(key):
                if self._chained:
                    break
                continue
            found += holders[:1]
            if self._chained:
                first.pin(key)
                if held is not None:
                    first.unpin(held)
                held = key
        if held is not None:
            first.unpin(held)
        return found

    def _fetch(self, key: int) -> bool:
        """Take a block into the first tier; whether there was room. Victims go down."""
        going = [key]
        for number, tier in enumerate(self._tiers):
            fallen: list[int] = []
            for each in going:
                if each not in tier.policy:
                    victims = tier.put(each, self._parents.get(each), self._weights)
                    if victims is None and not number:
                        return False
                    fallen += victims or ()
            going = fallen
        return True


def replay_tiers(
    blocks: Blocks, tiers: Sequence[Tier], progress: Callable[[int], object] | None = None
) -> Stacked:
    """Replay a trace through empty tiers, first to last. `progress` as in `ragkv.benchmarks.replay.replay`."""
    stack = Stack(blocks, tiers)
    hits = [0] * len(tiers)
    start = time.perf_counter()
    for first in range(0, len(blocks.requests), STEP):
        requests = blocks.requests[first : first + STEP]
        for request in requests:
            for tier in stack.serve(request):
                hits[tier] += 1
        if progress is not None:
            progress(len(requests))
    return Stacked(hits, blocks.references, time.perf_counter() - start)
