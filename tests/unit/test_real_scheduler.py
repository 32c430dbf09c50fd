"""vLLM's own scheduler and block tables, with models of kinds that do not run on a CPU."""

import logging
import random

import pytest
import torch
from vllm.distributed import parallel_state
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, MambaSpec, SlidingWindowSpec

import real_scheduler
from real_scheduler import DIM, SIZE, next_token, numbers


def attention(kind=FullAttentionSpec, block=16, **more):
    return kind(block_size=block, num_kv_heads=1, head_size=DIM, dtype=torch.float32, **more)


def states(block=16, **more):
    return MambaSpec(block_size=block, shapes=((SIZE,),), dtypes=(torch.int8,), mamba_cache_mode="align", **more)


CHECKPOINTS = {"num_prefill_checkpoint_blocks": 1, "prefill_checkpoint_alignment": 1}
KINDS = {
    "full attention": [attention()],
    "windows": [attention(), attention(SlidingWindowSpec, sliding_window=40)],
    "chunks": [attention(), attention(ChunkedLocalAttentionSpec, attention_chunk_size=32)],
    "linear attention": [states(), states(), states(), attention()],
    "Mamba 2": [attention(), states(**CHECKPOINTS)],
    "Mamba 2 alone": [states(**CHECKPOINTS)],
    "states in larger blocks": [attention(), states(block=64)],
    "checkpoints in larger blocks": [attention(), states(block=64, **CHECKPOINTS)],
    "states and windows": [attention(), attention(SlidingWindowSpec, sliding_window=40), states()],
}
SETTINGS = {
    "memory": {"capacity": "1MiB"},
    "chunks": {"min_tokens": 16, "average_tokens": 32, "max_tokens": 64},
    "placement": {"gate": False},
}


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """Makes engines, and closes them."""
    made = []
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(logging.getLogger("vllm"), "disabled", True)

    def make(kind, **more):
        made.append(real_scheduler.Engine(tmp_path / str(len(made)), KINDS[kind], **{"ragkv": SETTINGS} | more))
        return made[-1]

    yield make
    for each in made:
        each.close()


def answer(prompt, tokens=4):
    """What the model says to a prompt."""
    text = list(prompt)
    for _ in range(tokens):
        text.append(next_token(numbers(text)))
    return text[len(prompt) :]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_prompt_and_the_next_turn_are_hit_as_far_as_the_kind_allows(engine, kind, ahead):
    made, chance = engine(kind, ahead=ahead), random.Random(1)
    prompt = [chance.randrange(3, 1000) for _ in range(150)]
    turn = [*prompt, *answer(prompt), *[chance.randrange(3, 1000) for _ in range(40)]]
    with_states = any(isinstance(spec, MambaSpec) for spec in KINDS[kind])
    block = made.scheduler.block_size
    found = []
    for each in (prompt, prompt, turn, turn):
        ((said, cached),) = made.run(each)
        assert said == answer(each)
        found.append(cached)
        made.evict()
    again = (len(prompt) - 1) // block * block if with_states else len(prompt) - 1
    assert found[:3] == [0, again, len(prompt) + 3]
    assert found[3] >= len(prompt) + 3


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_asked_no_kv_is_wrong(engine, kind, seed, ahead):
    """Prompts that share beginnings, several at once, in few blocks, with vLLM's own cache and without."""
    chance = random.Random(seed)
    made = engine(kind, blocks=chance.choice([40, 60, 120]), step=chance.choice([48, 64, 200]), ahead=ahead)
    texts, hits = [[]], 0
    for _ in range(15):
        asked = []
        for _ in range(chance.randint(1, 4)):
            begun = chance.choice(texts)[: chance.randint(0, 200)]
            asked.append([*begun, *[chance.randrange(3, 1000) for _ in range(chance.randint(1, 120))]])
        for each, (said, cached) in zip(asked, made.run(*asked, tokens=chance.randint(1, 20)), strict=True):
            assert said == answer(each, len(said))
            hits += cached
            texts.append([*each, *said])
        if chance.random() < 0.5:
            made.evict()
    assert hits > 250


def test_more_tokens_move_a_cut_and_hide_nothing(engine):
    """An answer moves a cut into its prompt. What stood there before hid what stands behind the new cut."""
    made = engine(
        "full attention", step=1024, ragkv={"memory": {"capacity": "4MiB"}, "placement": {"gate": False}}
    )
    chance = random.Random(39)

    def fresh(count):
        return [chance.randrange(3, 2048) for _ in range(count)]

    first = fresh(600)
    said = [*first, *answer(first, 6)]
    short, turn = [*said, *fresh(1)], [*said, *fresh(50)]
    for each in (first, short, turn):
        made.run(each, tokens=6)
    made.evict()
    assert made.run(turn, tokens=6)[0][1] == len(turn) - 1
