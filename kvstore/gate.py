"""The load gate: is it quicker to load some tokens than to compute them? From what both took lately, as measured.

A load is declined only where it is known to be slow: the last loads of about that size all took longer than
prefill takes. What was never measured is taken to be quick (`ragkv.kvstore.costs`: what is known of what).
Whatever is declined is tried again now and then, so that a tier that recovers is noticed.
"""

import math
from collections.abc import Callable

from ragkv.kvstore import metrics as m
from ragkv.kvstore.costs import BELIEF, Cost, range_of
from ragkv.kvstore.metrics import Metrics

PROBE = 16  # of so many loads that do not pay one is made, those included from which that was learned
FIRST = BELIEF * (PROBE - 1)  # declined before the first that is tried
LEAST_TOKENS = 32  # a hit of fewer is not worth a load: it costs a step of the engine, whatever it saves


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
