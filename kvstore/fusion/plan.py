"""What becomes of each token of a prompt in which fusion finds moved pieces.

A token is exact, reused, recomputed (chosen among the moved, or in a gap between pieces) or left to the engine. A
plan that would take longer than plain prefill is declined, with the figures.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from ragkv.kvstore.fusion.matching import Piece
from ragkv.kvstore.fusion.selection import Run
from ragkv.kvstore.gate import Gate

REUSED, MOVED, MISSING = "reused", "moved", "missing"
TOO_SHORT, DECLINED, UNSUPPORTED = "too_short", "declined", "unsupported"
KINDS = (REUSED, MOVED, MISSING, TOO_SHORT, DECLINED, UNSUPPORTED)
MOST_RUNS = 64  # are told of, and of a document looked at

Joined = tuple[Piece, ...]  # without a gap, and of one shift


@dataclass(frozen=True, slots=True)
class Plan:
    """Tokens up to `exact` are had exactly. From there to `end`, `pieces` are moved, and the gaps between them
    recomputed; so are `budget` of the moved tokens. The engine computes what follows `end`.

    `work`: what the fusion computes, in tokens of prefill. `short`: pieces found but left out, for their runs are
    shorter than `min_tokens`.
    """

    exact: int
    end: int
    pieces: tuple[Piece, ...]
    budget: int
    work: float
    short: tuple[Piece, ...] = ()

    @property
    def moved(self) -> int:
        """Tokens of the pieces."""
        return sum(map(len, self.pieces))


@dataclass(frozen=True, slots=True)
class Declined:
    """No fusion: `kind` is one of `KINDS`, `reason` a line for people; `short` as in `Plan`."""

    kind: str
    reason: str
    short: tuple[Piece, ...] = ()


def runs_of(pieces: Sequence[Piece]) -> list[Run]:
    """The runs of ascending, disjoint pieces: adjacent pieces of one shift are one run."""
    return [(run[0].start, run[-1].end) for run in _joined(pieces)]


def make_plan(
    pieces: Sequence[Piece], exact: int, limit: int, ratio: float, min_tokens: int, scoring: float, gate: Gate
) -> Plan | Declined:
    """The plan for what `find_moved` found between `exact` and `limit`.

    `ratio`: of the moved tokens, the part that is recomputed. `scoring`: what the selection's look costs for each
    token between `exact` and the plan's end, as a part of that token's prefill (deviation at the first layers:
    about 1.5 / layers; selections that look at nothing: 0). Where the gate knows the costs, the plan ends after
    the run with which it saves the most; else after the last. ValueError: pieces beyond the bounds.
    """
    if pieces and not exact <= pieces[0].start < pieces[-1].end <= limit:
        raise ValueError(f"plan: pieces from {pieces[0].start} to {pieces[-1].end}, not in {exact} to {limit}")
    found = _joined(pieces)
    runs = [run for run in found if _size(run) >= min_tokens]
    short = tuple(piece for run in found if _size(run) < min_tokens for piece in run)
    if not runs:
        longest = max(map(_size, found), default=0)
        few = f"the longest run found has {longest} tokens; fusion.min_tokens = {min_tokens}"
        return Declined(TOO_SHORT, few, short) if found else Declined(MISSING, "nothing found")
    if not gate.judges:
        return _planned(exact, runs, short, ratio, scoring)

    def seconds(count: int) -> tuple[float, float]:
        moved, end = sizes[count], runs[count - 1][-1].end
        return gate.fusing(_work(exact, end, moved, ratio, scoring), moved), gate.computing(end - exact)

    sizes = list(accumulate(map(_size, runs), initial=0))
    best = max(range(len(runs), 0, -1), key=lambda count: seconds(count)[1] - seconds(count)[0])
    plan = _planned(exact, runs[:best], short, ratio, scoring)
    fused, computed = seconds(best)
    if gate.declines("fusion", plan.end - exact, fused, computed, pays=fused < computed):
        return Declined(
            DECLINED,
            f"to fuse {plan.moved} moved tokens would take {1e3 * fused:.1f} ms (work of {plan.work:.0f} tokens), "
            f"to compute all {plan.end - exact} takes {1e3 * computed:.1f} ms",
            short,
        )
    return plan


@dataclass(frozen=True, slots=True)
class Decision:
    """A document's fate; `kind` is one of `KINDS`. `by`: the shift of most of its moved tokens. `reused_tokens`:
    those that come from the store; of the moved ones some are then recomputed."""

    id: str
    start: int
    end: int
    kind: str
    by: int = 0
    reused_tokens: int = 0
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it; `reason` only where there is one."""
        entry: dict[str, Any] = {"id": self.id, "start": self.start, "end": self.end, "decision": self.kind}
        entry |= {"by": self.by, "reused_tokens": self.reused_tokens}
        return entry | ({"reason": self.reason} if self.reason else {})


