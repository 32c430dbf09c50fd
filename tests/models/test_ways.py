"""Ways to run a model: equal to plain vLLM, with all hit that can be hit."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from models.kinds import FIELDS, KINDS, make
from models.test_models import ENVIRONMENT, LONG, SHAPE, options, settings
from ragkv.benchmarks.engine import Engine
from rig.beside import Ask
from rig.engines import Plain, RigEngine

LLAMA, EXPERTS = (next(kind for kind in KINDS if kind.name == name) for name in ("Llama 3", "Qwen 3 MoE"))


@pytest.fixture(scope="module")
def fresh():
    chance = torch.Generator().manual_seed(5)
    return lambda length: tuple(torch.randint(3, FIELDS["vocab_size"], (length,), generator=chance).tolist())


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make(LLAMA, tmp_path_factory.mktemp("llama") / "model")


def adapter(folder, seed):
    """A LoRA adapter of random weights, which changes answers."""
    chance, weights = torch.Generator().manual_seed(seed), {}
    for layer in range(FIELDS["num_hidden_layers"]):
        for name, wide in (("q_proj", 128), ("v_proj", 64)):
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{place}.lora_A.weight"] = torch.randn(8, 128, generator=chance) * 0.6
            weights[f"{place}.lora_B.weight"] = torch.randn(wide, 8, generator=chance) * 0.4
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return str(folder)


def test_two_adapters_at_once_and_none_share_nothing(llama, fresh, tmp_path):
    """(A request without an adapter is asked alone: beside others vLLM 0.32 gives it an adapter on a CPU.)"""
    prompt, two = fresh(LONG), [(adapter(tmp_path / f"{n}", n), n) for n in (1, 2)]
    batches = [Ask(prompt, 6, adapter=each) for each in two], [Ask(prompt, 6)]
    with_adapters = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    with RigEngine(options(llama, None, enable_prefix_caching=False, **with_adapters)) as made:
        plain = Plain(made.wait())
        wanted = [plain.answers(asks) for asks in batches]
    assert len({answer.tokens for answers in wanted for answer in answers}) == 3
    for known in ((0, LONG - 1), (LONG - 1,)):  # the second engine finds it on disk
        with RigEngine(options(llama, settings(tmp_path / "disk"), **with_adapters)) as ragkv:
            for cached in known:
                for asks in batches:
                    found = ragkv.answers(asks)
                    plain.check(asks, found)
                    assert all(cached - 256 < answer.cached <= cached for answer in found)
                ragkv.evict()
            ragkv.rest()


def embed(llm, prompts):
    """Each prompt's vector, and how many of its tokens were not computed."""
    from vllm.inputs import TokensPrompt

    found = llm.embed([TokensPrompt(prompt_token_ids=list(each)) for each in prompts], use_tqdm=False)
    return [(each.outputs.embedding, each.num_cached_tokens) for each in found]


def test_embeddings(llama, fresh, tmp_path):
    document = fresh(LONG)
    prompts, pooling = (
        [document, (*document[:300], *fresh(50))],
        {"runner": "pooling", "skip_tokenizer_init": False},
    )
    words = Tokenizer(WordLevel({f"{number}": number for number in range(FIELDS["vocab_size"])}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(llama)
    with Engine(options(llama, None, enable_prefix_caching=False, **pooling)) as made:
        wanted = [torch.tensor(vector) for vector, _ in made.call(embed, prompts)]
    assert (wanted[0] - wanted[1]).norm() > 0.1
    with Engine(options(llama, settings(tmp_path), **pooling)) as made:
        for cached in ([0, 300], [LONG - 1, 349]):
            found = [made.call(embed, [each])[0] for each in prompts]
            made.evict()
            assert [count for _, count in found] == cached
            for (vector, _), want in zip(found, wanted, strict=True):
                assert (torch.tensor(vector) - want).abs().max() < 1e-4


def test_a_mixture_of_experts_on_two_workers(fresh, tmp_path):
    folder, prompt = make(EXPERTS, tmp_path / "model"), fresh(LONG)
    asks = [Ask(prompt, 6), Ask((*prompt[:300], *fresh(40)), 6)]
    with RigEngine(options(folder, None, enable_prefix_caching=False)) as made:
        plain = Plain(made.wait())
        plain.answers(asks)
        two = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
        with RigEngine(options(folder, settings(tmp_path / "disk"), **two)) as made:
            for cached in (0, LONG - 1):
                found = made.answers(asks)
                plain.check(asks, found)
                assert found[0].cached == cached
                made.evict()


def test_two_engines_of_one_server(llama, fresh, tmp_path):
    """Data parallel 2. Each has its own memory; the second may find on disk what the first has stored."""
    prompt = fresh(LONG)
    with RigEngine(options(llama, None, enable_prefix_caching=False)) as made:
        wanted = list(made.answer(prompt, tokens=6).tokens)
    transfer = {
        "kv_connector": "RagKVConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": settings(tmp_path / "disk"),
    }
    arguments = {"model": str(llama), "dtype": "float32", "max_model_len": 1024, "kv_transfer_config": transfer}
    given = {"arguments": arguments | SHAPE, "prompt": prompt, "tokens": 6}
    environment = (
        os.environ | ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    ran = subprocess.run(
        [sys.executable, "-m", "models.two_engines"],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        env=environment,
        timeout=500,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert [tokens for tokens, _ in found] == [wanted] * 4
    first, again, _, other = (cached for _, cached in found)
    assert (first, again, other) == (0, LONG - 1, LONG - 1)
