"""A store of chunks without bytes, for tests of matching; and passages as an application sends them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np

from ragkv.kvstore.chunking import Chunker, TokenChain
from ragkv.kvstore.fusion.matching import Piece, find_moved
from ragkv.kvstore.keys import TOKEN_BYTES, as_tokens, chain_key
from ragkv.kvstore.prefix_tree import Chunk, DetachedRoot, PrefixTree

NAMESPACE = b"n" * 16


def part(chunk: Chunk, first: int, size: int) -> list[int]:
    """Tokens of a chunk, from its token `first` on."""
    return np.frombuffer(chunk.tokens, dtype="<i4")[first : first + size].tolist()


class TokenStore:
    """Stores prompts as `MemoryTier.reserve` does: cuts, and an open tail; without pages."""

    def __init__(self, chunker: Chunker) -> None:
        self.chunker = chunker
        self.catalogue = PrefixTree(by_content=True)
        self.contents = self.catalogue.contents

    def chain(self, tokens: Sequence[int], named: Sequence[int] = (), namespace: bytes = NAMESPACE) -> TokenChain:
        """A prompt, cut."""
        chain = TokenChain(namespace, self.chunker, named)
        chain.extend(as_tokens(tokens))
        return chain

    def add(self, tokens: Sequence[int], named: Sequence[int] = (), namespace: bytes = NAMESPACE) -> list[Chunk]:
        """Store a prompt; all its chunks, from the root on."""
        chain = self.chain(tokens, named, namespace)
        ends = [*chain.ends, len(tokens)] if (chain.ends or [0])[-1] < len(tokens) else chain.ends
        return self.add_cut(tokens, ends, namespace)

    def add_cut(self, tokens: Sequence[int], ends: Iterable[int], namespace: bytes = NAMESPACE) -> list[Chunk]:
        """Store a prompt cut at these ends."""
        raw = as_tokens(tokens).tobytes()
        chunks, parent, key, start = [], self.catalogue.root(namespace), namespace, 0
        for end in ends:
            piece = raw[TOKEN_BYTES * start : TOKEN_BYTES * end]
            key = chain_key(key, piece)
            chunk = self.catalogue.get(key, parent, piece)
            if chunk is None:
                (chunk,) = self.catalogue.insert(parent, [(key, piece)])
                self.catalogue.mark_ready(chunk)
            chunks.append(chunk)
            parent, start = chunk, end
        return chunks

    def add_loose(self, tokens: Sequence[int], position: int, namespace: bytes = NAMESPACE) -> Chunk:
        """Store a chunk without what it was computed behind, at `position`."""
        raw = as_tokens(tokens).tobytes()
        root = DetachedRoot(namespace, raw, position)
        (chunk,) = self.catalogue.insert(root, [(root.key, raw)])
        self.catalogue.mark_ready(chunk)
        return chunk

    def found(
        self, tokens: Sequence[int], named: Sequence[int] = (), namespace: bytes = NAMESPACE
    ) -> tuple[int, list[Piece]]:
        """As a request looks a prompt up: the length of its exact match, and what is found of the rest."""
        chain, limit = self.chain(tokens, named, namespace), len(tokens) - 1
        match = self.catalogue.match(self.catalogue.root(namespace), chain, limit)
        pieces = find_moved(self.contents, namespace, chain, match.length, limit, match.chunks)
        return match.length, pieces


class Counter:
    """Calls of some functions, of `children_of` one for each parent; `most`: AssertionError beyond."""

    def __init__(self, most: float) -> None:
        self.count, self.most = 0, most

    def counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += len(args[0]) if function.__name__ == "children_of" else 1
            assert self.count <= self.most, f"more than {self.most} steps"
            return function(*args, **kwargs)

        return call


@contextmanager
def counted(owner: Any, *names: str, most: float = float("inf")) -> Iterator[Counter]:
    """Count the calls of functions of a module or class while this lasts."""
    counter = Counter(most)
    with patch.multiple(owner, **{name: counter.counting(getattr(owner, name)) for name in names}):
        yield counter


def covered(start: int, end: int, exact: int, pieces: Sequence[Piece]) -> int:
    """Tokens from `start` to `end` of a prompt that are matched, exactly or moved."""
    spans = [(0, exact), *((piece.start, piece.end) for piece in pieces)]
    return sum(max(0, min(end, b) - max(start, a)) for a, b in spans)
