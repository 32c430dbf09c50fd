"""A small Llama in plain PyTorch with an explicit mask: what fused KV must be equal to, by other means.

It shares no code with the package, with vLLM or with transformers: weights are read by their Hugging Face
names, all is float32 and done for one sequence. Shapes: keys and values of a sequence are [layers, tokens,
kv_heads, dim], keys already turned to their positions (neox halves, no scaling).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file


@dataclass(frozen=True)
class State:
    """What one forward leaves. `keys`, `values`: of the whole sequence; `logits` [positions, vocabulary] and
    `queries` [layers, positions, heads, dim] only of the positions that went through the model."""

    logits: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor


class Llama:
    """A LlamaForCausalLM of Hugging Face: RMSNorm, rotary positions, grouped queries, SwiGLU.

    `config` is its config.json; `weights` its state dict, any float dtype."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> None:
        rope = config.get("rope_parameters") or {"rope_theta": config["rope_theta"]}
        if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
            raise ValueError("the reference knows rotary positions without scaling only")
        self.layers = int(config["num_hidden_layers"])
        self.heads = int(config["num_attention_heads"])
        self.kv_heads = int(config["num_key_value_heads"])
        self.dim = int(config.get("head_dim") or config["hidden_size"] // self.heads)
        self.epsilon = float(config["rms_norm_eps"])
        self.theta = float(rope["rope_theta"])
        self._weights = {name: tensor.detach().float() for name, tensor in weights.items()}
        self._head = self._weights.get("lm_head.weight", self._weights["model.embed_tokens.weight"])

    @classmethod
    def load(cls, folder: Path) -> "Llama":
        """From a Hugging Face folder: config.json and safetensors."""
        weights: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= load_file(file)
        return cls(json.loads((folder / "config.json").read_text()), weights)

    def prefill(self, tokens: Sequence[int]) -> State:
        """All tokens through the model."""
        nothing = torch.zeros(self.layers, len(tokens), self.kv_heads, self.dim)
        return self.forward(nothing, nothing, tokens, range(len(tokens)))

    def fuse(
        self, keys: torch.Tensor, values: torch.Tensor, tokens: Sequence[int], selected: Sequence[int]
    ) -> State:
        """CacheBlend (Yao et al., EuroSys 2025, section 4.2) with an exact causal mask: the selected positions go
        through the model once; in every layer their K and V take the place of the reused ones before attention."""
        return self.forward(keys, values, tokens, sorted(selected))

    def forward(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        tokens: Sequence[int],
        positions: Sequence[int],
        layers: int | None = None,
    ) -> State:
        """The tokens at `positions`, over K and V of all others; of the first `layers` layers only, if given."""
        at = torch.tensor(list(positions), dtype=torch.int64)
        keys, values = keys.float().clone(), values.float().clone()
        hidden = self._weights["model.embed_tokens.weight"][torch.tensor(list(tokens), dtype=torch.int64)[at]]
        sees = torch.arange(len(tokens)) <= at[:, None]
        queries = []
        for layer in range(self.layers if layers is None else layers):
            name = f"model.layers.{layer}."
            x = self._norm(hidden, name + "input_layernorm.weight")
            query = self.turn(self._heads(x, name + "self_attn.q_proj.weight"), at)
            keys[layer, at] = self.turn(self._heads(x, name + "self_attn.k_proj.weight"), at)
            values[layer, at] = self._heads(x, name + "self_attn.v_proj.weight")
            mixed = attend(query, keys[layer], values[layer], sees)
            hidden = hidden + mixed.flatten(1) @ self._weights[name + "self_attn.o_proj.weight"].T
            x = self._norm(hidden, name + "post_attention_layernorm.weight")
            gate = F.silu(x @ self._weights[name + "mlp.gate_proj.weight"].T)
            up = x @ self._weights[name + "mlp.up_proj.weight"].T
            hidden = hidden + (gate * up) @ self._weights[name + "mlp.down_proj.weight"].T
            queries.append(query)
        logits = self._norm(hidden, "model.norm.weight") @ self._head.T
        return State(logits, keys, values, torch.stack(queries))

    def turn(self, states: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """Rotary positions: [..., tokens, heads, dim] turned on by `by` [tokens] positions, as complex numbers."""
        half = self.dim // 2
        speed = self.theta ** (-torch.arange(half, dtype=torch.float64) / half)
        turn = torch.polar(torch.ones(1, dtype=torch.float64), by.double()[:, None] * speed)[:, None]
        turned = torch.complex(states[..., :half].double(), states[..., half:].double()) * turn
        return torch.cat([turned.real, turned.imag], -1).float()

    def _heads(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return (x @ self._weights[name].T).unflatten(-1, (-1, self.dim))

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * self._weights[name]


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
    """Attention: query [n, heads, dim], keys and values [tokens, kv_heads, dim], `sees` bool [n, tokens]."""
    weights = attention(query, keys, sees)
    return torch.einsum("hnt,thd->nhd", weights, _for_every_query(values, query))


def attention(query: torch.Tensor, keys: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
    """The probabilities [heads, n, tokens] of `attend`."""
    products = torch.einsum("nhd,thd->hnt", query, _for_every_query(keys, query)) * query.shape[-1] ** -0.5
    return products.masked_fill(~sees, -torch.inf).softmax(-1)


def _for_every_query(states: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    return states.repeat_interleave(query.shape[1] // states.shape[1], dim=1)


def divergence(full: torch.Tensor, other: torch.Tensor) -> float:
    """Mean over positions of KL(full || other), in nats, of logits [positions, vocabulary]."""
    ours, theirs = full.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())
