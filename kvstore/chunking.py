"""Where chunks end: the text's own structure first, a rolling hash second.

A chunk ends at the first paragraph break between `min_tokens` and `max_tokens` of its start; where there is
none, at the first token in that range at which a hash of the last few tokens says so; at `max_tokens` at the
latest. Boundaries that the caller names come first, unless two chunks in a row got shorter than `min_tokens` by
them. A decision looks at nothing before the chunk's start, so the same passage is cut alike wherever it stands:
content-defined chunking (Muthitacharoen, Chen, Mazières: "A Low-bandwidth Network File System", SOSP 2001, section
3.1), with paragraphs for anchors.
"""

import bisect
import functools
import re
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from ragkv.kvstore.keys import Tokens, chain_key, chain_keys

HASH_WINDOW = 16
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, from the golden ratio; inverse below is its inverse modulo 2**64
_INVERSE = pow(_MULTIPLIER, -1, 2**64)

_HOLDS_BREAK = re.compile(r"\n[^\S\n]*\n")
_OPENS = re.compile(r"\n[^\S\n]*\Z")
_CLOSES = re.compile(r"[^\S\n]*\n")
_SPACE = re.compile(r"[^\S\n]*\Z")
HOLDS, OPENS, CLOSES, SPACE = 1, 2, 4, 8


class TokenStructure:
    """What each entry of a vocabulary says about blank lines. A blank line may be spread over tokens."""

    def __init__(self, flags: npt.NDArray[np.uint8]) -> None:
        self._flags = np.append(flags, np.uint8(0))

    @classmethod
    def of(cls, texts: Iterable[str]) -> "TokenStructure":
        """From the text of every token, in the order of their ids."""
        return cls(np.fromiter((_classify(text) for text in texts), dtype=np.uint8))

    def breaks(self, tokens: Tokens) -> npt.NDArray[np.int64]:
        """Ends of paragraphs, ascending: positions p such that a run of line breaks ends with token p - 1.

        The last token is never taken for one, since the run may go on. Ids outside the vocabulary are text.
        """
        flags = self._flags.take(tokens.view(np.uint32), mode="clip")  # unknown ids read the padding
        closing = np.flatnonzero(flags & (HOLDS | CLOSES))
        last_solid = np.where(flags & SPACE, -1, np.arange(len(tokens)))  # the last that is not a space
        before = np.append(-1, np.maximum.accumulate(last_solid))[closing]
        opened = (before >= 0) & ((flags[before] & OPENS) != 0)
        ends: npt.NDArray[np.int64] = closing[((flags[closing] & HOLDS) != 0) | opened] + 1
        run_goes_on = np.append(ends[1:] == ends[:-1] + 1, False)
        return ends[~run_goes_on & (ends < len(tokens))]


def _classify(text: str) -> int:
    return (
        HOLDS * bool(_HOLDS_BREAK.search(text))
        + OPENS * bool(_OPENS.search(text))
        + CLOSES * bool(_CLOSES.match(text))
        + SPACE * (bool(_SPACE.match(text)) and bool(text))
    )


