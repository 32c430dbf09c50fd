"""Ways through the tokens of a prompt: prompts are cut where they end, so the same tokens may stand in chunks of
other cuts, and what windows and states hold may stand at the ends of some of them only.
"""

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from ragkv.kvstore.chunking import TokenChain
from ragkv.kvstore.keys import TOKEN_BYTES
from ragkv.kvstore.planes import Plane, reachable
from ragkv.kvstore.prefix_tree import LOOKED_AT, REACH, Chunk, Match, follow

WAYS = 8  # that are looked at beside the match


def longer(found: Match, chain: TokenChain, limit: int) -> Match:
    """A match, or the way behind a shorter sibling of its last chunk, if that leads further: where more tokens
    have moved a cut, what was stored then stands behind the new one."""
    if not found.chunks or found.length == limit:
        return found
    *before, last = found.chunks
    assert last.parent is not None
    raw = chain.tokens.tobytes()
    for child in _beginnings(last.parent, raw, last.position):
        if child is not last:
            other = follow([*before, child], child, child.end, raw, limit)
            found = max(found, other, key=lambda match: match.length)
    return found


def furthest(
    found: Match,
    root: Chunk,
    chain: TokenChain,
    limit: int,
    planes: Sequence[Plane],
    have: int,
    over: Callable[[Chunk], bool] | None = None,
) -> Match:
    """As `reachable`, of a match or of another way behind `root`, whichever is longer. `over`: whether a chunk has
    expired."""
    best = reachable(found, planes, have)
    if best.length < found.length:
        for other in other_ways(root, chain, limit):
            if over is None or not any(map(over, other.chunks)):
                best = max(best, reachable(other, planes, have), key=lambda match: match.length)
    return replace(best, shared=found.shared)


def other_ways(root: Chunk, chain: TokenChain, limit: int) -> Iterator[Match]:
    """Ways along whole chunks behind `root` that are the beginning of `chain`, at most `limit` tokens; at most
    `WAYS`, those of the shortest chunks first: what is cut for one prompt's sake is where prompts go on."""
    raw, ways = chain.tokens[:limit].tobytes(), WAYS
    todo: list[tuple[tuple[Chunk, ...], Chunk, int]] = [((), root, 0)]
    while todo and ways:
        chunks, parent, start = todo.pop()
        inside = sorted(_beginnings(parent, raw, start), key=len, reverse=True)
        todo += [((*chunks, child), child, child.end) for child in inside]
        if not inside and chunks:
            ways -= 1
            yield Match(chunks, start, parent, shared=start)


def _beginnings(parent: Chunk, raw: bytes, start: int) -> list[Chunk]:
    """Ready children of `parent` whose tokens `raw` continues with at position `start`."""
    children = parent.children
    if children is None:
        return []
    if isinstance(children, Chunk):
        near = [children]
    else:
        rest = raw[TOKEN_BYTES * start : TOKEN_BYTES * (start + REACH)]
        place = bisect.bisect_left(children, rest, key=lambda child: child.tokens)
        near = children[max(0, place - LOOKED_AT) : place + LOOKED_AT]
    return [child for child in near if child.ready and raw.startswith(child.tokens, TOKEN_BYTES * start)]
