"""What an engine is: the shape of its KV, and the namespace in which its KV may be shared."""

import json
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from ragkv.connectors.vllm.error_boundary import logger
from ragkv.connectors.vllm.files import Files, adapter_files, model_files
from ragkv.connectors.vllm.layout import Geometry
from ragkv.connectors.vllm.messages import Group
from ragkv.connectors.vllm.speculation import drafts, refuse_speculation
from ragkv.connectors.vllm.states import describe_state
from ragkv.errors import LayoutError
from ragkv.kvstore.chunking import TokenStructure
from ragkv.kvstore.keys import namespace

VERSION = 2  # of what a namespace is made of
NOT_THE_MODEL = frozenset({"_name_or_path", "transformers_version", "_commit_hash"})
_TELLS_TABLES = "kv_connector_block_state" in SchedulerOutput.__dataclass_fields__
MOST_TOKENS = 1 << 24  # that a vocabulary may number
_BYTE_LEVEL = str.maketrans({"Ċ": "\n", "Ġ": " ", "ĉ": "\t", "č": "\r", "▁": " "})


@dataclass(frozen=True)
class PlaneLayers:
    """The layers of one plane on one worker (plane 0 may have none): their geometry, and their names, group by
    group of vLLM's; `sizes`: how many each group has. `window`, `span`: as of `ragkv.kvstore.planes.Plane`; or
    `state`: what states they have, as of `describe_state`. None of the three: plane 0."""

    geometry: Geometry
    names: tuple[str, ...]
    groups: tuple[int, ...] = (0,)
    sizes: tuple[int, ...] = ()
    window: int = 0
    span: int = 0
    state: str = ""


@dataclass(frozen=True)
class Shape:
    """What an engine keeps for a token: `planes`, the first of layers that attend to all before, if any; the
    cache's dtype, and the `workers`, of all pipeline stages. `stages`: layers of each of them, if there are
    several; a page has room for as many as the largest has. `ranks`: the parts of a page, one a worker, or one a
    stage where all its workers hold the same (MLA)."""

    planes: tuple[PlaneLayers, ...]
    dtype: torch.dtype
    workers: int
    ranks: int
    stages: tuple[int, ...] = ()

    @property
    def geometry(self) -> Geometry:
        """Of plane 0."""
        return self.planes[0].geometry

    @property
    def layers(self) -> tuple[str, ...]:
        """Of plane 0, by name."""
        return self.planes[0].names

    @property
    def has_windows(self) -> bool:
        """Whether some layers attend to a part of what is before, or have states."""
        return len(self.planes) > 1

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in all layers, on one worker; of a state, where there is nothing else."""
        sizes = [plane.geometry.token_bytes for plane in self.planes]
        return sum(size for size, plane in zip(sizes, self.planes, strict=True) if not plane.state) or sum(sizes)

    @property
    def groups(self) -> list[Group]:
        """vLLM's groups, those of plane 0 first."""
        return [
            Group(number, place, plane.geometry.block_tokens)
            for place, plane in enumerate(self.planes)
            for number in plane.groups
        ]


def examine(vllm_config: Any, kv_cache_config: Any) -> Shape:
    """The shape of an engine's KV. LayoutError says, in plain words, why ragkv cannot serve the engine."""
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise LayoutError(f"{name} = {getattr(parallel, name)}; supported: 1")
    if getattr(parallel, "is_moe_model", False) and (
        getattr(parallel, "data_parallel_size", 1) > 1 or getattr(parallel, "enable_eplb", False)
    ):
        raise LayoutError("experts of one model in several engines, or that move: weights that nobody sees whole")
    refuse_speculation(vllm_config)
    if not getattr(vllm_config.model_config, "is_prefix_caching_supported", True):
        raise LayoutError("vLLM says that this model (its attention or its pooling) cannot do without a prefix")
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        raise LayoutError("calculate_kv_scales: fp8 scales differ from start to start; supported: False")
    groups, workers = kv_cache_config.kv_cache_groups, parallel.tensor_parallel_size
    if parallel.pipeline_parallel_size > 1:
        return _in_stages(vllm_config, groups, workers)
    if len(groups) == 1 and type(groups[0].kv_cache_spec) is MLAAttentionSpec:
        return _latent(vllm_config, groups[0], workers)
    return _of_groups(groups, workers)


