"""Three queues, first in, first out: a small one for what is new, the main one, and ghosts.

Yang et al.: "FIFO Queues are All You Need for Cache Eviction" (S3-FIFO, SOSP 2023), with its constants: a tenth
for the small queue, at most three uses counted, more than one use to be moved on, ghosts for the main queue's
size. The cache's size is what is tracked whenever room is asked for.
"""

from collections.abc import Iterator

from ragkv.policies.chain import SLACK, ChainPolicy, Node, Queue
from ragkv.policies.contract import K
from ragkv.policies.ghosts import Ghosts, mark

SMALL = 0.1
MOST_USES = 3


class S3FIFO(ChainPolicy[K]):
    """`_queue` is the small queue. A node is ranked by its entry into its queue; `uses` counts since then."""

    def __init__(self) -> None:
        super().__init__()
        self._main: Queue[K] = Queue()
        self._ghosts = Ghosts()

    def _queues(self) -> Iterator[Queue[K]]:
        yield from (self._queue, self._main)

    def _add(self, node: Node[K]) -> None:
        node.mark = mark(node.key)
        node.rank = self._clock
        node.uses = 0
        node.queue = self._queue
        node.queue.weight += node.weight
        if self._ghosts.discard(node.mark):
            self._move_chain(node, self._main)

    def _use(self, node: Node[K]) -> None:
        if node.uses < MOST_USES:
            node.uses += 1

    def _next(self) -> Node[K]:
        small, main = self._queue, self._main
        while True:
            node = small.peek() if small.weight >= SMALL * self._weight else None
            node = node or main.peek() or small.peek()
            assert node is not None
            if node.queue is small:
                if node.uses <= 1:
                    return node
                node.uses = 0
            elif node.uses:
                node.uses -= 1
            else:
                return node
            self._clock += 1
            node.rank = self._clock
            self._move_chain(node, main)

    def _forget(self, node: Node[K], *, evicted: bool) -> None:
        assert node.queue is not None
        node.queue.weight -= node.weight
        if evicted and node.queue is self._queue:
            self._ghosts.add(node.mark, node.weight)
        self._ghosts.trim(self._main.weight + 1, 2 * len(self._nodes) + SLACK)
