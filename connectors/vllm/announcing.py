"""What the log says while all is well: the start, in one line; tiers that rest and return; the end."""

import vllm

import ragkv
from ragkv.config import Settings
from ragkv.config.settings import rough_size
from ragkv.connectors.vllm.error_boundary import logger
from ragkv.kvstore import metrics as m
from ragkv.kvstore.cache import KVCache
from ragkv.kvstore.storage_tier import StorageTier
from ragkv.kvstore.stores.redis_url import parse_location

NOT_ALL_WRITTEN = "ragkv: not all was written to the lower tiers within placement.flush"
SHOWN = 8  # hexadecimal digits of a namespace


class Announcer:
    """Of one engine, on its scheduler side."""

    def __init__(self, settings: Settings, cache: KVCache) -> None:
        self._settings, self._cache = settings, cache
        self._resting: dict[str, tuple[str, ...]] = {}

    def started(self, namespace: bytes, workers: int, no_fusion: str | None) -> None:
        """Reuse begins: all workers have proven their layout. `no_fusion`: why the model cannot be fused."""
        self._cache.tick()  # so that the scans of the tiers that have ended count
        memory = rough_size(self._cache.capacity * self._cache.token_bytes)
        tiers = [f"memory {memory}"]
        if self._settings.device.capacity:
            tiers.append(f"device {rough_size(self._settings.device.capacity)} a worker")
        tiers += [self._described(tier) for tier in self._cache.tiers]
        parts = [
            f"version {ragkv.__version__} on vLLM {vllm.__version__} reuses KV",
            f"namespace {namespace.hex()[:SHOWN]}",
            *tiers,
            f"layout proven by {workers} worker{'s' if workers > 1 else ''}",
            f"fusion {self._fusion(no_fusion)}",
            f"gate {'on' if self._settings.placement.gate else 'off'}",
        ]
        logger.info("ragkv: %s", "; ".join(parts))

    def look(self) -> None:
        """Say which tiers rest now and did not before, and which are in use again."""
        for tier in self._cache.tiers:
            before, now = self._resting.get(tier.name, ()), tier.resting
            for side in now:
                if side not in before:
                    logger.info(
                        "ragkv: %s tier: %s rests after errors; it is tried again by itself", tier.name, side
                    )
            for side in before:
                if side not in now:
                    logger.info("ragkv: %s tier: %s is in use again", tier.name, side)
            self._resting[tier.name] = now

    def ended(self, *, written: bool) -> None:
        """The engine has ended; `written`: whether all that was to be written is."""
        if not written:
            logger.warning(NOT_ALL_WRITTEN)
        tiers = " and ".join(tier.name for tier in self._cache.tiers if tier.may_write)
        kept = f"; all that was to be kept is in {tiers}" if tiers and written else ""
        logger.info("ragkv: ended, with %d chunks in memory%s", len(self._cache), kept)

    def _described(self, tier: StorageTier) -> str:
        """A lower tier: where it is, its budget, and what was found there."""
        given = self._settings
        url = None if given.redis.url is None else parse_location(given.redis.url).text
        place = {m.DISK: given.disk.path, m.REDIS: url, m.STORE: given.store.name}.get(tier.name)
        where = tier.name if place is None else f"{tier.name} {place}"
        if tier.index is None:
            return f"{where}, which says itself what it holds"
        found = f"{len(tier.index):,} values, {rough_size(tier.index.used)} found"
        if "reading" in tier.resting:
            found = "it cannot be read now"
        elif not tier.listed:
            found = "still being listed"
        return f"{where} of {rough_size(tier.index.capacity)} ({found})"

    def _fusion(self, refusal: str | None) -> str:
        if refusal is not None:
            return f"not possible ({refusal})"
        return "on" if self._settings.fusion.enabled else "where a request asks for it"
