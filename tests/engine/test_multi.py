"""ragkv inside vLLM's MultiConnector: as alone, also beside another connector, also when a load fails. Alone,
with a compiled model (by Dynamo, without a code generator, which takes minutes)."""

import random

import pytest

from engine_tools import break_copies, in_workers
from ragkv.benchmarks.engine import Engine, EngineOptions
from ragkv.benchmarks.internal.fusion_measure import ask as ask_hinted

OURS = {
    "kv_connector": "RagKVConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {
        "memory": {"capacity": "64MiB"},
        "placement": {"gate": False},
    },
}
COMPILED = {
    "enforce_eager": False,
    "compilation_config": {"mode": 3, "backend": "eager", "cudagraph_mode": "NONE"},
}
QUIET = {"kv_connector": "QuietConnector", "kv_connector_module_path": "quiet_connector", "kv_role": "kv_both"}


def tokens(seed, length):
    pick = random.Random(seed)
    return [pick.randrange(1000, 40000) for _ in range(length)]


@pytest.fixture(scope="module", params=[[OURS], [QUIET, OURS], [OURS, QUIET]], ids=["alone", "second", "first"])
def engine(request, model):
    extra = {"connectors": request.param}
    transfer = {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    options = {"kv_transfer_config": transfer, "num_gpu_blocks_override": 64}
    options |= COMPILED if request.param == [OURS] else {}
    with Engine(EngineOptions(model, None, "float32", 2048, options, one_process=True)) as engine:
        engine.ask([tokens(0, 20)])  # beside another's handshake reuse begins with the first step
        yield engine


def ask(engine, prompt):
    """Tokens that were hit, and the answer."""
    (answer,) = engine.ask([prompt], 6)
    engine.evict()
    return sum(answer.hit_tokens.values()), answer.tokens


def right(engine, prompt):
    """What full prefill answers: under a salt of its own, shared with nobody."""
    return engine.ask([prompt], 6, cache_salt=random.randbytes(8).hex())[0].tokens


def total(engine, name):
    return sum(value for key, value in engine.metrics().items() if key.split("{")[0] == name)


def test_a_prompt_comes_back(engine):
    prompt = tokens(1, 500)
    hit, answer = ask(engine, prompt)
    assert hit == 0 and ask(engine, prompt) == (499, answer)
    assert total(engine, "ragkv_hit_tokens_total") >= 499, "its metrics are there too"


def test_moved_documents_are_fused(engine):
    one, two, tail = tokens(2, 300), tokens(3, 300), tokens(5, 40)
    spans = [{"id": name, "start": start, "end": start + 300} for name, start in (("a", 0), ("b", 300))]
    fuse = {"fuse": True, "documents": spans, "recompute_ratio": 1.0}
    ask_hinted(engine, [*one, *two, *tail], 1, fuse)
    engine.evict()
    prompt = [*two, *one, *tail]
    told = ask_hinted(engine, prompt, 6, fuse)
    assert [each["decision"] for each in told.told["documents"]] == ["moved"] * 2
    assert told.tokens == right(engine, prompt), "with all of them computed again, as full prefill"


def test_a_load_that_fails_is_computed(engine):
    prompt = tokens(4, 500)
    _, answer = ask(engine, prompt)
    engine.call(in_workers, break_copies, "load", 1)
    (again,) = engine.ask([prompt], 6)
    assert again.tokens == answer == right(engine, prompt)
    engine.evict()
    assert total(engine, "ragkv_errors_total") > 0
    assert ask(engine, prompt) == (499, answer), "and the next load is good"
