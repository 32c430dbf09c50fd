"""Big buffers, used again: the kernel takes as long to hand out fresh pages as to copy into old ones."""

import mmap
import weakref

import numpy as np

SIZE, MOST_FREE = 32 << 20, 8  # a buffer takes memory only as far as it was ever filled
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class BufferPool:
    """Keeps up to `MOST_FREE` buffers of `SIZE` bytes for the next who asks. Safe for threads."""

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    @property
    def free(self) -> int:
        """Buffers that wait for their next use."""
        return len(self._free)

    def take(self, size: int) -> memoryview:
        """`size` bytes, at most `SIZE`, of any content. They are used again once nobody holds a view of them."""
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = mmap.mmap(-1, SIZE, flags=_PRIVATE)
        window = np.frombuffer(buffer, dtype=np.uint8, count=size)  # which every view of it keeps alive
        weakref.finalize(window, self._give_back, buffer).atexit = False
        return memoryview(window)  # type: ignore[arg-type]  # numpy 2 says so under Python 3.11

    def _give_back(self, buffer: mmap.mmap) -> None:
        if len(self._free) < MOST_FREE:
            self._free.append(buffer)
