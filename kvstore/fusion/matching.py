"""Finds tokens of a prompt that memory holds after another prefix, at other positions.

Whole chunks are found by content, since the chunker cuts a passage alike wherever it occurs (`chunking`). From
there tokens are compared in both directions, so that a passage's first and last chunk, which are cut differently
beside other neighbours, are found too.

Work is bounded in the prompt's length, whatever is stored: of each cut a few holders are followed (`FOLLOWED`) and
a few more looked at (`LOOKED_AT`), however many there are, and of all of them together no more than `CLIMBED`
ancestors. Behind `MOST_CUTS` cuts the search ends. What is not looked at can make the choice worse, never wrong.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ragkv.kvstore.chunking import TokenChain
from ragkv.kvstore.keys import TOKEN_BYTES
from ragkv.kvstore.prefix_tree import Chunk, ContentIndex, children_of, longest_shared, shared_tokens

FOREIGN = 4  # what a token of foreign context weighs, where one of its own document that is lacking weighs 1
FOLLOWED = 4  # of the holders of a cut's tokens, the best, which may go on behind it
LOOKED_AT = 16  # of the holders of a cut's tokens that do not go on where another stopped
PASSED = 64  # of which these are found
FORKS = 4  # chunks of the exact match behind which several go on, and where holders are looked for first
CLIMBED = 8192  # ancestors, in one search, of which it is seen whether the prompt has them too
MOST_CUTS = 1024  # that are looked up in one search, on the thread on which all requests wait
REACH = 4096  # tokens that are compared with children at a time: more than a chunk has


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens `start` to `end` of a prompt, which `chunk` holds from its token `first` on.

    `shift`: by how many positions it moves; the token at `start` stood at `start` - `shift` when its KV was
    computed.
    """

    start: int
    end: int
    chunk: Chunk
    first: int
    shift: int

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def ends_chunk(self) -> bool:
        """Whether it holds the chunk's last token."""
        return self.first + len(self) == len(self.chunk)


class _Holder(NamedTuple):
    """A chunk that holds the tokens asked for. `own`: tokens directly before it that stand directly before them in
    the prompt too. `foreign`: all others that it was computed behind and that this prompt does not have there."""

    chunk: Chunk
    own: int
    foreign: int


class _Fresh(NamedTuple):
    """A chunk that holds the tokens asked for; `common`: of what it was computed behind, the first tokens that are
    the first of this prompt too; `floor`: what it costs (`_cost`) at least, wherever in the prompt they stand."""

    floor: int
    chunk: Chunk
    common: int


def find_moved(
    contents: ContentIndex,
    namespace: bytes,
    chain: TokenChain,
    start: int,
    limit: int,
    shared: Sequence[Chunk] = (),
) -> list[Piece]:
    """The tokens between `start` and `limit` of a prompt that chunks of `contents` hold; ascending, disjoint.

    `start`: where the exact match ends, `shared`: its chunks. Of several chunks with the same tokens that is taken
    which was computed behind the fewest tokens that this prompt does not have (KL to full prefill .211 behind
    others, .101 directly behind the shared system prompt), while a passage is not patched together for little: see
    `FOREIGN`. Ties go to the chunk that goes on where the last one stopped, then to the one stored last.
    """
    search = _Search(contents, namespace, chain, start, limit, shared)
    return search.grown(search.whole())


