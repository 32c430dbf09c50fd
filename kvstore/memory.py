"""Accounting of the two paged tiers, memory and device: pages, a budget, a policy, pins. No bytes pass through."""

from collections.abc import Sequence

import numpy as np

from ragkv.kvstore.catalogue import Chunk
from ragkv.policies import EvictionPolicy, Prioritized


class PagePool:
    """`pages` pages; the budget is the pages: there are never more in use."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))  # from the end: lowest first, so that copies run together

    @property
    def used(self) -> int:
        """Pages in use."""
        return self.pages - len(self._free)

    @property
    def free(self) -> int:
        """Pages not in use."""
        return len(self._free)

    def take(self, pages: int) -> bytes:
        """`pages` free pages as int32 bytes. IndexError: fewer are free."""
        if pages > len(self._free):
            raise IndexError(f"pages: {pages} asked for, {len(self._free)} free")
        cut = len(self._free) - pages
        taken = self._free[cut:][::-1]
        del self._free[cut:]
        return np.array(taken, dtype=np.int32).tobytes()

    def give_back(self, pages: bytes) -> None:
        """Take back what `take` gave."""
        self._free.extend(np.frombuffer(pages, dtype=np.int32)[::-1].tolist())

    def check_integrity(self) -> None:
        """Raise AssertionError where a page is free twice, or is none."""
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        assert all(0 <= page < self.pages for page in self._free)


class MemoryTier:
    """A chunk owns whole pages alone. It goes before its parent does."""

    def __init__(self, pages: int, policy: EvictionPolicy[Chunk]) -> None:
        self.pages = pages
        self._pool = PagePool(pages)
        self._policy = policy
        self._classes = policy if isinstance(policy, Prioritized) else None

    @property
    def used(self) -> int:
        """Pages in use."""
        return self._pool.used

    @property
    def classes(self) -> int:
        """Classes of priority; 1: all chunks are alike."""
        return 1 if self._classes is None else self._classes.highest + 1

    def make_room(self, pages: int) -> list[Chunk] | None:
        """Evict until `pages` pages are free; the victims, or None (and no change) where that cannot be. What
        their pages hold is lost with the next `take`."""
        victims = self._policy.evict(pages - self._pool.free)
        for chunk in victims or ():
            self._pool.give_back(chunk.pages)
        return victims

    def take(self, pages: int) -> bytes:
        """`pages` free pages as int32 bytes. IndexError: fewer are free (call `make_room` first)."""
        return self._pool.take(pages)

    def add(self, chunk: Chunk, cost: float = 1.0, priority: int = 0) -> None:
        """Put a chunk that owns taken pages under the policy; `priority` counts where the policy has classes."""
        parent = chunk.parent if chunk.parent is not None and chunk.parent.pages else None
        pages = chunk.page_count
        if self._classes is None:
            self._policy.insert(chunk, parent, pages, cost)
        else:
            self._classes.insert(chunk, parent, pages, cost, min(priority, self._classes.highest))

    def drop(self, chunk: Chunk) -> None:
        """Forget a chunk and free its pages, pinned or not."""
        self._policy.remove(chunk)
        self._pool.give_back(chunk.pages)

    def touch(self, chunks: Sequence[Chunk], priority: int = 0) -> None:
        """Note a use of a chain, root first; its priority can only rise."""
        for chunk in chunks:
            self._policy.touch(chunk)
        if self._classes is not None and priority and chunks:
            self._classes.raise_priority(chunks[-1], min(priority, self._classes.highest))

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
        self._pool.check_integrity()


class DeviceTier:
    """Copies of chunks that are hit often, in pages of the accelerator's memory; each is in memory too. A chunk is
    copied at its `after`-th use. Copies are written and read in the order of the steps, so pages may be given to
    another chunk while a step still reads them; a copy is read only once a worker has said that it was made."""

    def __init__(self, pages: int, policy: EvictionPolicy[Chunk], after: int) -> None:
        self.pages, self._after = pages, after
        self._pool = PagePool(pages)
        self._policy = policy
        self._made: set[Chunk] = set()

    @property
    def used(self) -> int:
        """Pages in use."""
        return self._pool.used

    def __contains__(self, chunk: Chunk) -> bool:
        return chunk in self._made

    def __len__(self) -> int:
        return len(self._made)

    def used_now(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Note a use of a chain, root first; the chunks that have been given pages now and are to be copied. No
        chunk of the chain makes room for another."""
        here: list[Chunk] = []
        due: list[Chunk] = []
        for chunk in reversed(chunks):  # the root counts as used last
            if chunk.device:
                self._policy.touch(chunk)
                self._policy.pin(chunk)
                here.append(chunk)
            elif chunk.hits >= self._after:
                due.append(chunk)
        given = [chunk for chunk in reversed(due) if self._give_pages(chunk)]
        for chunk in (*here, *given):
            self._policy.unpin(chunk)
        return given

    def made(self, chunk: Chunk, pages: bytes, *, well: bool) -> None:
        """The copy that was ordered into `pages`, the very object, is made, or failed."""
        if not chunk.device or chunk.device is not pages:
            return  # dropped meanwhile, and perhaps ordered anew into equal pages
        if well:
            self._made.add(chunk)
        else:
            self.drop(chunk)

    def drop(self, chunk: Chunk) -> bool:
        """Forget a copy; whether there was one."""
        if not chunk.device:
            return False
        self._policy.remove(chunk)
        self._release(chunk)
        return True

    def check_integrity(self) -> None:
        """Raise AssertionError where pages or policy contradict themselves."""
        self._policy.check_integrity()
        self._pool.check_integrity()
        assert all(chunk.device for chunk in self._made)

    def _give_pages(self, chunk: Chunk) -> bool:
        """Make room for a chunk; it comes pinned in the policy."""
        pages = chunk.page_count
        victims = self._policy.evict(pages - self._pool.free)
        if victims is None:
            return False
        for victim in victims:
            self._release(victim)
        chunk.device = self._pool.take(pages)
        self._policy.insert(chunk, None, pages)
        self._policy.pin(chunk)
        return True

    def _release(self, chunk: Chunk) -> None:
        self._pool.give_back(chunk.device)
        chunk.device = b""
        self._made.discard(chunk)
