"""Windows: what planes of windows and states have of a prompt, loaded and stored beside plane 0."""

from collections.abc import Sequence

import numpy as np

from ragkv.kvstore.chunking import TokenChain
from ragkv.kvstore.keys import TOKEN_BYTES
from ragkv.kvstore.memory_tier import MemoryTier
from ragkv.kvstore.pages import rows
from ragkv.kvstore.planes import window_of
from ragkv.kvstore.prefix_tree import Chunk, Match
from ragkv.kvstore.prompt import Indices, Load, Prompt, Store


class Windows:
    """Of a memory tier. Planes are numbered from 1."""

    def __init__(self, memory: MemoryTier) -> None:
        self._memory = memory

    def prepare_loads(self, match: Match, start: int, end: int) -> list[Load]:
        """The copies that it takes to go on at `end`, the end of a match, one a plane; the engine has the first
        `start` tokens. As of `KVCache.prepare_load`."""
        loads = []
        for number, plane in enumerate(self._memory.planes, 1):
            windows = [window for window in match.windows if window.plane == number]
            if windows:
                where, positions = self._places(windows, number)
                wanted = (positions >= max(start, plane.first(end))) & (positions < end)
                loads.append(Load(where[wanted], positions[wanted], windows, windows, plane=number))
                self._memory.pin(windows)
        return loads

    def prepare_stores(self, prompt: Prompt, end: int, live: Sequence[int], number: int = 0) -> list[Store]:
        """Reserve memory for what it takes to go on at token `end` of a prompt, as far as memory lacks it. `live`:
        of each plane, from which position on the engine has it now. `number`: as of `KVCache.prepare_store`,
        which comes before. A plane of which not all is to be had is left out; so are all, if no chunk ends there.
        """
        memory, stores = self._memory, []
        chunks = _chunks_upto(memory, prompt.namespace, prompt.chain, end)
        memory.pin(chunks[-1:])  # none makes room for another's window
        for which, (plane, first) in enumerate(zip(memory.planes, live, strict=True), 1):
            kept = plane.kept_from(end, first)
            lacking = [] if kept is None else _lacking(chunks, which, kept)
            new = [memory.reserve_window(chunk, which, position) for chunk, position in lacking]
            got = [window for window in new if window is not None]
            if got:
                stores.append(Store(prompt, *self._places(got, which), got, number=number, plane=which))
        memory.unpin(chunks[-1:])
        return stores

    def _places(self, windows: Sequence[Chunk], plane: int) -> tuple[Indices, Indices]:
        """Rows, and positions in the prompt. A state has a row in each of its pages: page * pages + place."""
        if self._memory.planes[plane - 1].state:
            pages = np.frombuffer(windows[-1].pages, dtype=np.int32).astype(np.int64)
            where: Indices = pages * len(pages) + np.arange(len(pages))
            return where, np.full(len(pages), windows[-1].position, dtype=np.int64)
        return rows(windows, self._memory.planes[plane - 1].shape.page_tokens), positions_of(windows)


def positions_of(chunks: Sequence[Chunk]) -> Indices:
    """The positions in the prompt of all tokens of chunks of one chain."""
    return np.concatenate([np.arange(chunk.position, chunk.end, dtype=np.int64) for chunk in chunks])


def _chunks_upto(memory: MemoryTier, namespace: bytes, chain: TokenChain, end: int) -> list[Chunk]:
    """The chunks of a chain's first `end` tokens, ready or being written; none where they end elsewhere."""
    raw, parent, start = chain.tokens.tobytes(), memory.tree.root(namespace), 0
    found: list[Chunk] = []
    for stop, key in chain.cuts(end):
        chunk = memory.tree.get(key, parent, raw[TOKEN_BYTES * start : TOKEN_BYTES * stop])
        if chunk is None or not (chunk.ready or chunk.pins):
            return []
        found.append(chunk)
        parent, start = chunk, stop
    return found


def _lacking(chunks: Sequence[Chunk], plane: int, first: int) -> list[tuple[Chunk, int]]:
    """What a plane lacks of the positions from `first` to the end of some chunks: chunks, and from which position
    on of each. Nothing, where another store holds up one of them."""
    lacking = []
    for chunk in chunks:
        window, start = window_of(chunk, plane), max(first, chunk.position)
        if chunk.end <= first:
            continue
        if window is not None and (window.ready or window.pins) and window.position <= start:
            continue
        if window is not None and window.pins and not window.ready:
            return []
        lacking.append((chunk, start))
    return lacking
