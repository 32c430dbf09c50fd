"""Least recently used, chains from their tail on.

The order that PagedAttention engines use for free blocks (Kwon et al., "Efficient Memory Management for Large
Language Model Serving with PagedAttention", SOSP 2023): the longest unused goes first, and of one request's
chunks the last ones.
"""

from ragkv.policies.chain import ChainPolicy, Node, SlimNode
from ragkv.policies.contract import K


class LRU(ChainPolicy[K]):
    """Ranked by last use."""

    node_type = SlimNode

    def _use(self, node: Node[K]) -> None:
        node.rank = self._clock
