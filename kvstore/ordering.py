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
from ragkv.kvstore.io_pool import Completions
from ragkv.kvstore.keys import TOKEN_BYTES, Tokens, chain_keys, window_key
from ragkv.kvstore.memory_tier import MemoryTier
from ragkv.kvstore.planes import reach, window_of
from ragkv.kvstore.prefix_lookup import Part
from ragkv.kvstore.prefix_tree import Chunk, longest_shared, shared_tokens
from ragkv.kvstore.storage_tier import StorageTier

BEAM = 8  # chains that are followed at once
MOST_STEPS = 2048  # chunks that are compared in one search: bounds its time
IDLE_SECONDS = 0.005  # that an engine without other work is held up for answers
ANSWER_SECONDS = 0.002  # that any is


@dataclass(frozen=True, slots=True)
class Ordered:
    """`order`: all passages, by number; those that are stored as a chain come first. `tokens`: of the passages,
    how many that chain has. `given`: how many of them the order given would have. `all`: of all passages."""

    order: tuple[int, ...]
    tokens: int
    given: int
    all: int


@dataclass(frozen=True, slots=True)
class _Chain:
    """What is stored behind one another: `passages`, by number, which end at position `end`. In memory it ends in
    `last`, at its token `used`; behind that come `parts` of lower tiers, the last with the key `key`."""

    passages: tuple[int, ...]
    last: Chunk
    used: int
    key: bytes
    end: int
    parts: tuple[Part, ...] = ()


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
        self._memory, self._tiers, self._chunker = memory, tiers, chunker
        self._texts = [(each, self._cuts(each)) for each in passages]
        self._alike: dict[bytes, list[int]] = {}  # passages of equal tokens, which only their numbers tell apart
        for number, each in enumerate(passages):
            self._alike.setdefault(each.tobytes(), []).append(number)
        self._planes = list(enumerate(memory.planes, 1))
        self.deadline = deadline
        self.asking = 0  # questions without an answer
        self.result: Ordered | None = None
        self._held: set[bytes] = set()  # of the keys that were asked for, those that a tier has
        self._steps = 0
        self._coming: list[_Chain] = []
        self._found: list[_Chain] = []
        self._start = len(before)
        root = memory.tree.root(namespace)
        start = self._behind(_Chain((), root, 0, namespace, 0), (before, self._cuts(before)), ())
        self._try([] if start is None else [start])

    def end(self) -> None:
        """Answer with what is known."""
        if self.result is not None:
            return
        count = len(self._texts)
        lengths = [(self._reach(each), each) for each in self._found]
        given = [length for length, each in lengths if each.passages == tuple(range(len(each.passages)))]
        length, best = max(lengths, key=lambda found: found[0], default=(0, None))
        chain = () if best is None or not length else best.passages
        rest = tuple(number for number in range(count) if number not in chain)
        total = sum(len(tokens) for tokens, _ in self._texts)
        self.result = Ordered(chain + rest, length, max(given, default=0), total)

    def advance(self) -> None:
        """All questions are answered: go on with the chains that are stored."""
        while self.result is None and not self.asking:
            alive = [each for each in self._coming if all(part.key in self._held for part in each.parts)]
            self._found += [each for each in alive if each.passages]
            given = [each for each in alive if each.passages == tuple(range(len(each.passages)))]
            longest = sorted(alive, key=lambda each: -each.end)[:BEAM]  # of equals, the first in the order given
            chains = longest + [each for each in given if each not in longest]
            more = [
                longer
                for each in chains
                for number in self._left(each)
                if self._steps < MOST_STEPS
                if (longer := self._behind(each, self._texts[number], (number,))) is not None
            ]
            self._try(more)
            if not more:
                self.end()

    def _left(self, chain: _Chain) -> list[int]:
        """The passages that a chain lacks, of equal ones the first."""
        have = set(chain.passages)
        firsts = (next((number for number in each if number not in have), None) for each in self._alike.values())
        return sorted(number for number in firsts if number is not None)

    def _try(self, chains: list[_Chain]) -> None:
        """Ask the tiers for what memory lacks of `chains`."""
        self._coming = chains
        keys = dict.fromkeys(key for each in chains for key in self._keys(each))
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
        """Of a chain's parts; and of the windows that it may take to go on behind them, or behind what memory has
        of it."""
        keys = [part.key for part in chain.parts]
        for number, plane in self._planes:
            spans = [each for each in self._spans(chain) if each.end > plane.earliest(chain.end)]
            keys += [window_key(each.key, number) for each in spans if self._start_of(each, number) is None]
        return keys

    def _behind(self, chain: _Chain, text: tuple[Tokens, list[int]], name: tuple[int, ...]) -> _Chain | None:
        """A chain with a passage more, as far as it is known; None: it is not stored."""
        tokens, cuts = text
        raw, end = tokens.tobytes(), chain.end + len(tokens)
        last, used, left = chain.last, chain.used, raw if not chain.parts else b""
        self._steps += 1 if left else len(cuts)
        while left:
            self._steps += 1
            if used < len(last):
                same = shared_tokens(last.tokens[TOKEN_BYTES * used :], left)
                if not same or same < min(len(last) - used, len(left) // TOKEN_BYTES):
                    return None
                used += same
            else:
                child, same = longest_shared(last, left)
                if child is None or same < min(len(child), len(left) // TOKEN_BYTES):
                    break
                last, used = child, same
            left = left[TOKEN_BYTES * same :]
        passages = chain.passages + name
        if not left and not chain.parts:
            return replace(chain, passages=passages, last=last, used=used, key=last.key, end=end)
        done = 0 if chain.parts else len(tokens) - len(left) // TOKEN_BYTES
        if used < len(last) or (done and done not in cuts) or not self._tiers:
            return None
        key = chain.key if chain.parts else last.key
        ends = [done, *(cut for cut in cuts if cut > done)]
        keys = chain_keys(key, raw, ends)
        parts = tuple(
            Part(each, raw[TOKEN_BYTES * start : TOKEN_BYTES * stop], chain.end + start, chain.end + stop)
            for each, (start, stop) in zip(keys, pairwise(ends), strict=True)
        )
        return _Chain(passages, last, used, keys[-1], end, chain.parts + parts)

    def _cuts(self, tokens: Tokens) -> list[int]:
        """Where a passage is cut, behind which its prompt is cut too."""
        return self._chunker.cut(tokens, 0, [len(tokens)]) if len(tokens) else []

    def _spans(self, chain: _Chain) -> list[Chunk | Part]:
        chunks: list[Chunk | Part] = []
        chunk: Chunk | None = chain.last
        while chunk is not None and chunk.parent is not None:
            chunks.append(chunk)
            chunk = chunk.parent
        return [*chunks[::-1], *chain.parts]

    def _start_of(self, each: Chunk | Part, number: int) -> int | None:
        """From where on a plane has what belongs to a chunk; None: nothing."""
        window = window_of(each, number) if isinstance(each, Chunk) else None
        if window is not None and window.ready:
            return window.position
        if window_key(each.key, number) in self._held:
            return max(each.position, self._memory.planes[number - 1].kept(each.end))
        return None

    def _reach(self, chain: _Chain) -> int:
        """Tokens of a chain's passages that a prompt can go on behind."""
        end = chain.end
        if self._planes:
            end = reach(self._spans(chain), self._memory.planes, end, 0, self._start_of)
        return max(0, min(end, chain.end) - self._start)


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
