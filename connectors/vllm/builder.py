"""The scheduler side, put together from the settings."""

import contextlib
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ragkv.config import Settings
from ragkv.connectors.vllm.control import open_control
from ragkv.connectors.vllm.documents import DocumentStats
from ragkv.connectors.vllm.error_boundary import Faults, in_words, logger
from ragkv.connectors.vllm.fusing import Fusing
from ragkv.connectors.vllm.identity import Shape, load_structure
from ragkv.connectors.vllm.lifecycle import duties_of
from ragkv.connectors.vllm.listener import Listener
from ragkv.connectors.vllm.request_state import Recorder
from ragkv.connectors.vllm.scheduler import SchedulerSide
from ragkv.connectors.vllm.sizes import device_pages
from ragkv.connectors.vllm.trust import Trust
from ragkv.kvstore import metrics as m
from ragkv.kvstore.budget import Index
from ragkv.kvstore.cache import KVCache
from ragkv.kvstore.chunking import Chunker, TokenChain
from ragkv.kvstore.device_tier import DeviceTier
from ragkv.kvstore.gate import Gate
from ragkv.kvstore.io_pool import Completions, Lane
from ragkv.kvstore.keys import content_key
from ragkv.kvstore.metrics import Metrics
from ragkv.kvstore.pages import Pages, PageShape
from ragkv.kvstore.planes import Plane
from ragkv.kvstore.storage_tier import StorageTier
from ragkv.kvstore.stores.contract import Store
from ragkv.kvstore.stores.disk import DiskStore
from ragkv.kvstore.stores.installed import make_store
from ragkv.kvstore.trace import TraceWriter
from ragkv.policies import EvictionPolicy, Prioritized, make_admission, make_policy

READING_THREADS = 3  # a tier; writing takes one more


def make_cache(
    settings: Settings,
    pages: Sequence[PageShape],
    buffer: Any,
    hidden_size: int,
    metrics: Metrics,
    faults: Faults,
    *,
    planes: Sequence[Plane] = (),
    stores: bool = True,
) -> KVCache:
    """All tiers over one segment of shared memory. `hidden_size`: of the model, for what a token costs.
    `stores`: whether lower tiers are written to; an engine that only reads looks for what others write."""
    memory, device, placement = settings.memory, settings.device, settings.placement
    copies, attention_tokens = 0 if planes else device_pages(settings, pages[0]), 12.0 * hidden_size
    completions = Completions()
    tiers = _tiers(settings, completions, metrics, faults, stores=stores)
    return KVCache(
        Pages(buffer, pages[0], pages[1:]),
        _memory_policy(settings),
        tiers,
        Gate(
            active=placement.gate,
            attention_tokens=attention_tokens,
            metrics=metrics,
            say=lambda line: logger.info("ragkv: %s", line),
        ),
        completions,
        metrics,
        planes=planes,
        admission=make_admission(memory.admission),
        device=DeviceTier(copies, make_policy(device.policy), device.after) if copies else None,
        attention_tokens=attention_tokens,
        deadline=placement.deadline,
        by_content=settings.fusion.enabled or "fuse" in settings.hints.kinds,
        note=faults.note,
    )


def _memory_policy(settings: Settings) -> EvictionPolicy[Any]:
    memory = settings.memory
    if memory.priorities == 1:
        return make_policy(memory.policy)
    return Prioritized(lambda: make_policy(memory.policy), memory.priorities)


def make_side(
    vllm_config: Any,
    settings: Settings,
    shape: Shape,
    cache: KVCache,
    trust: Trust,
    metrics: Metrics,
    faults: Faults,
) -> SchedulerSide:
    """The scheduler side of an engine, over its cache."""
    sizes, duties = settings.chunks, duties_of(vllm_config.kv_transfer_config)
    block_tokens, layers = shape.geometry.block_tokens, shape.geometry.layers
    return SchedulerSide(
        cache,
        shape.groups,
        shape.workers,
        metrics,
        faults,
        chunker=Chunker(sizes.min_tokens, sizes.average_tokens, sizes.max_tokens, load_structure(vllm_config)),
        namespace_of=trust.namespaces.of,
        recorder=make_recorder(settings, faults),
        fusing=Fusing(settings.fusion, cache, block_tokens, layers, metrics),
        documents=DocumentStats(metrics, settings.fusion.documents),
        stores=duties.stores,
        loads=duties.loads,
        allow=settings.hints.kinds,
        control=open_control(settings, cache),
        confirmed_by=trust.round,
        listener=make_listener(vllm_config, shape.workers, cache.token_bytes, faults),
    )


