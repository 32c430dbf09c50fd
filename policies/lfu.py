"""Least frequently used, in constant time a step; of equally frequent keys the least recently used goes first.

Shah, Mitra, Matani: "An O(1) algorithm for implementing the LFU cache eviction scheme" (2010): a list of
buckets, one a frequency, each a list in order of use. Counts live as long as their key. A key counts no more
uses than its parent, so that a parent outlives its children.
"""

from collections.abc import Iterator
from typing import cast

from ragkv.policies.chain import ChainPolicy, Node, Ring, link
from ragkv.policies.contract import K


class Bucket(Ring[K]):
    """All keys of one frequency. Held keys count as members, though they stand in no ring."""

    __slots__ = ("higher", "lower", "members", "uses")

    def __init__(self, uses: int) -> None:
        super().__init__()
        self.uses = uses
        self.members = 0
        self.lower: Bucket[K] = self
        self.higher: Bucket[K] = self


class LFU(ChainPolicy[K]):
    """A new key has one use; each touch adds one, up to its parent's count."""

    def __init__(self) -> None:
        super().__init__()
        self._never: Bucket[K] = Bucket(0)  # the sentinel of the circular list of buckets

    def _use(self, node: Node[K], *, new: bool) -> None:
        old = self._never if new else cast(Bucket[K], node.bucket)
        uses = old.uses + 1
        if node.parent is not None and uses > cast(Bucket[K], node.parent.bucket).uses:
            return
        bucket = old.higher
        if bucket.uses != uses:
            bucket = Bucket(uses)
            bucket.lower, bucket.higher = old, old.higher
            old.higher.lower = bucket
            old.higher = bucket
        bucket.members += 1
        if not new:
            self._forget(node)
        node.bucket = bucket

    def _forget(self, node: Node[K]) -> None:
        bucket = cast(Bucket[K], node.bucket)
        bucket.members -= 1
        if not bucket.members:
            bucket.lower.higher, bucket.higher.lower = bucket.higher, bucket.lower

    def _place(self, node: Node[K]) -> None:
        parent, bucket = node.parent, cast(Bucket[K], node.bucket)
        same = parent is not None and not parent.held and parent.bucket is bucket
        link(node, cast(Node[K], parent) if same else bucket)

    def _order(self) -> Iterator[Node[K]]:
        bucket = self._never.higher
        while bucket is not self._never:
            following = bucket.higher
            yield from bucket
            bucket = following
