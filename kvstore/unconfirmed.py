"""Chunks in memory of which nobody knows yet whether they are what their namespace says: they are not written down
before that is confirmed. (An engine looks at its weights now and then, and only after the fact.)"""

from collections.abc import Sequence

from ragkv.kvstore.catalogue import Chunk

Positioned = tuple[int, Chunk]  # a chunk and its first position


class Unconfirmed:
    """Chunks by the number that will confirm them, in the order in which they were stored. Numbers only grow."""

    def __init__(self) -> None:
        self._confirmed = 0
        self._batches: list[tuple[int, bytes, list[Positioned]]] = []
        self._chunks: set[Chunk] = set()

    def __len__(self) -> int:
        return len(self._chunks)

    def __contains__(self, chunk: Chunk) -> bool:
        return chunk in self._chunks

    def hold(self, number: int, namespace: bytes, chunks: Sequence[Positioned]) -> bool:
        """Keep these until `number` is confirmed; False: it is already."""
        if number <= self._confirmed:
            return False
        if chunks:
            self._batches.append((number, namespace, list(chunks)))
            self._chunks.update(chunk for _, chunk in chunks)
        return True

    def confirm(self, number: int) -> list[tuple[bytes, list[Positioned]]]:
        """Up to that number all is confirmed: what was held for it, by namespace, oldest first."""
        self._confirmed = max(self._confirmed, number)
        due = [batch for batch in self._batches if batch[0] <= self._confirmed]
        self._batches = [batch for batch in self._batches if batch[0] > self._confirmed]
        self._chunks = {chunk for _, _, chunks in self._batches for _, chunk in chunks}
        return [(namespace, chunks) for _, namespace, chunks in due]

    def drop(self) -> list[Chunk]:
        """None of what is held will be confirmed: these chunks, oldest first."""
        dropped = [chunk for _, _, chunks in self._batches for _, chunk in chunks]
        self._batches, self._chunks = [], set()
        return dropped
