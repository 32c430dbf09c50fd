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
DRAFTER = "drafter"  # its folder, beside the model's
EXACT, REFUSED = "exact", "not yet"
FOUR_BIT = "avx512f"  # what kernels of 4-bit weights take


@dataclass(frozen=True)
class Kind:
    """`name`, `layers`: as the table says; `config`: the class of transformers, with `fields`; `architecture`: for
    vLLM, where transformers saves another; `more`: of config.json; `windows`: some layers attend to a part of what
    is before a token, or have states, which vLLM keeps at multiples of `states` tokens; `drafter`: a model that
    drafts tokens, another one or the model itself (""), and by which `method`; `weights`: how they are quantised,
    and what a CPU `needs` for that; `dtype`: computed in; `near`: how exact vLLM's own log probabilities are, from
    one split to another; `says`: what the log says where ragkv does not serve it."""

    name: str
    layers: str
    config: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    architecture: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    windows: bool = False
    states: int = 0
    near: float = 1e-3
    method: str | None = None
    drafter: str = ""
    weights: str = ""
    needs: str = ""
    dtype: str = "float32"
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
    def tokens(self) -> int:
        """Of an answer, as far as they can be compared."""
        return 6 if self.near < 0.01 else 1

    def reach(self, tokens: int) -> int:
        """How many of so many equal tokens can be hit after vLLM's own cache is emptied."""
        return tokens // self.states * self.states if self.states else tokens

    @property
    def slug(self) -> str:
        """The name of its folder and of its tests."""
        return self.name.lower().replace(" ", "-").replace(".", "-").replace(",", "")

    def speculation(self, folder: Path) -> dict[str, Any]:
        """What vLLM is given to draft tokens, beside the model in that folder."""
        if self.method is None:
            return {}
        given = {"method": self.method, "num_speculative_tokens": 1 if self.method == "mtp" else 3}
        if self.method == "ngram":
            given |= {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
        elif self.method != "mtp":
            given["model"] = str(folder.parent / DRAFTER if self.drafter else folder)
        return {"speculative_config": given}


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
    sliding(
        "Gemma 3n",
        "Gemma3nTextConfig",
        [S, F, S, F, S, F],
        architecture="Gemma3nForCausalLM",
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=32,
        intermediate_size=[256] * 6,
        vocab_size_per_layer_input=VOCABULARY,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 6,
    ),
    sliding(
        "Gemma 4",
        "Gemma4TextConfig",
        [S, S, F, S, S, F],
        architecture="Gemma4ForCausalLM",
        global_head_dim=64,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=32,
        vocab_size_per_layer_input=VOCABULARY,
    ),
    sliding("gpt-oss", "GptOssConfig", [S, F, S, F], **MOE, num_local_experts=4),
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
        "Llama 3, GPTQ",
        "full attention",
        "LlamaConfig",
        weights="gptq",
        needs=FOUR_BIT,
        dtype="bfloat16",
        near=0.5,
    ),
    Kind(
        "Llama 3, AWQ", "full attention", "LlamaConfig", weights="awq", needs=FOUR_BIT, dtype="bfloat16", near=0.5
    ),
    Kind("Llama 3, int8 weights", "full attention", "LlamaConfig", weights="int8", near=0.5),
    Kind("Llama 3 with a draft model", "full attention", "LlamaConfig", method="draft_model"),
    Kind("Llama 3 with EAGLE", "full attention", "LlamaConfig", method="eagle", drafter="eagle"),
    Kind("Llama 3 with Medusa", "full attention", "LlamaConfig", method="medusa", drafter="medusa"),
    Kind("Llama 3 with n-grams", "full attention", "LlamaConfig", method="ngram"),
    Kind(
        "GLM 4 MoE with MTP",
        "full attention",
        "Glm4MoeConfig",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "tie_word_embeddings": False,
        },
        more={"num_nextn_predict_layers": 1},
        method="mtp",
    ),
    Kind("Mistral with a window", "sliding windows", "MistralConfig", {"sliding_window": WINDOW}, windows=True),
    Kind("Phi 3", "sliding windows", "Phi3Config", {"sliding_window": WINDOW, "pad_token_id": 2}, windows=True),
    Kind(
        "LFM 2",
        "convolutions and full attention",
        "Lfm2Config",
        {"layer_types": ["conv", "conv", F, "conv"], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False},
        more={"block_dim": 128, "conv_dim": 128, "conv_dim_out": 128},
        windows=True,
        states=128,
        near=0.5,  # vLLM's own answers on a CPU differ by 0.3 from one split of the prompt to another
    ),
    Kind(
        "LFM 2 without attention",
        "convolutions",
        "Lfm2Config",
        {"layer_types": ["conv"] * 4, "conv_L_cache": 3, "block_auto_adjust_ff_dim": False},
        more={"block_dim": 128, "conv_dim": 128, "conv_dim_out": 128},
        windows=True,
        states=16,
    ),
    Kind(
        "Mamba 2",
        "states",
        "Mamba2Config",
        {"state_size": 32, "expand": 2, "num_heads": 8, "head_dim": 32, "n_groups": 1, "chunk_size": 64},
        says="cannot do without a prefix",
    ),
)