def _of_groups(groups: Any, workers: int) -> Shape:
    """Of attention and states: a plane for each kind of layers. Each worker has its own part of them."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for number, group in enumerate(groups):
        kinds.setdefault(_kind(group.kv_cache_spec), []).append(number)
    planes = [_layers(groups, numbers, kind) for kind, numbers in sorted(kinds.items())]
    if not planes:
        raise LayoutError("0 groups of KV cache; supported: one at least")
    if planes[0].span and not any(plane.state for plane in planes):
        raise LayoutError("layers of chunked attention, and none of full attention; supported: one at least")
    if planes[0].window or planes[0].span or planes[0].state:
        planes.insert(0, PlaneLayers(replace(planes[0].geometry, layers=0, heads=1, head_dim=1), (), ()))
    if len(planes) > 1 and (planes[1].window, planes[1].span, planes[1].state) == (0, 0, ""):
        raise LayoutError("layers of full attention with heads of several sizes; supported: one")
    if len(planes) > 1 and not _TELLS_TABLES:
        raise LayoutError("layers with windows; supported from vLLM 0.32 on")
    dtypes = {group.kv_cache_spec.dtype for group in groups if not isinstance(group.kv_cache_spec, MambaSpec)}
    if len(dtypes) > 1:
        raise LayoutError("KV caches of several dtypes; supported: one")
    return Shape(tuple(planes), next(iter(dtypes), torch.uint8), workers, workers)


def _in_stages(vllm_config: Any, groups: Any, workers: int) -> Shape:
    """Of an engine whose workers are in stages, each with some of the layers. vLLM tells the scheduler side of
    those of the first stage alone, so both sides count them as vLLM does."""
    from vllm.distributed.utils import get_pp_indices

    if len(groups) != 1 or drafts(vllm_config):
        raise LayoutError("pipeline stages of layers of several kinds, or with a drafter; supported: one kind")
    count, (group,) = vllm_config.parallel_config.pipeline_parallel_size, groups
    layers = vllm_config.model_config.get_total_num_hidden_layers()
    ranges = [get_pp_indices(layers, stage, count) for stage in range(count)]
    stages = tuple(end - start for start, end in ranges)
    if len(group.layer_names) not in stages:
        raise LayoutError(f"a pipeline stage has {len(group.layer_names)} layers with KV; supported: {stages}")
    latent = type(group.kv_cache_spec) is MLAAttentionSpec
    shape = _latent(vllm_config, group, workers) if latent else _of_groups(groups, workers)
    if shape.has_windows:
        raise LayoutError("pipeline stages of layers with windows or states; supported: full attention")
    plane = replace(shape.planes[0], geometry=replace(shape.geometry, layers=max(stages)))
    return replace(
        shape, planes=(plane,), workers=workers * count, ranks=count if latent else workers * count, stages=stages
    )


def _kind(spec: Any) -> tuple[Any, ...]:
    """What tells one plane's layers from another's: state, window, span, and sizes. LayoutError: none that is
    served."""
    if isinstance(spec, MambaSpec):
        return describe_state(spec), 0, 0, 1, spec.state_content_size_bytes, spec.block_size
    if type(spec) is FullAttentionSpec:
        window, span = 0, 0
    elif type(spec) is SlidingWindowSpec and not getattr(spec, "extra_retained_tokens", 0):
        window, span = spec.sliding_window, 0
    elif type(spec) is ChunkedLocalAttentionSpec:
        window, span = 0, spec.attention_chunk_size
    else:
        raise LayoutError(
            f"KV cache of kind {type(spec).__name__}; supported: full, sliding and chunked attention, states"
        )
    _refuse_what_elements_do_not_tell(spec)
    if spec.head_size != getattr(spec, "head_size_v", spec.head_size):
        raise LayoutError(f"head sizes of K and V differ: {spec.head_size}, {spec.head_size_v}")
    return "", window, span, spec.num_kv_heads, spec.head_size, spec.block_size


def _layers(groups: Any, numbers: list[int], kind: tuple[Any, ...]) -> PlaneLayers:
    state, window, span, heads, head_size, block_tokens = kind
    names = tuple(name for number in numbers for name in groups[number].layer_names)
    itemsize = 1 if state else groups[numbers[0]].kv_cache_spec.dtype.itemsize
    geometry = Geometry(len(names), heads, head_size, itemsize, block_tokens, 1 if state else 2)
    sizes = tuple(len(groups[number].layer_names) for number in numbers)
    return PlaneLayers(geometry, names, tuple(numbers), sizes, window, span, state)


def _latent(vllm_config: Any, group: Any, workers: int) -> Shape:
    """Of MLA: one vector a token, the same on all workers."""
    spec = group.kv_cache_spec
    if not prefix_is_exact(vllm_config):
        raise LayoutError(
            "MLA on a CPU: vLLM's answers there change with a cached prefix; supported: accelerators"
        )
    if getattr(spec, "state_content_bytes", None) is not None:
        raise LayoutError(f"MLA cache of kind {spec.cache_dtype_str}; supported: elements of one dtype")
    if getattr(spec, "tokens_per_state", 1) != 1:
        raise LayoutError(f"MLA with {spec.tokens_per_state} tokens a state; supported: 1")
    _refuse_what_elements_do_not_tell(spec)
    sizes = spec.num_kv_heads, spec.head_size, spec.dtype.itemsize, spec.block_size, 1
    names = tuple(group.layer_names)
    layers = PlaneLayers(Geometry(len(names), *sizes), names, sizes=(len(names),))
    return Shape((layers,), spec.dtype, workers, 1)


def _refuse_what_elements_do_not_tell(spec: Any) -> None:
    if getattr(spec, "non_causal", False):
        raise LayoutError("attention that is not causal: KV depends on later tokens; supported: causal")
    quantised = getattr(getattr(spec, "kv_quant_mode", None), "name", "NONE")
    if quantised not in ("NONE", "FP8_PER_TENSOR"):  # the others keep scales that no element tells of
        raise LayoutError(f"KV quantised by {quantised}; supported: none, or fp8 with one scale a tensor")


def prefix_is_exact(vllm_config: Any) -> bool:
    """Whether vLLM computes the same with a cached prefix as without one, for MLA. Its CPU backend does not (in
    0.32, decoded tokens differ from those that a prefill gives), and disables prefix caching."""
    device = getattr(getattr(vllm_config, "device_config", None), "device_type", None)
    return device != "cpu" or bool(vllm_config.cache_config.enable_prefix_caching)


def engine_identity(vllm_config: Any, shape: Shape, *page_tokens: int) -> bytes:
    """16 bytes that name what an engine's KV depends on beside its weights and the request, and how its bytes are
    laid out. Names, paths, revisions, seeds and load formats do not count: the weights tell. `page_tokens`: of a
    page of each plane."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    text, more = _as_text(model.hf_config), dict[str, Any]()
    if drafts(vllm_config):
        more["drafter"] = _as_text(vllm_config.speculative_config.draft_model_config.hf_config)
    if shape.stages:
        more["stages"] = list(shape.stages)
    return namespace(
        {
            "version": VERSION,
            "model": text,
            "quantization": str(model.quantization),
            "dtype": str(model.dtype),
            "cache_dtype": str(cache.cache_dtype),
            "raw_dtype": str(shape.dtype),
            "heads": shape.geometry.heads * shape.ranks,
            "kinds": shape.geometry.kinds,
            "head_dim": shape.geometry.head_dim,
            "layers": shape.geometry.layers,
            "ranks": shape.ranks,
            "planes": [
                [list(p.names), p.geometry.heads, p.geometry.head_dim, p.window, p.span, p.state, tokens]
                for p, tokens in zip(shape.planes, page_tokens, strict=True)
            ]
            if shape.has_windows
            else None,
            "page_tokens": page_tokens[0],
            # vLLM chooses long or short factors by it, and holds both in one buffer:
            "longest": getattr(model, "max_model_len", None) if "longrope" in text or '"su"' in text else None,
            # None where the model's configuration says it, or there is none:
            "window": getattr(cache, "sliding_window", None),
        }
        | more
    )


