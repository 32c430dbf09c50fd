"""What every policy over chains shares: linked nodes, pins, and the rule that a parent outlives its children.

A node is *held* while it is pinned or has a held child. The *frontier* are the nodes that are neither held nor
have children: only they can go next. A policy ranks its nodes; of the frontier, the lowest rank goes first. A
node whose last child goes joins the frontier with the rank it has, so an old parent follows at once.
"""

import heapq
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Generic

from ragkv.policies.contract import EvictionPolicy, K

Rank = Any  # comparable, and of no two nodes equal: a stamp, or a tuple that ends in one
ARRIVED = object()
SLACK = 64  # entries that mean nothing any more which are never too many


class SlimNode(Generic[K]):
    """One tracked key. `queued`: the rank under which its queue knows it, ARRIVED before that, or None."""

    __slots__ = (
        *("children", "held_children", "key", "parent", "pins"),
        *("queue", "queued", "rank", "weight"),
    )

    def __init__(self, key: K, parent: "Node[K] | None", weight: int, cost: float) -> None:
        self.key = key
        self.parent = parent
        self.weight = weight
        self.pins = 0
        self.children = 0
        self.held_children = 0
        self.rank: Rank = 0
        self.queued: Rank = None
        self.queue: Queue[K] | None = None

    @property
    def held(self) -> bool:
        return self.pins > 0 or self.held_children > 0

    @property
    def ready(self) -> bool:
        """In the frontier."""
        return not (self.children or self.pins or self.held_children)


class Node(SlimNode[K]):
    """With what most policies need beside; those that rank by use alone take `SlimNode`, 48 bytes less a key."""

    __slots__ = ("cost", "mark", "uses")

    def __init__(self, key: K, parent: "Node[K] | None", weight: int, cost: float) -> None:
        super().__init__(key, parent, weight, cost)
        self.cost = cost
        self.uses: float = 1
        self.mark = 0


class Queue(Generic[K]):
    """Frontier nodes, lowest rank first. A heap that is put right late: a node that has left the frontier, or
    ranks higher by now, is dropped or moved when it comes up; so a touch costs no work here."""

    __slots__ = ("_first", "_heap", "_limit", "weight")

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, Node[K]]] = []
        self._first: tuple[Rank, Node[K]] | None = None  # beside the heap: a victim's parent comes and goes here
        self._limit = SLACK
        self.weight = 0  # of all nodes that belong here, for policies that count it

    def __len__(self) -> int:
        return len(self._heap) + (self._first is not None)

    def push(self, node: Node[K]) -> None:
        """Let a node in."""
        if len(self._heap) > self._limit:
            self.compact()
        node.queued = rank = node.rank
        entry, first = (rank, node), self._first
        if first is None:
            self._first = entry
        elif rank < first[0]:
            self._first = entry
            heapq.heappush(self._heap, first)
        else:
            heapq.heappush(self._heap, entry)

    def peek(self) -> Node[K] | None:
        """The node to go next, left where it is. None: the frontier has none of this queue."""
        while True:
            heap, entry = self._heap, self._first
            if entry is None:
                if not heap:
                    return None
                self._first = entry = heapq.heappop(heap)
            elif heap and heap[0][0] < entry[0]:
                self._first = entry = heapq.heapreplace(heap, entry)
            rank, node = entry
            if node.queued is rank and node.queue is self:
                if node.rank is rank and not (node.children or node.pins or node.held_children):
                    return node
                node.queued = None
                if node.ready:
                    self._first = None
                    self.push(node)
                    continue
            self._first = None

    def compact(self) -> None:
        """Drop entries that mean nothing any more."""
        entries = [e for e in (*self._heap, self._first) if e and e[1].queue is self and e[1].queued is e[0]]
        self._heap, self._first = entries, None
        self._limit = 2 * len(entries) + SLACK
        heapq.heapify(entries)


