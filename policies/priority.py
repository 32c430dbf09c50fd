"""Classes of priority over any policy: what is in a lower class goes first, whatever its use."""

from collections.abc import Callable, Iterator
from typing import cast

from ragkv.policies.chain import ChainPolicy, Node, Queue
from ragkv.policies.contract import EvictionPolicy, K


class PrioritizedNode(Node[K]):
    __slots__ = ("priority",)

    priority: int


class Prioritized(ChainPolicy[K]):
    """One policy of `make` for each priority from 0 to `levels` - 1; victims come from the lowest that has any.

    A key is never in a lower class than its children: to insert or raise a child raises its ancestors. They stay
    raised when it goes. Raised keys begin anew in their class, as just used. The inner policies see keys without
    parents: all but the frontier is pinned there, so they say which leaf goes and need not know more. Raising
    takes time in proportion to the keys raised, which a key is `levels` - 1 times at most.
    """

    node_type = PrioritizedNode

    def __init__(self, make: Callable[[], EvictionPolicy[K]], levels: int = 4) -> None:
        super().__init__()
        if levels < 1:
            raise ValueError(f"levels = {levels!r}; allowed: 1 or more")
        self._inner = [make() for _ in range(levels)]
        self._entering = 0  # priority of the key being inserted

    def insert(
        self, key: K, parent: K | None = None, weight: int = 1, cost: float = 1.0, priority: int = 0
    ) -> None:
        """As in the contract, in the class `priority`. ValueError: no such class."""
        self._check_priority(priority)
        self._entering = priority
        super().insert(key, parent, weight, cost)
        if parent is not None:
            self._leave_frontier(self._nodes[parent])
            self.raise_priority(parent, priority)

    def raise_priority(self, key: K, priority: int) -> None:
        """Move `key` and its ancestors up to the class `priority`, those of them that are below. KeyError: unknown
        key. ValueError: no such class."""
        self._check_priority(priority)
        node = cast("PrioritizedNode[K] | None", self._nodes[key])
        while node is not None and node.priority < priority:
            placed = node.queued is PLACED
            self._inner[node.priority].remove(node.key)
            node.priority = priority
            self._enter_inner(node)
            if placed:
                self._inner[priority].unpin(node.key)
            node = cast("PrioritizedNode[K] | None", node.parent)

    @property
    def highest(self) -> int:
        """The class that goes last."""
        return len(self._inner) - 1

    def priority(self, key: K) -> int:
        """The class that `key` is in now. KeyError: unknown key."""
        return cast("PrioritizedNode[K]", self._nodes[key]).priority

    def pin(self, key: K) -> None:
        super().pin(key)
        self._leave_frontier(self._nodes[key])

    def check_integrity(self) -> None:
        super().check_integrity()
        for inner in self._inner:
            inner.check_integrity()
        assert sum(map(len, self._inner)) == len(self._nodes)
        for key, node in self._nodes.items():
            node = cast("PrioritizedNode[K]", node)
            assert key in self._inner[node.priority], f"{key!r} is not in its class"
            if node.parent is not None:
                assert node.priority <= cast("PrioritizedNode[K]", node.parent).priority, (
                    f"{key!r} above its parent"
                )

    def _check_priority(self, priority: int) -> None:
        if not 0 <= priority < len(self._inner):
            raise ValueError(f"priority = {priority!r}; allowed: 0 to {len(self._inner) - 1}")

    def _add(self, node: Node[K]) -> None:
        node = cast("PrioritizedNode[K]", node)
        node.queue = self._queue
        node.priority = self._entering
        self._enter_inner(node)

    def _enter_inner(self, node: PrioritizedNode[K]) -> None:
        inner = self._inner[node.priority]
        inner.insert(node.key, None, node.weight, node.cost)
        inner.pin(node.key)

    def _use(self, node: Node[K]) -> None:
        self._inner[cast("PrioritizedNode[K]", node).priority].touch(node.key)

    def _place(self, node: Node[K]) -> None:
        node.queued = PLACED
        self._inner[cast("PrioritizedNode[K]", node).priority].unpin(node.key)

    def _leave_frontier(self, node: Node[K]) -> None:
        if node.queued is PLACED:
            node.queued = None
            self._inner[cast("PrioritizedNode[K]", node).priority].pin(node.key)

    def _next(self) -> Node[K]:
        inner = next(inner for inner in self._inner if inner.evictable)
        victims = inner.evict(1)
        assert victims is not None and len(victims) == 1
        return self._nodes[victims[0]]

    def _forget(self, node: Node[K], *, evicted: bool) -> None:
        if not evicted:
            self._inner[cast("PrioritizedNode[K]", node).priority].remove(node.key)

    def _queues(self) -> Iterator[Queue[K]]:
        yield from ()

    def _check_frontier(self) -> None:
        for key, node in self._nodes.items():
            assert node.queued is not None or not node.ready, f"{key!r} is not in the frontier"
            assert node.queued is not PLACED or node.ready, f"{key!r} is in the frontier"


PLACED = object()  # in the frontier, and not pinned in its class
