"""ragkv's metrics in vLLM's own /metrics: carried by vLLM's connector stats, exported in the API process."""

from collections.abc import Mapping
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from ragkv.connectors.vllm.error_boundary import in_words, logger
from ragkv.kvstore import metrics as m
from ragkv.kvstore.metrics import METRICS, SECONDS, merge, split


class RagKVStats(KVConnectorStats):
    """What `Metrics.drain` gave, on its way to the API process."""

    def reset(self) -> None:
        """Forget everything."""
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> "RagKVStats":
        """Add another process's or interval's record to this one."""
        merge(self.data, other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        """Counters of the interval, for vLLM's log line."""
        return {
            ":".join([name.removeprefix("ragkv_"), *values]): round(number)
            for key, number in sorted(self.data.get("counters", {}).items())
            for name, values in [split(key)]
        }

    def is_empty(self) -> bool:
        """True when there is nothing to send."""
        return not any(self.data.values())


class RagKVPromMetrics(KVConnectorPromMetrics):
    """Registers just what `ragkv.kvstore.metrics.METRICS` lists, with vLLM's own labels in front."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._engines = per_engine_labelvalues
        self._metrics: dict[str, Any] = {}
        try:
            self._register(metric_types, labelnames)
        except Exception as error:  # such as a name that is taken: the server serves without
            self._metrics = {}
            logger.warning("ragkv: no metrics in /metrics: %s", in_words(error))

    def _register(self, metric_types: dict[Any, Any], labelnames: list[str]) -> None:
        counter, gauge, histogram = (metric_types[kind] for kind in (Counter, Gauge, Histogram))
        for name, metric in METRICS.items():
            labels = [*labelnames, *metric.labels]
            if metric.kind == "counter":
                made = counter(name=name, documentation=metric.text, labelnames=labels)
            elif metric.kind == "gauge":
                made = gauge(
                    name=name, documentation=metric.text, labelnames=labels, multiprocess_mode="mostrecent"
                )
            else:
                made = histogram(name=name, documentation=metric.text, labelnames=labels, buckets=SECONDS)
            self._metrics[name] = made
            for values in metric.at_start:
                for engine in self._engines.values():
                    made.labels(*engine, *values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Book one record."""
        if not self._metrics:
            return
        for key, value in transfer_stats_data.get("counters", {}).items():
            self._at(key, engine_idx).inc(value)
        for key, value in transfer_stats_data.get("gauges", {}).items():
            self._at(key, engine_idx).set(value)
        for key, values in transfer_stats_data.get("seconds", {}).items():
            for seconds in values:
                self._at(key, engine_idx).observe(seconds)

    def _at(self, key: str, engine: int) -> Any:
        name, values = split(key)
        return self._metrics[name].labels(*self._engines[engine], *values)


def hit_sources(found: Mapping[str, int], tokens: int) -> dict[Any, int]:
    """Of so many tokens hit, how many are of which of vLLM's sources. `found`: tokens by tier; where these are not
    as many, all are of the host."""
    from vllm.v1.metrics.cache_hit_source import CacheHitSource as Source

    names = {m.DEVICE: Source.DEVICE, m.DISK: Source.DISK}
    names |= dict.fromkeys((m.REDIS, m.STORE), Source.EXTERNAL_UNSPECIFIED)
    if not tokens:
        return {}
    if sum(found.values()) != tokens:
        return {Source.HOST: tokens}
    sources: dict[Any, int] = {}
    for tier, count in found.items():
        source = names.get(tier, Source.HOST)
        sources[source] = sources.get(source, 0) + count
    return sources
