"""Why keys of LMCache's have no counterpart here."""

EXTRA = "extra_config."  # what stands in that key of LMCache's
UNKNOWN = "not a key of LMCache's that ragkv knows"

REASONS = {
    "local_cpu": "memory is always a tier; memory.capacity says how large",
    "local_cpu_use_hugepages": "shared memory comes as /dev/shm gives it",
    "reserve_local_cpu_size": "memory.capacity is what is used, and is reserved at start",
    "local_disk_path_sharding": "one folder serves all workers",
    "pipelined_backend": "lower tiers are always read in parallel, while the request waits",
    "enable_async_loading": "lower tiers are always read while the request waits, at most placement.deadline",
    "use_layerwise": "all layers are loaded together, before the step",
    "save_decode_cache": "answers are always stored",
    "save_unfull_chunk": "the end of a prompt is always stored, also where it fills no chunk",
    "pre_caching_hash_algorithm": "hashes are the same in every process and on every machine",
    "hash_algorithm": "hashes are the same in every process and on every machine",
    "blend_special_str": "passages are found by their text, or by hints: no separator stands between them",
    "blend_separator": "passages are found by their text, or by hints: no separator stands between them",
    "blend_add_special_in_precomp": "passages are prefilled behind the system prompt: ragkv ingest",
    "blend_check_layers": "the selection deviation always looks at the second layer",
    "blend_thresholds": "fusion.recompute_ratio alone says how much is computed again",
    "min_retrieve_tokens": "placement.gate declines loads that cost more than they save",
    "lookup_timeout_ms": "a lookup crosses no process",
    "priority_limit": "memory.priorities and the hint priority say what goes first; everything may be stored",
    "cache_policy": "no policy goes by it here; memory.policy stays as it is",
    "eviction_policy": "no policy goes by it here; memory.policy stays as it is",
    "numa_mode": "memory lies where the kernel puts it; numactl can bind the engine",
    "store_location": "disk.write, redis.write and the admissions say what is written where",
    "retrieve_locations": "tiers are asked in their order: memory, disk, Redis",
    "enable_kv_events": "no events are published",
    "external_lookup_client": "the scheduler side knows itself what is stored",
    "remote_config_url": "settings come from a file, kv_connector_extra_config and the environment",
    "audit_actual_remote_url": "nothing stands between an engine and its store",
    "extra_config": "a detail of LMCache's own",
    "py_enable_gc": "the garbage collector is left alone",
    "app_id": "settings come from a file, kv_connector_extra_config and the environment",
    "hit_miss_ratio": "nothing makes hits or misses up",
    "enable_scheduler_bypass_lookup": "the scheduler side knows itself what is stored",
    "lookup_server_worker_ids": "the scheduler side knows itself what is stored",
    "use_gpu_connector_v3": "the layout of the engine's cache is found out at start",
    "null_block_id": "the layout of the engine's cache is found out at start",
    "eviction_ratio": "as much goes as room is needed, when it is needed",
    "eviction_trigger_watermark": "as much goes as room is needed, when it is needed",
    "kv_event_log_size": "no events are published",
    "separate_object_groups": "models with layers of several kinds are not supported",
    "enable_segmented_prefix": "fusion takes whatever was found",
    "enable_dedup_content": "of several copies fusion takes the one with the least foreign text before it",
    "enable_blend_reorder": "prompts are left as they are",
}

# A reason, and how the names begin that it holds for. The longest that fits counts.
BEGINNINGS = {
    "engines share a folder or Redis, not each other's memory": ("p2p_", "enable_p2p"),
    "prefill and decoding on different engines are not supported": ("pd_", "enable_pd", "enable_xpyd"),
    "there is no NIXL transport": ("nixl_", "transfer_channel"),
    "there is no GPUDirect Storage; disk.path is read through memory": ("gds_", "use_gds"),
    "there is no CXL memory": ("maru_",),
    "there is no controller; engines find each other's chunks in the store they share": (
        *("controller_", "enable_controller", "lmcache_", "coordinator_"),
    ),
    "ragkv has no port of its own: metrics are in vLLM's, ragkv store looks into folders": ("internal_api_",),
    "no foreign code is loaded or run": (
        *("run_script", "script_", "plugin", "runtime_plugin", "server_module"),
        *("storage_plugin", "remote_storage_plugin", "external_backends"),
    ),
    "memory.capacity is reserved at start": ("lazy_memory_", "enable_lazy_memory", "l1_"),
    "trace.file and ragkv simulate serve for that": ("chunk_statistics_", "enable_chunk_statistics"),
    "a pin says itself how long it holds, by hint": ("pin_",),
    "only KV is kept": ("hidden_state", "enable_hidden_state", "max_hidden_state", "ec_", "ec"),
    "lower tiers are disk.path and redis.url": ("l2_",),
    "there is no server: ragkv runs inside the engine": (
        *("mp_", "host", "port", "http_", "max_workers", "max_gpu_workers", "max_cpu_workers", "shm_name"),
        *("supported_transfer_mode", "transport", "instance_id", "worker_", "isolated_ipc"),
        *("grpc_", "session_ttl", "periodic_notifier", "enable"),
    ),
}


def reason(name: str) -> str:
    """Why the key of that name (those in `extra_config` begin with EXTRA) has no counterpart."""
    if name in REASONS:
        return REASONS[name]
    if name.startswith(EXTRA):
        return REASONS["extra_config"]
    fitting = [
        (len(beginning), why)
        for why, beginnings in BEGINNINGS.items()
        for beginning in beginnings
        if name.startswith(beginning)
    ]
    return max(fitting)[1] if fitting else UNKNOWN