FIELDS = {
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


def make(kind: Kind, folder: Path) -> Path:
    """Write a model of that kind, in float32 and without a tokenizer; and beside it its drafter."""
    import torch
    import transformers

    config = getattr(transformers, kind.config)(**FIELDS | kind.fields)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    chance = torch.Generator().manual_seed(zlib.crc32(kind.slug.encode()))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2 or "A_log" in name:
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
    if kind.weights:
        _quantise(kind.weights, folder)
    if kind.method == "mtp":
        _add_mtp_layer(folder)
    elif kind.drafter:
        _make_drafter(kind, folder.parent / DRAFTER)
    return folder


def _make_drafter(kind: Kind, folder: Path) -> None:
    """One layer. EAGLE's also takes the model's hidden states; embeddings and head it shares with the model."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(**FIELDS | {"num_hidden_layers": 1}, architectures=["LlamaForCausalLM"])
    if kind.drafter == "medusa":
        folder.mkdir()
        fields = {"hidden_size": 128, "num_heads": 3, "num_hidden_layers": 1, "vocab_size": VOCABULARY}
        more = {"model_type": "medusa", "architectures": ["MedusaModel"], "truncated_vocab_size": VOCABULARY}
        (folder / "config.json").write_text(json.dumps(fields | more))
        shapes = {f"{n}.0.linear.weight": (128, 128) for n in range(3)}
        shapes |= {f"{n}.0.linear.bias": (128,) for n in range(3)} | {
            f"{n}.1.weight": (VOCABULARY, 128) for n in range(3)
        }
    else:
        config.save_pretrained(folder)
        layer = "layers.0."
        shapes = {
            "fc.weight": (128, 256),
            f"{layer}self_attn.q_proj.weight": (128, 128),
            f"{layer}self_attn.k_proj.weight": (64, 128),
            f"{layer}self_attn.v_proj.weight": (64, 128),
            f"{layer}self_attn.o_proj.weight": (128, 128),
            f"{layer}mlp.gate_proj.weight": (256, 128),
            f"{layer}mlp.up_proj.weight": (256, 128),
            f"{layer}mlp.down_proj.weight": (128, 256),
            f"{layer}post_attention_layernorm.weight": (128,),
        }
    chance = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(shape, generator=chance) / math.sqrt(shape[-1]) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _add_mtp_layer(folder: Path) -> None:
    """Add a layer to a GLM 4 MoE, which drafts tokens: a copy of the last layer, and a projection that adds the
    next token's embedding."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    last, new = (f"model.layers.{n}." for n in (FIELDS["num_hidden_layers"] - 1, FIELDS["num_hidden_layers"]))
    added = {new + name.removeprefix(last): w.clone() for name, w in weights.items() if name.startswith(last)}
    ones = torch.ones(FIELDS["hidden_size"])
    added |= {f"{new}{name}.weight": ones.clone() for name in ("enorm", "hnorm", "shared_head.norm")}
    added[f"{new}eh_proj.weight"] = torch.cat([torch.eye(128), torch.eye(128)], 1)
    added[f"{new}embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    added[f"{new}shared_head.head.weight"] = weights["lm_head.weight"].clone()
    save_file(weights | added, folder / "model.safetensors", metadata={"format": "pt"})


def _quantise(how: str, folder: Path) -> None:
    """Put random weights of that form, of the same scale, in the place of a Llama's linear layers."""
    import torch
    from safetensors.torch import load_file, save_file

    group, chance = 32, torch.Generator().manual_seed(9)

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, shape, generator=chance, dtype=torch.int64).to(torch.int32)

    made: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "_proj.weight" not in name:
            made[name] = weight
            continue
        (out, into), layer = weight.shape, name.removesuffix(".weight")
        scale = 1.5 / math.sqrt(into)
        if how == "int8":
            made[name] = torch.randint(-127, 128, (out, into), generator=chance).to(torch.int8)
            made[f"{layer}.weight_scale"] = torch.full((out, 1), scale / 73.0)
            continue
        zeros = 0x77777777 if how == "gptq" else 0x88888888 - (1 << 32)
        made[f"{layer}.qweight"] = words(into // 8, out) if how == "gptq" else words(into, out // 8)
        made[f"{layer}.qzeros"] = torch.full((into // group, out // 8), zeros, dtype=torch.int32)
        made[f"{layer}.scales"] = torch.full((into // group, out), scale / 4.6).half()
        if how == "gptq":
            made[f"{layer}.g_idx"] = (torch.arange(into) // group).to(torch.int32)
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": QUANTISED[how]}))


FOUR_BITS = {"bits": 4, "group_size": 32}
CHANNELS = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTISED = {
    "gptq": FOUR_BITS | {"quant_method": "gptq", "desc_act": False, "sym": True, "lm_head": False},
    "awq": FOUR_BITS | {"quant_method": "awq", "zero_point": True, "version": "gemm"},
    "int8": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": CHANNELS | {"strategy": "channel", "dynamic": False},
                "input_activations": CHANNELS | {"strategy": "token", "dynamic": True},
            }
        },
    },
}


@dataclass(frozen=True)
class Way:
    """A way to run models, for the table, and the `test` that tries it, below tests."""

    name: str
    test: str
    reuse: str = EXACT


WAYS = (
    Way("tensor parallel", "rig/test_ranks.py"),
    Way("pipeline parallel", "rig/test_stages.py"),
    Way("data parallel", "models/test_ways.py"),
    Way("LoRA adapters", "models/test_ways.py"),
    Way("embeddings", "models/test_ways.py"),
    Way("fp8 KV", "rig/test_fp8.py"),
)
