"""What fusion needs of an engine: a model whose keys can be rotated, and a way through its forward."""

from collections.abc import Callable
from typing import Any

import torch

from ragkv.connectors.vllm.forward import EngineForward
from ragkv.connectors.vllm.identity import Shape
from ragkv.connectors.vllm.layout import RAW, LayerCache
from ragkv.connectors.vllm.recompute import Fuser
from ragkv.connectors.vllm.rope import rotations
from ragkv.errors import FusionError

FLOAT8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def element_type(vllm_config: Any, shape: Shape) -> torch.dtype:
    """What the cache's elements are (vLLM's own tensors of fp8 are of bytes)."""
    return FLOAT8.get(str(vllm_config.cache_config.cache_dtype), shape.dtype)


def make_turn(
    vllm_config: Any, shape: Shape, model: Any
) -> Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Rotates raw keys of a layer. FusionError: the model's positions are of a kind that cannot be."""
    by_layer, dtype = rotations(model, shape.layers), element_type(vllm_config, shape)

    def turn(number: int, raw: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
        turned = by_layer[number].turn(raw.view(dtype), shifts)
        return turned.view(RAW[shape.geometry.itemsize])

    return turn


def make_fuser(
    vllm_config: Any, kv_cache_config: Any, shape: Shape, model: Any, caches: list[LayerCache]
) -> Fuser:
    """The worker's part of fusion. FusionError: this engine cannot."""
    parallel = vllm_config.parallel_config
    if getattr(parallel, "data_parallel_size", 1) > 1 and getattr(parallel, "is_moe_model", False):
        raise FusionError("data parallel experts: all ranks would have to fuse at once; supported: one rank")
    if getattr(vllm_config, "lora_config", None) is not None:
        raise FusionError("LoRA adapters; supported: none")
    if vllm_config.speculative_config is not None:
        raise FusionError("speculative decoding; supported: none")
    if getattr(vllm_config.model_config, "is_multimodal_model", False):
        raise FusionError("a multimodal model; supported: text only")
    layers = {name: vllm_config.compilation_config.static_forward_context[name] for name in shape.layers}
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    first = next(iter(layers.values()))
    tokens, kernel = shape.geometry.block_tokens, caches[0].kernel_tokens
    forward = EngineForward(vllm_config, spec, layers, model, tokens, kernel, first.kv_cache.device)
    return Fuser(forward, list(layers.values()), caches, element_type(vllm_config, shape), tokens)
