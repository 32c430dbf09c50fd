"""Which tokens of a prompt stand in memory elsewhere: behind other text, at other positions.

Whole chunks are found by content, since the chunker cuts a passage alike wherever it stands (`chunking`); from
there tokens are compared to both sides, so that a passage's first and last chunk, which are cut differently beside
other neighbours, are not lost. No step looks at all chunks or at all children of one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ragkv.kvstore.catalogue import Chunk, longest_shared, shared_tokens
from ragkv.kvstore.chunking import TokenChain
from ragkv.kvstore.contents import Contents
from ragkv.kvstore.keys import TOKEN_BYTES

FOREIGN = 4  # what a token of foreign context weighs, where one of its own document that is lacking weighs 1
LOOKED_AT = 16  # of the holders of a chunk's tokens that do not go on where another stopped
REACH = 4096  # tokens that are compared with children at a time: more than a chunk has

Place = Callable[[Chunk], tuple[bytes, int]]


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens `start` to `end` of a prompt, which `chunk` holds from its token `first` on.

    `stored`: the position at which the token at `start` stood when its KV was computed.
    """

    start: int
    end: int
    chunk: Chunk
    first: int
    stored: int

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def shift(self) -> int:
        """By how many positions it moves."""
        return self.start - self.stored

    @property
    def ends_chunk(self) -> bool:
        """Whether it holds the chunk's last token."""
        return self.first + len(self) == len(self.chunk)


class _Context(NamedTuple):
    """What a chunk was computed behind: `position` tokens, of which the first `common` are the first of this
    prompt too, as far as it matches exactly."""

    namespace: bytes
    position: int
    common: int


class _Holder(NamedTuple):
    """A chunk that holds the tokens asked for, at the position at which it was computed. `own`: tokens directly
    before it that stand directly before them in the prompt too. `foreign`: all others that it was computed behind
    and that this prompt does not have there."""

    chunk: Chunk
    position: int
    own: int
    foreign: int


def find_moved(
    contents: Contents,
    place: Place,
    namespace: bytes,
    chain: TokenChain,
    start: int,
    limit: int,
    shared: Sequence[Chunk] = (),
) -> list[Piece]:
    """The tokens between `start` and `limit` of a prompt that chunks of `contents` hold; ascending, disjoint.

    `start`: where the exact match ends, `shared`: its chunks. `place`: the namespace of a chunk and the position
    of its first token (`catalogue.origin`, where all chunks stand in the tree). Of several chunks with the same
    tokens that is taken which was computed behind the fewest tokens that this prompt does not have (KL to full
    prefill .211 behind others, .101 directly behind the shared system prompt), while a passage is not patched
    together for little: see `FOREIGN`. Ties go to the chunk that goes on where the last one stopped, then to the
    one stored last.
    """
    search = _Search(contents, place, namespace, chain, start, limit, frozenset(shared))
    return search.grown(search.whole())