class _Search:
    """One prompt's search. `raw`: its tokens as int32 bytes."""

    def __init__(
        self,
        contents: ContentIndex,
        namespace: bytes,
        chain: TokenChain,
        start: int,
        limit: int,
        shared: Sequence[Chunk],
    ) -> None:
        self._contents, self._namespace = contents, namespace
        self._raw = chain.tokens.tobytes()
        self._ends = [*chain.ends, len(chain.tokens)][: bisect.bisect_right(chain.ends, start) + MOST_CUTS]
        self._start, self._limit, self._shared = start, min(limit, self._ends[-1]), frozenset(shared)
        several = [chunk for chunk in shared if isinstance(chunk.children, list)]
        self._forks = [*(chunk.root for chunk in shared[:1]), *several][:FORKS]
        self._commons: dict[Chunk, int] = {}
        self._looked: dict[bytes, list[_Fresh]] = {}
        self._climbed = 0

    def whole(self) -> list[Piece]:
        """Pieces of the prompt's own cuts, each from the best of its holders."""
        pieces: list[Piece] = []
        before: list[_Holder] = []  # the best first
        begin = 0
        for end in self._ends:
            start, upto = max(begin, self._start), min(end, self._limit)
            if start < upto:
                before = self._holders(begin, end, before)
                if before:
                    chunk = before[0].chunk
                    pieces.append(Piece(start, upto, chunk, start - begin, begin - chunk.position))
            begin = end
        return pieces

    def grown(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces, and their neighbours in the prefix tree as far as they match the gaps."""
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
        """The best of those that hold just the tokens from `begin` to `end`, the very best first. `before`: the
        same of the tokens before them."""
        tokens = self._slice(begin, end)
        found: list[_Holder] = []
        going_on = children_of([holder.chunk for holder in before], tokens)
        for holder, chunk in zip(before, going_on, strict=True):  # it adds nothing foreign: their order stays
            if chunk is not None:
                found.append(_Holder(chunk, holder.own + chunk.position - holder.chunk.position, holder.foreign))
        goes_on = found[0].chunk if found and found[0].chunk.parent is before[0].chunk else None
        known = len(found)
        for floor, chunk, common in self._fresh(tokens):
            if found and floor > min(_cost(found[0]), _cost(found[-1])):
                break  # nor can those that follow be better
            if not any(chunk is holder.chunk for holder in found[:known]):
                own = self._own(chunk, begin, before)
                found.append(_Holder(chunk, own, max(0, chunk.position - common - own)))
        if len(found) > known or goes_on is None:
            found.sort(key=lambda holder: (_cost(holder), holder.chunk is not goes_on))
        return found[:FOLLOWED]

    def _fresh(self, tokens: bytes) -> list[_Fresh]:
        """Some of those that hold just these tokens, anywhere, by what they cost at least."""
        if tokens not in self._looked:
            held = self._contents.holders(self._namespace, tokens, PASSED) if tokens else []
            likely = [found for found in children_of(self._forks, tokens) if found is not None]
            held.reverse()  # the latest first, and before all those directly behind the exact match
            held.sort(key=lambda chunk: chunk.parent not in self._shared)
            fresh: list[_Fresh] = []
            for chunk in list(dict.fromkeys([*likely, *held]))[:LOOKED_AT]:
                parent, common = chunk.parent, self._common(chunk)
                most = chunk.position - parent.position if parent is not None and parent.tokens else chunk.position
                floor = FOREIGN * max(0, chunk.position - common - most) - most
                fresh.append(_Fresh(floor, chunk, common))
            self._looked[tokens] = sorted(fresh, key=lambda each: each.floor)
        return self._looked[tokens]

    def _own(self, chunk: Chunk, begin: int, before: list[_Holder]) -> int:
        """Tokens directly before a chunk that stand directly before `begin` too, as far as is quickly seen.
        `before`: who holds what is before `begin`, and how much they own up to there."""
        parent = chunk.parent
        if parent is not None and parent.tokens:
            return _shared_last(parent.tokens, self._slice(max(0, begin - len(parent)), begin))
        # It stands for itself: what stops just there is taken for its own.
        ends = (e.own + len(e.chunk) for e in before if e.chunk.end == chunk.position)
        return max(ends, default=0)

    def _common(self, chunk: Chunk) -> int:
        """How many of the first tokens that a chunk was computed behind are the first of this prompt too, as far
        as it matches exactly: what is known of its nearest known ancestor, and what lies between."""
        path = [chunk]
        while path[-1] not in self._commons and (above := path[-1].parent) is not None and above.tokens:
            if self._climbed >= CLIMBED:
                return 0
            self._climbed += 1
            path.append(above)
        common = self._commons.setdefault(path[-1], 0)
        while len(path) > 1:
            parent = path.pop()
            if common == parent.position:
                end = min(common + len(parent), self._start)
                common += shared_tokens(parent.tokens, self._slice(common, end))
            self._commons[path[-1]] = common
        return common

    def _rightwards(self, piece: Piece, limit: int) -> Iterator[Piece]:
        """Pieces that continue a piece in the prefix tree, up to `limit`."""
        while piece.end < limit and piece.ends_chunk:
            tokens = self._slice(piece.end, min(limit, piece.end + REACH))
            child, shared = longest_shared(piece.chunk, tokens)
            if child is None:
                return
            piece = Piece(piece.end, piece.end + shared, child, 0, piece.shift)
            yield piece

    def _leftwards(self, piece: Piece, limit: int) -> Iterator[Piece]:
        """Pieces that precede a piece in the prefix tree, down to `limit`; the nearest first."""
        while piece.start > limit and not piece.first:
            parent = piece.chunk.parent
            if parent is None or not parent.ready:
                return
            shared = _shared_last(parent.tokens, self._slice(max(limit, piece.start - len(parent)), piece.start))
            if not shared:
                return
            start, first = piece.start - shared, len(parent) - shared
            piece = Piece(start, piece.start, parent, first, piece.shift)
            yield piece

    def _slice(self, start: int, end: int) -> bytes:
        return self._raw[TOKEN_BYTES * start : TOKEN_BYTES * end]


def _cost(holder: _Holder) -> int:
    """What it costs to take it: the least is best."""
    return FOREIGN * holder.foreign - holder.own


def _shared_last(a: bytes, b: bytes) -> int:
    """How many last tokens two token strings share."""
    size = min(len(a), len(b))
    differ = int.from_bytes(a[len(a) - size :], "little") ^ int.from_bytes(b[len(b) - size :], "little")
    return (size - (differ.bit_length() + 7) // 8) // TOKEN_BYTES
