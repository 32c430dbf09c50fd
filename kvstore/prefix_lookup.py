"""What lower tiers have of a prompt's prefix: which keys to ask for, what to read of them, and in which order it
enters memory.

Beyond what memory has, a prompt goes on in whole chunks, found by the prompt's own cuts; then in a tail, whose
tokens are known once it is read. Where a model has several planes, it can only go on where each has what its
layers attend to: then windows are read as well, and no chunk behind the last position that can be reached. How far
a window reaches back is known once it is read. Until then it is taken to be enough; if not, what was read for
nothing is there for the next request.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ragkv.kvstore.chunking import TokenChain
from ragkv.kvstore.codec import ChunkCodec, Header
from ragkv.kvstore.io_pool import Wanted
from ragkv.kvstore.keys import TOKEN_BYTES, tail_key, tail_keys, window_key
from ragkv.kvstore.memory_tier import MemoryTier
from ragkv.kvstore.planes import reach, window_of
from ragkv.kvstore.prefix_tree import Chunk, Match, has_open_child, shared_tokens
from ragkv.kvstore.promotion import Promotion, Read
from ragkv.kvstore.prompt import Fetch
from ragkv.kvstore.storage_tier import StorageTier

SHORTEST = 16  # tokens: fewer are computed sooner than asked for
MOST_TAILS = 4  # behind one another; a prompt and its answer leave one each


@dataclass(frozen=True, slots=True)
class Part:
    """A chunk of a prompt that memory lacks: its key (for a tail its address), its tokens, and their positions."""

    key: bytes
    tokens: bytes
    position: int
    end: int


@dataclass(frozen=True, slots=True)
class Tail:
    """A tail that was read, to be attached to `parent`, once all before it has come."""

    tier: StorageTier
    parent: Chunk
    header: Header
    raw: memoryview


@dataclass(slots=True)
class Prefix:
    """What a fetch of a prompt's prefix is for: `have` tokens the request has without it, of which the engine has
    `computed` itself; `limit` it can use. `tail`: that was read last. `tails`: how many were."""

    chain: TokenChain
    computed: int
    have: int
    limit: int
    tail: Tail | None = None
    tails: int = 0


@dataclass(frozen=True, slots=True)
class Way:
    """How a prompt may go on: behind `chunks` in memory, ready or on their way, the last of them `parent`, which
    is the prompt's up to position `upto`, come `parts` of lower tiers, and then maybe a tail of `rest`, the
    tokens that are left. `has_tail`: memory has one behind `parent`."""

    parent: Chunk
    upto: int
    chunks: list[Chunk]
    parts: list[Part]
    rest: bytes
    has_tail: bool

    def wanted(self) -> list[bytes]:
        """Keys of all of it: the parts, and a tail after each of them."""
        parts = [part.key for part in self.parts]
        open_end = (self.rest or parts) and not self.has_tail
        return parts + tail_keys([*parts, self.parent.key] if open_end else parts)

    @property
    def spans(self) -> list[Chunk | Part]:
        """All of it, but for a tail."""
        return [*self.chunks, *self.parts]

    @property
    def end(self) -> int:
        """Where it ends, but for a tail."""
        return self.parts[-1].end if self.parts else self.upto

    def held(self, fetch: Fetch) -> "Way":
        """The way as far as lower tiers have its parts without a gap."""
        count = next((n for n, part in enumerate(self.parts) if part.key not in fetch.holders), len(self.parts))
        rest = b"".join(part.tokens for part in self.parts[count:]) + self.rest
        return replace(self, parts=self.parts[:count], rest=rest)

    def tail(self) -> Part | None:
        """What may be read of a tail."""
        if not self.rest or (self.has_tail and not self.parts):
            return None
        key = self.parts[-1].key if self.parts else self.parent.key
        return Part(tail_key(key), self.rest, self.end, self.end + len(self.rest) // TOKEN_BYTES)


class PrefixLookup:
    """Of a memory tier and the tiers below it."""

    def __init__(self, memory: MemoryTier, codec: ChunkCodec, promotion: Promotion) -> None:
        self._memory, self._codec, self._promotion = memory, codec, promotion
        self._planes = list(enumerate(memory.planes, 1))

    def fetch(self, namespace: bytes, chain: TokenChain, match: Match, computed: int, limit: int) -> Fetch | None:
        """Begin to bring up what lower tiers have of a prompt's first `limit` tokens, beyond a match in memory and
        what the engine has `computed` itself; None where there is nothing, or it is not worth the wait."""
        have, promotion = max(match.length, computed), self._promotion
        short = limit - have < min(SHORTEST, self._memory.page_tokens) or promotion.gate.small(limit - have)
        if short or not promotion.readable:
            return None
        prefix = Prefix(chain, computed, have, limit)
        ways, loading = self._ways(namespace, prefix)
        keys = self._wanted(ways, prefix)
        if not keys and not loading:
            return None
        lacking = max(0, limit - ways[0].upto)
        probes = promotion.probes(limit - have, lacking, have) if keys else False
        if probes is None:
            return None
        load = functools.partial(self._load, prefix=prefix)
        complete = functools.partial(self._attach, prefix=prefix)
        return promotion.begin(namespace, keys, load, complete, probes=probes, coming=bool(loading))

    def _ways(self, namespace: bytes, prefix: Prefix) -> tuple[list[Way], list[Chunk]]:
        """How the prompt may go on, and what is on its way of that. Along its own cuts: not at all, where a chunk
        is being computed by another request. With several planes also along what memory has in other cuts."""
        chain, memory, parent = prefix.chain, self._memory, self._memory.tree.root(namespace)
        raw = chain.tokens.tobytes()
        parts: list[Part] = []
        chunks: list[Chunk] = []
        start, known = 0, True
        for end, key in zip(chain.ends, chain.keys, strict=True):
            if start >= prefix.limit:
                break
            tokens = raw[TOKEN_BYTES * start : TOKEN_BYTES * end]
            chunk = None if parts else memory.tree.get(key, parent, tokens)
            if chunk is None:
                parts.append(Part(key, tokens, start, end))
            elif chunk.ready or chunk in self._promotion.loading:
                chunks.append(chunk)
                parent = chunk
            else:
                known = False
                break
            start = end
        rest = raw[TOKEN_BYTES * start : TOKEN_BYTES * prefix.limit] if known else b""
        ways = [Way(parent, parent.end, chunks, parts, rest, known and has_open_child(parent))]
        if self._planes:
            ways += self._beside(namespace, prefix, chunks)
        windows = (window_of(chunk, number) for way in ways for chunk in way.chunks for number, _ in self._planes)
        coming = (each for each in (*chunks, *windows) if each is not None and each in self._promotion.loading)
        return ways, list(dict.fromkeys(coming))

    def _beside(self, namespace: bytes, prefix: Prefix, chunks: list[Chunk]) -> list[Way]:
        """The way along what memory has behind `chunks`, which ends where the prompt is not cut, and on from
        there: the request that stored it was cut there."""
        chain = prefix.chain
        found = self._memory.tree.match(self._memory.tree.root(namespace), chain, prefix.limit)
        if len(found.chunks) <= len(chunks) or found.chunks[: len(chunks)] != tuple(chunks):
            return []
        last, start = found.chunks[-1], found.length
        parts: list[Part] = []
        rest = b""
        if start == last.end:
            for end, key in chain.behind(start, last.key):
                if start < prefix.limit:
                    parts.append(Part(key, chain.tokens[start:end].tobytes(), start, end))
                    start = end
            rest = chain.tokens[start : prefix.limit].tobytes()
        return [Way(last, found.length, list(found.chunks), parts, rest, has_open_child(last))]

    def _wanted(self, ways: Sequence[Way], prefix: Prefix) -> list[bytes]:
        """Keys of all that may lead on, once each; of windows those that a position beyond `have` may need."""
        windows = (
            window_key(each.key, number)
            for way in ways
            for number, plane in self._planes
            for each in way.spans
            if each.end > plane.first(prefix.have) and self._lacks(each, number)
        )
        return list(dict.fromkeys([*(key for way in ways for key in way.wanted()), *windows]))

    def _load(self, fetch: Fetch, prefix: Prefix) -> None:
        """Reserve room for what leads furthest, and order its reads."""
        promotion = self._promotion
        ways, loading = self._ways(fetch.namespace, prefix)  # again: memory may have changed since it was asked
        for chunk in loading:
            promotion.join(fetch, chunk)
        held = [way.held(fetch) for way in ways]
        end, best = max((self._reach(fetch, prefix, way), number) for number, way in enumerate(held))
        way = held[best]
        tail = way.tail() if end >= way.end else None
        tier = fetch.holders.get(tail.key) if tail is not None else None
        run = [part for part in way.parts if part.position < end]
        windows = self._windows(fetch, prefix, way, min(end, way.end))
        if tail is not None and any(plane.state for _, plane in self._planes):  # the tail may be another prompt's
            sure = self._reach(fetch, prefix, replace(way, rest=b""))
            windows = list(dict.fromkeys([*windows, *self._windows(fetch, prefix, way, sure)]))
        if (run or windows) and not self._worth(fetch, prefix, run, windows, end):
            return
        self._memory.pin(way.chunks[-1:])
        new = self._memory.reserve_chain(way.parent, [(part.key, part.tokens) for part in run])
        wanted = [Wanted(chunk.key, accept) for chunk, accept in zip(new, self._codec.readers(new), strict=True)]
        reads = [Read(chunk, fetch.holders[chunk.key], w) for chunk, w in zip(new, wanted, strict=True)]
        promotion.read(fetch, reads + self._reserve_windows(fetch, windows, new))
        self._memory.unpin(way.chunks[-1:])
        if tail is not None and tier is not None and len(new) == len(way.parts):
            self._read_tail(fetch, prefix, tier, new[-1] if new else way.parent, tail)

    def _worth(
        self,
        fetch: Fetch,
        prefix: Prefix,
        run: Sequence[Part],
        windows: Sequence[tuple[Chunk | Part, int]],
        end: int,
    ) -> bool:
        """What the gate says of reading these, so that the prompt can go on at `end`."""
        shares = [shape.token_bytes / self._codec.pages.token_bytes for shape in self._codec.pages.shapes]
        wanted: list[tuple[bytes, Chunk | Part, float]] = [(part.key, part, shares[0]) for part in run]
        for each, number in windows:
            wanted.append((window_key(each.key, number), each, shares[number]))
        sizes: dict[str, int] = {}
        for key, each, share in wanted:
            name = fetch.holders[key].name
            sizes[name] = sizes.get(name, 0) + round((each.end - each.position) * share)
        return self._promotion.worth(fetch, min(end, prefix.limit) - prefix.have, sizes, prefix.have)

    def _reach(self, fetch: Fetch, prefix: Prefix, way: Way) -> int:
        """Up to where the prompt can go on, if what lower tiers hold is what it takes."""
        if not self._planes:
            return way.end
        tail = way.tail()
        tail = tail if tail is not None and tail.key in fetch.holders else None
        spans = way.spans + ([tail] if tail is not None else [])
        limit = min(way.end if tail is None else tail.end, prefix.limit)

        def start_of(each: Chunk | Part, number: int) -> int | None:
            window = window_of(each, number) if isinstance(each, Chunk) else None
            if window is not None and (window.ready or window in self._promotion.loading):
                return window.position
            if each is tail or (window is None and window_key(each.key, number) in fetch.holders):
                end = min(each.end, limit) if each is tail else each.end  # where a tail ends is not known yet
                return max(each.position, self._memory.planes[number - 1].kept(end))
            return None

        return reach(spans, self._memory.planes, limit, prefix.computed, start_of)

    def _windows(self, fetch: Fetch, prefix: Prefix, way: Way, end: int) -> list[tuple[Chunk | Part, int]]:
        """What lower tiers hold, and memory lacks, of what it takes to go on at `end`, or behind it in a tail."""
        return [
            (each, number)
            for number, plane in self._planes
            for each in way.spans
            if each.position < end and each.end > max(prefix.computed, plane.first(end))
            if self._lacks(each, number) and window_key(each.key, number) in fetch.holders
        ]

    def _reserve_windows(
        self, fetch: Fetch, windows: Sequence[tuple[Chunk | Part, int]], new: Sequence[Chunk]
    ) -> list[Read]:
        """Room for windows, those of parts behind the chunks that are `new`."""
        by_key, reads = {chunk.key: chunk for chunk in new}, []
        for each, number in windows:
            chunk = by_key.get(each.key) if isinstance(each, Part) else each
            if chunk is None or chunk not in self._memory:
                continue
            first = max(each.position, self._memory.planes[number - 1].earliest(each.end))
            window = self._memory.reserve_window(chunk, number, first)
            if window is not None:
                (accept,) = self._codec.readers([window])
                reads.append(Read(window, fetch.holders[window.key], Wanted(window.key, accept)))
        return reads

    @staticmethod
    def _lacks(each: Chunk | Part, number: int) -> bool:
        return isinstance(each, Part) or window_of(each, number) is None

    def _read_tail(self, fetch: Fetch, prefix: Prefix, tier: StorageTier, parent: Chunk, tail: Part) -> None:
        accept = self._codec.tail_reader(fetch.namespace, parent.key, tail.position)

        def done(found: list[Any]) -> None:
            if found[0] is not None and shared_tokens(found[0][0].tokens, tail.tokens):
                prefix.tail = Tail(tier, parent, *found[0])

        self._promotion.read_beside(fetch, tier, [Wanted(tail.key, accept)], done)

    def _attach(self, fetch: Fetch, prefix: Prefix) -> bool:
        """Put an open tail into memory, if all before it came and is still there. With several planes the prompt
        may go on behind it (a prompt's answer lies there), and needs its windows: whether these are asked for."""
        tail, prefix.tail = prefix.tail, None
        if tail is None:
            return False
        parent, header = tail.parent, tail.header
        if parent.parent is None:
            parent = self._memory.tree.root(fetch.namespace)
        elif not parent.ready or parent not in self._memory:
            return False
        if self._memory.tree.get(header.key, parent, header.tokens) is not None:
            return False
        chunk = self._memory.reserve_chunk(header.key, parent, header.tokens)
        if chunk is None:
            return False
        chunk.open = True
        self._codec.pages.fill(chunk, tail.raw)
        self._promotion.arrived(tail.tier, {chunk: header}, {chunk: [fetch]})
        fetch.sources[chunk] = tail.tier.name
        fetch.result = "loaded"
        prefix.tails += 1
        if not self._planes or fetch.over or prefix.tails >= MOST_TAILS:
            return False
        ways, _ = self._ways(fetch.namespace, prefix)
        self._promotion.ask_again(fetch, self._wanted(ways, prefix))
        return True
