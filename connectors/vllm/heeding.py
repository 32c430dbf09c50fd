"""The scheduler side's part of run-time control: what `Control` wants is done here, on the scheduler's thread."""

from collections.abc import Callable
from typing import Any

from ragkv.connectors.vllm.control import Control
from ragkv.kvstore.cache import KVCache

FLUSH_SECONDS = 60.0  # after which a flush is given up


class Heed:
    """Of one engine. A flush looks at all of memory, a bounded part of it a step."""

    def __init__(self, control: Control, cache: KVCache, clock: Callable[[], float]) -> None:
        self.control, self._cache, self._clock = control, cache, clock
        self.under_way = False  # a flush has begun and not ended: the engine must go on stepping
        self._number, self._until = 0, 0.0
        control.numbers = self.numbers

    def heed(self, *, storing: bool) -> None:
        """Begin a flush that is wanted, once nothing is `storing`, and go on with it."""
        if not self.control.flushing or (storing and not self.under_way):
            return
        if not self.under_way:
            self._number, self._until = self.control.asked, self._clock() + FLUSH_SECONDS
            self.under_way = True
        if self._cache.flush() or self._clock() > self._until:
            self._cache.end_flush()
            self.under_way, self.control.answered = False, self._number

    def numbers(self) -> dict[str, Any]:
        """Plain figures, for the server's thread too: each by itself is right."""
        tiers = {
            tier.name: {"queued_bytes": tier.queued, "resting": list(tier.resting)}
            | ({} if tier.index is None else {"values": len(tier.index), "bytes": tier.index.used})
            for tier in self._cache.tiers
        }
        return {"chunks": len(self._cache), "tiers": tiers}
