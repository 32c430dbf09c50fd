"""The load gate: is it quicker to load some tokens than to compute them? From what both took lately, as measured.

A load is declined only where it is known to be slow: the last loads of about that size all took longer than
prefill takes. What was never measured is taken to be quick. Whatever is declined is tried again now and then, so
that a tier that recovers is noticed.

What is taken for granted of a cost: it grows with the amount, at most in proportion (there is a fixed part).
Nothing else is: observations are kept by ranges of the amount, each a factor of two wide, and say what they can of
amounts elsewhere. One second for one token says of 3,000 tokens that they take a second at least, and no more.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median_low

from ragkv.kvstore import metrics as m
from ragkv.kvstore.metrics import Metrics

BELIEF = 3  # observations of like amounts, all of them slow, before anything is believed to be slow
LATEST = 5  # observations of a range that are kept
NEAR = 3  # ranges: what larger amounts took is believed of amounts 8 times smaller, and no further
PROBE = 16  # of so many loads that do not pay one is made, those included from which that was learned
FIRST = BELIEF * (PROBE - 1)  # declined before the first that is tried
LEAST_TOKENS = 32  # a hit of fewer is not worth a load: it costs a step of the engine, whatever it saves


@dataclass(frozen=True, slots=True)
class Observation:
    """So much took so many seconds; `number`: in the order in which they came."""

    amount: float
    seconds: float
    number: int

    @property
    def rate(self) -> float:
        """Seconds for one of the amount."""
        return self.seconds / self.amount

    def scaled(self, amount: float) -> float:
        """Seconds for a like amount: half-way between a cost that is all fixed and one that has no fixed part, and
        so off by 1.42 at most within a range."""
        return self.seconds * math.sqrt(amount / self.amount)


class Cost:
    """Seconds over an amount (tokens, bytes, work): at least 0, as measured."""

    def __init__(self) -> None:
        self._ranges: dict[int, deque[Observation]] = {}
        self._seen = 0

    def note(self, amount: float, seconds: float) -> None:
        """One observation. What is not finite or above zero (a clock too coarse, or set back) is passed over."""
        if not (0 < amount < math.inf and 0 < seconds < math.inf):
            return
        self._seen += 1
        kept = self._ranges.setdefault(range_of(amount), deque(maxlen=LATEST))
        kept.append(Observation(amount, seconds, self._seen))

    @property
    def known(self) -> bool:
        """Whether there was any observation."""
        return self._seen > 0

    def believes(self, amount: float) -> bool:
        """Whether there are as many observations of like amounts as it takes."""
        return len(self._ranges.get(range_of(amount), ())) >= BELIEF

    def least(self, amount: float) -> float:
        """Seconds that an amount above zero takes at least, as far as is known: 0 where nothing is.

        The quickest of the last `BELIEF` observations of its range; where there are fewer, what others imply, if
        that is less. So neither a slow first one nor single outliers count."""
        likely = [each.scaled(amount) for each in list(self._ranges.get(range_of(amount), ()))[-BELIEF:]]
        if len(likely) < BELIEF:
            likely.append(self._implied(amount))
        return min(likely)

    def typical(self, amount: float) -> float:
        """Seconds that an amount above zero takes mostly; 0 where nothing is known.

        At the rate of its range, or between those of the next below and above (a line: the fixed part and the
        slope of these two), or in proportion to the only one. What came later in other ranges bounds it: more
        takes no less time, and at most in proportion."""
        if not self._ranges:
            return 0.0
        own = range_of(amount)
        rate, number = self._rate(amount, own)
        seconds = rate * amount
        later = [kept for other, kept in self._ranges.items() if other != own and kept[-1].number > number]
        for kept in sorted(later, key=lambda kept: kept[-1].number):
            their = _median(kept)
            low, high = sorted((their.seconds, their.rate * amount))
            seconds = min(max(seconds, low), high)
        return seconds

    def _rate(self, amount: float, own: int) -> tuple[float, int]:
        """Seconds for one of an amount in the range `own`, and the number of the observation that says so."""
        found = [own] if own in self._ranges else self._beside(own, self._ranges)
        points = [_median(self._ranges[each]) for each in found]
        number = min(self._ranges[each][-1].number for each in found)
        if len(points) == 1:
            return points[0].rate, number
        below, above = points
        line = _between(below, above, amount) / amount
        return min(max(line, above.rate), max(below.rate, above.rate)), number

    def _implied(self, amount: float) -> float:
        """What observations of other ranges imply of an amount at least."""
        own = range_of(amount)
        believed = [each for each, kept in self._ranges.items() if len(kept) >= BELIEF and each <= own + NEAR]
        found = {each: _quickest(self._ranges[each]) for each in self._beside(own, believed)}
        below = next((point for each, point in found.items() if each < own), None)
        above = next((point for each, point in found.items() if each > own), None)
        if below is not None and above is not None:
            return _between(below, above, amount)
        return below.seconds if below is not None else above.rate * amount if above is not None else 0.0

    @staticmethod
    def _beside(own: int, ranges: "dict[int, deque[Observation]] | list[int]") -> list[int]:
        """Of some ranges the next below and the next above one that is not among them."""
        below = sorted(each for each in ranges if each < own)
        return below[-1:] + sorted(each for each in ranges if each > own)[:1]


class Gate:
    """`prefill`: seconds of a step over its work (see `work`); `copy`: memory tier to engine, over tokens; `fuse`:
    fusion, over its work in tokens; `tiers`: lower tier to memory, over bytes. Where a cost is not known yet, the
    load is made.

    `attention_tokens`: at this position a token's attention costs as much as its other work. `say` is told when it
    begins to decline, and when it ends to.
    """

    def __init__(
        self,
        *,
        active: bool = True,
        attention_tokens: float = math.inf,
        metrics: Metrics | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.prefill, self.copy, self.fuse = Cost(), Cost(), Cost()
        self.tiers: dict[str, Cost] = {}
        self._active, self._attention_tokens = active, attention_tokens
        self._metrics, self._say = metrics, say
        self._declined: dict[tuple[str, int], int] = {}  # by name and range of tokens: how many more until a trial

    def tier(self, name: str) -> Cost:
        """The cost of a lower tier."""
        return self.tiers.setdefault(name, Cost())

    def work(self, start: int, tokens: int) -> float:
        """What the tokens from a position on cost to compute, in tokens at the beginning of a prompt."""
        return tokens * (1.0 + (start + tokens / 2) / self._attention_tokens)

    def computing(self, tokens: int, start: int = 0) -> float:
        """Seconds that it takes mostly to compute some tokens, above 0, from a position on."""
        return self.prefill.typical(self.work(start, tokens))

    def loading(self, tokens: int, sizes: dict[str, int] | None = None) -> float:
        """Seconds that it takes at least to load some tokens, above 0. `sizes`: bytes that must first be read from
        lower tiers."""
        below = sum(self.tier(name).least(size) for name, size in (sizes or {}).items() if size)
        return self.copy.least(tokens) + below

    def fusing(self, work: float, moved: int) -> float:
        """Seconds that it takes at least to move so many tokens and mend them. Work is taken to cost what prefill
        does, until some like it was measured."""
        mending = self.fuse.least(work) if work > 0 else 0.0
        if work > 0 and not self.fuse.believes(work):
            mending = max(mending, self.prefill.typical(work))
        return self.copy.least(moved) + mending

    @property
    def judges(self) -> bool:
        """Whether it compares at all: it is active, and knows what prefill costs."""
        return self._active and self.prefill.known

    def small(self, tokens: int) -> bool:
        """Whether a hit is too small to be worth anything."""
        return self._active and tokens < LEAST_TOKENS

    def pays(self, tokens: int, sizes: dict[str, int] | None = None, start: int = 0) -> bool:
        """Whether loading `tokens` tokens, which begin at a position, is not known to take longer than computing
        them. `sizes` as for `loading`."""
        return not self.judges or self.loading(tokens, sizes) <= self.computing(tokens, start)

    def allows(self, tokens: int, tier: str, sizes: dict[str, int] | None = None, start: int = 0) -> bool:
        """Whether to load: it pays, or it is to be tried. `tier` only names the decision."""
        times = (self.loading(tokens, sizes), self.computing(tokens, start)) if self.judges else (0.0, 0.0)
        return not self.declines(tier, tokens, *times, pays=times[0] <= times[1])

    def declines(self, name: str, tokens: int, loading: float, computing: float, *, pays: bool) -> bool:
        """Whether to leave something be: it does not pay, and it is not to be tried. `name`: of the decision;
        `loading`, `computing`: seconds, for people."""
        key, before = (name, range_of(max(tokens, 1))), self._is_declining(name)
        if pays:
            self._declined.pop(key, None)
            left = 0
        else:
            left = self._declined.get(key, FIRST)
            self._declined[key] = left - 1 if left else PROBE - 1
        now = self._is_declining(name)
        if self._metrics is not None:
            self._metrics.gauge(m.GATE_STATE, int(now), tier=name)
        if now != before:
            does = f"computes what {name} would be slower for" if now else f"no longer declines {name}"
            times = f"{tokens} tokens in {1e3 * loading:.0f} ms, to compute them takes {1e3 * computing:.0f} ms"
            self._say(f"the load gate {does}: {times}" + (f"; 1 in {PROBE} is tried" if now else ""))
        return left > 0

    def _is_declining(self, name: str) -> bool:
        return any(each == name for each, _ in self._declined)


def range_of(amount: float) -> int:
    """The range of an amount above zero."""
    return math.frexp(amount)[1]


def _median(kept: "deque[Observation]") -> Observation:
    rate = median_low(each.rate for each in kept)
    return next(each for each in kept if each.rate == rate)


def _quickest(kept: "deque[Observation]") -> Observation:
    return min(list(kept)[-BELIEF:], key=lambda each: each.scaled(1.0))


def _between(below: Observation, above: Observation, amount: float) -> float:
    """On the line through two observations. A cost that bends downwards is never below it."""
    share = (amount - below.amount) / (above.amount - below.amount)
    return below.seconds + share * (above.seconds - below.seconds)
