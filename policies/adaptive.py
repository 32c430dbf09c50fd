"""Learns from the requests what returns and when, and evicts what is worth least to keep.

Every key belongs to a group: how often it was used of late; if only once, how deep it stands, whether it has
children, and whether it stands behind something popular. For each group a `ReuseTable` learns the ages at which
its keys were used again, evicted ones too (ghosts), and from that what a key is worth at every age; times cost per
weight. The victim is the least worthy of a sample of the frontier and the least of earlier samples (as Redis
samples for its LRU); then its chain is followed upwards, as long as nothing seen is worth less. So the policy
turns into LRU, LFU, or MRU where the requests say so, and knows the pause after which a talk goes on.
"""

import random
from collections import OrderedDict
from typing import cast

from ragkv.policies.chain import ARRIVED, SLACK, ChainPolicy, Node
from ragkv.policies.contract import K
from ragkv.policies.ghosts import mark
from ragkv.policies.reuse import ReuseTable, bucket

SAMPLE = 32  # nodes looked at for a victim
KEPT = 8  # of them remembered for the next time
FOLLOWED = 16  # victims of one chain in a row
GHOSTS = 4  # for each tracked key, and at least LEAST_GHOSTS
LEAST_GHOSTS = 1024
HALF_LIFE = 8  # a use counts half after so many references for each tracked key, and for LEAST_TRACKED more
LEAST_TRACKED = 256
LEARNED = 20  # references for each tracked key that the tables remember
LEAST_LEARNED = 2048
MOST_LEVEL, MOST_DEPTH, MOST_FAME = 6, 4, 3


class AdaptiveNode(Node[K]):
    """`uses` fades; `rank` is the stamp of the last use. `fame`: above 0 behind a key that was used again."""

    __slots__ = ("depth", "fame", "table", "worth")

    depth: int
    fame: int
    table: ReuseTable
    worth: float


Ghost = tuple[ReuseTable, int, float]  # table, stamp, uses


