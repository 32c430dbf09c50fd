"""What an engine is: its weights, its tokenizer's structure, its shape, and the namespaces of its requests."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.kv_cache_interface import KVQuantMode, MLAAttentionSpec, SlidingWindowSpec

from engine_config import caches, config, spec
from ragkv.connectors.vllm.identity import (
    Namespaces,
    engine_identity,
    examine,
    load_structure,
    token_structure,
    weights_fingerprint,
)
from ragkv.errors import LayoutError


def weights(folder, name="model.safetensors", size=300_000, change=None):
    content = bytearray(np.random.default_rng(1).bytes(size))
    if change is not None:
        content[change] ^= 1
    (folder / name).write_bytes(content)


@pytest.mark.parametrize("change", [0, 150_001, 299_999])
def test_the_fingerprint_of_weights_changes_with_their_bytes(tmp_path, change):
    weights(tmp_path)
    before = weights_fingerprint(str(tmp_path), "main", 0)
    assert weights_fingerprint(str(tmp_path), "other name of the same", 0) == before
    weights(tmp_path, change=change)
    assert weights_fingerprint(str(tmp_path), "main", 0) != before


def test_the_fingerprint_of_weights_changes_with_files_sizes_names_and_seed(tmp_path):
    seen = set()

    def look(seed=0):
        seen.add(weights_fingerprint(str(tmp_path), "main", seed))
        return len(seen)

    weights(tmp_path)
    assert look() == 1
    assert look(seed=1) == 2
    weights(tmp_path, "more.bin", 10)
    assert look() == 3
    weights(tmp_path, "more.bin", 11)
    assert look() == 4
    (tmp_path / "more.bin").rename(tmp_path / "less.bin")
    assert look() == 5
    (tmp_path / "tokenizer.json").write_text("{}")
    assert look() == 5, "only weights count"


def test_a_single_file_and_a_name_are_told_apart(tmp_path):
    weights(tmp_path, "model.gguf")
    file = str(tmp_path / "model.gguf")
    assert weights_fingerprint(file, "None", 0) == weights_fingerprint(str(tmp_path), "None", 0)
    assert weights_fingerprint("org/model", "a", 0) != weights_fingerprint("org/model", "b", 0)
    assert weights_fingerprint("org/model", "a", 0) != weights_fingerprint("org/other", "a", 0)


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


def test_the_shape_of_an_engine():
    shape = examine(config(), caches(spec()))
    geometry = shape.geometry
    assert shape.layers == ("layer.0", "layer.1", "layer.2") and shape.ranks == 2
    assert (geometry.layers, geometry.heads, geometry.head_dim) == (3, 2, 64)
    assert (geometry.itemsize, geometry.block_tokens) == (2, 16)
    assert geometry.token_bytes == 2 * 3 * 2 * 64 * 2
    assert shape.page_bytes(5) == 5 * geometry.token_bytes * 2


@pytest.mark.parametrize(
    ("change", "groups", "says"),
    [
        ({"pipeline_parallel_size": 2}, [spec()], "pipeline_parallel_size = 2"),
        ({"decode_context_parallel_size": 2}, [spec()], "decode_context_parallel_size = 2"),
        ({"prefill_context_parallel_size": 2}, [spec()], "prefill_context_parallel_size = 2"),
        (
            {"speculative_config": SimpleNamespace(method="eagle3")},
            [spec()],
            "speculative decoding by eagle3",
        ),
        ({"is_prefix_caching_supported": False}, [spec()], "cannot do without a prefix"),
        ({}, [], "0 groups"),
        ({}, [spec(), spec()], "2 groups"),
        ({}, [spec(SlidingWindowSpec, sliding_window=64)], "SlidingWindowSpec"),
        ({}, [spec(MLAAttentionSpec, num_kv_heads=1)], "MLAAttentionSpec"),
        ({}, [spec(head_size_v=32)], "head sizes of K and V differ: 64, 32"),
        ({}, [spec(non_causal=True)], "not causal"),
        ({}, [spec(kv_quant_mode=KVQuantMode.INT8_PER_TOKEN_HEAD)], "INT8_PER_TOKEN_HEAD"),
        ({}, [spec(kv_quant_mode=KVQuantMode.NVFP4)], "NVFP4"),
        ({"calculate_kv_scales": True}, [spec()], "^calculate_kv_scales: [^\\n]*; supported: False$"),
    ],
)
def test_engines_that_cannot_be_served_are_refused_in_plain_words(change, groups, says):
    with pytest.raises(LayoutError, match=says):
        examine(config(**change), caches(*groups))


@pytest.mark.parametrize(
    ("change", "group"),
    [
        ({"speculative_config": SimpleNamespace(method="ngram")}, spec()),
        ({}, spec(kv_quant_mode=KVQuantMode.FP8_PER_TENSOR, dtype=torch.uint8)),
        ({}, spec(sliding_window=128)),
    ],
)
def test_what_may_look_odd_and_is_served(change, group):
    assert examine(config(**change), caches(group)).geometry.itemsize == group.dtype.itemsize


def test_an_engine_is_named_by_all_that_its_kv_depends_on():
    variants = [
        {},
        {"hf_config": SimpleNamespace(to_dict=lambda: {"rope_theta": 1e6})},
        {"model": "org/other"},
        {"revision": "abc"},
        {"seed": 1},
        {"quantization": "awq"},
        {"dtype": torch.float16},
        {"cache_dtype": "fp8"},
        {"load_format": "dummy"},
        {"tensor_parallel_size": 4},
    ]
    names = [engine_identity(config(**each), examine(config(**each), caches(spec())), 16) for each in variants]
    names += [engine_identity(config(), examine(config(), caches(spec())), tokens) for tokens in (8, 32)]
    names.append(engine_identity(config(), examine(config(), caches(spec(dtype=torch.float32))), 16))
    names.append(engine_identity(config(), examine(config(), caches(spec(), layers=("layer.0",))), 16))
    assert len(set(names)) == len(variants) + 4
    assert names[0] == engine_identity(config(), examine(config(), caches(spec())), 16)
    assert all(len(name) == 16 for name in names)


def test_a_model_has_one_name_wherever_it_lies(tmp_path):
    """Lower tiers are shared between machines."""
    found = set()
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        weights(tmp_path / folder)
        details = {"rope_theta": 1e4, "_name_or_path": folder, "transformers_version": folder}
        hf_config = SimpleNamespace(to_dict=lambda details=details: details)
        given = {"model": str(tmp_path / folder), "hf_config": hf_config}
        found.add(engine_identity(config(**given), examine(config(**given), caches(spec())), 16))
    assert len(found) == 1


def request(**features):
    given = {"prompt_embeds": None, "lora_request": None, "mm_features": [], "cache_salt": None}
    return SimpleNamespace(**given | features)


def test_a_changed_adapter_is_left_alone_until_it_has_a_new_name(tmp_path):
    weights(tmp_path, "adapter_model.safetensors", 100)
    lora = SimpleNamespace(lora_name="a", lora_int_id=1, lora_path=str(tmp_path), load_inplace=False)
    names = Namespaces(b"e" * 16)
    first = names.of(request(lora_request=lora))
    assert first is not None and first == names.of(request(lora_request=lora))
    assert first != names.of(request())
    weights(tmp_path, "adapter_model.safetensors", 101)
    assert names.of(request(lora_request=lora)) is None
    renewed = SimpleNamespace(**vars(lora) | {"lora_int_id": 2})
    assert names.of(request(lora_request=renewed)) not in (None, first)
    assert names.of(request(lora_request=lora)) is None


def test_the_same_adapter_under_another_id_shares(tmp_path):
    weights(tmp_path, "adapter_model.safetensors", 100)
    loras = [
        SimpleNamespace(lora_name="a", lora_int_id=n, lora_path=str(tmp_path), load_inplace=False) for n in (1, 2)
    ]
    names = Namespaces(b"e" * 16)
    assert len({names.of(request(lora_request=lora)) for lora in loras}) == 1


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
