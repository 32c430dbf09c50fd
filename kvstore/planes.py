"""Planes: the kinds of KV that a token has, where a model's layers are of several kinds.

Plane 0 holds the KV of layers that attend to all earlier tokens; every chunk has it. Each other plane is of
layers that attend to a window, or to a chunk of positions, or whose state has taken in all tokens before (Mamba,
linear attention, convolutions). A prompt can continue at a position if what these layers attend to there, or their
state there, is stored too. It is kept only at positions where prompts are likely to continue.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from ragkv.kvstore.keys import mark, window_key
from ragkv.kvstore.pages import PageShape
from ragkv.kvstore.prefix_tree import Chunk, Match, child_of

WIDEST = 512  # blocks of engines whose windows can be read, or divisors of it
KEPT = 128  # what is kept begins at a multiple, so that engines of smaller blocks find theirs whole


@dataclass(frozen=True, slots=True)
class Plane:
    """`shape`: of its pages. `window`: how many tokens a token attends to, itself included; or `span`: it attends
    to those of its own `span` positions, counted from multiples (chunked attention); or `state`: the state that
    the last token has left is all that is needed. Only one of the three is given. `block_tokens`: of the engine's
    blocks, which are loaded whole."""

    shape: PageShape
    window: int = 0
    span: int = 0
    block_tokens: int = 1
    state: bool = False

    @property
    def name(self) -> str:
        """As metrics have it."""
        if self.state:
            return "state"
        return f"window_{self.window}" if self.window else f"chunk_{self.span}"

    def first(self, position: int, grain: int | None = None) -> int:
        """From which position on KV must be there for a prompt to go on at `position`, in whole blocks (or in
        multiples of `grain`); `position` itself: none."""
        if self.state:
            return max(0, position - 1)
        start = max(0, position - self.window + 1) if self.window else position // self.span * self.span
        start = start // (grain or self.block_tokens) * (grain or self.block_tokens)
        return min(start, position)

    def kept_from(self, position: int, live: int) -> int | None:
        """From which position on to keep KV, so that a prompt can continue at `position`. None: the engine has too
        little, its KV begins at `live`. If it has more, also what the position before needs (the same prompt again
        continues there, since its last token is always computed), and what engines with other blocks need."""
        if live > self.first(position):
            return None
        return max(live, self.kept(position))

    def kept(self, position: int) -> int:
        """As `kept_from`, where the engine has everything."""
        if self.state:
            return self.first(position)
        return self.first(max(0, position - 1)) // KEPT * KEPT

    def earliest(self, position: int) -> int:
        """From which position on any engine may have kept KV, so that a prompt can continue at `position`."""
        return self.first(position) if self.state else self.first(max(0, position - 1), WIDEST)

    def free(self, position: int) -> int:
        """The last position up to this one where nothing is needed."""
        if self.window > 1 or self.state:
            return 0
        step = math.lcm(self.span or 1, self.block_tokens)
        return position // step * step


class Window(Chunk):
    """A plane's KV of the last tokens of its parent, from `position` on. It is a child of that chunk; its `tokens`
    are a mark that no token has, which sorts after all tokens. So it never matches a prompt by itself."""

    __slots__ = ("plane",)

    def __init__(self, parent: Chunk, plane: int, position: int) -> None:
        super().__init__(window_key(parent.key, plane), parent, mark(plane))
        self.plane, self.position, self.end = plane, position, parent.end


def window_of(chunk: Chunk, plane: int) -> Chunk | None:
    """What a plane has of a chunk, ready or not."""
    return child_of(chunk, mark(plane))


def is_longest(chunk: Chunk, planes: Sequence[Plane]) -> bool:
    """Whether a window begins as early as any that its plane keeps of that chunk."""
    assert chunk.parent is not None
    return chunk.position <= max(chunk.parent.position, planes[chunk.plane - 1].kept(chunk.end))


def reachable(match: Match, planes: Sequence[Plane], have: int) -> Match:
    """Of a match the longest beginning at whose end the prompt can go on, with what it takes of `planes` (numbered
    from 1). The engine has the first `have` tokens itself. A match no longer than that is as good as none."""
    end = reach(match.chunks, planes, match.length, have, _start_of)
    chunks = tuple(chunk for chunk in match.chunks if chunk.position < end)
    windows = [
        window
        for number, plane in enumerate(planes, 1)
        for chunk in chunks
        if chunk.end > max(have, plane.first(end)) and (window := window_of(chunk, number)) is not None
    ]
    tail = match.whole_tail if end == match.length else None
    kept = tuple(window for window in windows if window.ready) if end > have else ()
    return replace(match, chunks=chunks, length=end, whole_tail=tail, windows=kept)


class _Spanning(Protocol):
    @property
    def position(self) -> int: ...

    @property
    def end(self) -> int: ...


Span = TypeVar("Span", bound=_Spanning)  # some of a prompt's tokens


def reach(
    spans: Sequence[Span],
    planes: Sequence[Plane],
    limit: int,
    have: int,
    start_of: Callable[[Span, int], int | None],
) -> int:
    """The last position up to `limit` at which a prompt can go on; not more than `have`, which the engine has
    itself: there is none. `start_of`: from where on a plane has the tokens of one of `spans`, up to its end; None:
    it has none of them."""
    end, before = limit, -1
    while end != before and end > have:  # each plane may shorten it further
        before = end
        for number, plane in enumerate(planes, 1):
            end = _reach(spans, number, plane, end, have, start_of)
    return end


def _reach(
    spans: Sequence[Span],
    number: int,
    plane: Plane,
    limit: int,
    have: int,
    start_of: Callable[[Span, int], int | None],
) -> int:
    """The last position up to `limit` at which one plane has all that is needed; 0: there is none.

    What is needed begins no later at a lower position. So of what the plane has without a gap, from `start` on,
    either all can be used, up to `stop`, or nothing.
    """
    start = stop = limit
    for span in reversed(spans):
        if span.position >= stop:
            continue
        first = start_of(span, number)
        if first is not None and first < stop:
            start = first
            if max(plane.first(stop), have) >= start:
                return max(stop, plane.free(limit))
        if start > span.position:
            start = stop = span.position
    return plane.free(limit)


def _start_of(chunk: Chunk, number: int) -> int | None:
    window = window_of(chunk, number)
    return window.position if window is not None and window.ready else None
