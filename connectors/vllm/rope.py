"""The rotation of each attention layer's keys: found in the model, and proven on the layer's own computation."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ragkv.connectors.vllm.forward import watch
from ragkv.errors import FusionError
from ragkv.kvstore.fusion.rotation import Rotation, check, compare, tried_positions

_COLLECTING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def rotations(model: nn.Module, layers: Sequence[str]) -> list[Rotation]:
    """How the keys of `layers` (names of attention layers) turn, in their order; equal ones are one object.

    FusionError, naming the layer: no rotary embedding, or several, or one that is not supported; or the layer does
    not put its keys through it as it is (no positions in some layers, a norm after it). The model's weights
    must be loaded; two small inputs go through each layer's projections, and no further.
    """
    paths = {getattr(module, "layer_name", path): path for path, module in model.named_modules()}
    known: dict[int, Rotation] = {}
    equal: dict[Rotation, Rotation] = {}
    found = []
    for layer in layers:
        if layer not in paths:
            raise FusionError(f"layer {layer} is not in the model")
        attention = model.get_submodule(paths[layer])
        block = model.get_submodule(paths[layer].rpartition(".")[0])
        try:
            module = _rotary(block)
            if id(module) not in known:
                rotation = Rotation.of(module)
                check(module, rotation)
                known[id(module)] = equal.setdefault(rotation, rotation)
            found.append(known[id(module)])
            _check_block(block, attention, module, found[-1])
        except FusionError as error:
            raise FusionError(f"layer {layer}: {error}") from error
    return found


def _rotary(block: nn.Module) -> Any:
    """The one rotary module inside an attention block."""
    candidates = {
        id(module): module
        for path, module in block.named_modules()
        if path.rpartition(".")[2] == "rotary_emb" or "RotaryEmbedding" in type(module).__name__
    }
    if len(candidates) != 1:
        names = ", ".join(sorted(type(module).__name__ for module in candidates.values()))
        raise FusionError(f"{len(candidates)} rotary embeddings{': ' * bool(names)}{names}; supported: 1")
    return next(iter(candidates.values()))


@torch.inference_mode()
def _check_block(block: nn.Module, attention: Any, rotary: Any, rotation: Rotation) -> None:
    """Prove that the keys which reach `attention` turn so: the same random input at two rows of positions."""
    if attention.head_size != rotary.head_size:
        raise FusionError(f"heads of {attention.head_size} in attention, of {rotary.head_size} in its embedding")
    projection: Any = next((m for m in block.modules() if hasattr(m, "params_dtype")), None)
    if projection is None:
        raise FusionError(f"{type(block).__name__} has no projection of vLLM's")
    table = rotary.cos_sin_cache
    start, end = tried_positions(table.shape[0])
    hidden = torch.randn(len(start), projection.input_size, generator=torch.Generator().manual_seed(7))
    hidden = hidden.to(table.device, projection.params_dtype)
    before, after = (
        _keys(block, attention, positions.to(table.device), hidden.clone()) for positions in (start, end)
    )
    compare(rotation, before, after, start, end, type(block).__name__)


def _keys(block: nn.Module, attention: Any, positions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The keys [tokens, heads, head_dim] that `block` hands to its attention layer, which does not run."""
    name = type(block).__name__
    parameters = inspect.signature(block.forward).parameters
    given = {"position_ids" if "position_ids" in parameters else "positions": positions, "hidden_states": hidden}
    needed = {p.name for p in parameters.values() if p.default is p.empty and p.kind not in _COLLECTING}
    if unlike := needed - given.keys() | given.keys() - parameters.keys():
        raise FusionError(f"{name}.forward is unlike others in {', '.join(sorted(unlike))}")
    keys: list[Any] = []
    try:
        with watch([attention], lambda _, inputs: keys.append(inputs[1]), stop=True):
            block(**given)
    except Exception as error:  # a model's code, called out of its way, may raise anything
        raise FusionError(f"{name}.forward cannot be tried: {type(error).__name__}: {error}") from error
    if not keys or keys[0] is None:
        raise FusionError(f"{name} does not hand keys to its attention")
    return torch.as_tensor(keys[0]).reshape(len(positions), -1, attention.head_size)