def _as_text(hf_config: Any) -> str:
    """A model's configuration, without what says nothing of its KV."""
    config = {key: value for key, value in hf_config.to_dict().items() if key not in NOT_THE_MODEL}
    return json.dumps(config, sort_keys=True, default=str)


class Namespaces:
    """The namespace of each request: the engine's identity and weights, and the request's adapter, tenant, media.

    `engine`: all but the weights. Until they are known (`set_weights`) it stands for them too.
    """

    def __init__(self, engine: bytes) -> None:
        self._without, self._engine = engine, engine
        self._files = Files()
        self._adapters: dict[int, tuple[str, str | None]] = {}  # path and fingerprint, by number
        self._replaced = False
        self._undo: tuple[dict[int, tuple[str, str | None]], bool] | None = None

    @property
    def engine(self) -> bytes:
        """What all namespaces of this engine are made from now; 16 bytes."""
        return self._engine

    def renew(self) -> None:
        """From now on nothing is equal to what was, in any engine: nobody knows the weights."""
        self.set_weights(os.urandom(16).hex())

    def set_weights(self, weights: str) -> None:
        """From now on requests are computed by weights of that fingerprint. Weights that come back find what was
        kept of them."""
        self._engine = namespace({"engine": self._without, "weights": weights})

    def set_weights_of_files(self, model_config: Any, load_format: str) -> bool:
        """The same by the files of the model, where it cannot be looked at itself; whether they are known."""
        try:
            found = self._files.fingerprint(model_files(model_config, load_format))
        except OSError:
            found = None
        if found is None:
            return False
        longest = getattr(model_config, "max_model_len", None)  # may have chosen among rotary tables
        self.set_weights(f"files {found}, {longest}")
        return True

    def of(self, request: Any) -> bytes | None:
        """16 bytes, equal for two requests only if equal tokens give them equal KV; None where that cannot be
        known: tokens that are not all of the prompt, or an adapter whose weights are not known.
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

    @property
    def replaced(self) -> bool:
        """Whether an adapter that was known has, or may have, other weights since `settle_replaced`: what requests
        under way compute by it is of no namespace."""
        return self._replaced

    def settle_replaced(self) -> None:
        """What follows from that is done."""
        self._replaced = False

    def note_adapter(self, lora: Any) -> None:
        """An adapter is about to be loaded: it will be known by what its files hold now. Does not raise."""
        self._undo = dict(self._adapters), self._replaced
        try:
            self._adapter(lora)
        except Exception:  # whatever it is: then it is looked at with its first request
            logger.debug("ragkv: an adapter could not be looked at", exc_info=True)

    def adapter_failed(self) -> None:
        """The adapter that was noted last was not loaded: what was known before holds."""
        if self._undo is not None:
            (self._adapters, self._replaced), self._undo = self._undo, None

    def _adapter(self, lora: Any) -> str | None:
        """Fingerprint of an adapter's files. None: they are not in a local folder, or have changed since the
        adapter was loaded, or first asked for, or another was loaded under its number: nobody says whether the
        engine runs the old weights or the new, now or later."""
        number, path = int(lora.lora_int_id), str(lora.lora_path)
        in_place = getattr(lora, "load_inplace", False)
        if number not in self._adapters:
            self._adapters[number] = path, None if in_place else self._read_adapter(path)
        known, found = self._adapters[number]
        if found is not None and (in_place or path != known or self._read_adapter(path) != found):
            self._adapters[number], self._replaced = (path, None), True
        return self._adapters[number][1]

    def _read_adapter(self, path: str) -> str | None:
        """Fingerprint of what an adapter's files hold now; bytes that were hashed are not read again."""
        try:
            return self._files.fingerprint(adapter_files(path))
        except OSError:
            return None


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
