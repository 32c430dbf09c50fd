"""Passages in stored order: of passages whose order is free, the longest chain that stands in the store as it is.

KV of a prefix is exact. So where an application may choose the order of a prompt's passages, it asks first, and
puts those first that memory or a lower tier has behind one another, as the context index of ContextPilot (MLSys
2026) does, which guesses from the client's side what the engine keeps.

The search goes level by level: of the chains found so far, with a passage more each, those go on that are stored;
of many, the `BEAM` longest. In memory a passage is followed by its tokens, however it was cut; of lower tiers the
chunks are asked for, cut as in every prompt whose hints name the passage. It is advice: a lookup decides.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ragkv.kvstore.chunking import Chunker
from ragkv.kvstore.io_pool import ANSWER_SECONDS, IDLE_SECONDS, Completions
from ragkv.kvstore.keys import TOKEN_BYTES, Tokens, chain_keys, window_key
from ragkv.kvstore.memory_tier import MemoryTier
from ragkv.kvstore.planes import reach, window_of
from ragkv.kvstore.prefix_lookup import Part
from ragkv.kvstore.prefix_tree import REACH, Chunk, longest_shared
from ragkv.kvstore.storage_tier import StorageTier

BEAM = 8  # chains that are followed at once
MOST_STEPS = 2048  # chunks that are looked at in one search: bounds its time
MOST_TRIED = 16  # chains of a model with windows or states that may not be long enough


@dataclass(frozen=True, slots=True)
class Ordered:
    """`order`: all passages, by number; those that are stored as a chain come first. `tokens`: of the passages,
    how many that chain has. `given`: how many of them the order given would have. `all`: of all passages."""

    order: tuple[int, ...]
    tokens: int
    given: int
    all: int


@dataclass(frozen=True, slots=True)
class _Text:
    """A passage: its tokens (int32 bytes), their number, and its cuts, where prompts are cut before and behind."""

    raw: bytes
    size: int
    cuts: list[int]


@dataclass(frozen=True, slots=True)
class _Chain:
    """What is stored behind one another: `passages`, by number, which end at position `end`. In memory it has all
    up to the end of `last`, and behind that `tail`, with which the chunk `inside` begins; or else there come
    `parts` of lower tiers, of which the last `fresh` have been added last."""

    passages: tuple[int, ...]
    last: Chunk
    end: int
    tail: bytes = b""
    inside: Chunk | None = None
    parts: tuple[Part, ...] = ()
    fresh: int = 0

    @property
    def added(self) -> tuple[Part, ...]:
        """The parts that have been added last."""
        return self.parts[len(self.parts) - self.fresh :]


class OrderSearch:
    """One search; `Ordering.begin` makes it. `result`: None until it is over."""

    def __init__(
        self,
        memory: MemoryTier,
        tiers: Sequence[StorageTier],
        chunker: Chunker,
        namespace: bytes,
        before: Tokens,
        passages: Sequence[Tokens],
        deadline: float,
    ) -> None:
        self._memory, self._tiers = memory, tiers
        self._texts = [_text(chunker, each) for each in passages]
        self._alike: dict[bytes, list[int]] = {}  # passages of equal tokens, which only their numbers tell apart
        for number, each in enumerate(self._texts):
            self._alike.setdefault(each.raw, []).append(number)
        self._planes = list(enumerate(memory.planes, 1))
        self.deadline = deadline
        self.asking = 0  # questions without an answer
        self.result: Ordered | None = None
        self._held: set[bytes] = set()  # of the keys that were asked for, those that a tier has
        self._steps = 0
        self._found: list[_Chain] = []
        self._start = len(before)
        start = self._behind(_Chain((), memory.tree.root(namespace), 0), _text(chunker, before), ())
        self._coming = [] if start is None else [start]
        self._try()

    def end(self) -> None:
        """Answer with what is known."""
        if self.result is not None:
            return
        found = sorted(filter(self._stands, self._found), key=lambda each: -each.end)
        length, chain = self._longest(found)
        given, _ = self._longest([each for each in found if _as_given(each)])
        rest = tuple(number for number in range(len(self._texts)) if number not in chain)
        self.result = Ordered(chain + rest, length, given, sum(text.size for text in self._texts))

    def advance(self) -> None:
        """All questions are answered: go on with the chains that are stored."""
        while self.result is None and not self.asking:
            alive = [each for each in self._coming if self._is_held(each) and self._stands(each)]
            self._found += [each for each in alive if each.passages]
            longest = sorted(alive, key=lambda each: -each.end)[:BEAM]  # of equals, the first in the order given
            chains = longest + [each for each in alive if _as_given(each) and each not in longest]
            more = (
                self._behind(each, self._texts[number], (number,))
                for each in chains
                for number in self._left(each)
            )
            self._coming = [each for each in more if each is not None]
            self._try()
            if not self._coming:
                self.end()

    def _left(self, chain: _Chain) -> list[int]:
        """The passages that a chain lacks, of equal ones the first."""
        have = set(chain.passages)
        firsts = (next((number for number in each if number not in have), None) for each in self._alike.values())
        return sorted(number for number in firsts if number is not None)

    def _stands(self, chain: _Chain) -> bool:
        """Whether memory still has its part of a chain: it may have been dropped while a tier was asked."""
        chunks = [each for each in (chain.last, chain.inside) if each is not None and each.parent is not None]
        return all(chunk in self._memory.tree for chunk in chunks)

    def _is_held(self, chain: _Chain) -> bool:
        return all(part.key in self._held for part in chain.added)

    def _try(self) -> None:
        """Ask the tiers for what memory lacks of the chains to come."""
        keys = dict.fromkeys(key for each in self._coming for key in self._keys(each)) if self._tiers else {}
        for tier in self._tiers if keys else ():
            known = tier.known([key for key in keys if key not in self._held])
            self._held.update(key for key, held in known.items() if held)
            unsure = [key for key, held in known.items() if held is None]
            if unsure and tier.readable:
                self._ask(tier, unsure)

    def _ask(self, tier: StorageTier, keys: list[bytes]) -> None:
        def answered(held: list[bool]) -> None:
            self._held.update(key for key, one in zip(keys, held, strict=True) if one)
            self.asking -= 1
            self.advance()

        self.asking += 1
        tier.ask(keys, answered)

    def _keys(self, chain: _Chain) -> list[bytes]:
        """Of a chain's new parts; and of the windows that it may take to go on behind them, or behind what memory
        has of it."""
        keys = [part.key for part in chain.added]
        for number, plane in self._planes:
            spans = self._spans(chain, plane.earliest(chain.end))
            keys += [window_key(each.key, number) for each in spans if self._start_of(each, number) is None]
        return keys

    def _behind(self, chain: _Chain, text: _Text, name: tuple[int, ...]) -> _Chain | None:
        """A chain with a passage more, as far as it is known; None: it is not stored, or was not looked for."""
        passages, end = chain.passages + name, chain.end + text.size
        if self._steps >= MOST_STEPS:
            return None
        if chain.parts:
            return self._below(replace(chain, passages=passages), text, 0)
        last, tail, at, size = chain.last, chain.tail, 0, len(chain.tail) + len(text.raw)
        while at < size:  # always down to the child that shares the most, as of `follow`
            self._steps += 1
            start = max(0, at - len(tail))
            rest = tail[at:] + text.raw[start : start + TOKEN_BYTES * REACH]
            child, same = longest_shared(last, rest)
            if child is None or same < min(len(child), len(rest) // TOKEN_BYTES):
                break
            if same < len(child) and at + len(rest) == size:
                return _Chain(passages, last, end, rest, child)
            if same < len(child):  # a longer chunk than is looked at
                break
            last, at = child, at + TOKEN_BYTES * same
        if at >= size:
            return _Chain(passages, last, end)
        done = (at - len(tail)) // TOKEN_BYTES
        return self._below(_Chain(passages, last, chain.end), text, done) if done >= 0 else None

    def _below(self, chain: _Chain, text: _Text, done: int) -> _Chain | None:
        """A chain with what lower tiers may have of a passage, of which memory has the first `done` tokens."""
        self._steps += 1
        if not self._tiers or (done and done not in text.cuts):
            return None
        ends = [done, *(cut for cut in text.cuts if cut > done)]
        self._steps += len(ends)
        if self._steps > MOST_STEPS:
            return None
        keys = chain_keys(chain.parts[-1].key if chain.parts else chain.last.key, text.raw, ends)
        parts = tuple(
            Part(key, text.raw[TOKEN_BYTES * start : TOKEN_BYTES * stop], chain.end + start, chain.end + stop)
            for key, (start, stop) in zip(keys, pairwise(ends), strict=True)
        )
        return replace(chain, end=chain.end + text.size, parts=chain.parts + parts, fresh=len(parts))

    def _spans(self, chain: _Chain, behind: int) -> list[Chunk | Part]:
        """What a chain is made of, as far as it ends behind a position."""
        found: list[Chunk | Part] = [part for part in chain.parts if part.end > behind]
        chunks: list[Chunk | Part] = [] if chain.inside is None else [chain.inside]
        chunk = chain.last
        while chunk.parent is not None and chunk.end > behind:
            chunks.append(chunk)
            chunk = chunk.parent
        self._steps += len(found) + len(chunks)
        return chunks[::-1] + found

    def _start_of(self, each: Chunk | Part, number: int) -> int | None:
        """From where on a plane has what belongs to a chunk; None: nothing."""
        window = window_of(each, number) if isinstance(each, Chunk) else None
        if window is not None and window.ready:
            return window.position
        if window_key(each.key, number) in self._held:
            return max(each.position, self._memory.planes[number - 1].kept(each.end))
        return None

    def _longest(self, chains: Sequence[_Chain]) -> tuple[int, tuple[int, ...]]:
        """Of chains, the longest first, the one that prompts can go on furthest behind: how many tokens of its
        passages that are, and these."""
        best = 0
        passages: tuple[int, ...] = ()
        behind = min((plane.earliest(self._start) for _, plane in self._planes), default=0)
        for tried, chain in enumerate(chains):
            if chain.end - self._start <= best or tried >= MOST_TRIED:
                break
            end = chain.end
            if self._planes:
                end = reach(self._spans(chain, behind), self._memory.planes, end, 0, self._start_of)
            if end - self._start > best:
                best, passages = end - self._start, chain.passages
        return best, passages


def _text(chunker: Chunker, tokens: Tokens) -> _Text:
    cuts = chunker.cut(tokens, 0, [len(tokens)]) if len(tokens) else []
    return _Text(tokens.tobytes(), len(tokens), cuts)


def _as_given(chain: _Chain) -> bool:
    return chain.passages == tuple(range(len(chain.passages)))


class Ordering:
    """Searches of one cache. `deadline`: seconds that one may wait for lower tiers. `clock`: monotonic seconds."""

    def __init__(
        self,
        memory: MemoryTier,
        tiers: Sequence[StorageTier],
        completions: Completions,
        deadline: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._memory, self._tiers, self._completions = memory, tiers, completions
        self._deadline, self._clock = deadline, clock

    def begin(self, chunker: Chunker, namespace: bytes, before: Tokens, passages: Sequence[Tokens]) -> OrderSearch:
        """Look for the longest chain of `passages` behind the tokens `before`, int32 [n] each."""
        until = self._clock() + self._deadline
        return OrderSearch(self._memory, self._tiers, chunker, namespace, before, passages, until)

    def waits(self, search: OrderSearch, *, idle: bool = False) -> bool:
        """Whether a search is not over; it then waits for tiers, and this is to be called again. Blocks for a few
        ms at most, longer where the engine is `idle`."""
        begun = self._clock()
        search.advance()
        while search.result is None:
            left = min(begun + (IDLE_SECONDS if idle else ANSWER_SECONDS), search.deadline) - self._clock()
            if left <= 0 or not self._completions.drain(left):
                break
        if search.result is None and self._clock() >= search.deadline:
            search.end()
        return search.result is None
