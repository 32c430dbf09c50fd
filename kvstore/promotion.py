"""From the lower tiers up into memory, while a request waits.

A fetch looks for what memory lacks of a prompt (one question a tier, where the tier must be asked), lets the gate
decide, reserves room, and reads (`ragkv.kvstore.lifting`).
"""

from dataclasses import dataclass
from typing import Any

from ragkv.kvstore.catalogue import Chunk, Match, shared_tokens
from ragkv.kvstore.chunking import TokenChain
from ragkv.kvstore.codec import Header
from ragkv.kvstore.keys import TOKEN_BYTES, tail_key
from ragkv.kvstore.lifting import BATCH_BYTES, Lift, Lifts, Read
from ragkv.kvstore.tier import StoreTier
from ragkv.kvstore.tier_jobs import Wanted


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a prompt that memory lacks: its chunk key, its tokens and where they begin."""

    key: bytes
    tokens: bytes
    start: int

    @property
    def end(self) -> int:
        """Where its tokens end."""
        return self.start + len(self.tokens) // TOKEN_BYTES


@dataclass(frozen=True, slots=True)
class Gap:
    """What memory lacks of a prompt: `parent`, ready or on its way, is the last that it has; then the pieces; then
    `rest`, tokens behind the last cut. `end`: where `parent` ends. `loading`: chunks on their way up to it.
    `has_tail`: memory has an open tail behind `parent`."""

    parent: Chunk
    end: int
    pieces: list[Piece]
    rest: bytes
    loading: list[Chunk]
    has_tail: bool

    def keys(self) -> list[bytes]:
        """Where all of it would lie: the pieces, and a tail behind each of them."""
        pieces = [piece.key for piece in self.pieces]
        tails = [tail_key(key) for key in pieces]
        if (self.rest or pieces) and not self.has_tail:
            tails.append(tail_key(self.parent.key))
        return pieces + tails


@dataclass(eq=False, slots=True, kw_only=True)
class Fetch(Lift):
    """A prompt's prefix. `have`: tokens that the request has without it; `limit`: that it can use."""

    chain: TokenChain
    have: int
    limit: int
    tail: tuple[StoreTier, Chunk, Header, memoryview] | None = None


