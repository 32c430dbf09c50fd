"""A small LRU window in front of a segmented LRU, which a key enters only if it is used more than who goes for it.

Einziger, Friedman, Manes: "TinyLFU: A Highly Efficient Cache Admission Policy" (ACM TOS 2017), with the window of
1% and the protected share of 80% of the rest. Frequencies are those of all keys seen of late, gone ones
too. The cache's size is what is tracked whenever room is asked for.
"""

from collections.abc import Iterator

from ragkv.policies.chain import ChainPolicy, Node, Queue
from ragkv.policies.contract import K
from ragkv.policies.ghosts import mark
from ragkv.policies.sketch import FrequencySketch

WINDOW = 0.01
PROTECTED = 0.8
SAMPLE = 10  # uses counted for each tracked key before all counts are halved
COUNTERS = 4  # in each row of the sketch for each tracked key, as in Caffeine
FILLING = 0.5  # a window of more than this share means that the main part is still empty: no duels


class WTinyLFU(ChainPolicy[K]):
    """`_queue` is the window; all three queues are ranked by last use."""

    def __init__(self) -> None:
        super().__init__()
        self._probation: Queue[K] = Queue()
        self._protected: Queue[K] = Queue()
        self._sketch = FrequencySketch(sample=SAMPLE / COUNTERS)

    def _queues(self) -> Iterator[Queue[K]]:
        yield from (self._queue, self._probation, self._protected)

    def _add(self, node: Node[K]) -> None:
        node.mark = mark(node.key)
        node.rank = self._clock
        node.queue = self._queue
        self._queue.weight += node.weight
        if self._sketch.width < COUNTERS * len(self._nodes):
            self._sketch.widen(COUNTERS * len(self._nodes))
        self._sketch.add(node.mark)

    def _use(self, node: Node[K]) -> None:
        node.rank = self._clock
        self._sketch.add(node.mark)
        if node.queue is self._probation:
            self._move(node, self._protected)

    def _next(self) -> Node[K]:
        self._demote()
        filling = self._queue.weight > FILLING * self._weight
        candidate = victim = None
        while self._queue.weight > WINDOW * self._weight:
            candidate = self._queue.peek()
            if candidate is None or not filling:
                break
            self._move_chain(candidate, self._probation)
            candidate = None
        victim = self._probation.peek() or self._protected.peek()
        if candidate is not None and victim is not None:
            if self._sketch.estimate(candidate.mark) > self._sketch.estimate(victim.mark):
                self._move_chain(candidate, self._probation)
            else:
                victim = candidate
        victim = victim or self._queue.peek()
        assert victim is not None
        return victim

    def _demote(self) -> None:
        """What the protected segment has too much goes back on probation, as just used there."""
        while self._protected.weight > PROTECTED * (self._weight - self._queue.weight):
            node = self._protected.peek()
            if node is None:
                return
            self._clock += 1
            node.rank = self._clock
            self._move(node, self._probation)

    def _forget(self, node: Node[K], *, evicted: bool) -> None:
        assert node.queue is not None
        node.queue.weight -= node.weight