class Chunker:
    """Cuts token sequences. Sizes in tokens; `HASH_WINDOW` <= min < average <= max."""

    def __init__(self, min_tokens: int, average_tokens: int, max_tokens: int, structure: TokenStructure) -> None:
        if not HASH_WINDOW <= min_tokens < average_tokens <= max_tokens:
            raise ValueError(
                f"chunk sizes {min_tokens}/{average_tokens}/{max_tokens}: "
                f"need {HASH_WINDOW} <= min < average <= max"
            )
        self.min_tokens, self.max_tokens = min_tokens, max_tokens
        self._threshold = np.uint64(2**64 // (average_tokens - min_tokens) - 1)
        self._structure = structure

    def cut(self, tokens: Tokens, start: int = 0, named: Sequence[int] = ()) -> list[int]:
        """Ends, ascending, of all chunks from `start` on that later tokens cannot change.

        `start`: 0 or an end that an earlier call gave for a prefix of `tokens`. `named`: ascending boundaries.
        Those that are kept (`_kept`) make the only chunks that are shorter than `min_tokens`, and never two in a
        row (where two chunks of `min_tokens` fit into one of `max_tokens`). The tokens behind the last end are an
        open tail, shorter than `max_tokens` + 1.
        """
        size, named = len(tokens), self._kept(named)
        if size - start < self.min_tokens and not named:
            return []
        paragraphs = self._structure.breaks(tokens).tolist()
        hashed: list[int] | None = None
        ends: list[int] = []
        while True:
            low, high = start + self.min_tokens, start + self.max_tokens
            name, end = _next(named, start + 1), _next(paragraphs, low)
            kept = name is not None and name <= high and (end is None or end > name - self.min_tokens)
            if name is not None and kept:  # a chunk that ended before it would leave too little for one up to it
                if name > size:
                    return ends
                end = name
            elif end is None or end > high:
                if size <= high:
                    return ends
                if hashed is None:
                    hashed = (np.flatnonzero(rolling_hash(tokens) <= self._threshold) + 1).tolist()
                end = _next(hashed, low)
                end = high if end is None or end > high else end
            if name is not None and not kept and low <= name - self.min_tokens < end:
                end = name - self.min_tokens
            ends.append(end)
            start = end

    def _kept(self, named: Sequence[int]) -> list[int]:
        """Of ascending boundaries those that stand `min_tokens` or more behind the last that is kept, or behind
        the beginning; and those that stand nearer, if the last one did not."""
        kept: list[int] = []
        last, near = 0, False
        for name in named:
            if name - last >= self.min_tokens or not near:
                last, near = name, name - last < self.min_tokens
                kept.append(name)
        return kept


def rolling_hash(tokens: Tokens) -> npt.NDArray[np.uint64]:
    """At each position, a 64-bit hash of the `HASH_WINDOW` tokens that end there (uint64, same shape).

    Polynomial in the manner of Karp and Rabin, modulo 2**64, by differences of a running sum; scrambled at
    the end, since its low bits are weak.
    """
    size = len(tokens)
    terms = _scramble(tokens.astype(np.uint64)) * _powers(_INVERSE, size)
    sums = np.cumsum(terms, dtype=np.uint64)
    sums[HASH_WINDOW:] -= sums[:-HASH_WINDOW].copy()
    return _scramble(sums * _powers(_MULTIPLIER, size))


def _scramble(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _powers(base: int, size: int) -> npt.NDArray[np.uint64]:
    """base**0 … base**(size - 1), modulo 2**64."""
    return _power_table(base, 1 << max(size - 1, 1).bit_length())[:size]


@functools.lru_cache(maxsize=4)
def _power_table(base: int, size: int) -> npt.NDArray[np.uint64]:
    steps = np.full(size, base, dtype=np.uint64)
    steps[0] = 1
    return np.cumprod(steps, dtype=np.uint64)


def _next(ascending: Sequence[int], at_least: int) -> int | None:
    index = bisect.bisect_left(ascending, at_least)
    return ascending[index] if index < len(ascending) else None


class TokenChain:
    """The tokens of one request, cut and named as far as they are known.

    `tokens` int32 [n]; `ends[i]` and `keys[i]`: end position and chain key of the i-th decided chunk. `loose`:
    ascending ends where only this request is cut (its prompt ends there), so that to others that chunk is an open
    tail.
    """

    def __init__(
        self, root_key: bytes, chunker: Chunker, named: Sequence[int] = (), loose: Sequence[int] = ()
    ) -> None:
        self.tokens: Tokens = np.empty(0, dtype=np.int32)
        self.ends: list[int] = []
        self.keys: list[bytes] = []
        self.loose = list(loose)
        self._root_key = root_key
        self._chunker = chunker
        self._named = named

    def extend(self, more: Tokens) -> None:
        """Append tokens; what was decided stays."""
        self.tokens = np.concatenate([self.tokens, more]) if len(self.tokens) else more
        start = self.ends[-1] if self.ends else 0
        ends: list[int] = []
        for loose in [each for each in self.loose if start < each <= len(self.tokens)]:
            ends += self._chunker.cut(self.tokens[:loose], ends[-1] if ends else start, self._named)
            if ends and ends[-1] == loose:
                self.loose.remove(loose)
            else:
                ends.append(loose)
        ends += self._chunker.cut(self.tokens, ends[-1] if ends else start, self._named)
        key = self.keys[-1] if self.keys else self._root_key
        self.keys += chain_keys(key, self.tokens.tobytes(), [start, *ends])
        self.ends += ends

    def as_others(self) -> "TokenChain":
        """The same tokens, cut as in other prompts."""
        if not self.loose:
            return self
        plain = TokenChain(self._root_key, self._chunker, self._named)
        plain.extend(self.tokens)
        return plain

    def behind(self, end: int, key: bytes) -> list[tuple[int, bytes]]:
        """End and key of each decided chunk, if the tokens were cut at `end`, behind a chunk of that key."""
        ends = self._chunker.cut(self.tokens, end, self._named)
        return list(zip(ends, chain_keys(key, self.tokens.tobytes(), [end, *ends]), strict=True))

    def cuts(self, upto: int) -> list[tuple[int, bytes]]:
        """End and key of each chunk of the first `upto` tokens, of which the last may be an open tail."""
        upto, whole = min(upto, len(self.tokens)), bisect.bisect_right(self.ends, upto)
        found = list(zip(self.ends[:whole], self.keys[:whole], strict=True))
        end, key = found[-1] if found else (0, self._root_key)
        if end < upto:
            found.append((upto, chain_key(key, self.tokens[end:upto].tobytes())))
        return found