class Cover:
    """Ascending, disjoint pieces, to be asked how many of their tokens lie in a span: two bisections each time."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._starts, self._ends = [piece.start for piece in pieces], [piece.end for piece in pieces]
        self._sums = list(accumulate(map(len, pieces), initial=0))

    def tokens(self, start: int, end: int) -> int:
        """Tokens of the pieces from `start` to `end`."""
        return max(0, self._upto(end) - self._upto(start))

    def _upto(self, position: int) -> int:
        index = bisect.bisect_right(self._ends, position)
        begun = max(0, position - self._starts[index]) if index < len(self._starts) else 0
        return self._sums[index] + begun


def decisions(
    documents: Sequence[tuple[str, int, int]], exact: int, pieces: Sequence[Piece], outcome: Plan | Declined
) -> list[Decision]:
    """One decision for each document (id, start, end); without documents, one for each of the first `MOST_RUNS`
    runs found, with no id.

    `exact`, `pieces`: what was found; `outcome`: what was made of it. A document that is had in part exactly and
    in part moved is called by the larger part; less than a tenth of it is a neighbour's blank line, or chance.
    """
    spans = documents or [("", start, end) for start, end in runs_of(pieces)[:MOST_RUNS]]
    moved = outcome.pieces if isinstance(outcome, Plan) else ()
    told = _Told(exact, Cover(pieces), Cover(moved), Cover(outcome.short), _joined(moved), outcome)
    return [_decide(name, start, end, told) for name, start, end in spans]


class _Told(NamedTuple):
    """What decisions are made of. `runs`: of what is moved."""

    exact: int
    found: Cover
    moved: Cover
    short: Cover
    runs: list[Joined]
    outcome: Plan | Declined


def _decide(name: str, start: int, end: int, told: _Told) -> Decision:
    outcome = told.outcome
    had, total = max(0, min(end, told.exact) - start), told.moved.tokens(start, end)
    little = (end - start) // 10
    if had + total > little:
        kind = MOVED if total > had else REUSED
        return Decision(name, start, end, kind, _shift(told.runs, start, end) if kind == MOVED else 0, had + total)
    if isinstance(outcome, Declined) and outcome.kind == UNSUPPORTED:
        return Decision(name, start, end, UNSUPPORTED, reason=outcome.reason)
    there = told.found.tokens(start, end)
    if there <= little:
        return Decision(name, start, end, MISSING)
    if there - told.short.tokens(start, end) <= little:
        return Decision(name, start, end, TOO_SHORT)
    behind = f"nothing behind token {outcome.end} pays" if isinstance(outcome, Plan) else outcome.reason
    return Decision(name, start, end, DECLINED, reason=behind)


def _shift(runs: Sequence[Joined], start: int, end: int) -> int:
    """By how much most tokens of a span are moved, as far as its first `MOST_RUNS` runs tell."""
    moved: dict[int, int] = {}
    first = bisect.bisect_right(runs, start, key=lambda run: run[-1].end)
    for run in runs[first : first + MOST_RUNS]:
        common = min(end, run[-1].end) - max(start, run[0].start)
        if common <= 0:
            break
        moved[run[0].shift] = moved.get(run[0].shift, 0) + common
    return max(moved, key=lambda shift: moved[shift])


def _planned(exact: int, runs: Sequence[Joined], short: tuple[Piece, ...], ratio: float, scoring: float) -> Plan:
    moved, end = sum(map(_size, runs)), runs[-1][-1].end
    pieces, work = tuple(piece for run in runs for piece in run), _work(exact, end, moved, ratio, scoring)
    return Plan(exact, end, pieces, _budget(moved, ratio), work, short)


def _work(exact: int, end: int, moved: int, ratio: float, scoring: float) -> float:
    return end - exact - moved + _budget(moved, ratio) + scoring * (end - exact)


def _budget(moved: int, ratio: float) -> int:
    return min(moved, math.ceil(ratio * moved - 1e-6))  # of 100, 0.07 is 7, though 0.07 * 100 is a little more


def _joined(pieces: Sequence[Piece]) -> list[Joined]:
    cuts = [index for index, (a, b) in enumerate(pairwise(pieces), 1) if a.end != b.start or a.shift != b.shift]
    return [tuple(pieces[start:end]) for start, end in pairwise([0, *cuts, len(pieces)]) if start < end]


def _size(run: Joined) -> int:
    return run[-1].end - run[0].start
