"""Greedy dual size frequency, with the cost of making a chunk's KV anew.

Cherkasova: "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy" (HP Labs 1998);
for KV of document trees RAGCache (Jin et al., "RAGCache: Efficient Knowledge Caching for Retrieval-Augmented
Generation", 2024, section 5.1, "PGDSF"): priority = clock + frequency * cost / weight, leaves first.
"""

from ragkv.policies.chain import ChainPolicy, Node
from ragkv.policies.contract import K


class GDSF(ChainPolicy[K]):
    """Ranked by priority. The clock is the priority of the last victim, so that what is not used ages."""

    def __init__(self) -> None:
        super().__init__()
        self._inflation = 0.0

    def _add(self, node: Node[K]) -> None:
        node.queue = self._queue
        self._rank(node)

    def _use(self, node: Node[K]) -> None:
        node.uses += 1
        self._rank(node)

    def _rank(self, node: Node[K]) -> None:
        node.rank = (self._inflation + node.uses * node.cost / node.weight, self._clock)

    def _forget(self, node: Node[K], *, evicted: bool) -> None:
        if evicted:
            self._inflation = max(self._inflation, node.rank[0])
