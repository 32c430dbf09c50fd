"""vLLM's rotary modules, as its models make them."""

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

HEAD = 64
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 32.0, "original_max_position_embeddings": 4096}
SCHEMES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "theta": {"rope_type": "default", "rope_theta": 1e6},
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.25},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3,
    "ntk": {"rope_type": "ntk", "factor": 4.0},
    "ntk_mixed": {"rope_type": "ntk", "factor": 4.0, "mixed_b": 0.75},
    "yarn": YARN,
    "yarn_attention": YARN | {"attention_factor": 2.5, "truncate": False},
    "yarn_partial": YARN | {"partial_rotary_factor": 0.5},
}
REFUSED = {
    "DynamicNTKScalingRotaryEmbedding": {"rope_type": "dynamic", "factor": 2.0},
    "DynamicNTKAlphaRotaryEmbedding": {"rope_type": "dynamic", "alpha": 2.0},
    "MRotaryEmbedding": {"rope_type": "default", "mrope_section": [8, 12, 12]},
    "Gemma4RotaryEmbedding": {"rope_type": "proportional"},
    "DeepseekScalingRotaryEmbedding": YARN | {"rope_type": "deepseek_yarn"},
}


def rotary(parameters, neox=True, dtype=torch.float32, count=131072, head=HEAD):
    """vLLM's module for a config's `rope_parameters`; positions below `count` at least."""
    with set_current_vllm_config(VllmConfig()):
        return get_rope(head, count, neox, dict(parameters), dtype)


def keys_at(module, keys, positions):
    """What vLLM makes of keys [tokens, heads, head] at `positions`, by the forward that its CPU engine runs."""
    flat = keys.flatten(1).clone()
    return module(positions, flat.clone(), flat)[1].view(keys.shape)


def noise(*shape, seed=0):
    """Normal values, float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
