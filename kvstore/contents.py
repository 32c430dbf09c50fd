"""Which chunks in memory hold some tokens, wherever they were computed: one dictionary access a lookup."""

import xxhash

from ragkv.kvstore.catalogue import Chunk


class Contents:
    """An index from tokens to the chunks that hold just these, of all namespaces. Whoever looks up compares
    namespaces; tokens are compared here. Most tokens have one holder, which then stands without a list."""

    def __init__(self) -> None:
        self._held: dict[int, Chunk | list[Chunk]] = {}

    def add(self, chunk: Chunk) -> None:
        """Enter a chunk, once."""
        key = xxhash.xxh3_64_intdigest(chunk.tokens)
        held = self._held.get(key)
        if held is None:
            self._held[key] = chunk
        elif isinstance(held, Chunk):
            self._held[key] = [held, chunk]
        else:
            held.append(chunk)

    def remove(self, chunk: Chunk) -> None:
        """Take a chunk out; no matter if it never was entered."""
        key = xxhash.xxh3_64_intdigest(chunk.tokens)
        held = self._held.get(key)
        if held is chunk:
            del self._held[key]
        elif isinstance(held, list) and chunk in held:
            held.remove(chunk)
            if len(held) == 1:
                self._held[key] = held[0]

    def holders(self, tokens: bytes) -> list[Chunk]:
        """All chunks that hold just these tokens (int32 bytes), in the order in which they were entered."""
        held = self._held.get(xxhash.xxh3_64_intdigest(tokens))
        several = held if isinstance(held, list) else [] if held is None else [held]
        return [chunk for chunk in several if chunk.tokens == tokens]

    def clear(self) -> None:
        """Forget all."""
        self._held.clear()

    def check_integrity(self, chunks: list[Chunk]) -> None:
        """Raise AssertionError unless just these chunks are entered."""
        held = [c for each in self._held.values() for c in (each if isinstance(each, list) else [each])]
        assert len(held) == len(set(held)) and set(held) == set(chunks), "contents and catalogue disagree"
