"""Least frequently used; of equally frequent keys the least recently used goes first.

Counts live as long as their key (in-cache LFU; Breslau et al., "Web Caching and Zipf-like Distributions",
INFOCOM 1999).
"""

from ragkv.policies.chain import ChainPolicy, Node
from ragkv.policies.contract import K


class LFU(ChainPolicy[K]):
    """Ranked by uses, then by last use. A new key has one use; each touch adds one."""

    def _add(self, node: Node[K]) -> None:
        node.queue = self._queue
        node.rank = (1, self._clock)

    def _use(self, node: Node[K]) -> None:
        node.uses += 1
        node.rank = (node.uses, self._clock)
