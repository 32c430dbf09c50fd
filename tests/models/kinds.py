"""Models of random weights, one for each kind of layers that people serve, and how ragkv serves it.

The weights are large enough that every token of a prompt changes the answer, else a comparison says nothing.
docs/models.md has the table of them, which a test compares with this list; tests/models holds each row to it.
"""

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VOCABULARY = 2048
WINDOW = 96  # tokens; no multiple of any block size
S, F, C = "sliding_attention", "full_attention", "chunked_attention"
EXACT, REFUSED = "exact", "not yet"


@dataclass(frozen=True)
class Kind:
    """`name`, `layers`: as the table says; `config`: the class of transformers, with `fields`; `architecture`: for
    vLLM, where transformers saves another; `more`: of config.json; `windows`: some layers attend to a part of what
    is before a token; `says`: what the log says where ragkv does not serve it."""

    name: str
    layers: str
    config: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    architecture: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    windows: bool = False
    says: str | None = None

    @property
    def served(self) -> bool:
        """Whether ragkv reuses its KV."""
        return self.says is None

    @property
    def reuse(self) -> str:
        """The table's last column."""
        return EXACT if self.served else REFUSED

    @property
    def slug(self) -> str:
        """The name of its folder and of its tests."""
        return self.name.lower().replace(" ", "-").replace(".", "-").replace(",", "")


def sliding(name: str, config: str, layers: list[str], **more: Any) -> Kind:
    """A model whose layers are partly sliding."""
    fields = {"sliding_window": WINDOW, "layer_types": layers, "num_hidden_layers": len(layers)}
    given = {key: more.pop(key) for key in ("architecture",) if key in more}
    return Kind(name, "sliding windows and full attention", config, fields | more, windows=True, **given)


GEMMA = {"query_pre_attn_scalar": 32}
MOE = {"num_experts_per_tok": 2, "tie_word_embeddings": False}

KINDS = (
    Kind("Llama 3", "full attention", "LlamaConfig"),
    Kind("Qwen 3", "full attention", "Qwen3Config"),
    Kind("Qwen 3 MoE", "full attention", "Qwen3MoeConfig", MOE | {"num_experts": 4, "moe_intermediate_size": 64}),
    Kind("Mixtral", "full attention", "MixtralConfig", MOE | {"num_local_experts": 4}),
    Kind("OLMo 2", "full attention", "Olmo2Config"),
    Kind("SmolLM 3", "full attention, some without positions", "SmolLM3Config", {"no_rope_layers": [1, 1, 1, 0]}),
    sliding("Gemma 2", "Gemma2Config", [S, F, S, F], **GEMMA),
    sliding("Gemma 3", "Gemma3TextConfig", [S, S, F, S, S, F], **GEMMA),
    sliding("Command A, Cohere 2", "Cohere2Config", [S, S, S, F]),
    sliding("EXAONE 4", "Exaone4Config", [S, S, S, F], sliding_window_pattern=4),
    sliding("OLMo 3", "Olmo3Config", [S, S, S, F]),
    Kind(
        "Llama 4",
        "chunked and full attention",
        "Llama4TextConfig",
        {
            "attention_chunk_size": 128,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 256,
            "interleave_moe_layer_step": 2,
            "layer_types": [C, C, C, F],
            "no_rope_layers": [1, 1, 1, 0],
        },
        architecture="Llama4ForCausalLM",
        windows=True,
    ),
    Kind(
        "Mistral with a window",
        "sliding windows",
        "MistralConfig",
        {"sliding_window": WINDOW},
        says="none of full attention",
    ),
    Kind(
        "LFM 2",
        "convolutions and full attention",
        "Lfm2Config",
        {"layer_types": ["conv", "conv", F, "conv"], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False},
        more={"block_dim": 128, "conv_dim": 128, "conv_dim_out": 128},
        says="MambaSpec",
    ),
    Kind(
        "Mamba 2",
        "states",
        "Mamba2Config",
        {"state_size": 32, "expand": 2, "num_heads": 8, "head_dim": 32, "n_groups": 1, "chunk_size": 64},
        says="cannot do without a prefix",
    ),
)


def make(kind: Kind, folder: Path) -> Path:
    """Write a model of that kind, in float32 and without a tokenizer."""
    import torch
    import transformers

    given = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    config = getattr(transformers, kind.config)(**given | kind.fields)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    chance = torch.Generator().manual_seed(zlib.crc32(kind.slug.encode()))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2 or "conv" in name or "A_log" in name:
                continue
            is_table = "embed" in name or "lm_head" in name
            small = 0.05 if "Gemma" in kind.config else 0.5  # Gemma scales embeddings itself
            std = small if is_table else 1.5 / math.sqrt(weight.shape[-1])
            weight.copy_(torch.randn(weight.shape, generator=chance) * std)
    model.save_pretrained(folder)
    file = folder / "config.json"
    saved = json.loads(file.read_text()) | dict(kind.more)
    if kind.architecture:
        saved["architectures"] = [kind.architecture]
    file.write_text(json.dumps(saved, indent=1))
    return folder
