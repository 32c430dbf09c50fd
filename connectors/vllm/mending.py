"""What fusion needs of an engine: a model whose keys can be rotated, and a way through its forward."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ragkv.connectors.vllm.forward import EngineForward
from ragkv.connectors.vllm.fusion_worker import Fuser
from ragkv.connectors.vllm.identity import Shape
from ragkv.connectors.vllm.layers import LayerCache
from ragkv.connectors.vllm.rope import rotations
from ragkv.connectors.vllm.tiles import RAW
from ragkv.connectors.vllm.transfer import PrepareRotation, Rotate
from ragkv.errors import FusionError

FLOAT8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}

TURN_BYTES = 16 << 20  # of keys in float32 that are rotated at once
TURN_DEVICE_BYTES = 5 * TURN_BYTES  # with what is computed beside them


def element_type(vllm_config: Any, shape: Shape) -> torch.dtype:
    """What the cache's elements are (vLLM's own tensors of fp8 are of bytes)."""
    return FLOAT8.get(str(vllm_config.cache_config.cache_dtype), shape.dtype)


def make_turn(vllm_config: Any, shape: Shape, model: Any) -> PrepareRotation:
    """What prepares, for the tokens of a copy, the rotation of their raw keys in any layers. FusionError: the
    model's positions are of a kind that cannot be rotated."""
    by_layer, dtype = rotations(model, shape.layers), element_type(vllm_config, shape)
    raw_type, geometry = RAW[shape.geometry.itemsize], shape.geometry
    token_bytes = 4 * geometry.heads * geometry.head_dim  # in float32

    def prepare(shifts: torch.Tensor) -> Rotate:
        distinct = {id(rotation): rotation for rotation in by_layer}
        prepared = {number: rotation.prepare(shifts) for number, rotation in distinct.items()}
        most = max(1, TURN_BYTES // max(1, token_bytes * len(shifts)))

        def turn(layers: range, raw: torch.Tensor) -> torch.Tensor:
            turned = torch.empty(raw.shape, dtype=raw_type, device=raw.device)
            for some in together([id(by_layer[number]) for number in layers], most):
                turning = prepared[id(by_layer[layers[some.start]])]
                turned[some] = turning(raw[some].view(dtype)).view(raw_type)
            return turned

        return turn

    return prepare


def together(kinds: Sequence[int], most: int) -> Iterator[slice]:
    """Slices of at most `most` layers, each of one kind."""
    start = 0
    for end in range(1, len(kinds) + 1):
        if end == len(kinds) or end - start == most or kinds[end] != kinds[start]:
            yield slice(start, end)
            start = end


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
