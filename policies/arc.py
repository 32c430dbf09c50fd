"""Adaptive replacement: used once against used again, the share of each learned from what was evicted too early.

Megiddo, Modha: "ARC: A Self-Tuning, Low Overhead Replacement Cache" (FAST 2003). Weights take the place of
counts; the cache's size is what is tracked whenever room is asked for. Where the list that should give has no
leaf, the other one gives.
"""

from collections.abc import Iterator

from ragkv.policies.chain import SLACK, ChainPolicy, Node, Queue
from ragkv.policies.contract import K
from ragkv.policies.ghosts import Ghosts, mark


class ARC(ChainPolicy[K]):
    """`_queue` holds what was used once (T1), `_again` what was used again (T2); B1 and B2 are their ghosts, which
    weigh together no more than what is tracked."""

    def __init__(self) -> None:
        super().__init__()
        self._again: Queue[K] = Queue()
        self._gone_once, self._gone_again = Ghosts(), Ghosts()
        self._share = 0.0  # weight that what was used once may have (p)

    def _queues(self) -> Iterator[Queue[K]]:
        yield from (self._queue, self._again)

    def _add(self, node: Node[K]) -> None:
        node.mark = mark(node.key)
        node.rank = self._clock
        once, again = self._gone_once, self._gone_again
        node.queue = self._queue
        if once.discard(node.mark):
            more = node.weight * max(1.0, again.weight / (once.weight + node.weight))
            self._share = min(self._weight, self._share + more)
            node.queue = self._again
        elif again.discard(node.mark):
            less = node.weight * max(1.0, once.weight / (again.weight + node.weight))
            self._share = max(0.0, self._share - less)
            node.queue = self._again
        node.queue.weight += node.weight

    def _use(self, node: Node[K]) -> None:
        node.rank = self._clock
        if node.queue is self._queue:
            self._move(node, self._again)

    def _next(self) -> Node[K]:
        first, second = self._queue, self._again
        if first.weight <= self._share:
            first, second = second, first
        node = first.peek() or second.peek()
        assert node is not None
        return node

    def _forget(self, node: Node[K], *, evicted: bool) -> None:
        assert node.queue is not None
        node.queue.weight -= node.weight
        if evicted:
            ghosts = self._gone_once if node.queue is self._queue else self._gone_again
            ghosts.add(node.mark, node.weight)
            self._trim()

    def _trim(self) -> None:
        """As in the paper: |T1| + |B1| at most the cache's size, all four lists at most twice that."""
        size, most = self._weight, 2 * len(self._nodes) + SLACK
        self._gone_once.trim(max(0, size - self._queue.weight), most)
        self._gone_again.trim(max(0, size - self._gone_once.weight), most)
