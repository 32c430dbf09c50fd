"""Engines that the tests share: plain vLLM, and vLLM with ragkv, on SmolLM2 in float32.

In float32 greedy answers do not depend on how a prompt is split into steps, so that plain vLLM's answers are
the same with and without a hit. In bfloat16 they do, with or without ragkv.
"""

import pytest

from engine_tools import BLOCK, Resting, filing_tokens
from ragkv.benchmarks.engine import EngineOptions
from ragkv.benchmarks.fusion_measure import ENVIRONMENT, PROCESSOR
from ragkv.benchmarks.model import ensure_model

UNGATED = {"placement": {"gate": False}}  # so that what tests ask for is done, whether or not it pays


def pytest_collection_modifyitems(items):
    for item in items:
        if "/tests/engine/" in str(item.path):
            item.add_marker(pytest.mark.engine)
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def model():
    return ensure_model()


@pytest.fixture(scope="session")
def tokenizer(model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="session")
def filings(tokenizer):
    return [filing_tokens(tokenizer, seed) for seed in range(6)]


@pytest.fixture(scope="session")
def plain(model):
    with Resting(EngineOptions(model, dtype="float32", max_model_len=4096)) as engine:
        yield engine.wait()


@pytest.fixture(scope="session")
def shared_ragkv(model):
    options = EngineOptions(
        model,
        {"memory": {"capacity": "1GiB"}, **UNGATED},
        "float32",
        max_model_len=4096,
        environment=ENVIRONMENT,
        llm={"logits_processors": [PROCESSOR]},  # idle but for requests that ask to be measured
    )
    with Resting(options) as engine:
        yield engine.wait()


@pytest.fixture
def ragkv(shared_ragkv):
    """An engine with ragkv in which nothing is cached."""
    shared_ragkv.evict(ragkv_too=True)
    return shared_ragkv


@pytest.fixture(scope="session")
def small(model):
    """Room for 12 blocks in the engine and for about 1,400 tokens in ragkv, prompts in steps of 256 tokens. Its
    model is compiled (by Dynamo, without a code generator, which takes minutes)."""
    options = EngineOptions(
        model,
        {"memory": {"capacity": "64MiB", "policy": "lfu"}, **UNGATED},
        "float32",
        max_model_len=10 * BLOCK,
        llm={
            "num_gpu_blocks_override": 12,
            "max_num_batched_tokens": 256,
            "max_num_seqs": 16,
            "enforce_eager": False,
            "compilation_config": {"mode": 3, "backend": "eager", "cudagraph_mode": "NONE"},
        },
    )
    with Resting(options) as engine:
        yield engine.wait()