def make_listener(vllm_config: Any, workers: int, token_bytes: int, faults: Faults) -> Listener | None:
    """What makes spans, where vLLM traces."""
    observability = getattr(vllm_config, "observability_config", None)
    endpoint = getattr(observability, "otlp_traces_endpoint", None)
    if endpoint is None:
        return None
    try:
        from ragkv.connectors.vllm.tracing import Tracing, open_tracer

        return Tracing(*open_tracer(endpoint), workers, token_bytes, faults.note)
    except Exception as error:  # OpenTelemetry is not ours, and may fail in any way
        logger.warning("ragkv: no spans to %s: %s: %s", endpoint, type(error).__name__, error)
        return None


def make_recorder(settings: Settings, faults: Faults) -> Recorder | None:
    """What writes the trace; it stops at the first trouble, and says so once."""
    if settings.trace.file is None:
        return None
    try:
        writer: TraceWriter | None = TraceWriter(Path(settings.trace.file).expanduser())
    except Exception as error:  # whatever lies there
        logger.warning("ragkv: trace.file = %s: %s; no trace is written", settings.trace.file, in_words(error))
        return None

    def record(namespace: bytes, chain: TokenChain) -> None:
        nonlocal writer
        if writer is None:
            return
        ends = (
            chain.ends if chain.ends and chain.ends[-1] == len(chain.tokens) else [*chain.ends, len(chain.tokens)]
        )
        starts = [0, *ends[:-1]]
        chunks = [
            (content_key(namespace, chain.tokens[start:end].tobytes()), end - start)
            for start, end in zip(starts, ends, strict=True)
        ]
        try:
            writer.record(time.time(), chunks)
        except OSError as error:
            faults.note("trace", error)
            with contextlib.suppress(OSError):
                writer.close()
            writer = None

    def close() -> None:
        with contextlib.suppress(OSError):
            if writer is not None:
                writer.close()

    return Recorder(record, close)


def _tiers(
    settings: Settings, completions: Completions, metrics: Metrics, faults: Faults, *, stores: bool
) -> list[StorageTier]:
    tiers = []
    make = functools.partial(_tier, settings, completions, metrics, faults, stores)
    disk, redis, other = settings.disk, settings.redis, settings.store
    if disk.path is not None and (store := _disk(disk.path, fsync=disk.fsync)) is not None:
        index = Index(disk.capacity, make_policy(disk.policy))
        tiers.append(make(m.DISK, store, index, disk, asks=disk.shared or not stores, bit=1))
    if redis.url is not None:
        from ragkv.kvstore.stores.redis import RedisStore

        server = RedisStore(
            redis.url,
            ttl_seconds=redis.ttl or None,
            max_value_bytes=redis.max_value,
            timeout_seconds=redis.timeout,
            prefix=f"{redis.prefix}:1:",
        )
        tiers.append(make(m.REDIS, server, None, redis, asks=True, bit=2))
    if other.name is not None and (store := _installed(other.name, other.options)) is not None:
        can = store.capabilities
        own = None if can.evicts else Index(other.capacity, make_policy(other.policy))
        tiers.append(make(m.STORE, store, own, other, asks=can.evicts or can.shared or not stores, bit=4))
    return tiers


def _tier(
    settings: Settings,
    completions: Completions,
    metrics: Metrics,
    faults: Faults,
    stores: bool,
    name: str,
    store: Store,
    index: Index | None,
    section: Any,
    *,
    asks: bool,
    bit: int,
) -> StorageTier:
    return StorageTier(
        store,
        index,
        make_admission(section.admission),
        Lane(f"{name}-read", READING_THREADS, completions),
        Lane(f"{name}-write", 1, completions),
        time.monotonic,
        metrics,
        faults.note,
        through=section.write == "through",
        queue_bytes=min(settings.placement.queue, settings.memory.capacity),  # what waits is pinned there
        asks=asks,
        bit=bit,
        name=name,
        may_write=stores,
        say=lambda text: logger.warning("ragkv: %s", text),
    )


def _installed(name: str, options: Mapping[str, Any]) -> Store | None:
    try:
        return make_store(name, options)
    except Exception as error:  # of the package that brings it, which may do anything
        logger.warning("ragkv: store.name = %s: %s; the engine runs without a store tier", name, in_words(error))
        return None


def _disk(path: str, *, fsync: bool) -> Store | None:
    try:
        store = DiskStore(Path(path).expanduser(), fsync=fsync)
    except Exception as error:  # whatever lies there, or does not
        logger.warning("ragkv: disk.path = %s: %s; the engine runs without a disk tier", path, in_words(error))
        return None
    if store.warning:
        logger.warning("ragkv: disk.path = %s: %s", path, store.warning)
    return store
