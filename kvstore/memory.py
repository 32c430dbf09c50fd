"""The memory tier's accounting: pages of shared memory, a budget, a policy, pins. No bytes pass through."""

from collections.abc import Sequence

import numpy as np

from ragkv.kvstore.catalogue import Chunk
from ragkv.policies import EvictionPolicy


class MemoryTier:
    """`pages` pages; a chunk owns whole pages alone. The budget is the pages: there are never more in use."""

    def __init__(self, pages: int, policy: EvictionPolicy[Chunk]) -> None:
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))  # from the end: lowest first, so that copies run together
        self._policy = policy

    @property
    def used(self) -> int:
        """Pages in use."""
        return self.pages - len(self._free)

    def make_room(self, pages: int) -> list[Chunk] | None:
        """Evict until `pages` pages are free; the victims, or None (and no change) where that cannot be."""
        victims = self._policy.evict(pages - len(self._free))
        for chunk in victims or ():
            self._give_back(chunk)
        return victims

    def take(self, pages: int) -> bytes:
        """`pages` free pages as int32 bytes. IndexError: fewer are free (call `make_room` first)."""
        if pages > len(self._free):
            raise IndexError(f"memory tier: {pages} pages asked for, {len(self._free)} free")
        cut = len(self._free) - pages
        taken = self._free[cut:][::-1]
        del self._free[cut:]
        return np.array(taken, dtype=np.int32).tobytes()

    def add(self, chunk: Chunk) -> None:
        """Put a chunk that owns taken pages under the policy."""
        parent = chunk.parent if chunk.parent is not None and chunk.parent.pages else None
        self._policy.insert(chunk, parent, len(chunk.pages) // 4)

    def drop(self, chunk: Chunk) -> None:
        """Forget a chunk and free its pages, pinned or not."""
        self._policy.remove(chunk)
        self._give_back(chunk)

    def touch(self, chunks: Sequence[Chunk]) -> None:
        """Note a use of a chain, root first."""
        for chunk in chunks:
            self._policy.touch(chunk)

    def pin(self, chunk: Chunk) -> None:
        """Keep a chunk and its ancestors until `unpin`."""
        self._policy.pin(chunk)
        chunk.pins += 1

    def unpin(self, chunk: Chunk) -> None:
        """Take back one `pin`."""
        self._policy.unpin(chunk)
        chunk.pins -= 1

    def check_integrity(self) -> None:
        """Raise AssertionError where pages or policy contradict themselves."""
        self._policy.check_integrity()
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        assert all(0 <= page < self.pages for page in self._free)

    def _give_back(self, chunk: Chunk) -> None:
        self._free.extend(np.frombuffer(chunk.pages, dtype=np.int32)[::-1].tolist())
