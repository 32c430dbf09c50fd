"""What every policy over chains shares: linked nodes, pins, and the rule that a parent outlives its children.

A node is *held* while it is pinned or has a held child. Held nodes stand outside the order, so `evict` never
walks over them. A node in the order always stands before its parent: children go first, in constant time.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Generic

from ragkv.policies.contract import EvictionPolicy, K


class Node(Generic[K]):
    """One tracked key. `before`/`after` link it into a `Ring` while it is not held."""

    __slots__ = (
        "after",
        "before",
        "bucket",
        "children",
        "cost",
        "held_children",
        "key",
        "parent",
        "pins",
        "weight",
    )

    def __init__(self, key: K, parent: "Node[K] | None", weight: int, cost: float = 1.0) -> None:
        self.key = key
        self.parent = parent
        self.weight = weight
        self.cost = cost
        self.pins = 0
        self.children = 0
        self.held_children = 0
        self.bucket: object = None
        self.before: Node[K] | Ring[K] | None = None
        self.after: Node[K] | Ring[K] | None = None

    @property
    def held(self) -> bool:
        return self.pins > 0 or self.held_children > 0


class Ring(Generic[K]):
    """A circular doubly-linked list of nodes, first to go first; the ring itself is its sentinel."""

    __slots__ = ("after", "before")

    def __init__(self) -> None:
        self.before: Node[K] | Ring[K] = self
        self.after: Node[K] | Ring[K] = self

    def __iter__(self) -> Iterator[Node[K]]:
        node = self.after
        while isinstance(node, Node):
            following = node.after
            yield node
            assert following is not None
            node = following


def link(node: Node[K], ahead_of: "Node[K] | Ring[K]") -> None:
    """Put `node` directly ahead of another (ahead of the ring: at its end)."""
    before = ahead_of.before
    assert before is not None
    node.before, node.after = before, ahead_of
    before.after = node
    ahead_of.before = node


def unlink(node: Node[K]) -> None:
    """Take `node` out of its ring."""
    assert node.before is not None and node.after is not None
    node.before.after, node.after.before = node.after, node.before
    node.before = node.after = None


class ChainPolicy(EvictionPolicy[K]):
    """Implementers say where a node stands (`_place`), what a use changes (`_use`), and the order (`_order`)."""

    def __init__(self) -> None:
        self._nodes: dict[K, Node[K]] = {}
        self._evictable = 0

    @abstractmethod
    def _place(self, node: Node[K]) -> None:
        """Link a node that is not held into the order, as just used, never after its parent."""

    @abstractmethod
    def _order(self) -> Iterator[Node[K]]:
        """The nodes of the order, first to go first. Safe against unlinking the node just yielded."""

    def _use(self, node: Node[K], *, new: bool) -> None:
        """Note a use of a node that is linked nowhere at the moment, or held."""

    def _forget(self, node: Node[K]) -> None:
        """Drop what `_use` keeps for a node."""

    def insert(self, key: K, parent: K | None = None, weight: int = 1, cost: float = 1.0) -> None:
        if key in self._nodes:
            raise ValueError(f"insert: {key!r} is tracked already")
        if weight < 1:
            raise ValueError(f"insert: weight {weight} of {key!r} is below 1")
        if not cost > 0:
            raise ValueError(f"insert: cost {cost} of {key!r} is not above 0")
        above = None if parent is None else self._nodes[parent]
        node = Node(key, above, weight, cost)
        if above is not None:
            above.children += 1
        self._nodes[key] = node
        self._use(node, new=True)
        self._enter(node)

    def touch(self, key: K) -> None:
        node = self._nodes[key]
        if node.held:
            self._use(node, new=False)
        else:
            unlink(node)
            self._use(node, new=False)
            self._place(node)

    def remove(self, key: K) -> None:
        node = self._nodes[key]
        if node.children:
            raise ValueError(f"remove: {key!r} has {node.children} children")
        if node.held:
            node.pins = 0
            self._release(node.parent)
        else:
            self._leave(node)
        self._drop(node)

    def pin(self, key: K) -> None:
        node = self._nodes[key]
        held = node.held
        node.pins += 1
        while not held:
            self._leave(node)
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
        if not node.held:
            self._enter(node)
            self._release(node.parent)

    def evict(self, weight: int) -> list[K] | None:
        if weight > self._evictable:
            return None
        victims: list[K] = []
        order = self._order()
        while weight > 0:
            node = next(order)
            self._leave(node)
            self._drop(node)
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
        order = list(self._order())
        place = {node.key: index for index, node in enumerate(order)}
        assert len(place) == len(order), "a key stands twice in the order"
        assert place.keys() == {k for k, n in self._nodes.items() if not n.held}, "order and holds disagree"
        assert self._evictable == sum(node.weight for node in order), "evictable weight is off"
        children = dict.fromkeys(self._nodes, 0)
        held_children = dict.fromkeys(self._nodes, 0)
        for key, node in self._nodes.items():
            assert node.key == key
            if node.parent is None:
                continue
            above = node.parent.key
            assert self._nodes.get(above) is node.parent, f"{key!r} outlived its parent"
            children[above] += 1
            held_children[above] += node.held
            assert above not in place or (not node.held and place[key] < place[above]), (
                f"{key!r} does not stand before its parent"
            )
        for key, node in self._nodes.items():
            assert (node.children, node.held_children) == (children[key], held_children[key])

    def _enter(self, node: Node[K]) -> None:
        self._evictable += node.weight
        self._place(node)

    def _leave(self, node: Node[K]) -> None:
        self._evictable -= node.weight
        unlink(node)

    def _release(self, node: Node[K] | None) -> None:
        """A held child of `node` is held no more."""
        while node is not None:
            node.held_children -= 1
            if node.held:
                return
            self._enter(node)
            node = node.parent

    def _drop(self, node: Node[K]) -> None:
        self._forget(node)
        if node.parent is not None:
            node.parent.children -= 1
        del self._nodes[node.key]
