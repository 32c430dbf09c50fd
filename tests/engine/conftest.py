"""Engines that the tests share: plain vLLM, and vLLM with ragkv, in float32.

In float32 greedy answers do not depend on how a prompt is split into steps, so that plain vLLM's answers are
the same with and without a hit. In bfloat16 they do, with or without ragkv.

Most engines run a Llama of random weights, `model`, which computes a token in a fortieth of the time of SmolLM2:
whether answers are equal says as much there, since every token of a prompt changes them (test_model.py). SmolLM2
runs where language matters, and once in each of a hit, a restart and a server.
"""

import sys
from pathlib import Path

import pytest
import yaml

from engine_tools import BLOCK, filing_tokens, room
from otlp_collector import collecting
from ragkv.benchmarks.engine import EngineOptions, Resting
from ragkv.benchmarks.internal.fusion_measure import ENVIRONMENT, PROCESSOR
from ragkv.benchmarks.internal.redis_server import Server as Redis
from ragkv.benchmarks.internal.redis_server import find_server
from ragkv.benchmarks.model import ensure_model, random_llama
from ragkv.benchmarks.server import Server, free_port

UNGATED = {"placement": {"gate": False}}  # so that what tests ask for is done, whether or not it pays


def pytest_collection_modifyitems(items):
    for item in items:
        if "/tests/engine/" in str(item.path):
            item.add_marker(pytest.mark.engine)
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def smollm2():
    return ensure_model()


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A Llama of random weights, with the tokenizer of SmolLM2."""
    return random_llama(tmp_path_factory.mktemp("model") / "llama", heads=8, kv_heads=4, head_dim=32, layers=6)


@pytest.fixture(scope="session")
def tokenizer(model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="session")
def filings(tokenizer):
    return [filing_tokens(tokenizer, seed) for seed in range(6)]


def plain_engine(model):
    """Plain vLLM."""
    return Resting(EngineOptions(model, dtype="float32", max_model_len=4096, one_process=True))


def ragkv_engine(model):
    """An engine with ragkv, with room for all that tests ask for."""
    options = EngineOptions(
        model,
        {"memory": {"capacity": room(model, 23_000)}, **UNGATED},
        "float32",
        max_model_len=4096,
        environment=ENVIRONMENT,
        one_process=True,
        llm={"logits_processors": [PROCESSOR]},  # idle but for requests that ask to be measured
    )
    return Resting(options)


@pytest.fixture(scope="session")
def plain(model):
    with plain_engine(model) as engine:
        yield engine.wait()


@pytest.fixture(scope="module")
def plain_smollm2(smollm2):
    with plain_engine(smollm2) as engine:
        yield engine.wait()


@pytest.fixture(scope="session")
def shared_ragkv(model):
    with ragkv_engine(model) as engine:
        yield engine.wait()


@pytest.fixture
def ragkv(shared_ragkv):
    """An engine with ragkv in which nothing is cached."""
    shared_ragkv.evict(ragkv_too=True)
    return shared_ragkv


@pytest.fixture(scope="session")
def shared_smollm2(smollm2):
    """An engine with ragkv on SmolLM2."""
    with ragkv_engine(smollm2) as engine:
        yield engine.wait()


@pytest.fixture(scope="session")
def small(model):
    """Room for 12 blocks in the engine and for about 1,400 tokens in ragkv, prompts in steps of 256 tokens."""
    options = EngineOptions(
        model,
        {"memory": {"capacity": room(model, 1456), "policy": "lfu"}, **UNGATED},
        "float32",
        max_model_len=10 * BLOCK,
        one_process=True,
        llm={
            "num_gpu_blocks_override": 12,
            "max_num_batched_tokens": 256,
            "max_num_seqs": 16,
        },
    )
    with Resting(options) as engine:
        yield engine.wait()


@pytest.fixture(scope="session")
def collector():
    """Takes the server's spans."""
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="session")
def disk_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("server") / "disk"


@pytest.fixture(scope="session")
def resting_server(model, collector, disk_folder):
    """`ragkv serve` with all tiers, of which memory holds about 2,000 tokens, and room for 2,560 of vLLM's own."""
    folder = disk_folder.parent
    redis = Redis() if find_server() else None
    settings = {
        "memory": {"capacity": room(model, 2176)},
        "device": {"capacity": room(model, 720)},
        "disk": {"path": str(disk_folder)},
        **({"redis": {"url": redis.url}} if redis else {}),
        **UNGATED,
    }
    file = folder / "ragkv.yaml"
    file.write_text(yaml.safe_dump(settings))
    port = free_port()
    command = [
        *(
            str(Path(sys.executable).with_name("ragkv")),
            "serve",
            str(model),
            "--config",
            str(folder / "ragkv.yaml"),
        ),
        *("--served-model-name", "llama", "--port", str(port), "--max-model-len", "2048", "--enforce-eager"),
        *("--num-gpu-blocks-override", "20", "--otlp-traces-endpoint", collector.endpoint),
        *("--dtype", "float32"),
    ]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1"}
    try:
        with Server(command, port, folder / "log", environment | collector.environment) as server:
            server.wait()
            server.rest()
            yield server
    finally:
        if redis:
            redis.close()


@pytest.fixture(scope="module")
def server(resting_server):
    """The server, awake."""
    resting_server.wake()
    yield resting_server
    resting_server.rest()
