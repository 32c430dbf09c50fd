"""Which weights an engine has: those of its start, and whether they are still the same.

vLLM resets a connector when it sleeps, pauses or is told to reset its caches, and says neither why nor whether
weights change: they may, after the reset and before the next request (`update_weights`, `reload_weights`,
`collective_rpc`). So after every reset the workers look at the weights as soon as a request comes, which waits
until all have answered.
"""

import hashlib
from collections.abc import Mapping
from typing import Literal

from ragkv.connectors.vllm.messages import WeightsLook, WeightsSample

Verdict = Literal["same", "changed", "unknown"]


class WeightsWatch:
    """The scheduler side's books. `first`: every rank's fingerprint at start; None or one of None, where it is not
    known: then weights can never be told apart, and every doubt ends in "unknown"."""

    LOST = 1024  # steps after which an answer will not come any more, or a look that failed is tried again
    TRIES = 3  # lost answers, after which requests wait no longer

    def __init__(self, first: Mapping[int, bytes | None]) -> None:
        self._ranks = len(first)
        self._known = combine(first) is not None
        self._number = self._asked = self._steps = self._lost = 0
        self._answers: dict[int, bytes | None] = {}
        self.settled = True  # no answer is awaited; else requests wait
        self._awake = True  # the weights have memory: they may be looked at
        self.blind = False  # weights that were known cannot be looked at now: nothing must be reused or kept
        self.current: bytes | None = combine(first)  # the fingerprint of all ranks

    def doubt(self) -> None:
        """vLLM has reset the connector: the weights may change until the next forward. What is under way to an
        earlier question counts no more."""
        self.settled = self._awake = False
        self._lost = 0
        self.ask_again()

    def suspect(self) -> None:
        """The weights may have changed already: they are looked at in the next step. (But not where vLLM has reset
        the connector and no request came since: it may be asleep, and they have no memory.)"""
        awake = self._awake
        self.doubt()
        self._awake = awake

    def want(self) -> None:
        """A request waits for the answer."""
        self._awake = True

    def ask_again(self) -> None:
        """What was asked last may never have come to the workers."""
        self._number += 1
        self._answers = {}

    def question(self) -> int:
        """The number under which the workers shall look now; 0: they need not. (After a reset they may not have
        been changed yet where no request waits.)"""
        if self.settled and not self.blind:
            return 0
        self._steps += 1
        if self._asked == self._number and self._steps > self.LOST:
            self.ask_again()
            self._lost += 1
            if self._lost >= self.TRIES:
                self._give_up()
        due = self._steps > self.LOST if self.settled else self._awake
        if not due or self._asked == self._number:
            return 0
        self._asked, self._steps = self._number, 0
        return self._number

    def hear(self, look: WeightsLook) -> Verdict | None:
        """An answer; the verdict, once all ranks have given theirs to the last question."""
        if (self.settled and not self.blind) or look.number != self._number:
            return None
        self._answers[look.rank] = look.fingerprint
        if len(self._answers) < self._ranks:
            return None
        now = combine(self._answers)
        if now is None or not self._known:
            self._give_up()
            self.blind = self._known  # else there is nothing to wait for
            return "unknown"
        self.settled, self._awake, self.blind = True, True, False
        before, self.current = self.current, now
        return "same" if before == now else "changed"

    def _give_up(self) -> None:
        """The weights cannot be known: nothing kept is of them, and no request waits."""
        self.settled = self._awake = self.blind = True
        self.current = None
        self._steps = 0
        self.ask_again()


class Rounds:
    """The scheduler side's books of samples. A round that finds nothing confirms all KV that was computed before
    it began. `ranks`: workers that take part; `memory_tokens`: that memory has room for."""

    ENOUGH = 1024  # tokens computed, after which KV that waits to be confirmed is worth a round
    SHARE = 8  # or so large a part of memory, which may evict what waits
    EVERY = 64  # steps after which a round begins in any case
    LOST = 1024  # steps after which an answer will not come any more

    def __init__(self, ranks: int, memory_tokens: float = float("inf")) -> None:
        self._ranks, self._asked, self._open = ranks, 0, False
        self._enough = min(self.ENOUGH, memory_tokens / self.SHARE)
        self._answered: set[int] = set()
        self._steps = self._tokens = 0  # since the last round began

    @property
    def next(self) -> int:
        """The round that will confirm what has been computed until now, or is computed in this step."""
        return self._asked + 1

    def question(self, tokens: int, *, waiting: bool, stopping: bool = False) -> int:
        """The number of the round that begins in this step, before its `tokens` are computed; 0: none does.
        `waiting`: some KV waits to be confirmed; `stopping`: the engine was asked to stop."""
        due = waiting and (stopping or not tokens or self._tokens >= self._enough)
        begin = self._steps >= self.LOST if self._open else due or self._steps >= self.EVERY
        if begin:
            self._asked += 1
            self._open, self._answered = True, set()
            self._steps = self._tokens = 0
        self._steps += 1
        self._tokens += tokens
        return self._asked if begin else 0

    def abandon(self) -> None:
        """A round under way confirms nothing."""
        self._open = False

    def hear(self, sample: WeightsSample) -> bool | None:
        """An answer. False: something differs; True: all ranks have found nothing in this round; None: neither."""
        if not self._open or sample.number != self._asked:
            return None
        self._answered.add(sample.rank)
        if sample.same and len(self._answered) < self._ranks:
            return None
        self._open = False
        return sample.same


def combine(fingerprints: Mapping[int, bytes | None]) -> bytes | None:
    """One fingerprint of all ranks; None where one is not known, or there are none."""
    if not fingerprints or any(each is None for each in fingerprints.values()):
        return None
    digest = hashlib.blake2b(digest_size=16)
    for rank, each in sorted(fingerprints.items()):
        digest.update(rank.to_bytes(4, "big") + (each or b""))
    return digest.digest()
