"""Least recently used, chains from their tail on.

The order that PagedAttention engines use for free blocks (Kwon et al., "Efficient Memory Management for Large
Language Model Serving with PagedAttention", SOSP 2023): the longest unused goes first, and of one request's
chunks the last ones.
"""

from collections.abc import Iterator

from ragkv.policies.chain import ChainPolicy, Node, Ring, link
from ragkv.policies.contract import K


class LRU(ChainPolicy[K]):
    """A used key moves to the end of the order, or, behind a parent that stands in it, directly before that."""

    def __init__(self) -> None:
        super().__init__()
        self._ring: Ring[K] = Ring()

    def _place(self, node: Node[K]) -> None:
        parent = node.parent
        link(node, self._ring if parent is None or parent.held else parent)

    def _order(self) -> Iterator[Node[K]]:
        return iter(self._ring)
