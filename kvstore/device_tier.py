"""The device tier: copies of hot chunks in the accelerator's memory. Pages and an order; no bytes pass through."""

from collections.abc import Sequence

from ragkv.kvstore.pages import PagePool
from ragkv.kvstore.prefix_tree import Chunk
from ragkv.policies import EvictionPolicy


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

    def made(self, chunk: Chunk, pages: bytes, *, ok: bool) -> None:
        """The copy that was ordered into `pages`, the very object, is made, or failed."""
        if not chunk.device or chunk.device is not pages:
            return  # dropped meanwhile, and perhaps ordered anew into equal pages
        if ok:
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
