"""What is where: a tree of chunks, found by chain key, or by the tokens that a prompt shares with a child."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

import numpy as np
import xxhash

from ragkv.kvstore.chunking import TokenChain
from ragkv.kvstore.keys import TOKEN_BYTES, Tokens

PAGE_NUMBER_BYTES = 4
REACH = 1024  # tokens that are compared with children at first: few chunks have more
LOOKED_AT = 64  # siblings, to each side, that are passed over since they are not ready


class Chunk:
    """KV of `tokens` (int32 bytes) behind the chunks from `parent` up. Compared by identity.

    `pages`: int32 bytes, the pages that hold it, in order; `device`: likewise, in the device tier. `children`:
    None, one chunk, or a list sorted by tokens (most chunks have one). `position`: of its first token behind
    `root`, its topmost ancestor (itself, where it has no parent). `ready`, `open`, `below` and `hits` share one
    small integer: there may be millions of chunks.
    """

    __slots__ = ("_state", "children", "device", "key", "pages", "parent", "pins", "position", "root", "tokens")

    MOST_BELOW, MOST_HITS = 0b111, 7
    _READY, _OPEN, _BELOW, _HITS = 1, 2, 2, 5  # two masks, two shifts

    def __init__(self, key: bytes, parent: "Chunk | None", tokens: bytes) -> None:
        self.key = key
        self.parent = parent
        self.tokens = tokens
        self.pages = b""
        self.device = b""
        self.pins = 0
        self.children: Chunk | list[Chunk] | None = None
        self.position: int = 0 if parent is None else parent.position + len(parent)
        self.root: Chunk = self if parent is None else parent.root
        self._state = 0

    @property
    def ready(self) -> bool:
        """Its bytes have been written; before that nobody may read them."""
        return bool(self._state & self._READY)

    @ready.setter
    def ready(self, ready: bool) -> None:
        self._state = self._state | self._READY if ready else self._state & ~self._READY

    @property
    def open(self) -> bool:
        """It is an open tail, whose end is not a cut."""
        return bool(self._state & self._OPEN)

    @open.setter
    def open(self, tail: bool) -> None:
        self._state = self._state | self._OPEN if tail else self._state & ~self._OPEN

    @property
    def below(self) -> int:
        """A bit for each lower tier that has been given it."""
        return self._state >> self._BELOW & self.MOST_BELOW

    @below.setter
    def below(self, tiers: int) -> None:
        self._state = self._state & ~(self.MOST_BELOW << self._BELOW) | (tiers & self.MOST_BELOW) << self._BELOW

    @property
    def hits(self) -> int:
        """Uses, as long as it is in memory, counted up to `MOST_HITS`."""
        return self._state >> self._HITS

    @hits.setter
    def hits(self, uses: int) -> None:
        self._state = self._state & ~(-1 << self._HITS) | min(uses, self.MOST_HITS) << self._HITS

    def __len__(self) -> int:
        return len(self.tokens) // TOKEN_BYTES

    @property
    def page_count(self) -> int:
        """Pages of memory that it holds."""
        return len(self.pages) // PAGE_NUMBER_BYTES


class LooseRoot(Chunk):
    """The root of one loose chunk: of KV that is in memory without what it was computed behind, so that it never
    matches a prompt, and is found by its tokens alone. `holder`: key of the chunk that it is a copy of, which
    began at token `position` of a prompt of `namespace`. The loose chunk has the root's key."""

    __slots__ = ("holder", "namespace")

    def __init__(self, namespace: bytes, holder: bytes, position: int) -> None:
        super().__init__(loose_key(holder), None, b"")
        self.namespace, self.holder, self.position = namespace, holder, position


@dataclass(frozen=True, slots=True)
class Match:
    """A stored prefix of a prompt: whole chunks, of which the last may match with its first tokens only.

    `whole_tail`: the last chunk, where all its tokens match but the prompt is cut elsewhere: mostly an open
    tail that the prompt goes on behind.
    """

    chunks: tuple[Chunk, ...]
    length: int
    whole_tail: Chunk | None = None

    def __bool__(self) -> bool:
        return self.length > 0


