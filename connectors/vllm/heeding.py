"""The scheduler side's part of run-time control: what `Control` wants is done here, on the scheduler's thread."""

from collections import deque
from collections.abc import Callable
from typing import Any

from ragkv.connectors.vllm.control import Control
from ragkv.kvstore.catalogue import Chunk
from ragkv.kvstore.placement import Placement

FLUSH_SECONDS = 60.0  # after which a flush is given up


class Heed:
    """Of one engine. A flush looks at all of memory, a bounded part of it a step."""

    def __init__(self, control: Control, placement: Placement, clock: Callable[[], float]) -> None:
        self.control, self._placement, self._clock = control, placement, clock
        self._left: deque[Chunk] | None = None  # what the flush under way has still to look at
        self._number, self._until = 0, 0.0
        control.numbers = self.numbers

    @property
    def under_way(self) -> bool:
        """Whether a flush has begun and not ended: the engine must go on stepping."""
        return self._left is not None

    def heed(self, *, storing: bool) -> None:
        """Begin a flush that is wanted, once nothing is `storing`, and go on with it."""
        if not self.control.flushing or (storing and self._left is None):
            return
        if self._left is None:
            self._number, self._until = self.control.asked, self._clock() + FLUSH_SECONDS
            self._left = deque(self._placement.hierarchy.everything())
        over = self._placement.write_down(self._left) and not any(t.queued for t in self._placement.tiers)
        if over or self._clock() > self._until:
            self._left, self.control.answered = None, self._number

    def numbers(self) -> dict[str, Any]:
        """Plain figures, for the server's thread too: each by itself is right."""
        tiers = {
            tier.name: {"queued_bytes": tier.queued, "resting": list(tier.resting)}
            | ({} if tier.index is None else {"values": len(tier.index), "bytes": tier.index.used})
            for tier in self._placement.tiers
        }
        return {"chunks": len(self._placement.hierarchy), "tiers": tiers}
