"""From the lower tiers up into memory, while a request waits.

A fetch looks for what memory lacks of a prompt (one question a tier, where the tier must be asked), lets the gate
decide, reserves room, reads, and is over when all has come or its deadline has passed. What comes later is there
for the next request. Requests that lack the same chunk wait for the same read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ragkv.kvstore import metrics as m
from ragkv.kvstore.catalogue import Chunk, Match, shared_tokens
from ragkv.kvstore.chunking import TokenChain
from ragkv.kvstore.codec import Header
from ragkv.kvstore.gate import Gate
from ragkv.kvstore.hierarchy import Hierarchy
from ragkv.kvstore.keys import TOKEN_BYTES, tail_key
from ragkv.kvstore.metrics import Metrics
from ragkv.kvstore.payloads import Payloads
from ragkv.kvstore.tier import StoreTier, Wanted

BATCH_BYTES = 8 << 20  # read by one job: enough to be quick, and small enough for several threads to share


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


@dataclass(eq=False, slots=True)
class Fetch:
    """What is being brought up for a request. `have`: tokens that it has without it; `limit`: that it can use.
    `sources`: the tier that each chunk came from. `waiting_for`: a tier for each question, and for the tail, that
    is not answered yet. `over`: the request need not wait any more. `probes`: it does not pay, but somebody has
    to try."""

    namespace: bytes
    chain: TokenChain
    have: int
    limit: int
    began: float
    deadline: float
    answers: dict[str, dict[bytes, bool]] = field(default_factory=dict)
    asking: int = 1
    loading: int = 1
    sizes: dict[str, int] = field(default_factory=dict)
    sources: dict[Chunk, str] = field(default_factory=dict)
    tail: tuple[StoreTier, Chunk, Header, memoryview] | None = None
    waiting_for: list[StoreTier] = field(default_factory=list)
    over: bool = False
    probes: bool = False
    result: str = "missed"


class Promotion:
    """`tiers`: from the quickest to the slowest. `deadline`: seconds that a request may wait."""

    def __init__(
        self,
        hierarchy: Hierarchy,
        payloads: Payloads,
        tiers: Sequence[StoreTier],
        gate: Gate,
        metrics: Metrics,
        clock: Callable[[], float],
        deadline: float,
    ) -> None:
        self._hierarchy, self._payloads, self._tiers = hierarchy, payloads, tuple(tiers)
        self._gate, self._metrics, self._clock, self._deadline = gate, metrics, clock, deadline
        self._loading: dict[Chunk, list[Fetch]] = {}

    def fetch(self, namespace: bytes, chain: TokenChain, match: Match, computed: int, limit: int) -> Fetch | None:
        """Begin to bring up what lies below of a prompt's first `limit` tokens, beyond a match in memory and what
        the engine has `computed` itself; None where nothing is to be had, or not worth the wait."""
        have, now = max(match.length, computed), self._clock()
        readable = [tier for tier in self._tiers if tier.readable]
        if limit - have < self._hierarchy.page_tokens or not readable:
            return None
        fetch = Fetch(namespace, chain, have, limit, now, now + self._deadline)
        gap = self._gap(fetch)
        keys = gap.keys()
        if not keys and not gap.loading:
            return None
        best = {readable[0].name: (limit - gap.end) * self._payloads.pages.shape.token_bytes}
        fetch.probes = bool(keys) and not self._gate.pays(limit - have, best)
        if fetch.probes and not self._gate.allows(limit - have, readable[0].name, best):
            self._metrics.count(m.GATE_DECISIONS, tier=readable[0].name, decision="decline")
            return None
        for tier in self._tiers:
            self._ask(fetch, tier, keys)
        if fetch.asking == 1 and not gap.loading and not any(any(a.values()) for a in fetch.answers.values()):
            return None
        self._answered(fetch)
        return fetch

    def waits(self, fetch: Fetch) -> bool:
        """Whether a request should go on waiting."""
        if not fetch.over and self._clock() >= fetch.deadline:
            reads = {
                first.sources[chunk] for chunk, (first, *more) in self._loading.items() if fetch in (first, *more)
            }
            for tier in self._tiers:
                if tier in fetch.waiting_for or tier.name in reads:
                    tier.late()
            self._end(fetch, "deadline")
        return not fetch.over

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

    def _ask(self, fetch: Fetch, tier: StoreTier, keys: list[bytes]) -> None:
        known = {key: tier.knows(key) for key in keys}
        found = fetch.answers[tier.name] = {key: bool(answer) for key, answer in known.items()}
        unsure = [key for key, answer in known.items() if answer is None]
        if not unsure:
            return

        def done(answers: list[bool]) -> None:
            fetch.waiting_for.remove(tier)
            found.update(zip(unsure, answers, strict=True))
            self._answered(fetch)

        fetch.asking += 1
        fetch.waiting_for.append(tier)
        tier.ask(unsure, done)

    def _answered(self, fetch: Fetch) -> None:
        """One answer is in. With the last: load what is there, unless the request has given up."""
        fetch.asking -= 1
        if fetch.asking:
            return
        if not fetch.over:
            self._load(fetch)
        self._loaded(fetch)

    def _load(self, fetch: Fetch) -> None:
        """Reserve room for the pieces that lie below without a gap, and order their reads."""
        gap = self._gap(fetch)  # again: memory may have changed since it was asked
        for chunk in gap.loading:
            self._loading[chunk].append(fetch)
            fetch.loading += 1
        run: list[tuple[Piece, StoreTier]] = []
        for piece in gap.pieces:
            tier = self._holder(fetch, piece.key)
            if tier is None:
                break
            run.append((piece, tier))
        if run and not self._worth(fetch, run):
            return
        parent = self._order(fetch, gap.parent, run)
        if len(run) == len(fetch.sources) and (run or not gap.has_tail):
            rest = b"".join(piece.tokens for piece in gap.pieces[len(run) :]) + gap.rest
            tier = self._holder(fetch, tail_key(parent.key)) if rest else None
            if tier is not None:
                self._order_tail(fetch, tier, parent, run[-1][0].end if run else gap.end, rest)

    def _holder(self, fetch: Fetch, key: bytes) -> StoreTier | None:
        return next((tier for tier in self._tiers if fetch.answers[tier.name].get(key)), None)

    def _worth(self, fetch: Fetch, run: list[tuple[Piece, StoreTier]]) -> bool:
        sizes: dict[str, int] = {}
        for piece, tier in run:
            size = (piece.end - piece.start) * self._payloads.pages.shape.token_bytes
            sizes[tier.name] = sizes.get(tier.name, 0) + size
        slowest = [tier.name for tier in self._tiers if tier.name in sizes][-1]
        gain = min(run[-1][0].end, fetch.limit) - fetch.have
        allowed = gain > 0 and (fetch.probes or self._gate.allows(gain, slowest, sizes))
        self._metrics.count(m.GATE_DECISIONS, tier=slowest, decision="load" if allowed else "decline")
        if allowed:
            fetch.sizes = sizes
        else:
            fetch.result = "declined"
        return allowed

    def _order(self, fetch: Fetch, parent: Chunk, run: list[tuple[Piece, StoreTier]]) -> Chunk:
        """Order the reads of a run behind `parent`, in batches, as far as there is room; its last chunk."""
        batch: list[tuple[Chunk, Wanted]] = []
        size, current = 0, None
        for piece, tier in run:
            chunk = self._hierarchy.reserve_chunk(piece.key, parent, piece.tokens, piece.start)
            if chunk is None:
                break
            if batch and (tier is not current or size >= BATCH_BYTES):
                self._read(batch, current)
                batch, size = [], 0
            filler = self._payloads.filler(chunk, fetch.namespace, piece.start)
            batch.append((chunk, Wanted(piece.key, filler)))
            size += self._payloads.pages.size(chunk)
            self._loading[chunk] = [fetch]
            fetch.loading += 1
            fetch.sources[chunk] = tier.name
            parent, current = chunk, tier
        self._read(batch, current)
        return parent

    def _read(self, batch: list[tuple[Chunk, Wanted]], tier: StoreTier | None) -> None:
        if tier is None:
            return

        def done(found: list[Any]) -> None:
            for (chunk, _), header in zip(batch, found, strict=True):
                if header is None:
                    self._hierarchy.abandon(chunk)
                else:
                    self._arrived(chunk, tier, header)
                for fetch in self._loading.pop(chunk):
                    fetch.result = fetch.result if header is None else "loaded"
                    self._loaded(fetch)

        tier.read([wanted for _, wanted in batch], done)

    def _arrived(self, chunk: Chunk, tier: StoreTier, header: Header) -> None:
        chunk.below |= tier.bit
        self._hierarchy.commit(chunk)
        if header.expires and chunk in self._hierarchy:
            left = header.expires - self._payloads.wall()
            self._hierarchy.holds.expire(chunk, self._clock() + left)
        self._metrics.count(m.PROMOTED_TOKENS, len(chunk), tier=tier.name)

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

    def _loaded(self, fetch: Fetch) -> None:
        """One read has ended, well or not. With the last, the fetch is over."""
        fetch.loading -= 1
        if fetch.loading:
            return
        if fetch.tail is not None:
            self._attach(fetch, *fetch.tail)
            fetch.tail = None
        if fetch.result == "loaded" and len(fetch.sizes) == 1:  # else it is not clear whose time it was
            ((name, size),) = fetch.sizes.items()
            self._gate.tier(name).note(size, self._clock() - fetch.began)
        if not fetch.over:
            self._end(fetch, fetch.result)

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
            self._arrived(chunk, tier, header)
            fetch.sources[chunk] = tier.name
            fetch.result = "loaded"

    def _end(self, fetch: Fetch, result: str) -> None:
        fetch.over = True
        self._metrics.count(m.WAITS, result=result)
        self._metrics.observe(m.WAIT_SECONDS, max(0.0, self._clock() - fetch.began))


def _has_open_child(parent: Chunk) -> bool:
    children = parent.children
    several = children if isinstance(children, list) else [] if children is None else [children]
    return any(child.open for child in several)