class _Search:
    """One prompt's search. `raw`: its tokens as int32 bytes."""

    def __init__(
        self,
        contents: Contents,
        place: Place,
        namespace: bytes,
        chain: TokenChain,
        start: int,
        limit: int,
        shared: frozenset[Chunk],
    ) -> None:
        self._contents, self._place, self._namespace = contents, place, namespace
        self._raw = chain.tokens.tobytes()
        self._ends = [*chain.ends, len(chain.tokens)]
        self._start, self._limit, self._shared = start, min(limit, len(chain.tokens)), shared
        self._contexts: dict[Chunk, _Context] = {}

    def whole(self) -> list[Piece]:
        """Pieces of the prompt's own cuts, each from the best of its holders."""
        pieces: list[Piece] = []
        before: list[_Holder] = []
        last: _Holder | None = None
        begin = 0
        for end in self._ends:
            start, upto = max(begin, self._start), min(end, self._limit)
            if start < upto:
                before = self._holders(begin, end, before)
                last = _best(before, last)
                if last is not None:
                    first = start - begin
                    pieces.append(Piece(start, upto, last.chunk, first, last.position + first))
            begin = end
        return pieces

    def grown(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces, and what stands beside them in their trees too, as far as it fills the gaps."""
        found: list[Piece] = []
        edge = self._start
        for piece in pieces:
            if found:
                found += self._rightwards(found[-1], piece.start)
                edge = found[-1].end
            found += reversed(list(self._leftwards(piece, edge)))
            found.append(piece)
        if found:
            found += self._rightwards(found[-1], self._limit)
        return found

    def _holders(self, begin: int, end: int, before: list[_Holder]) -> list[_Holder]:
        """Who holds just the tokens from `begin` to `end`. `before`: who holds the ones before them."""
        tokens = self._slice(begin, end)
        ahead = {holder.chunk: holder for holder in before}
        size = len(before[0].chunk) if before else 0
        found: list[_Holder] = []
        fresh: list[Chunk] = []
        for chunk in self._contents.holders(tokens) if tokens else []:
            holder = ahead.get(chunk.parent) if chunk.parent is not None else None
            if holder is None:
                fresh.append(chunk)
            else:  # it goes on where another stopped, so that nothing foreign is added
                found.append(_Holder(chunk, holder.position + size, holder.own + size, holder.foreign))
        if len(fresh) > LOOKED_AT:
            fresh = sorted(fresh, key=lambda chunk: chunk.parent in self._shared)[-LOOKED_AT:]
        ends = {holder.position + size: holder.own + size for holder in before} if fresh else {}
        for chunk in fresh:
            namespace, position, common = self._context(chunk)
            if namespace == self._namespace:
                own = self._own(chunk, position, begin, ends)
                found.append(_Holder(chunk, position, own, max(0, position - common - own)))
        return found

    def _own(self, chunk: Chunk, position: int, begin: int, ends: dict[int, int]) -> int:
        """Tokens directly before a chunk that stand directly before `begin` too, as far as is quickly seen.
        `ends`: where those stop that hold what is before `begin`, and how much they own up to there."""
        parent = chunk.parent
        if parent is not None and parent.tokens:
            return _shared_last(parent.tokens, self._slice(max(0, begin - len(parent)), begin))
        return ends.get(position, 0)  # it stands for itself: what stops just there is taken for its own

    def _context(self, chunk: Chunk) -> _Context:
        """What a chunk was computed behind: its nearest known ancestor's context, and what lies between."""
        path = [chunk]
        while path[-1] not in self._contexts and (above := path[-1].parent) is not None and above.tokens:
            path.append(above)
        if path[-1] not in self._contexts:
            namespace, position = self._place(path[-1])
            self._contexts[path[-1]] = _Context(namespace, position, 0)
        while len(path) > 1:
            parent = path.pop()
            namespace, position, common = self._contexts[parent]
            after = position + len(parent)
            if common == position:
                common += shared_tokens(parent.tokens, self._slice(position, min(after, self._start)))
            self._contexts[path[-1]] = _Context(namespace, after, common)
        return self._contexts[chunk]

    def _rightwards(self, piece: Piece, limit: int) -> Iterator[Piece]:
        """What goes on behind a piece in its tree, up to `limit`."""
        while piece.end < limit and piece.ends_chunk:
            tokens = self._slice(piece.end, min(limit, piece.end + REACH))
            child, shared = longest_shared(piece.chunk, tokens)
            if child is None:
                return
            piece = Piece(piece.end, piece.end + shared, child, 0, piece.stored + len(piece))
            yield piece

    def _leftwards(self, piece: Piece, limit: int) -> Iterator[Piece]:
        """What stands before a piece in its tree, down to `limit`; the nearest first."""
        while piece.start > limit and not piece.first:
            parent = piece.chunk.parent
            if parent is None or not parent.ready:
                return
            shared = _shared_last(parent.tokens, self._slice(max(limit, piece.start - len(parent)), piece.start))
            if not shared:
                return
            start, first = piece.start - shared, len(parent) - shared
            piece = Piece(start, piece.start, parent, first, piece.stored - shared)
            yield piece

    def _slice(self, start: int, end: int) -> bytes:
        return self._raw[TOKEN_BYTES * start : TOKEN_BYTES * end]


def _best(holders: list[_Holder], last: _Holder | None) -> _Holder | None:
    """The holder to take; `last`: the one taken for the tokens before."""
    most = max((holder.own for holder in holders), default=0)
    best, least = None, (0, False)
    for holder in reversed(holders):
        goes_on = last is not None and holder.chunk.parent is last.chunk
        cost = FOREIGN * holder.foreign + most - holder.own, not goes_on
        if best is None or cost < least:
            best, least = holder, cost
    return best


def _shared_last(a: bytes, b: bytes) -> int:
    """How many last tokens two token strings share."""
    size = min(len(a), len(b)) // TOKEN_BYTES
    if not size or a.endswith(b) or b.endswith(a):
        return size
    differ = np.frombuffer(a, dtype="<i4")[-size:] != np.frombuffer(b, dtype="<i4")[-size:]
    return int(differ[::-1].argmax())
