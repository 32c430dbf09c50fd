"""The prefix tree: chunks by chain key, by the tokens that a prompt shares with a child, and by content."""

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import xxhash

from ragkv.kvstore.chunking import TokenChain
from ragkv.kvstore.keys import TOKEN_BYTES, Tokens

PAGE_NUMBER_BYTES = 4
REACH = 1024  # tokens that are compared with children at first: few chunks have more
LOOKED_AT = 64  # siblings, to each side, that are passed over since they are not ready


class Chunk:
    """The KV of some tokens, computed after those of its ancestors. Compared by identity."""

    __slots__ = (
        "children",  # None, one chunk, or a list sorted by tokens (most chunks have one child)
        "device",  # pages in the device tier, as `pages`
        "end",  # position of the token after its last
        "hits",  # uses while it is in memory
        "key",  # chain key, 16 bytes
        "open",  # whether it is an open tail: its end is not a cut
        "pages",  # pages in memory, in order, int32 bytes
        "parent",
        "pins",  # how often it is pinned in memory: the only count
        "position",  # of its first token, from `root` on
        "ready",  # whether its bytes are written; before that nobody may read them
        "root",  # its topmost ancestor; itself, where it has no parent
        "stored_in",  # a bit for each lower tier that was given it
        "tokens",  # int32 bytes
    )

    plane = 0  # of its KV

    def __init__(self, key: bytes, parent: "Chunk | None", tokens: bytes) -> None:
        self.key, self.parent, self.tokens = key, parent, tokens
        self.pages = self.device = b""
        self.ready = self.open = False
        self.pins = self.hits = self.stored_in = 0
        self.children: Chunk | list[Chunk] | None = None
        self.position: int = 0 if parent is None else parent.end
        self.end: int = self.position + len(tokens) // TOKEN_BYTES
        self.root: Chunk = self if parent is None else parent.root

    def __len__(self) -> int:
        return self.end - self.position

    @property
    def page_count(self) -> int:
        """Pages of memory that it holds."""
        return len(self.pages) // PAGE_NUMBER_BYTES


class DetachedRoot(Chunk):
    """The root of one detached chunk: a copy in memory without its ancestors. It never matches a prompt, and is
    found by its tokens alone. `source`: key of the chunk that it is a copy of, whose first token was at
    `position` of a prompt of `namespace`. The detached chunk has the root's key."""

    __slots__ = ("namespace", "source")

    def __init__(self, namespace: bytes, source: bytes, position: int) -> None:
        super().__init__(detached_key(source), None, b"")
        self.namespace, self.source = namespace, source
        self.position = self.end = position


@dataclass(frozen=True, slots=True)
class Match:
    """A stored prefix of a prompt: whole chunks, of which the last may match with its first tokens only.

    `whole_tail`: the last chunk, where all its tokens match but the prompt is cut elsewhere: mostly an open
    tail that the prompt goes on behind. `windows`: of other planes, what is needed to go on at `length`.
    `shared`: how many tokens are stored, were it not for these.
    """

    chunks: tuple[Chunk, ...]
    length: int
    whole_tail: Chunk | None = None
    windows: tuple[Chunk, ...] = ()
    shared: int = field(default=0, compare=False)

    def __bool__(self) -> bool:
        return self.length > 0