class Catalogue:
    """All chunks of all namespaces. A namespace's root is a chunk without tokens or pages."""

    def __init__(self) -> None:
        self._chunks: dict[bytes, Chunk] = {}
        self._roots: dict[bytes, Chunk] = {}

    def __len__(self) -> int:
        return len(self._chunks)

    def root(self, namespace: bytes) -> Chunk:
        """The root of a namespace. It is kept as long as a chunk stands behind it."""
        root = self._roots.get(namespace)
        return Chunk(namespace, None, b"") if root is None else root

    def get(self, key: bytes, parent: Chunk, tokens: bytes) -> Chunk | None:
        """The chunk of that key, if it stands behind `parent` and holds just these tokens."""
        chunk = self._chunks.get(key)
        if chunk is None or chunk.parent is not parent or chunk.tokens != tokens:
            return None
        return chunk

    def get_loose(self, holder: bytes) -> Chunk | None:
        """The loose copy of the chunk of that key."""
        return self._chunks.get(loose_key(holder))

    def match(self, root: Chunk, chain: TokenChain, limit: int) -> Match:
        """The longest prefix of `chain`, at most `limit` tokens, that stands ready behind `root`.

        First along the chain's own cuts; from where these are not stored, always to the child that shares the
        most. So the longest, except behind a child that is itself the beginning of its sibling.
        """
        raw = chain.tokens.tobytes()
        chunks: list[Chunk] = []
        parent, start = root, 0
        for end, key in zip(chain.ends, chain.keys, strict=True):
            if start >= limit:
                break
            chunk = self.get(key, parent, raw[TOKEN_BYTES * start : TOKEN_BYTES * end])
            if chunk is None or not chunk.ready:
                break
            chunks.append(chunk)
            parent, start = chunk, end
        tail = None
        while start < limit:
            reach = REACH
            rest = raw[TOKEN_BYTES * start : TOKEN_BYTES * min(limit, start + reach)]
            child, shared = longest_shared(parent, rest)
            while shared == reach:  # else not all of the rest each time: that would be quadratic
                reach *= 2
                rest = raw[TOKEN_BYTES * start : TOKEN_BYTES * min(limit, start + reach)]
                child, shared = longest_shared(parent, rest)
            if child is None:
                break
            chunks.append(child)
            parent, start = child, start + shared
            tail = child if shared == len(child) else None
            if tail is None:
                break
        return Match(tuple(chunks), min(start, limit), tail)

    def insert(self, key: bytes, parent: Chunk, tokens: bytes) -> Chunk | None:
        """Enter a chunk, without pages and not ready; None where the key is taken.

        By `get` that chunk holds other tokens, or stands elsewhere: a collision of hashes.
        """
        if key in self._chunks:
            return None
        chunk = self._chunks[key] = Chunk(key, parent, tokens)
        if parent.parent is None:
            self._roots[parent.key] = parent
        siblings = parent.children
        if siblings is None:
            parent.children = chunk
        elif isinstance(siblings, Chunk):
            parent.children = sorted((siblings, chunk), key=_tokens)
        else:
            bisect.insort(siblings, chunk, key=_tokens)
        return chunk

    def remove(self, chunk: Chunk) -> None:
        """Take out a chunk that has no children. KeyError: not in the catalogue."""
        if chunk.children is not None:
            raise ValueError("catalogue: a chunk with children cannot be removed")
        if self._chunks.get(chunk.key) is not chunk:
            raise KeyError(chunk.key)
        del self._chunks[chunk.key]
        parent = chunk.parent
        assert parent is not None
        siblings = parent.children
        if isinstance(siblings, list):
            del siblings[_index(siblings, chunk)]
            if len(siblings) == 1:
                parent.children = siblings[0]
        else:
            parent.children = None
        if parent.parent is None and parent.children is None:
            self._roots.pop(parent.key, None)

    def everything(self) -> list[Chunk]:
        """All chunks, parents before their children."""
        return list(self._chunks.values())

    def clear(self) -> None:
        """Forget everything; chunks that others still hold stand in no tree any more."""
        self._chunks.clear()
        self._roots.clear()

    def __contains__(self, chunk: Chunk) -> bool:
        return self._chunks.get(chunk.key) is chunk


