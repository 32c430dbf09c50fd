"""vLLM's configuration objects, as far as ragkv looks at them."""

from types import SimpleNamespace

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec


def spec(cls=FullAttentionSpec, **change):
    given = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
    return cls(**given | change)


def config(**change):
    parallel = {
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "tensor_parallel_size": 2,
        "data_parallel_size": 1,
        "is_moe_model": False,
        "enable_eplb": False,
    }
    parallel |= {name: change.pop(name) for name in list(change) if name in parallel}
    model = {
        "hf_config": SimpleNamespace(to_dict=lambda: {"rope_theta": 1e4}),
        "model": "org/model",
        "revision": None,
        "seed": 0,
        "quantization": None,
        "dtype": torch.bfloat16,
        "is_prefix_caching_supported": True,
        "max_model_len": 2048,
        "layers": 3,
    }
    model |= {name: change.pop(name) for name in list(change) if name in model}
    layers = model.pop("layers")
    model["get_total_num_hidden_layers"] = lambda: layers
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel),
        model_config=SimpleNamespace(**model),
        cache_config=SimpleNamespace(
            cache_dtype=change.pop("cache_dtype", "auto"),
            sliding_window=change.pop("sliding_window", None),
            calculate_kv_scales=change.pop("calculate_kv_scales", False),
            enable_prefix_caching=change.pop("enable_prefix_caching", True),
        ),
        load_config=SimpleNamespace(load_format=change.pop("load_format", "auto")),
        speculative_config=change.pop("speculative_config", None),
        device_config=SimpleNamespace(device_type=change.pop("device_type", "cuda")),
    )


def caches(*specs, layers=("layer.0", "layer.1", "layer.2")):
    return SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=each, layer_names=list(layers)) for each in specs]
    )
