"""What an engine is: the shape of its KV, and the namespace in which its KV may be shared."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from ragkv.connectors.vllm.layout import Geometry
from ragkv.errors import LayoutError
from ragkv.kvstore.chunking import TokenStructure
from ragkv.kvstore.keys import namespace

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
SAMPLE_BYTES = 1 << 16
NOT_THE_MODEL = frozenset({"_name_or_path", "transformers_version"})
MOST_TOKENS = 1 << 24  # that a vocabulary may number
_BYTE_LEVEL = str.maketrans({"Ċ": "\n", "Ġ": " ", "ĉ": "\t", "č": "\r", "▁": " "})


@dataclass(frozen=True)
class Shape:
    """One worker's geometry, its layers by name, the cache's dtype, and the tensor-parallel ranks."""

    geometry: Geometry
    layers: tuple[str, ...]
    dtype: torch.dtype
    ranks: int

    def page_bytes(self, page_tokens: int) -> int:
        """Bytes of one page, all ranks."""
        return page_tokens * self.geometry.token_bytes * self.ranks


def examine(vllm_config: Any, kv_cache_config: Any) -> Shape:
    """The shape of an engine's KV. LayoutError says, in plain words, why ragkv cannot serve the engine."""
    parallel = vllm_config.parallel_config
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise LayoutError(f"{name} = {getattr(parallel, name)}; supported: 1")
    speculative = vllm_config.speculative_config
    if speculative is not None and not str(speculative.method).startswith("ngram"):
        raise LayoutError(f"speculative decoding by {speculative.method}; supported: ngram")
    if not getattr(vllm_config.model_config, "is_prefix_caching_supported", True):
        raise LayoutError("vLLM says that this model (its attention or its pooling) cannot do without a prefix")
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise LayoutError(f"{len(groups)} groups of KV cache (layers of several kinds); supported: 1")
    spec = groups[0].kv_cache_spec
    if type(spec) is not FullAttentionSpec:
        raise LayoutError(f"KV cache of kind {type(spec).__name__}; supported: FullAttentionSpec")
    if getattr(spec, "non_causal", False):
        raise LayoutError("attention that is not causal: KV depends on later tokens; supported: causal")
    quantised = getattr(getattr(spec, "kv_quant_mode", None), "name", "NONE")
    if quantised not in ("NONE", "FP8_PER_TENSOR"):  # the others keep scales that no element tells of
        raise LayoutError(f"KV quantised by {quantised}; supported: none, or fp8 with one scale a tensor")
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        raise LayoutError("calculate_kv_scales: fp8 scales differ from start to start; supported: False")
    if spec.head_size != getattr(spec, "head_size_v", spec.head_size):
        raise LayoutError(f"head sizes of K and V differ: {spec.head_size}, {spec.head_size_v}")
    layers = tuple(groups[0].layer_names)
    geometry = Geometry(len(layers), spec.num_kv_heads, spec.head_size, spec.dtype.itemsize, spec.block_size)
    return Shape(geometry, layers, spec.dtype, parallel.tensor_parallel_size)


