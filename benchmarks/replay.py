"""Replay of a trace through the classes that decide in production: eviction and admission policies.

A request is served as `ragkv.kvstore.memory_tier` does it. Prefix semantics: its longest cached prefix hits,
and is touched from the root on; then the missing blocks are inserted in order, each with its parent pinned while
room is made; where admission declines one, or no room can be made, the rest of the request is not stored. Content
semantics: each block stands alone, hits wherever it stands, and is inserted or not for itself.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ragkv.benchmarks.compared import make_compared
from ragkv.benchmarks.traces import Blocks, Trace, as_blocks
from ragkv.policies import EvictionPolicy
from ragkv.policies.admission import AdmissionPolicy

Policy = EvictionPolicy[int]
STEP = 256  # requests between two calls of `progress`


@dataclass(frozen=True)
class Replayed:
    """Counts of block references, and the seconds that the replay took."""

    hits: int
    references: int
    seconds: float

    @property
    def hit_rate(self) -> float:
        """Between 0 and 1."""
        return self.hits / self.references


def replay(
    trace: Trace | Blocks,
    policy: str | Policy,
    capacity: int,
    admission: AdmissionPolicy | None = None,
    semantics: str = "prefix",
    progress: Callable[[int], object] | None = None,
) -> Replayed:
    """Replay a trace through an empty policy, or a new one by its name.

    `capacity`: in units of the trace's weights. `semantics`: as in `as_blocks`; `Blocks` have theirs already.
    `progress` is called now and then with the number of requests done since. A block's cost is its weight.
    """
    blocks = as_blocks(trace, semantics) if isinstance(trace, Trace) else trace
    made = make_compared(policy) if isinstance(policy, str) else policy
    serve = _prefix if blocks.chained else _content
    hits = 0
    start = time.perf_counter()
    for requests, found in serve(blocks, made, capacity, admission):
        hits += found
        if progress is not None:
            progress(requests)
    return Replayed(hits, blocks.references, time.perf_counter() - start)


def _prefix(
    blocks: Blocks, policy: Policy, capacity: int, admission: AdmissionPolicy | None
) -> Iterator[tuple[int, int]]:
    """Numbers of requests and of their hits, every `STEP` requests."""
    weights, cached, free = blocks.weights, bytearray(len(blocks.weights)), capacity
    insert, touch, pin, unpin, evict = policy.insert, policy.touch, policy.pin, policy.unpin, policy.evict
    admit = admission.admit if admission is not None else None
    for start in range(0, len(blocks.requests), STEP):
        hits, requests = 0, blocks.requests[start : start + STEP]
        for request in requests:
            parent = held = None
            for place, key in enumerate(request):
                if cached[key]:  # a cached block's parents are, too
                    touch(key)
                    hits += 1
                    parent = key
                    continue
                weight = weights[key]
                if admit is not None and not admit(key, weight, weight):
                    for later in request[place + 1 :]:  # to be asked is to be seen
                        admit(later, weights[later], weights[later])
                    break
                if parent is not None:
                    pin(parent)
                    if held is not None:
                        unpin(held)
                    held = parent
                if weight > free:
                    victims = evict(weight - free)
                    if victims is None:
                        break
                    for victim in victims:
                        cached[victim] = 0
                        free += weights[victim]
                insert(key, parent, weight, weight)
                cached[key] = 1
                free -= weight
                parent = key
            if held is not None:
                unpin(held)
        yield len(requests), hits


def _content(
    blocks: Blocks, policy: Policy, capacity: int, admission: AdmissionPolicy | None
) -> Iterator[tuple[int, int]]:
    """Numbers of requests and of their hits, every `STEP` requests."""
    weights, cached, free = blocks.weights, bytearray(len(blocks.weights)), capacity
    insert, touch, evict = policy.insert, policy.touch, policy.evict
    admit = admission.admit if admission is not None else None
    for start in range(0, len(blocks.requests), STEP):
        hits, requests = 0, blocks.requests[start : start + STEP]
        for request in requests:
            for key in request:
                if cached[key]:
                    touch(key)
                    hits += 1
                    continue
                weight = weights[key]
                if admit is not None and not admit(key, weight, weight):
                    continue
                if weight > free:
                    victims = evict(weight - free)
                    if victims is None:
                        continue
                    for victim in victims:
                        cached[victim] = 0
                        free += weights[victim]
                insert(key, None, weight, weight)
                cached[key] = 1
                free -= weight
        yield len(requests), hits