class ContentIndex:
    """Which chunks hold some tokens, wherever they were computed: one dictionary access a lookup, then the tokens
    are compared. Most tokens are held by one chunk, which then is kept without a dictionary."""

    def __init__(self) -> None:
        self._held: dict[int, Chunk | dict[Chunk, None]] = {}

    def add(self, chunk: Chunk) -> None:
        """Enter a chunk, once."""
        key = _content_hash(origin(chunk)[0], chunk.tokens)
        held = self._held.get(key)
        if held is None:
            self._held[key] = chunk
        elif isinstance(held, Chunk):
            self._held[key] = {held: None, chunk: None}
        else:
            held[chunk] = None

    def remove(self, chunk: Chunk) -> None:
        """Take a chunk out; no error if it was never entered."""
        key = _content_hash(origin(chunk)[0], chunk.tokens)
        held = self._held.get(key)
        if held is chunk:
            del self._held[key]
        elif isinstance(held, dict) and chunk in held:
            del held[chunk]
            if len(held) == 1:
                self._held[key] = next(iter(held))

    def holders(self, namespace: bytes, tokens: bytes, most: int) -> list[Chunk]:
        """Chunks of a namespace that hold exactly these tokens (int32 bytes), in the order in which they were
        entered; of more than `most` the first and the last, half of each."""
        held = self._held.get(_content_hash(namespace, tokens))
        if held is None:
            return []
        several = [held] if isinstance(held, Chunk) else held
        if len(several) > most:
            last = list(islice(reversed(several), most - most // 2))
            several = [*islice(several, most // 2), *reversed(last)]
        return [chunk for chunk in several if chunk.tokens == tokens and origin(chunk)[0] == namespace]

    def clear(self) -> None:
        """Forget all."""
        self._held.clear()

    def check_integrity(self, chunks: Sequence[Chunk]) -> None:
        """Raise AssertionError unless just these chunks are entered."""
        held = [c for each in self._held.values() for c in (each if isinstance(each, dict) else [each])]
        assert len(held) == len(set(held)) and set(held) == set(chunks), "content index and tree disagree"


class PrefixTree:
    """All chunks of all namespaces. A namespace's root is a chunk without tokens or pages. `by_content`: whether
    `contents` indexes all ready chunks by their tokens; else it is None."""

    def __init__(self, *, by_content: bool = False) -> None:
        self.contents = ContentIndex() if by_content else None
        self._chunks: dict[bytes, Chunk] = {}
        self._roots: dict[bytes, Chunk] = {}

    def __len__(self) -> int:
        return len(self._chunks)

    def __contains__(self, chunk: Chunk) -> bool:
        return self._chunks.get(chunk.key) is chunk

    def __iter__(self) -> Iterator[Chunk]:
        """All chunks, parents before their children."""
        return iter(self._chunks.values())

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

    def match(self, root: Chunk, chain: TokenChain, limit: int) -> Match:
        """The longest prefix of `chain`, at most `limit` tokens, that stands ready behind `root`.

        First along the chain's own cuts, then as of `follow`.
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
        return follow(chunks, parent, start, raw, limit)

    def insert(self, parent: Chunk, chain: Iterable[tuple[bytes, bytes]]) -> list[Chunk]:
        """Enter chunks of these keys and tokens, each behind the one before, without pages and not ready; up to
        the first key that is taken.

        By `get` the chunk of that key holds other tokens, or stands elsewhere: a collision of hashes.
        """
        new: list[Chunk] = []
        for key, tokens in chain:
            if key in self._chunks:
                break
            chunk = Chunk(key, parent, tokens)
            self.add(chunk, parent)
            new.append(chunk)
            parent = chunk
        return new

    def add(self, chunk: Chunk, parent: Chunk) -> None:
        """Enter a chunk behind `parent`. ValueError: its key is taken."""
        if chunk.key in self._chunks:
            raise ValueError("prefix tree: a chunk of that key is there")
        self._chunks[chunk.key] = chunk
        if parent.parent is None:
            self._roots[parent.key] = parent
        siblings = parent.children
        if siblings is None:
            parent.children = chunk
        elif isinstance(siblings, Chunk):
            parent.children = sorted((siblings, chunk), key=_tokens)
        else:
            bisect.insort(siblings, chunk, key=_tokens)

    def remove(self, chunk: Chunk) -> None:
        """Take out a chunk that has no children. KeyError: not in the tree."""
        if chunk.children is not None:
            raise ValueError("prefix tree: a chunk with children cannot be removed")
        if self._chunks.get(chunk.key) is not chunk:
            raise KeyError(chunk.key)
        del self._chunks[chunk.key]
        if self.contents is not None:
            self.contents.remove(chunk)
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

    def mark_ready(self, *chunks: Chunk) -> None:
        """The chunks' bytes are written; from now on they can be found, but for those that have left the tree."""
        for chunk in chunks:
            if self.contents is not None and not (chunk.ready or chunk.plane) and chunk in self:
                self.contents.add(chunk)
            chunk.ready = True

    def clear(self) -> None:
        """Forget everything; chunks that others still hold are in no tree any more."""
        self._chunks.clear()
        self._roots.clear()
        if self.contents is not None:
            self.contents.clear()


def follow(chunks: list[Chunk], parent: Chunk, start: int, raw: bytes, limit: int) -> Match:
    """Go on behind `chunks`, the last of them `parent`, which hold `start` tokens: always to the child that shares
    the most. So the longest way, except behind a child that is itself the beginning of its sibling."""
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
        if shared < len(child):
            child = _best_alike(parent, rest[: TOKEN_BYTES * shared], child)
        chunks.append(child)
        parent, start = child, start + shared
        tail = child if shared == len(child) else None
        if tail is None:
            break
    length = min(start, limit)
    return Match(tuple(chunks), length, tail, shared=length)


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


def _best_alike(parent: Chunk, tokens: bytes, found: Chunk) -> Chunk:
    """Of the children of `parent` that begin with these tokens, of which `found` is one, that which other planes
    have something of: at the end of these tokens, or else behind them."""
    children = parent.children
    if not isinstance(children, list):
        return found
    place = bisect.bisect_left(children, tokens, key=_tokens)
    for child in islice(children, place, place + LOOKED_AT):
        if not child.tokens.startswith(tokens):
            break
        last = child.children[-1] if isinstance(child.children, list) else child.children
        if child.ready and (child.tokens == tokens or (last is not None and last.plane)):
            return child
    return found


def shared_tokens(a: bytes, b: bytes) -> int:
    """How many first tokens two token strings share."""
    if a == b[: len(a)]:
        return len(a) // TOKEN_BYTES
    size = min(len(a), len(b)) // TOKEN_BYTES
    differ = _array(a)[:size] != _array(b)[:size]
    return int(differ.argmax()) if differ.any() else size


def detached_key(source: bytes) -> bytes:
    """Key of a detached copy of the chunk of key `source`."""
    return xxhash.xxh3_128_digest(b"loose" + source)


def is_detached(chunk: Chunk) -> bool:
    """Whether a chunk is outside of the tree of prompts."""
    return isinstance(chunk.parent, DetachedRoot)


def origin(chunk: Chunk) -> tuple[bytes, int]:
    """The namespace of a chunk, and the position of its first token where it was computed."""
    root = chunk.root
    return root.namespace if isinstance(root, DetachedRoot) else root.key, chunk.position


def children_of(parents: Sequence[Chunk], tokens: bytes) -> list[Chunk | None]:
    """The ready child of each of `parents` that holds just these tokens."""
    found = [child_of(parent, tokens) for parent in parents]
    return [child if child is not None and child.ready else None for child in found]


def child_of(parent: Chunk, tokens: bytes) -> Chunk | None:
    """The child of `parent` that holds just these tokens, ready or not."""
    child = parent.children
    if isinstance(child, list):
        place = bisect.bisect_left(child, tokens, key=_tokens)
        child = child[place] if place < len(child) else None
    return child if child is not None and child.tokens == tokens else None


def has_open_child(parent: Chunk) -> bool:
    """Whether a child of `parent` is an open tail."""
    children = parent.children
    several = children if isinstance(children, list) else [] if children is None else [children]
    return any(child.open for child in several)


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


def _content_hash(namespace: bytes, tokens: bytes) -> int:
    return xxhash.xxh3_64_intdigest(tokens, int.from_bytes(namespace[:8], "little"))


def _array(tokens: bytes) -> Tokens:
    return np.frombuffer(tokens, dtype="<i4")


def _index(siblings: list[Chunk], chunk: Chunk) -> int:
    place = bisect.bisect_left(siblings, chunk.tokens, key=_tokens)
    while siblings[place] is not chunk:
        place += 1
    return place
