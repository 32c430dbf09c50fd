"""Do two sets of times differ by more than the noise?

The difference is that of the medians of logarithms: where both sets are of the same requests, the median of each
request's own difference. Its interval comes from drawing again, with replacement (bootstrap): whole rounds where
there are at least `MIN_BLOCKS`, since a machine's speed drifts from round to round, else requests; few of them
make it wider, as Student's distribution does. What a machine does to the whole of a run no run can know.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ragkv.benchmarks.serve_report import Key

CONFIDENCE = 0.99
DRAWS = 2000
MIN_BLOCKS = 5
Blocks = list[list[float]]


@dataclass(frozen=True)
class Interval:
    """Of the logarithm of new over old."""

    low: float
    middle: float
    high: float


def interval(old: Mapping[Key, float], new: Mapping[Key, float], paired: bool) -> Interval | None:
    """New against old, both logarithms, by request; None where there are fewer than `MIN_BLOCKS` of either.

    `paired`: the requests that both have are compared each with itself.
    """
    if paired:
        sides = [_blocks({key: new[key] - old[key] for key in new if key in old})]
    else:
        sides = [_blocks(old), _blocks(new)]
    fewest = min(map(len, sides))
    if fewest < MIN_BLOCKS:
        return None
    random = np.random.default_rng(0)
    draws = [_draw(blocks, random) for blocks in sides]
    middles = [float(np.median([value for block in blocks for value in block])) for blocks in sides]
    drawn, middle = (draws[0], middles[0]) if paired else (draws[1] - draws[0], middles[1] - middles[0])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, (tail, 1 - tail))
    wider = widening(fewest)
    below, above = max(0.0, middle - float(low)), max(0.0, float(high) - middle)
    return Interval(middle - wider * below, middle, middle + wider * above)


def _blocks(values: Mapping[Key, float]) -> Blocks:
    """What is drawn as a whole: rounds if there are enough of them, else requests."""
    rounds: defaultdict[int, list[float]] = defaultdict(list)
    for (number, _, _), value in values.items():
        rounds[number].append(value)
    return list(rounds.values()) if len(rounds) >= MIN_BLOCKS else [[value] for value in values.values()]


def _draw(blocks: Blocks, random: np.random.Generator) -> NDArray[np.float64]:
    """Medians of `DRAWS` samples of the blocks, each with replacement."""
    longest = max(map(len, blocks))
    padded = np.array([block + [math.nan] * (longest - len(block)) for block in blocks])
    picked = random.integers(0, len(blocks), (DRAWS, len(blocks)))
    median = np.nanmedian if np.isnan(padded).any() else np.median  # the one is several times slower
    medians: NDArray[np.float64] = median(padded[picked].reshape(DRAWS, -1), axis=1)
    return medians


def widening(count: int) -> float:
    """How much wider than the bootstrap's the interval of a few values is: Student's quantile over the normal
    one (Cornish and Fisher's series, within 2% here), and the bootstrap's n for n - 1."""
    z, n = NormalDist().inv_cdf((1 + CONFIDENCE) / 2), count - 1
    student = z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
    student += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    return student / z * math.sqrt(count / n)