class Promotion(Lifts[Fetch]):
    """Chunks of a prompt's prefix, and the open tail behind them."""

    def fetch(self, namespace: bytes, chain: TokenChain, match: Match, computed: int, limit: int) -> Fetch | None:
        """Begin to bring up what lies below of a prompt's first `limit` tokens, beyond a match in memory and what
        the engine has `computed` itself; None where nothing is to be had, or not worth the wait."""
        have, now = max(match.length, computed), self._clock()
        least = self._hierarchy.page_tokens
        if (
            limit - have < least
            or self._gate.small(limit - have)
            or not any(tier.readable for tier in self._tiers)
        ):
            return None
        fetch = Fetch(
            namespace=namespace,
            chain=chain,
            have=have,
            limit=limit,
            began=now,
            since=now,
            deadline=now + self._deadline,
        )
        gap = self._gap(fetch)
        keys = gap.keys()
        if not keys and not gap.loading:
            return None
        size = (limit - gap.end) * self._payloads.pages.shape.token_bytes
        if keys and self._declines(fetch, limit - have, size, have):
            return None
        self._ask(fetch, keys)
        if not gap.loading and not self._found(fetch):
            return None
        self._answered(fetch)
        return fetch

    def _gap(self, fetch: Fetch) -> Gap:
        """What memory lacks now. Nothing, where a chunk on the way is being computed by another request."""
        chain, parent = fetch.chain, self._hierarchy.root(fetch.namespace)
        raw = chain.tokens.tobytes()
        pieces: list[Piece] = []
        loading: list[Chunk] = []
        start = behind = 0
        for end, key in zip(chain.ends, chain.keys, strict=True):
            if start >= fetch.limit:
                break
            tokens = raw[TOKEN_BYTES * start : TOKEN_BYTES * end]
            chunk = None if pieces else self._hierarchy.get(key, parent, tokens)
            if chunk is None:
                pieces.append(Piece(key, tokens, start))
            elif chunk.ready or chunk in self._loading:
                loading += [chunk] if chunk in self._loading else []
                parent, behind = chunk, end
            else:
                return Gap(parent, behind, [], b"", loading, has_tail=False)
            start = end
        rest = raw[TOKEN_BYTES * start : TOKEN_BYTES * fetch.limit]
        return Gap(parent, behind, pieces, rest, loading, _has_open_child(parent))

    def _load(self, fetch: Fetch) -> None:
        """Reserve room for the pieces that lie below without a gap, and order their reads."""
        gap = self._gap(fetch)  # again: memory may have changed since it was asked
        for chunk in gap.loading:
            self._join(fetch, chunk)
        run: list[tuple[Piece, StoreTier]] = []
        for piece in gap.pieces:
            tier = self._holder(fetch, piece.key)
            if tier is None:
                break
            run.append((piece, tier))
        if run and not self._pays(fetch, run):
            return
        parent = self._order(fetch, gap.parent, run)
        if len(run) == len(fetch.sources) and (run or not gap.has_tail):
            rest = b"".join(piece.tokens for piece in gap.pieces[len(run) :]) + gap.rest
            tier = self._holder(fetch, tail_key(parent.key)) if rest else None
            if tier is not None:
                self._order_tail(fetch, tier, parent, run[-1][0].end if run else gap.end, rest)

    def _pays(self, fetch: Fetch, run: list[tuple[Piece, StoreTier]]) -> bool:
        sizes: dict[str, int] = {}
        for piece, tier in run:
            size = (piece.end - piece.start) * self._payloads.pages.shape.token_bytes
            sizes[tier.name] = sizes.get(tier.name, 0) + size
        return self._worth(fetch, min(run[-1][0].end, fetch.limit) - fetch.have, sizes, fetch.have)

    def _order(self, fetch: Fetch, parent: Chunk, run: list[tuple[Piece, StoreTier]]) -> Chunk:
        """Order the reads of a run behind `parent`, as far as there is room; its last chunk."""
        reads: list[Read] = []
        for piece, tier in run:
            chunk = self._hierarchy.reserve_chunk(piece.key, parent, piece.tokens, piece.start)
            if chunk is None:
                break
            filler = self._payloads.filler(chunk, fetch.namespace, piece.start)
            reads.append(Read(chunk, tier, Wanted(piece.key, filler)))
            parent = chunk
        self._read(fetch, reads, BATCH_BYTES)
        return parent

    def _order_tail(self, fetch: Fetch, tier: StoreTier, parent: Chunk, position: int, rest: bytes) -> None:
        def done(found: list[Any]) -> None:
            fetch.waiting_for.remove(tier)
            if found[0] is not None and shared_tokens(found[0][0].tokens, rest):
                fetch.tail = (tier, parent, *found[0])
            self._loaded(fetch)

        fetch.loading += 1
        fetch.waiting_for.append(tier)
        accept = self._payloads.tail(parent.key, fetch.namespace, position)
        tier.read([Wanted(tail_key(parent.key), accept)], done)

    def _complete(self, fetch: Fetch) -> None:
        if fetch.tail is not None:
            self._attach(fetch, *fetch.tail)
            fetch.tail = None

    def _attach(self, fetch: Fetch, tier: StoreTier, parent: Chunk, header: Header, raw: memoryview) -> None:
        """Put an open tail into memory, if all before it came and is still there."""
        if parent.parent is None:
            parent = self._hierarchy.root(fetch.namespace)
        elif not parent.ready or parent not in self._hierarchy:
            return
        if self._hierarchy.get(header.key, parent, header.tokens) is not None:
            return
        chunk = self._hierarchy.reserve_chunk(header.key, parent, header.tokens, header.position)
        if chunk is not None:
            chunk.open = True
            self._payloads.pages.fill(chunk, raw)
            self._arrived(chunk, tier, header, [fetch])
            fetch.sources[chunk] = tier.name
            fetch.result = "loaded"


def _has_open_child(parent: Chunk) -> bool:
    children = parent.children
    several = children if isinstance(children, list) else [] if children is None else [children]
    return any(child.open for child in several)
