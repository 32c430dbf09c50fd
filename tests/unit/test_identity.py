"""What an engine is: its tokenizer's structure, its shape, and the namespaces of its requests."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    KVQuantMode,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from engine_config import caches, config, spec
from ragkv.config import Settings
from ragkv.connectors.vllm.identity import (
    Namespaces,
    engine_identity,
    examine,
    load_structure,
    token_structure,
)
from ragkv.connectors.vllm.messages import Group
from ragkv.connectors.vllm.sizes import memory_pages, page_shapes
from ragkv.connectors.vllm.speculation import DRAFTERS, WITHOUT_KV
from ragkv.errors import LayoutError
from ragkv.kvstore.pages import frame_bytes


def breaks(vocabulary, *tokens):
    structure = token_structure(vocabulary)
    return structure.breaks(np.array([vocabulary[token] for token in tokens], dtype=np.int32)).tolist()


def test_structure_of_byte_level_vocabularies():
    vocabulary = {"a": 0, "Ċ": 1, "ĊĊ": 2, ".ĠĊĊ": 3, "Ġ": 4, "ĠĊ": 5, "čĊ": 6, "ĉ": 9}
    assert breaks(vocabulary, "a", "ĊĊ", "a") == [2]
    assert breaks(vocabulary, "a", "Ċ", "a", "Ċ", "Ċ", "a") == [5]
    assert breaks(vocabulary, "a", ".ĠĊĊ", "a") == [2]
    assert breaks(vocabulary, "a", "Ċ", "Ġ", "ĠĊ", "a", "a") == [4]
    assert breaks(vocabulary, "a", "Ċ", "ĉ", "čĊ", "a") == [4]
    assert breaks(vocabulary, "a", "Ċ", "a", "Ċ", "a") == []


def test_structure_of_sentencepiece_vocabularies():
    vocabulary = {"▁the": 0, "<0x0A>": 1, "▁": 2, "a": 3}
    assert breaks(vocabulary, "a", "<0x0A>", "<0x0A>", "▁the", "a") == [3]
    assert breaks(vocabulary, "a", "<0x0A>", "▁", "<0x0A>", "▁the") == [4]
    assert breaks(vocabulary, "a", "<0x0A>", "▁the", "<0x0A>", "a") == []


def test_structure_of_bytes_of_holes_and_of_nothing():
    assert breaks({b"a": 7, b"\n\n": 3}, b"a", b"\n\n", b"a") == [2]
    assert token_structure({}).breaks(np.array([1, 2, 99], dtype=np.int32)).tolist() == []
    config = SimpleNamespace(model_config=SimpleNamespace(skip_tokenizer_init=True))
    assert load_structure(config).breaks(np.array([0, 0, 0], dtype=np.int32)).tolist() == []


def mla(**change):
    return spec(MLAAttentionSpec, num_kv_heads=1, head_size=576, **change)


def test_the_shape_of_an_engine_with_mla_is_one_vector_a_token_which_all_workers_hold():
    shape = examine(config(), caches(mla()))
    assert (shape.workers, shape.ranks) == (2, 1)
    assert (shape.geometry.kinds, shape.geometry.heads, shape.geometry.head_dim) == (1, 1, 576)
    assert page_shapes(Settings(), shape)[0].page_bytes == Settings().memory.page_tokens * 3 * 576 * 2


def test_the_shape_of_an_engine_with_layers_of_several_kinds():
    window = spec(SlidingWindowSpec, sliding_window=64)
    groups = [window, spec(), window, spec(ChunkedLocalAttentionSpec, attention_chunk_size=32)]
    shape = examine(config(), caches(*groups))
    assert [(plane.window, plane.span, plane.groups) for plane in shape.planes] == [
        (0, 0, (1,)),
        (0, 32, (3,)),
        (64, 0, (0, 2)),
    ]
    assert [plane.geometry.layers for plane in shape.planes] == [3, 3, 6]
    assert [(group.number, group.plane) for group in shape.groups] == [(1, 0), (3, 1), (0, 2), (2, 2)]
    pages = page_shapes(Settings(), shape)
    assert [page.page_tokens for page in pages] == [16, 16, 8], "none takes more room than plane 0's"
    named = engine_identity(config(), shape, 16, 16, 8)
    assert len({named, engine_identity(config(), shape, 16, 16, 4), identity()}) == 3


def test_pages_of_windows_and_of_full_attention_take_the_same_room():
    """As of Gemma 3: five of six layers have windows, so 3 tokens of theirs take the room of 15 of the others."""
    window = spec(SlidingWindowSpec, sliding_window=64)
    tokens, windows = page_shapes(Settings(), examine(config(), caches(spec(), *[window] * 5)))
    assert (tokens.page_tokens, windows.page_tokens) == (15, 3)
    assert tokens.page_bytes == windows.page_bytes == frame_bytes([tokens, windows])


def test_the_shape_of_an_engine_whose_layers_all_have_windows():
    shape = examine(config(), caches(spec(SlidingWindowSpec, sliding_window=64)))
    assert [(plane.window, plane.groups, plane.geometry.layers) for plane in shape.planes] == [
        (0, (), 0),
        (64, (0,), 3),
    ]
    assert [(group.number, group.plane) for group in shape.groups] == [(0, 1)] and shape.has_windows
    settings = Settings()
    nothing, windows = page_shapes(settings, shape)
    assert (nothing.page_bytes, nothing.page_tokens) == (0, settings.chunks.max_tokens)
    assert windows.page_tokens == 1, "what a chunk takes of plane 0 is lost"


def test_the_shape_of_an_engine_with_states():
    state = MambaSpec(
        block_size=128, shapes=((3, 8),), dtypes=(torch.float32,), mamba_cache_mode="align", page_size_padded=4096
    )
    shape = examine(config(), caches(state, spec(), state))
    full, states = shape.planes
    assert full.groups == (1,) and states.groups == (0, 2) and states.sizes == (3, 3) and states.state
    assert states.geometry.token_bytes == 6 * 96 and shape.token_bytes == full.geometry.token_bytes
    assert shape.dtype == torch.bfloat16 and shape.has_windows
    _, states = page_shapes(Settings(), shape)
    assert (states.rank_bytes, states.spread, states.pages(1)) == (576, 1, 2)
    alone = examine(config(), caches(state))
    assert [plane.geometry.layers for plane in alone.planes] == [0, 3] and alone.token_bytes == 3 * 96
    large = replace(state, shapes=((3 << 20, 1),))
    shapes = page_shapes(Settings(), examine(config(), caches(large)))
    assert shapes[1].spread == 36 << 4 and frame_bytes(shapes) <= 1 << 16
    with pytest.raises(LayoutError, match=r"one chunk of chunks\.max_tokens and a state needs 1153"):
        memory_pages(Settings(memory={"capacity": "64MiB"}), shapes)
    assert memory_pages(Settings(memory={"capacity": "256MiB"}), shapes) >= 1153


def speculating(method, **more):
    return {"speculative_config": SimpleNamespace(method=method, **more)}


def test_engines_whose_drafters_differ_are_told_apart():
    drafter = SimpleNamespace(hf_config=SimpleNamespace(to_dict=lambda: {"layers": 1}))
    other = SimpleNamespace(hf_config=SimpleNamespace(to_dict=lambda: {"layers": 2}))
    found = [identity(**speculating("eagle", draft_model_config=each)) for each in (drafter, other)]
    assert len({*found, identity()}) == 3
    assert identity(**speculating("ngram")) == identity() == identity(**speculating("medusa"))


def test_no_drafter_where_vllm_stores_before_it_has_run(monkeypatch):
    monkeypatch.delattr(KVConnectorModelRunnerMixin, "finalize_kv_connector")
    examine(config(**speculating("ngram")), caches(spec()))
    with pytest.raises(LayoutError, match=r"speculative decoding by mtp: .*; supported from vLLM 0\.32 on"):
        examine(config(**speculating("mtp")), caches(spec()))


def test_the_shape_of_an_engine():
    shape = examine(config(), caches(spec()))
    geometry = shape.geometry
    assert shape.layers == ("layer.0", "layer.1", "layer.2") and shape.ranks == 2
    assert (geometry.layers, geometry.heads, geometry.head_dim) == (3, 2, 64)
    assert (geometry.itemsize, geometry.block_tokens) == (2, 16)
    assert geometry.token_bytes == 2 * 3 * 2 * 64 * 2
    assert shape.groups == [Group(0, 0, 16)]


def test_the_shape_of_pipeline_stages_has_room_for_the_largest():
    """Seven layers are four and three; both sides must find the same, from what a worker of either knows."""
    given = config(pipeline_parallel_size=2, layers=7)
    of_stages = [examine(given, caches(spec(), layers=[f"layer.{n}" for n in range(count)])) for count in (4, 3)]
    for shape in of_stages:
        assert (shape.workers, shape.ranks, shape.stages) == (4, 4, (4, 3))
        assert shape.geometry.layers == 4
        assert (
            page_shapes(Settings(), shape)[0].page_bytes == Settings().memory.page_tokens * 4 * 4 * 2 * 2 * 64 * 2
        )
    latent = examine(given, caches(mla()))
    assert (latent.workers, latent.ranks) == (4, 2)


@pytest.mark.parametrize(
    ("change", "groups", "says"),
    [
        ({"pipeline_parallel_size": 2, "layers": 8}, [spec()], r"stage has 3 layers with KV; supported: \(4, 4\)"),
        ({"pipeline_parallel_size": 2}, [spec(), spec()], "pipeline stages of layers of several kinds"),
        (
            {"pipeline_parallel_size": 2, "speculative_config": SimpleNamespace(method="eagle")},
            [spec()],
            "or with a drafter",
        ),
        (
            {"pipeline_parallel_size": 2, "layers": 6},
            [spec(SlidingWindowSpec, sliding_window=64)],
            "pipeline stages of layers with windows",
        ),
        ({"decode_context_parallel_size": 2}, [spec()], "decode_context_parallel_size = 2"),
        ({"prefill_context_parallel_size": 2}, [spec()], "prefill_context_parallel_size = 2"),
        (
            {"speculative_config": SimpleNamespace(method="dflash")},
            [spec()],
            "speculative decoding by dflash; supported: .*, eagle3, mtp$",
        ),
        ({"is_prefix_caching_supported": False}, [spec()], "cannot do without a prefix"),
        ({}, [], "0 groups"),
        ({}, [spec(), spec(head_size=32)], "heads of several sizes"),
        ({}, [spec(ChunkedLocalAttentionSpec, attention_chunk_size=32)], "none of full attention"),
        ({}, [spec(), spec(SlidingWindowSpec, sliding_window=64, dtype=torch.float32)], "several dtypes"),
        ({}, [spec(), mla()], "MLAAttentionSpec"),
        ({"device_type": "cpu", "enable_prefix_caching": False}, [mla()], "MLA on a CPU"),
        ({}, [mla(cache_dtype_str="fp8_ds_mla", state_content_bytes=656)], "fp8_ds_mla"),
        ({}, [mla(tokens_per_state=4)], "4 tokens a state"),
        ({}, [mla(non_causal=True)], "not causal"),
        ({}, [mla(kv_quant_mode=KVQuantMode.NVFP4)], "NVFP4"),
        ({}, [spec(head_size_v=32)], "head sizes of K and V differ: 64, 32"),
        ({}, [spec(non_causal=True)], "not causal"),
        ({}, [spec(kv_quant_mode=KVQuantMode.INT8_PER_TOKEN_HEAD)], "INT8_PER_TOKEN_HEAD"),
        ({}, [spec(kv_quant_mode=KVQuantMode.NVFP4)], "NVFP4"),
        ({"is_moe_model": True, "data_parallel_size": 2}, [spec()], "experts of one model in several engines"),
        ({"is_moe_model": True, "enable_eplb": True}, [spec()], "or that move"),
        ({"calculate_kv_scales": True}, [spec()], "^calculate_kv_scales: [^\\n]*; supported: False$"),
    ],
)
def test_engines_that_cannot_be_served_are_refused_in_plain_words(change, groups, says):
    with pytest.raises(LayoutError, match=says):
        examine(config(**change), caches(*groups))


@pytest.mark.parametrize(
    ("change", "group"),
    [
        *(({"speculative_config": SimpleNamespace(method=method)}, spec()) for method in WITHOUT_KV + DRAFTERS),
        ({}, spec(kv_quant_mode=KVQuantMode.FP8_PER_TENSOR, dtype=torch.uint8)),
        ({}, spec(sliding_window=128)),
        ({}, mla()),
        ({"device_type": "cpu", "enable_prefix_caching": True}, mla()),
    ],
)
def test_what_may_look_odd_and_is_served(change, group):
    assert examine(config(**change), caches(group)).geometry.itemsize == group.dtype.itemsize


def identity(tokens=16, group=None, layers=("layer.0", "layer.1", "layer.2"), total=3, **change):
    given = config(layers=total, **change)
    return engine_identity(given, examine(given, caches(group or spec(), layers=layers)), tokens)


def longrope(length):
    details = {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 1024}}
    return identity(hf_config=SimpleNamespace(to_dict=lambda: details), max_model_len=length)


def test_an_engine_is_named_by_all_that_its_kv_depends_on_beside_its_weights():
    names = [
        identity(),
        identity(hf_config=SimpleNamespace(to_dict=lambda: {"rope_theta": 1e6})),
        identity(hf_config=SimpleNamespace(to_dict=lambda: {"rope_theta": 1e4, "attn_logit_softcapping": 30.0})),
        identity(hf_config=SimpleNamespace(to_dict=lambda: {"rope_theta": 1e4, "sliding_window": 64})),
        identity(quantization="awq"),
        identity(dtype=torch.float16),
        identity(cache_dtype="fp8"),
        identity(sliding_window=64),
        identity(tensor_parallel_size=4),
        identity(8),
        identity(32),
        identity(group=spec(dtype=torch.float32)),
        identity(layers=("layer.0",)),
        identity(pipeline_parallel_size=2, layers=("layer.0", "layer.1"), total=3),
        identity(pipeline_parallel_size=2, layers=("layer.0", "layer.1"), total=4),
        longrope(1024),
        longrope(2048),
    ]
    assert len(set(names)) == len(names)
    assert names[0] == identity() and all(len(name) == 16 for name in names)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "org/other"},
        {"model": "/some/folder"},
        {"revision": "abc"},
        {"seed": 1},
        {"load_format": "dummy"},
        {"max_model_len": 4096},
        {
            "hf_config": SimpleNamespace(
                to_dict=lambda: {
                    "rope_theta": 1e4,
                    "_name_or_path": "here",
                    "transformers_version": "9",
                    "_commit_hash": "c",
                }
            )
        },
    ],
    ids=lambda change: next(iter(change)),
)
def test_names_paths_revisions_seeds_and_load_formats_do_not_count(change):
    assert identity(**change) == identity()


def request(**features):
    given = {"prompt_embeds": None, "lora_request": None, "mm_features": [], "cache_salt": None}
    return SimpleNamespace(**given | features)


def test_a_renewal_leaves_all_names_behind():
    names = Namespaces(b"e" * 16)
    asked = [request(), request(cache_salt="x")]
    before = [names.of(each) for each in asked]
    names.renew()
    after = [names.of(each) for each in asked]
    names.renew()
    again = [names.of(each) for each in asked]
    assert len({*before, *after, *again}) == 6 and all(len(name) == 16 for name in after)
    assert [names.of(each) for each in asked] == again
    other = Namespaces(b"e" * 16)
    other.renew()
    assert other.of(request()) not in (*before, *after, *again), "nor does another engine come to the same"


def test_no_media_and_no_list_of_media_are_the_same():
    names = Namespaces(b"e" * 16)
    assert names.of(request(mm_features=None, cache_salt="x")) == names.of(request(cache_salt="x"))
