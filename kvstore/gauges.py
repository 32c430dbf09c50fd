"""The gauges of the tiers that have pages."""

from collections.abc import Sequence

from ragkv.kvstore import metrics as m
from ragkv.kvstore.device_tier import DeviceTier
from ragkv.kvstore.metrics import Metrics
from ragkv.kvstore.pages import PagePool


class Gauges:
    """Set only where something has changed. `page_bytes`: of a page, in either tier. `planes`: names of planes,
    from plane 0 on."""

    def __init__(self, metrics: Metrics, page_bytes: int, planes: Sequence[str]) -> None:
        self._metrics, self._page_bytes, self._planes = metrics, page_bytes, planes
        self._reported: tuple[int, ...] = ()

    def report(self, pinned: int, pool: PagePool, chunks: int, device: DeviceTier | None) -> None:
        """`pinned`: pages that owners have pinned; `pool`: memory's pages; `chunks`: that memory has."""
        held = tuple(pool.held[number] for number in range(len(self._planes)))
        now = (pinned, *held, chunks, *((device.used, len(device)) if device is not None else ()))
        if now == self._reported:
            return
        self._reported = now
        self._metrics.gauge(m.PINNED_BYTES, pinned * self._page_bytes)
        self._report(m.MEMORY, pool, chunks)
        for name in dict.fromkeys(self._planes):  # two planes may differ in their heads alone
            pages = sum(count for each, count in zip(self._planes, held, strict=True) if each == name)
            self._metrics.gauge(m.PLANE_BYTES, pages * self._page_bytes, plane=name)
        if device is not None:
            self._report(m.DEVICE, device, len(device))

    def _report(self, tier: str, pages: PagePool | DeviceTier, chunks: int) -> None:
        gauge = self._metrics.gauge
        gauge(m.USED_PAGES, pages.used, tier=tier)
        gauge(m.USED_BYTES, pages.used * self._page_bytes, tier=tier)
        gauge(m.CAPACITY_BYTES, pages.pages * self._page_bytes, tier=tier)
        gauge(m.CHUNKS, chunks, tier=tier)