class Adaptive(ChainPolicy[K]):
    """Deterministic: the sample comes from a seeded generator. `queued` is a node's place in `_frontier`."""

    node_type = AdaptiveNode

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._frontier: list[AdaptiveNode[K]] = []  # and some that have left it since
        self._ghosts: OrderedDict[int, Ghost] = OrderedDict()
        self._once = ReuseTable()
        self._tables: dict[int, ReuseTable] = {}
        self._due = 0  # when the tables are computed anew
        self._random = random.Random(seed).random
        self._kept: list[AdaptiveNode[K]] = []
        self._above: AdaptiveNode[K] | None = None  # the last victim's parent
        self._bar, self._followed = 0.0, 0

    def _add(self, node: Node[K]) -> None:
        node = cast("AdaptiveNode[K]", node)
        node.queue = self._queue
        node.rank = self._clock
        node.mark = mark(node.key)
        node.worth = node.cost / node.weight
        node.uses = 1.0
        parent = cast("AdaptiveNode[K] | None", node.parent)
        if parent is None:
            node.depth = node.fame = 0
        else:
            node.depth = parent.depth + 1
            node.fame = min(int(parent.uses).bit_length(), MOST_FAME) if parent.uses >= 2 else parent.fame
        if ghost := self._ghosts.pop(node.mark, None):
            table, stamp, uses = ghost
            self._count(node, table, self._clock - stamp, uses)
        node.table = self._table(node, False)
        node.table.waits += 1
        if parent is not None and not parent.children:
            parent.table.waits -= 1
            parent.table = self._table(parent, True)
            parent.table.waits += 1
        if self._clock >= self._due:
            self._learn()

    def _use(self, node: Node[K]) -> None:
        node = cast("AdaptiveNode[K]", node)
        self._count(node, node.table, self._clock - node.rank, node.uses)
        node.rank = self._clock
        node.table = self._table(node, node.children > 0)
        node.table.waits += 1
        if self._clock >= self._due:
            self._learn()

    def _count(self, node: AdaptiveNode[K], table: ReuseTable, age: int, uses: float) -> None:
        table.reused[bucket(age)] += 1
        node.uses = 1 + uses * 2 ** (-age / (HALF_LIFE * (len(self._nodes) + LEAST_TRACKED)))

    def _table(self, node: AdaptiveNode[K], inner: bool) -> ReuseTable:
        """Of the node's group. Used again: by uses in octaves; else by depth in double octaves, fame, children."""
        level = min(int(node.uses - 0.5).bit_length(), MOST_LEVEL)
        group = level
        if not level:
            depth = min(node.depth.bit_length() >> 1, MOST_DEPTH)
            group = -1 - (inner + 2 * (node.fame + (MOST_FAME + 1) * depth))
        table = self._tables.get(group)
        if table is None:
            below = self._tables.get(level - 1, self._once) if level else self._once
            table = self._tables[group] = ReuseTable(below)
        return table

    def _learn(self) -> None:
        """Compute the tables anew."""
        size = len(self._nodes)
        step = min(max(LEAST_LEARNED // 2, size // 2), max(64, self._clock // 2))
        self._due = self._clock + step
        factor = 1 - step / (LEARNED * max(LEAST_LEARNED, size))
        tables = self._tables.values()
        for table in tables:
            table.fade(factor)
        self._once.add_up(table for group, table in self._tables.items() if group < 0)
        for table in (self._once, *tables):
            table.rebuild(self._clock)

    def _value(self, node: AdaptiveNode[K]) -> float:
        return node.table.index[bucket(self._clock - node.rank)] * node.worth

    def _next(self) -> Node[K]:
        node = self._above
        if node is not None and (node.queue is None or not node.ready):
            node = None
        if node is not None and self._followed < FOLLOWED and self._value(node) <= self._bar:
            self._followed += 1
        else:
            node = self._search(node)
        self._above = cast("AdaptiveNode[K] | None", node.parent)
        return node

    def _search(self, candidate: AdaptiveNode[K] | None) -> AdaptiveNode[K]:
        sample = self._sample()
        if candidate is not None:
            sample.append(candidate)
        seen = {node.rank: (self._value(node), node.rank, node) for node in sample}
        first, *others = sorted(seen.values())
        self._bar = others[0][0] if others else first[0]
        self._kept = [entry[2] for entry in others[:KEPT]]
        self._followed = 0
        return first[2]

    def _sample(self) -> list[AdaptiveNode[K]]:
        """Of the frontier: all, where it is small, else some, and those kept from the last sample."""
        frontier = self._frontier
        if len(frontier) <= SAMPLE:
            for node in [node for node in frontier if not node.ready]:
                self._take_out(node)
            return list(frontier)
        sample = [node for node in self._kept if node.queue is not None and node.ready]
        wanted = len(sample) + SAMPLE
        while len(sample) < wanted:
            node = frontier[int(self._random() * len(frontier))]
            if node.ready:
                sample.append(node)
            else:
                self._take_out(node)
        return sample

    def _place(self, node: Node[K]) -> None:
        node.queued = len(self._frontier)
        self._frontier.append(cast("AdaptiveNode[K]", node))

    def _take_out(self, node: AdaptiveNode[K]) -> None:
        last = self._frontier.pop()
        if last is not node:
            self._frontier[node.queued] = last
            last.queued = node.queued
        node.queued = None

    def _forget(self, node: Node[K], *, evicted: bool) -> None:
        node = cast("AdaptiveNode[K]", node)
        if node.queued is not None and node.queued is not ARRIVED:
            self._take_out(node)
        ghosts = self._ghosts
        if evicted:
            ghosts[node.mark] = (node.table, node.rank, node.uses)
        while len(ghosts) > max(GHOSTS * len(self._nodes), LEAST_GHOSTS):
            ghosts.popitem(last=False)

    def _check_frontier(self) -> None:
        for place, node in enumerate(self._frontier):
            assert node.queued == place and self._nodes.get(node.key) is node
        for key, tracked in self._nodes.items():
            assert tracked.queued is not None or not tracked.ready, f"{key!r} is not in the frontier"
        assert len(self._ghosts) <= max(GHOSTS * (len(self._nodes) + 1), LEAST_GHOSTS) + SLACK