def longest_shared(parent: Chunk, tokens: bytes) -> tuple[Chunk | None, int]:
    """The ready child of `parent` that shares the most first tokens with `tokens`, and how many.

    In a list sorted by bytes, what shares the longest prefix stands beside the place of insertion.
    """
    children = parent.children
    if children is None:
        return None, 0
    if isinstance(children, Chunk):
        near = [children]
    else:
        place = bisect.bisect_left(children, tokens, key=_tokens)
        after = (children[index] for index in range(place, len(children)))
        before = (children[index] for index in range(place - 1, -1, -1))
        near = [c for side in (after, before) for c in islice(filter(_ready, islice(side, LOOKED_AT)), 1)]
    best, most = None, 0
    for child in near:
        shared = shared_tokens(child.tokens, tokens) if child.ready else 0
        if shared > most:
            best, most = child, shared
    return best, most


def shared_tokens(a: bytes, b: bytes) -> int:
    """How many first tokens two token strings share."""
    if a == b[: len(a)]:
        return len(a) // TOKEN_BYTES
    size = min(len(a), len(b)) // TOKEN_BYTES
    differ = _array(a)[:size] != _array(b)[:size]
    return int(differ.argmax()) if differ.any() else size


def rows(
    chunks: Sequence[Chunk], page_tokens: int, *, device: bool = False
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Rows in the paged tier (page * `page_tokens` + offset) of all tokens of `chunks`, in order; int64. `device`:
    in the device tier."""
    held = [chunk.device if device else chunk.pages for chunk in chunks]
    pages = np.frombuffer(b"".join(held), dtype=np.int32).astype(np.int64)
    sizes = np.array([len(chunk) for chunk in chunks], dtype=np.int64)
    first_pages = list(accumulate((len(each) // PAGE_NUMBER_BYTES for each in held), initial=0))[:-1]
    first_rows = np.array(first_pages, dtype=np.int64) * page_tokens  # were all pages full, and beside each other
    index = np.repeat(first_rows - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
    found: np.ndarray[tuple[int], np.dtype[np.int64]] = pages[index // page_tokens] * page_tokens
    found += index % page_tokens
    return found


def loose_key(holder: bytes) -> bytes:
    """Key of a loose copy of a chunk, given that chunk's key."""
    return xxhash.xxh3_128_digest(b"loose" + holder)


def is_loose(chunk: Chunk) -> bool:
    """Whether a chunk stands outside of the tree of prompts."""
    return isinstance(chunk.parent, LooseRoot)


def starts(chunks: Sequence[Chunk]) -> list[int]:
    """Where each chunk of a chain begins, from its root on."""
    return list(accumulate(map(len, chunks[:-1]), initial=0))[: len(chunks)]


def origin(chunk: Chunk) -> tuple[bytes, int]:
    """The namespace of a chunk, and the position of its first token; of a loose chunk, where it was computed."""
    root = chunk.root
    return root.namespace if isinstance(root, LooseRoot) else root.key, chunk.position


def child_of(parent: Chunk, tokens: bytes) -> Chunk | None:
    """The ready child of `parent` that holds just these tokens."""
    children = parent.children
    if isinstance(children, list):
        place = bisect.bisect_left(children, tokens, key=_tokens)
        children = children[place] if place < len(children) else None
    return children if children is not None and children.ready and children.tokens == tokens else None


def descendants(chunk: Chunk) -> list[Chunk]:
    """A chunk and all that stands behind it, parents before their children."""
    found = [chunk]
    for each in found:
        children = each.children
        if children is not None:
            found += [children] if isinstance(children, Chunk) else children
    return found


def _tokens(chunk: Chunk) -> bytes:
    return chunk.tokens


def _ready(chunk: Chunk) -> bool:
    return chunk.ready


def _array(tokens: bytes) -> Tokens:
    return np.frombuffer(tokens, dtype="<i4")


def _index(siblings: list[Chunk], chunk: Chunk) -> int:
    place = bisect.bisect_left(siblings, chunk.tokens, key=_tokens)
    while siblings[place] is not chunk:
        place += 1
    return place
