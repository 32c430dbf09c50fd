"""The load gate: is it quicker to load some tokens than to prefill them? From what both cost lately, as measured.

Every cost is a line, seconds = fixed + slope * amount, fitted by least squares over observations that fade
(exponential forgetting, as in Ljung, "System Identification", section 11.2). So a slow tier is declined for short
prompts and used for long ones, and a tier that becomes slow is left until it is quick again.
"""

import math

FADE = 0.9  # what an observation still weighs when the next one comes
ALIKE = 0.01  # amounts are alike whose variance is less than this part of their mean square
PROBE = 16  # of so many declined loads one is made all the same: otherwise nobody would see the tier recover


class Line:
    """seconds = fixed + slope * amount, both at least zero."""

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def note(self, amount: float, seconds: float) -> None:
        """One observation. What is not finite or below zero (a clock that was set back) is passed over."""
        if not (0 < amount < math.inf and 0 <= seconds < math.inf):
            return
        values = (1.0, amount, seconds, amount * amount, amount * seconds)
        old = (self._n, self._x, self._y, self._xx, self._xy)
        self._n, self._x, self._y, self._xx, self._xy = (FADE * o + v for o, v in zip(old, values, strict=True))

    @property
    def known(self) -> bool:
        """Whether there was any observation."""
        return self._n > 0

    def slope(self) -> float:
        """Seconds for one more of the amount."""
        return self._fit()[1]

    def at(self, amount: float) -> float:
        """Seconds for an amount above zero."""
        fixed, slope = self._fit()
        return fixed + slope * amount

    def _fit(self) -> tuple[float, float]:
        if not self._n:
            return 0.0, 0.0
        spread = self._n * self._xx - self._x * self._x
        if spread <= ALIKE * self._n * self._xx:  # their noise is no slope: a line through the origin
            return 0.0, self._y / self._x
        slope = (self._n * self._xy - self._x * self._y) / spread
        fixed = (self._y - slope * self._x) / self._n
        if slope < 0:
            return self._y / self._n, 0.0
        if fixed < 0:
            return 0.0, self._y / self._x
        return fixed, slope


class Gate:
    """`prefill`: seconds over tokens of a step; `copy`: memory tier to engine, over tokens; `fuse`: fusion, over
    its work in tokens; `tiers`: lower tier to memory, over bytes, from the question on. Where a cost is not known
    yet, the load is made."""

    def __init__(self, *, active: bool = True) -> None:
        self.prefill, self.copy, self.fuse = Line(), Line(), Line()
        self.tiers: dict[str, Line] = {}
        self._active = active
        self._declined: dict[str, int] = {}

    def tier(self, name: str) -> Line:
        """The cost of a lower tier."""
        return self.tiers.setdefault(name, Line())

    @property
    def judges(self) -> bool:
        """Whether it compares at all: it is active, and knows what prefill costs."""
        return self._active and self.prefill.known

    def declines(self, name: str, *, pays: bool) -> bool:
        """Whether to leave something be: it does not pay, and it is no probe's turn. `name`: of the decision, for
        the probes."""
        self._declined[name] = 0 if pays else (self._declined.get(name, 0) + 1) % PROBE
        return self._declined[name] != 0

    def pays(self, tokens: int, sizes: dict[str, int] | None = None) -> bool:
        """Whether loading `tokens` tokens will take no longer than computing them. `sizes`: bytes that must first
        be read from lower tiers."""
        if not self.judges:
            return True
        cost = self.copy.at(tokens) if self.copy.known else 0.0
        for name, size in (sizes or {}).items():
            cost += self.tier(name).at(size)
        return cost <= self.prefill.slope() * tokens

    def allows(self, tokens: int, tier: str, sizes: dict[str, int] | None = None) -> bool:
        """Whether to load: it pays, or it is a probe's turn. `tier` only names the decision, for the probes."""
        return not self.declines(tier, pays=self.pays(tokens, sizes))
