"""Chunks as payloads of the lower tiers: where they lie there, what is written, and what is believed when read.

A chunk lies under its chain key. The open tail behind a parent lies under `tail_key(parent)`, one for each parent,
the latest: so that an engine that has just started finds it without knowing its tokens.
"""

import time
from collections.abc import Callable, Sequence

from ragkv.errors import PayloadError
from ragkv.kvstore.catalogue import Chunk, LooseRoot
from ragkv.kvstore.codec import AliasHeader, Header, decode, encode
from ragkv.kvstore.keys import chain_key, tail_key
from ragkv.kvstore.pages import Pages
from ragkv.kvstore.stores.contract import Buffer

HEADER_BYTES, BLOCK_BYTES = 256, 4096


def address(chunk: Chunk) -> bytes:
    """Where a chunk lies; of a loose chunk, where what it is a copy of lies."""
    if isinstance(chunk.parent, LooseRoot):
        return chunk.parent.holder
    if not chunk.open:
        return chunk.key
    assert chunk.parent is not None
    return tail_key(chunk.parent.key)


class Payloads:
    """`wall`: seconds since the epoch, for what outlives the process."""

    def __init__(self, pages: Pages, wall: Callable[[], float] = time.time) -> None:
        self.pages, self.wall = pages, wall

    def size(self, chunk: Chunk) -> int:
        """Bytes that a chunk's payload occupies, about: with its header, in whole blocks of a file system."""
        return -(-(self.pages.size(chunk) + len(chunk.tokens) + HEADER_BYTES) // BLOCK_BYTES) * BLOCK_BYTES

    def writer(
        self, chunk: Chunk, namespace: bytes, position: int, *, expires: float, copy: bool
    ) -> Callable[[], Sequence[Buffer]]:
        """What makes a chunk's payload, on any thread: at once if `copy`, else as long as the chunk is pinned.
        `expires`: seconds since the epoch, 0.0 for never."""
        assert chunk.parent is not None
        shape = self.pages.shape
        header = Header(
            namespace=namespace,
            key=chunk.key,
            parent=chunk.parent.key,
            tokens=chunk.tokens,
            position=position,
            open=chunk.open,
            shape=shape.of(len(chunk)),
            dtype=shape.dtype,
            created=self.wall(),
            expires=expires,
        )
        if copy:
            raw = self.pages.parts(chunk, copy=True)
            return lambda: encode(header, raw)
        return lambda: encode(header, self.pages.parts(chunk))

    def filler(self, chunk: Chunk, namespace: bytes, position: int) -> Callable[[Buffer], Header]:
        """What checks a payload against all that is known of a reserved chunk, and fills the chunk's pages."""
        parent, key = chunk.parent, address(chunk)
        assert parent is not None
        loose = isinstance(parent, LooseRoot)  # its parent is not known, but follows from its key

        def accept(value: Buffer) -> Header:
            header, raw = self._read(value, namespace)
            behind = chain_key(header.parent, header.tokens) == key if loose else header.parent == parent.key
            found = (header.key, header.tokens, header.position, header.open)
            if not behind or found != (key, chunk.tokens, position, False):
                raise PayloadError("tokens", "payload: it is of other tokens than its key says")
            self.pages.fill(chunk, raw)
            return header

        return accept

    def tail(
        self, parent: bytes, namespace: bytes, position: int
    ) -> Callable[[Buffer], tuple[Header, memoryview]]:
        """What checks a payload that should be the open tail behind `parent`, of tokens yet unknown."""

        def accept(value: Buffer) -> tuple[Header, memoryview]:
            header, raw = self._read(value, namespace)
            if (header.parent, header.position, header.open) != (parent, position, True):
                raise PayloadError("tokens", "payload: it is of another place than its key says")
            if header.key != chain_key(parent, header.tokens):
                raise PayloadError("tokens", "payload: its key is not of its tokens")
            return header, raw

        return accept

    def _read(self, value: Buffer, namespace: bytes) -> tuple[Header, memoryview]:
        """Header and bytes of a payload that fits this engine. PayloadError."""
        header, raw = decode(value)
        if isinstance(header, AliasHeader):
            raise PayloadError("magic", "payload: it is an alias")
        shape = self.pages.shape
        if header.namespace != namespace:
            raise PayloadError("namespace", "payload: it is of another namespace")
        if (header.shape, header.dtype) != (shape.of(header.token_count), shape.dtype):
            raise PayloadError("shape", f"payload: {header.shape} {header.dtype} does not fit this engine")
        if header.expires and header.expires <= self.wall():
            raise PayloadError("expired", "payload: its time is over")
        return header, raw