class ChainPolicy(EvictionPolicy[K]):
    """Implementers rank a new node (`_add`) and a used one (`_use`), and may choose between queues (`_next`)."""

    node_type: type[Any] = Node  # or SlimNode, or a kind of Node

    def __init__(self) -> None:
        self._nodes: dict[K, Node[K]] = {}
        self._evictable = 0
        self._weight = 0  # of all tracked keys
        self._clock = 0  # uses so far
        self._queue: Queue[K] = Queue()
        self._arrived: list[Node[K]] = []  # joined the frontier since the last eviction; some have left again
        self._removed = 0  # since queues were compacted

    @abstractmethod
    def _use(self, node: Node[K]) -> None:
        """Rank a used node anew, never lower than before in its queue. `_clock` is the stamp of this use."""

    def _add(self, node: Node[K]) -> None:
        """Rank a new node and give it its queue."""
        node.queue = self._queue
        self._use(node)

    def _next(self) -> Node[K]:
        """The next victim. The frontier is not empty."""
        node = self._queue.peek()
        assert node is not None
        return node

    def _forget(self, node: Node[K], *, evicted: bool) -> None:
        """A node goes: drop what is kept for it, or remember it."""

    def _place(self, node: Node[K]) -> None:
        """Queue a node of the frontier."""
        assert node.queue is not None
        node.queue.push(node)

    def _queues(self) -> Iterator[Queue[K]]:
        yield self._queue

    def insert(self, key: K, parent: K | None = None, weight: int = 1, cost: float = 1.0) -> None:
        if key in self._nodes:
            raise ValueError(f"insert: {key!r} is tracked already")
        if weight < 1:
            raise ValueError(f"insert: weight {weight} of {key!r} is below 1")
        if not cost > 0:
            raise ValueError(f"insert: cost {cost} of {key!r} is not above 0")
        above = None if parent is None else self._nodes[parent]
        node = self.node_type(key, above, weight, cost)
        self._clock += 1
        self._add(node)
        if above is not None:
            above.children += 1
        self._nodes[key] = node
        self._weight += weight
        self._evictable += weight
        self._join(node)

    def touch(self, key: K) -> None:
        node = self._nodes[key]
        self._clock += 1
        self._use(node)

    def remove(self, key: K) -> None:
        node = self._nodes[key]
        if node.children:
            raise ValueError(f"remove: {key!r} has {node.children} children")
        if node.pins:
            node.pins = 0
            self._evictable += node.weight
            self._release(node.parent)
        self._drop(node, evicted=False)
        self._removed += 1
        if self._removed > len(self._nodes) + SLACK:
            self._removed = 0
            self._settle()
            for queue in self._queues():
                queue.compact()

    def pin(self, key: K) -> None:
        node = self._nodes[key]
        held = node.held
        node.pins += 1
        while not held:
            self._evictable -= node.weight
            if node.parent is None:
                return
            node = node.parent
            held = node.held
            node.held_children += 1

    def unpin(self, key: K) -> None:
        node = self._nodes[key]
        if not node.pins:
            raise ValueError(f"unpin: {key!r} is not pinned")
        node.pins -= 1
        if not (node.pins or node.held_children):
            self._evictable += node.weight
            if not node.children:
                self._join(node)
            if node.parent is not None:
                self._release(node.parent)

    def evict(self, weight: int) -> list[K] | None:
        if weight > self._evictable:
            return None
        victims: list[K] = []
        while weight > 0:
            if self._arrived:
                self._settle()
            node = self._next()
            self._drop(node, evicted=True)
            victims.append(node.key)
            weight -= node.weight
        return victims

    @property
    def evictable(self) -> int:
        return self._evictable

    def __contains__(self, key: object) -> bool:
        return key in self._nodes

    def __len__(self) -> int:
        return len(self._nodes)

    def check_integrity(self) -> None:
        nodes = self._nodes
        assert self._weight == sum(n.weight for n in nodes.values()), "tracked weight is off"
        assert self._evictable == sum(n.weight for n in nodes.values() if not n.held), "evictable weight is off"
        children = dict.fromkeys(nodes, 0)
        held_children = dict.fromkeys(nodes, 0)
        for key, node in nodes.items():
            assert node.key == key
            if node.parent is not None:
                above = node.parent.key
                assert nodes.get(above) is node.parent, f"{key!r} outlived its parent"
                children[above] += 1
                held_children[above] += node.held
        for key, node in nodes.items():
            assert (node.children, node.held_children) == (children[key], held_children[key])
            assert node.queue is not None
        assert len(self._arrived) <= 2 * len(nodes) + SLACK + 1, "what is gone is kept"
        self._check_frontier()

    def _check_frontier(self) -> None:
        for key, node in self._nodes.items():
            assert node.queued is not None or not node.ready, f"{key!r} is in no queue"
            assert node.queued in (None, ARRIVED) or node.queued <= node.rank, f"{key!r} is queued too late"

    def _move(self, node: Node[K], queue: Queue[K]) -> None:
        """Into another queue, or anew into its own under a lower rank."""
        origin = node.queue
        assert origin is not None
        origin.weight -= node.weight
        queue.weight += node.weight
        node.queue = queue
        if node.queued is not ARRIVED:
            node.queued = None
            if not (node.children or node.pins or node.held_children):
                queue.push(node)

    def _move_chain(self, node: Node[K], queue: Queue[K]) -> None:
        """Like `_move`, with all ancestors that are in the queue that `node` leaves."""
        origin = node.queue
        self._move(node, queue)
        above = node.parent
        while above is not None and above.queue is origin:
            self._move(above, queue)
            above = above.parent

    def _join(self, node: Node[K]) -> None:
        """A node is in the frontier now. Most leave it again before the next eviction, so they are queued then."""
        if node.queued is None:
            node.queued = ARRIVED
            self._arrived.append(node)

    def _settle(self) -> None:
        """Queue what has joined the frontier and is still there."""
        for node in self._arrived:
            node.queued = None
            if node.queue is not None and not (node.children or node.pins or node.held_children):
                self._place(node)
        self._arrived.clear()

    def _release(self, node: Node[K] | None) -> None:
        """A held child of `node` is held no more."""
        while node is not None:
            node.held_children -= 1
            if node.pins or node.held_children:
                return
            self._evictable += node.weight
            if not node.children:
                self._join(node)
            node = node.parent

    def _drop(self, node: Node[K], *, evicted: bool) -> None:
        self._forget(node, evicted=evicted)
        node.queue = None
        del self._nodes[node.key]
        self._weight -= node.weight
        self._evictable -= node.weight
        above = node.parent
        if above is not None:
            above.children -= 1
            if not (above.children or above.pins or above.held_children):
                self._join(above)
