"""Whether an engine's weights are still those of its start.

vLLM resets a connector when it sleeps, pauses or is told to reset its caches, and says neither why nor whether
weights change: they may, after the reset and before the next request (`update_weights`, `reload_weights`,
`collective_rpc`). So after every reset the workers look at the weights as soon as a request comes, which waits
until all have answered.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["same", "changed", "unknown"]


@dataclass(frozen=True, slots=True)
class Look:
    """A worker's answer. `number`: of the question; `fingerprint`: None where its model cannot be looked at."""

    number: int
    rank: int
    fingerprint: bytes | None


class WeightsWatch:
    """The scheduler side's books. `first`: every rank's fingerprint at start; None or one of None, where it is not
    known: then weights can never be told apart, and every doubt ends in "unknown"."""

    def __init__(self, first: Mapping[int, bytes | None]) -> None:
        self._ranks, self._first = len(first), combine(first)
        self._number = self._asked = 0
        self._answers: dict[int, bytes | None] = {}
        self._settled, self._wanted = True, False
        self.changed: bytes | None = None  # the fingerprint of all ranks, where it is not the first

    @property
    def settled(self) -> bool:
        """Whether the weights are known; else requests wait."""
        return self._settled

    def doubt(self) -> None:
        """vLLM has reset the connector: the weights may change until the next forward. What is under way to an
        earlier question counts no more."""
        self._settled = self._wanted = False
        self._number += 1
        self._answers = {}

    def want(self) -> None:
        """A request waits for the answer."""
        self._wanted = True

    def question(self) -> int:
        """The number under which the workers shall look now; 0: they need not. (Where no request waits, the
        weights may not have been changed yet.)"""
        if self._settled or not self._wanted or self._asked == self._number:
            return 0
        self._asked = self._number
        return self._number

    def hear(self, look: Look) -> Verdict | None:
        """An answer; the verdict, once all ranks have given theirs to the last question."""
        if self._settled or look.number != self._number:
            return None
        self._answers[look.rank] = look.fingerprint
        if len(self._answers) < self._ranks:
            return None
        self._settled = True
        now = combine(self._answers)
        if now is None or self._first is None:
            return "unknown"
        before, self.changed = self.changed, None if now == self._first else now
        return "same" if before == self.changed else "changed"


def combine(fingerprints: Mapping[int, bytes | None]) -> bytes | None:
    """One fingerprint of all ranks; None where one is not known, or there are none."""
    if not fingerprints or any(each is None for each in fingerprints.values()):
        return None
    digest = hashlib.blake2b(digest_size=16)
    for rank, each in sorted(fingerprints.items()):
        digest.update(rank.to_bytes(4, "big") + (each or b""))
    return digest.digest()
