"""What no policy can beat: the most hits that a cache of a given capacity can have when the future is known.

Equal weights: Belady's MIN with bypass ("A study of replacement algorithms for a virtual-storage computer", IBM
Systems Journal 1966), seen as intervals: a hit is an interval from one reference of a block to its next during
which the block is kept, at most `capacity` intervals may overlap, and dropping the one that ends last keeps the
most. That is the optimum under content semantics. Under prefix semantics it is the optimum, too: a prefix hit is
also a content hit, so it cannot be less than what is possible; and each use of a block follows a use of its
parent, so MIN drops a block before its parent and every hit that it counts lies behind hits.

Unequal weights: finding the optimum is NP-hard, so this is an upper bound that need not be reachable, the lower
of two. One keeps to the capacity on average over the trace only: the cheapest intervals (weight times length) that
fit into capacity times length of the trace (PFOO-L of Berger, Beckmann, Harchol-Balter, "Practical Bounds on
Optimal Caching with Variable Object Sizes", SIGMETRICS 2018). The other: as if all blocks weighed as the lightest.
"""

from heapq import heappush, heapreplace
from itertools import accumulate, chain

from ragkv.benchmarks.traces import Blocks

NEVER = -1


def most_hits(blocks: Blocks, capacity: int) -> int:
    """Block references that could hit: the optimum, or a bound above it (see the module). Linear memory."""
    references = list(chain.from_iterable(blocks.requests))
    ends = _next_uses(references, len(blocks.weights))
    lightest = min(blocks.weights)
    hits = _most_intervals(ends, capacity // lightest)
    if max(blocks.weights) == lightest:
        return hits
    costs = (
        blocks.weights[block] * (end - start)
        for start, (block, end) in enumerate(zip(references, ends, strict=True))
        if end != NEVER and blocks.weights[block] <= capacity
    )
    room = capacity * (len(references) - 1)
    return min(hits, sum(total <= room for total in accumulate(sorted(costs))))


def _next_uses(references: list[int], blocks: int) -> list[int]:
    """For each reference the place of the next one of the same block, or NEVER."""
    seen = [NEVER] * blocks
    ends = [NEVER] * len(references)
    for place in range(len(references) - 1, -1, -1):
        block = references[place]
        ends[place], seen[block] = seen[block], place
    return ends


def _most_intervals(ends: list[int], room: int) -> int:
    """The most intervals (start: the index, end: the value) of which at most `room` overlap."""
    if room < 1:
        return 0
    kept = bytearray(len(ends))
    by_end: list[int] = []  # negative ends, last first; those that are over lie below all others
    hits = overlapping = 0
    for place, end in enumerate(ends):
        if kept[place]:
            hits += 1
            overlapping -= 1
        if end == NEVER:
            continue
        if overlapping < room:
            overlapping += 1
            heappush(by_end, -end)
        elif end < -by_end[0]:
            kept[-heapreplace(by_end, -end)] = 0
        else:
            continue
        kept[end] = 1
    return hits
