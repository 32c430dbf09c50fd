"""Fusion on the worker: which of the moved tokens to compute again, and their forward (CacheBlend: Yao et al.,
EuroSys 2025, section 4; with an exact causal mask). Everything runs through the engine's own model and kernels.

Moved keys are there already, rotated. What a selection looks at comes first: the keys of an early layer, for which
a forward over all tokens is run and stopped there; or the queries of the question, which is run through the model
over what was moved. Then the chosen tokens and the gaps are computed, once, at their own positions.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ragkv.connectors.vllm.forward import EngineForward, watch
from ragkv.connectors.vllm.identity import Shape
from ragkv.connectors.vllm.layers import LayerCache, Layers, Slots
from ragkv.connectors.vllm.messages import Fusion, Indices, positions_of, slots_of
from ragkv.connectors.vllm.rope import rotations
from ragkv.connectors.vllm.streams import Packed
from ragkv.connectors.vllm.tiles import RAW
from ragkv.connectors.vllm.transfer import PrepareRotation, Rotate
from ragkv.errors import FusionError
from ragkv.kvstore.fusion.selection import SELECTIONS, Look, deviation_scores, early_layer, query_scores

FLOAT8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}

TURN_BYTES = 16 << 20  # of keys in float32 that are rotated at once
TURN_DEVICE_BYTES = 5 * TURN_BYTES  # with what is computed beside them


class Fuser:
    """One worker's part. `layers`, `caches`: of every attention layer, in the model's order; `dtype`: of the
    cache's elements; `tokens`: a block."""

    def __init__(
        self, forward: EngineForward, layers: list[Any], caches: list[LayerCache], dtype: torch.dtype, tokens: int
    ) -> None:
        self._forward, self._layers, self._dtype = forward, layers, dtype
        self.caches, self.block_tokens = Layers(caches), tokens

    def fuse(self, fusion: Fusion) -> int:
        """Mend one request's moved tokens; how many of them were computed again."""
        moved = positions_of(fusion.runs)
        gaps = np.setdiff1d(np.arange(fusion.start, fusion.end, dtype=np.int64), moved, assume_unique=True)
        chosen = moved[:0]
        if fusion.budget >= len(moved):
            chosen = moved
        elif fusion.budget:
            chosen = self._choose(fusion, moved, gaps)
        self._forward.compute(fusion.tokens, np.union1d(chosen, gaps), fusion.blocks)
        return len(chosen)

    def _choose(self, fusion: Fusion, moved: Indices, gaps: Indices) -> Indices:
        from vllm.distributed import get_tp_group, tensor_model_parallel_all_reduce

        selection = SELECTIONS[fusion.selection]
        looks: list[torch.Tensor] = []
        if Look.EARLY_KEYS in selection.looks_at:
            looks.append(tensor_model_parallel_all_reduce(self._early_keys(fusion, moved)))
        if Look.QUESTION in selection.looks_at:
            before = gaps[gaps < fusion.asked]  # the question must not see what was there
            self._forward.compute(fusion.tokens, before, fusion.blocks)
            looks.append(tensor_model_parallel_all_reduce(self._question(fusion, moved)))
        scores = torch.stack(looks).prod(0) if looks else None
        chosen = selection.choose(fusion.runs, fusion.budget, scores)
        if get_tp_group().world_size > 1:  # equal sums need not be equal bits: the first rank decides for all
            chosen = get_tp_group().broadcast(chosen.to(self._layers[0].kv_cache.device), src=0)
        return chosen.cpu().numpy()

    def _early_keys(self, fusion: Fusion, moved: Indices) -> torch.Tensor:
        """How far moved keys are from those that a forward over all tokens gives in an early layer. What it gives
        there is kept: up to that layer nothing is left to mend."""
        number = early_layer(len(self._layers))
        layer = self._layers[number]
        device = layer.kv_cache.device
        scores = [torch.zeros(0, device=device)]

        def compare(_: int, inputs: Any) -> None:
            keys, values = (side.reshape(len(slots), layer.num_kv_heads, -1) for side in inputs[1:])
            scores.append(deviation_scores(keys[here], self._keys(number, found)))
            layer.impl.do_kv_cache_update(layer, keys.contiguous(), values.contiguous(), layer.kv_cache, slots)

        for runs in self._forward.batches(np.arange(fusion.start, fusion.end, dtype=np.int64)):
            positions = positions_of(runs)
            among = np.flatnonzero(np.isin(positions, moved, assume_unique=True))
            every = slots_of(fusion.blocks, positions, self.block_tokens)
            sent = Packed([every, among, every[among]], device)
            slots, here, moved_slots = sent.on_device()
            found = self.caches.find(moved_slots)
            with watch([layer], compare, stop=True):
                self._forward.forward(fusion.tokens, runs, fusion.blocks)
        return torch.cat(scores)

    def _question(self, fusion: Fusion, moved: Indices) -> torch.Tensor:
        """How much the question attends to each moved token, among all before it. It is computed at the positions
        right after them; the tokens that belong there are computed later."""
        before = slots_of(fusion.blocks, np.arange(fusion.asked, dtype=np.int64), self.block_tokens)
        tokens = np.concatenate([fusion.tokens[: fusion.asked], fusion.question])
        device = self._layers[0].kv_cache.device
        slots, among = Packed([before, moved], device).on_device()
        found = self.caches.find(slots)
        scores = torch.zeros(fusion.asked, dtype=torch.float32, device=device)

        def look(number: int, inputs: Any) -> None:
            layer = self._layers[number]
            queries = inputs[0].reshape(-1, layer.num_heads, layer.head_size)
            scores.add_(query_scores(queries, self._keys(number, found), layer.impl.scale))

        with watch(self._layers, look, stop=True):
            self._forward.forward(tokens, [(fusion.asked, len(tokens))], fusion.blocks)
        return scores[among]

    def _keys(self, number: int, slots: Slots) -> torch.Tensor:
        """K of some slots as the cache has them: [tokens, kv_heads, head_dim], scaled as they are used."""
        keys = self.caches.read(slots, 0, range(number, number + 1))[0].view(self._dtype)
        return keys.float() * self._layers[number]._k_scale.float() if self._dtype.itemsize == 1 else keys


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
    if shape.stages:
        raise FusionError("pipeline stages; supported: one")
    if shape.has_windows:
        raise FusionError("layers with windows or states; supported: full attention")
    if shape.geometry.kinds == 1:
        raise FusionError("MLA: keys that are one with their values; supported: K and V")
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
