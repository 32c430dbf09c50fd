"""Which chunks in memory hold some tokens, wherever they were computed: one dictionary access a lookup."""

from itertools import chain, islice

import xxhash

from ragkv.kvstore.catalogue import Chunk, origin


class Contents:
    """An index from a namespace and tokens to the chunks that hold just these. Tokens are compared here. Most
    tokens have one holder, which then stands without a dictionary."""

    def __init__(self) -> None:
        self._held: dict[int, Chunk | dict[Chunk, None]] = {}

    def add(self, chunk: Chunk) -> None:
        """Enter a chunk, once."""
        key = _key(origin(chunk)[0], chunk.tokens)
        held = self._held.get(key)
        if held is None:
            self._held[key] = chunk
        elif isinstance(held, Chunk):
            self._held[key] = {held: None, chunk: None}
        else:
            held[chunk] = None

    def remove(self, chunk: Chunk) -> None:
        """Take a chunk out; no matter if it never was entered."""
        key = _key(origin(chunk)[0], chunk.tokens)
        held = self._held.get(key)
        if held is chunk:
            del self._held[key]
        elif isinstance(held, dict) and chunk in held:
            del held[chunk]
            if len(held) == 1:
                self._held[key] = next(iter(held))

    def holders(self, namespace: bytes, tokens: bytes, most: int) -> list[Chunk]:
        """Chunks of a namespace that hold just these tokens (int32 bytes), in the order in which they were
        entered; of more than `most` the first and the last, half of each."""
        held = self._held.get(_key(namespace, tokens))
        if held is None:
            return []
        several = [held] if isinstance(held, Chunk) else held
        if len(several) > most:
            last = list(islice(reversed(several), most - most // 2))
            several = list(chain(islice(several, most // 2), reversed(last)))
        return [chunk for chunk in several if chunk.tokens == tokens and origin(chunk)[0] == namespace]

    def clear(self) -> None:
        """Forget all."""
        self._held.clear()

    def check_integrity(self, chunks: list[Chunk]) -> None:
        """Raise AssertionError unless just these chunks are entered."""
        held = [c for each in self._held.values() for c in (each if isinstance(each, dict) else [each])]
        assert len(held) == len(set(held)) and set(held) == set(chunks), "contents and catalogue disagree"


def _key(namespace: bytes, tokens: bytes) -> int:
    return xxhash.xxh3_64_intdigest(tokens, int.from_bytes(namespace[:8], "little"))
