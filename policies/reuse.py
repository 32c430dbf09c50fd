"""What keeping a key is worth at each age, learned from how soon such keys were used again.

A `ReuseTable` counts, for one group of keys, the uses that began a wait for the next one, and the ages at which
the next one came. From that it computes for each age the Gittins index (Gittins, "Bandit Processes and Dynamic
Allocation Indices", 1979; for caches: hit density, Beckmann, Chen, Cidon, "LHD: Improving Cache Hit Rate by
Maximizing Hit Density", NSDI 2018): the most hits per time kept that any plan "keep it until then" can expect.
So a group that returns after a pause is worth more shortly before it, and a loop more the older it is.
Ages count references, in buckets of a quarter of an octave.
"""

from collections.abc import Iterable
from itertools import pairwise
from math import inf

MOST_SCALED = 4.0  # what was counted at an age stands for so many times more at most
FINE = 16  # ages below have a bucket each
BUCKETS = FINE + 4 * 18
_EDGES = [*range(FINE), *((4 + quarter) << octave + 2 for octave in range(18) for quarter in range(4)), 1 << 22]
_WIDTHS = [above - edge for edge, above in pairwise(_EDGES)]


def bucket(age: int) -> int:
    """The bucket of an age of 0 or more references."""
    if age < FINE:
        return age
    octave = age.bit_length() - 1
    at = (octave << 2) + (age >> octave - 2 & 3)
    return at if at < BUCKETS else BUCKETS - 1


class ReuseTable:
    """One group of keys. Where it has seen little, it leans on its `prior`, as if that had told of `LEAN` keys.

    A caller counts: `waits` up by one for each key that waits for its next use from now on, and
    `reused[bucket(age)]` up by one when one of them is used again.
    """

    LEAN = 20.0
    __slots__ = ("index", "prior", "reused", "waits")

    def __init__(self, prior: "ReuseTable | None" = None) -> None:
        self.prior = prior
        self.waits = 0.0
        self.reused = [0.0] * BUCKETS
        self.index = [0.0] * BUCKETS  # by bucket: hits per reference of time kept
        self.rebuild()

    def fade(self, factor: float) -> None:
        """Let what was counted count less."""
        self.waits *= factor
        self.reused = [count * factor for count in self.reused]

    def add_up(self, tables: "Iterable[ReuseTable]") -> None:
        """Take the counts of other tables together."""
        parts = list(tables)
        self.waits = sum(part.waits for part in parts)
        self.reused = [sum(counts) for counts in zip(*(part.reused for part in parts), strict=True)] or self.reused

    def rebuild(self, span: float = inf) -> None:
        """Compute `index` from the counts: slopes of the upper hull of hits over time kept, from each age on.
        `span`: for how many references there has been counting."""
        time, hits = self.expect(span)
        hull = [BUCKETS]
        for at in range(BUCKETS - 1, -1, -1):
            time_at, hits_at = time[at], hits[at]
            while len(hull) > 1:
                near, far = hull[-1], hull[-2]
                rise = (hits[near] - hits_at) * (time[far] - time[near])
                if rise > (hits[far] - hits[near]) * (time[near] - time_at):
                    break
                hull.pop()
            near = hull[-1]
            kept = time[near] - time_at
            self.index[at] = (hits[near] - hits_at) / kept if kept > 0 else 0.0
            hull.append(at)

    def expect(self, span: float) -> tuple[list[float], list[float]]:
        """Expected time kept and hits, summed up to the beginning of each bucket, of all waiting keys together.
        Of keys that came within the last `age` references none can have been used again at that age yet, so what
        was counted there stands for more."""
        alive, reused = max(self.waits, 0.0), self.reused
        prior = self.prior
        if prior is not None and prior.waits > 0:
            share = self.LEAN / prior.waits
            alive += self.LEAN
            reused = [own + share * other for own, other in zip(reused, prior.reused, strict=True)]
        time, hits = [0.0], [0.0]
        for age, width, count in zip(_EDGES, _WIDTHS, reused, strict=False):
            if count:
                seen = max(1 - age / span, 1 / MOST_SCALED)
                count = min(count / seen, max(alive, 0.0))
            time.append(time[-1] + (alive - count / 2) * width)
            hits.append(hits[-1] + count)
            alive -= count
        return time, hits
