"""First in, first out: the order of insertion, uses passed over. The floor for others."""

from ragkv.policies.chain import ChainPolicy, Node, SlimNode
from ragkv.policies.contract import K


class FIFO(ChainPolicy[K]):
    """Ranked by insertion."""

    node_type = SlimNode

    def _add(self, node: Node[K]) -> None:
        node.queue = self._queue
        node.rank = self._clock

    def _use(self, node: Node[K]) -> None:
        pass
