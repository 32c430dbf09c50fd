"""The scheduler side against the toy engine: what is found again, and who shares with whom."""

from types import SimpleNamespace

import pytest

from ragkv.connectors.vllm.messages import StepReport
from toy_engine import BLOCK, PAGE, Engine, closing, text


@pytest.fixture(params=[1, 2], ids=["1 worker", "2 workers"])
def engine(request):
    with closing(Engine(workers=request.param)) as made:
        yield made


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 32, 33, 100])
def test_an_identical_prompt_computes_its_last_token_only(engine, length):
    prompt = text(1, length)
    assert engine.run(prompt) == 0
    assert engine.run(prompt) == length - 1
    assert engine.loaded == (length - 1) * len(engine.workers)


def test_a_follow_up_has_prompt_and_answer_but_the_last_token(engine):
    prompt, answer = text(1, 50), text(2, 20)
    engine.run(prompt, answer)
    assert engine.run(prompt + answer + text(3, 30)) == 50 + 19  # the last answer token was never computed


def test_a_divergence_inside_a_chunk_keeps_what_is_shared(engine):
    prompt = text(1, 100)
    engine.run(prompt)
    for shared in (1, 15, 16, 37, 50, 99):
        assert engine.run(prompt[:shared] + text(50 + shared, 40)) == shared


def test_nothing_shared_is_a_miss(engine):
    engine.run(text(1, 100))
    assert engine.run(text(2, 100)) == 0


@pytest.mark.parametrize("local", [8, 16, 40, 96])
def test_ours_begins_where_vllms_own_hit_ends(engine, local):
    prompt = text(1, 100)
    engine.run(prompt)
    assert engine.run(prompt, local=local) == 99 - local
    assert engine.loaded == (99 - local) * len(engine.workers)


def test_vllms_own_hit_beyond_ours_loads_nothing(engine):
    prompt = text(1, 100)
    engine.run(prompt[:50])
    assert engine.run(prompt, local=64) == 0
    assert engine.run(prompt) == 99  # and what came behind it was stored


def test_a_local_hit_that_does_not_end_with_a_block(engine):
    """vLLM always gives block-aligned hits; the side does not depend on it."""
    prompt = text(1, 100)
    engine.run(prompt)
    request = engine.request(prompt)
    assert engine.side.lookup(request, 13) == 86
    blocks = list(range(20, 33))
    engine.side.allocated(request, [blocks], 86)
    (job,) = engine.side.take_orders().loads
    assert job.slots[0] == 21 * BLOCK + 5 and len(job.rows) == 86
    engine.side.report(StepReport({job.id: len(engine.workers)}), (), [request.request_id])


@pytest.mark.parametrize("budget", [1, 7, 16, 40])
def test_chunked_prefill(engine, budget):
    prompt = text(1, 120)
    assert engine.run(prompt, budget=budget) == 0
    assert engine.run(prompt + text(2, 30), budget=budget) == 120
    assert engine.run(prompt + text(2, 30), budget=budget) == 149


def test_whole_chunks_are_stored_while_the_prompt_is_prefilled(engine):
    prompt = text(1, 200)
    first = engine.request(prompt)
    for _ in range(3):
        engine.step(budget=40)
    second = engine.request(prompt)
    hits = engine.step(budget=40)
    assert 60 <= hits[second.request_id] <= 120
    assert first.num_computed_tokens == 160


def test_many_requests_in_a_step(engine):
    shared = text(1, 60)
    prompts = [shared + text(n, 10 + n) for n in range(2, 8)]
    engine.run(shared)
    for prompt in prompts:
        engine.request(prompt)
    assert set(engine.step().values()) == {60}
    engine.step()
    for request in list(engine.running):
        engine.finish(request)
    engine.settle()
    assert [engine.run(prompt) for prompt in prompts] == [len(prompt) - 1 for prompt in prompts]


def test_the_same_prompt_twice_in_one_step_is_stored_once(engine):
    prompt = text(1, 90)
    engine.request(prompt), engine.request(prompt)
    engine.step()
    engine.settle()
    used = engine.memory.used
    assert used < 90 / PAGE + 8
    assert engine.run(prompt) == 89
    assert engine.memory.used == used


def test_a_superseded_tail_makes_room(engine):
    prompt = text(1, 40)
    engine.run(prompt[:37])
    chunks = len(engine.memory)
    engine.run(prompt)
    assert len(engine.memory) == chunks
    assert engine.run(prompt) == 39


def test_named_boundaries_cut(engine):
    prompt = text(1, 90)
    hint = {"ragkv": {"documents": [{"start": 18, "end": 41}]}}
    engine.run(prompt, kv_transfer_params=hint)
    assert engine.run(prompt, kv_transfer_params=hint) == 89
    assert {41 - 18} <= {len(chunk) for chunk in engine.memory.tree}


# --- who shares with whom ---

LORA = SimpleNamespace(lora_name="a", lora_int_id=1, lora_path="/nowhere/a", load_inplace=False)
OTHER = SimpleNamespace(lora_name="b", lora_int_id=2, lora_path="/nowhere/b", load_inplace=False)


@pytest.fixture(scope="module", autouse=True)
def adapters(tmp_path_factory):
    """An adapter is known by its files."""
    for adapter in (LORA, OTHER):
        folder = tmp_path_factory.mktemp(adapter.lora_name)
        (folder / "adapter_model.safetensors").write_text(f"weights of {adapter.lora_name}")
        adapter.lora_path = str(folder)


def image(identifier, offset=4):
    return SimpleNamespace(identifier=identifier, mm_position=SimpleNamespace(offset=offset, length=9))


WORLDS = [
    {},
    {"cache_salt": "x"},
    {"cache_salt": "y"},
    {"cache_salt": ""},
    {"lora_request": LORA},
    {"lora_request": OTHER},
    {"lora_request": LORA, "cache_salt": "x"},
    {"mm_features": [image("cat")]},
    {"mm_features": [image("dog")]},
    {"mm_features": [image("cat", 5)]},
    {"mm_features": [image("cat"), image("dog", 40)]},
    {"mm_features": [image("cat")], "lora_request": OTHER},
]


def test_nothing_leaks_between_worlds(engine):
    prompt = text(1, 60)
    for world, features in enumerate(WORLDS):
        assert engine.run(prompt, world=world, **features) == 0
    for world, features in enumerate(WORLDS):
        assert engine.run(prompt, world=world, **features) == 59


@pytest.mark.parametrize(
    "features",
    [
        {"prompt_embeds": object()},
        {"resumable": True},
        {"lora_request": SimpleNamespace(**{**vars(LORA), "load_inplace": True})},
    ],
    ids=["embeddings", "streamed", "inplace adapter"],
)
def test_what_cannot_be_named_is_left_alone(engine, features):
    prompt = text(1, 60)
    for _ in range(2):
        assert engine.run(prompt, text(2, 40), **features) == 0
    assert len(engine.memory) == 0