def engine_identity(vllm_config: Any, shape: Shape, page_tokens: int) -> bytes:
    """16 bytes that name all that an engine's KV depends on beside the request, and how its bytes are laid out.

    The same for one model in two folders, or on two machines: weights are known by their bytes.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    config = {key: value for key, value in model.hf_config.to_dict().items() if key not in NOT_THE_MODEL}
    return namespace(
        {
            "model": json.dumps(config, sort_keys=True, default=str),
            "weights": weights_fingerprint(model.model, str(model.revision), model.seed),
            "load_format": str(vllm_config.load_config.load_format),
            "quantization": str(model.quantization),
            "dtype": str(model.dtype),
            "cache_dtype": str(cache.cache_dtype),
            "raw_dtype": str(shape.dtype),
            "heads": shape.geometry.heads * shape.ranks,
            "head_dim": shape.geometry.head_dim,
            "layers": shape.geometry.layers,
            "ranks": shape.ranks,
            "page_tokens": page_tokens,
        }
    )


def weights_fingerprint(model: str, revision: str, seed: int) -> str:
    """Fingerprint of a model folder's weight files: names, sizes, and samples of their bytes.

    A model that is no folder here is named by itself, its revision and the seed (of dummy weights).
    """
    folder = Path(model)
    files = [folder] if folder.is_file() else sorted(f for p in WEIGHT_FILES for f in folder.glob(p))
    if not files:
        return f"{model}@{revision}#{seed}"
    return f"{files_fingerprint(files)}#{seed}"


def files_fingerprint(files: Iterable[Path]) -> str:
    """Hex digest over names, sizes and three samples (start, middle, end) of the bytes of files."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as stream:
            for place in (0, size // 2, max(0, size - SAMPLE_BYTES)):
                stream.seek(place, os.SEEK_SET)
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


class Namespaces:
    """The namespace of each request: the engine's identity, and the request's adapter, tenant and media."""

    def __init__(self, engine: bytes) -> None:
        self._first = self._engine = engine
        self._adapters: dict[tuple[Any, ...], tuple[object, str]] = {}

    @property
    def engine(self) -> bytes:
        """What all namespaces of this engine are made from now; 16 bytes."""
        return self._engine

    def renew(self) -> None:
        """From now on nothing is equal to what was: weights may have changed in place, and then whatever lower
        tiers hold is of others."""
        self._engine = namespace({"engine": self._engine, "renewed": os.urandom(16)})

    def set_weights(self, changed: bytes | None) -> None:
        """From now on requests are computed by weights of that fingerprint, or None: by those of the start.
        Weights that come back find what was kept of them."""
        self._engine = self._first if changed is None else namespace({"engine": self._first, "weights": changed})

    def of(self, request: Any) -> bytes | None:
        """16 bytes, equal for two requests only if equal tokens give them equal KV; None where that cannot be
        known: tokens that are not all of the prompt, or an adapter whose weights may change under its name.
        """
        if request.prompt_embeds is not None or getattr(request, "resumable", False):
            return None
        lora, media = request.lora_request, request.mm_features
        if lora is None and not media and request.cache_salt is None:
            return self._engine
        adapter = None if lora is None else self._adapter(lora)
        if lora is not None and adapter is None:
            return None
        return namespace(
            {
                "engine": self._engine,
                "adapter": adapter,
                "tenant": request.cache_salt,
                "media": [
                    [str(f.identifier), int(f.mm_position.offset), int(f.mm_position.length)] for f in media or ()
                ],
            }
        )

    def _adapter(self, lora: Any) -> str | None:
        """Name and fingerprint of an adapter; None once its files have changed, since nobody says whether the
        engine runs the old weights or the new."""
        if getattr(lora, "load_inplace", False):
            return None
        folder = Path(str(lora.lora_path))
        files = sorted(file for file in folder.glob("adapter_*") if file.is_file())
        stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        known = (lora.lora_name, lora.lora_int_id, str(folder))
        if known not in self._adapters:
            content = files_fingerprint(files) if files else f"{folder}#{lora.lora_int_id}"
            self._adapters[known] = stamps, f"{lora.lora_name}:{content}"
        first_stamps, name = self._adapters[known]
        return name if stamps == first_stamps else None


def token_structure(vocabulary: dict[Any, int]) -> TokenStructure:
    """What a tokenizer's vocabulary (token to id) says about blank lines.

    Reads the two usual spellings of white space: byte-level BPE (Ċ, Ġ) and SentencePiece (▁, <0x0A>).
    """
    numbered = {token: n for token, n in vocabulary.items() if isinstance(n, int) and 0 <= n < MOST_TOKENS}
    texts = [""] * (max(numbered.values(), default=-1) + 1)
    for token, number in numbered.items():
        text = token.decode("latin-1") if isinstance(token, bytes) else str(token)
        texts[number] = text.replace("<0x0A>", "\n").translate(_BYTE_LEVEL)
    return TokenStructure.of(texts)


def load_structure(vllm_config: Any) -> TokenStructure:
    """The structure of the model's tokenizer; an empty one where the engine runs without a tokenizer."""
    model = vllm_config.model_config
    if model.skip_tokenizer_init:
        return token_structure({})
    from vllm.tokenizers import cached_tokenizer_from_config

    return token_structure(cached_tokenizer_from_config(model).get_vocab())
