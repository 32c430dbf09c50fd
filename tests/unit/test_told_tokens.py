"""Of a prompt's tokens a response says how many were exact, fused and computed: each once, whatever happened."""

import pytest

from ragkv.config.settings import FusionSettings
from toy_engine import BLOCK, Engine, closing, text

SYSTEM, PASSAGES, QUESTION = text(1, 20), [text(number, 64) for number in (31, 32)], text(33, 40)


def prompt(order):
    """A prompt of passages, and a request's hints."""
    tokens, documents = list(SYSTEM), []
    for number in order:
        documents.append({"id": str(number), "start": len(tokens), "end": len(tokens) + 64})
        tokens += PASSAGES[number]
    return [*tokens, *QUESTION], {"kv_transfer_params": {"ragkv": {"documents": documents}}}


def told(engine, request):
    engine.finish(request)
    engine.settle()
    figures = request.answer["ragkv"]
    parts = [figures[f"{name}_tokens"] for name in ("exact", "fused", "computed")]
    assert sum(parts) == request.num_prompt_tokens and min(parts) >= 0
    return *parts, figures["hit_tokens"]


def go_on(engine, times=6, **more):
    for _ in range(times):
        engine.step(sample=list(range(3, 160)), **more)
        engine.work()


def preempted(engine):
    """A prompt, and its request, which was preempted after it had loaded what was stored."""
    tokens, hints = prompt([0, 1])
    engine.run(tokens, **hints)
    request = engine.request(tokens, **hints)
    go_on(engine, 3)
    engine.preempt(request)
    return tokens, request


@pytest.fixture
def engine():
    with closing(Engine(fusion=FusionSettings(min_tokens=16))) as made:
        yield made


def test_cold_and_warm(engine):
    tokens, hints = prompt([0, 1])
    for expected in ((0, 0, len(tokens), 0), (len(tokens) - 1, 0, 1, len(tokens) - 1)):
        request = engine.request(tokens, **hints)
        go_on(engine)
        assert told(engine, request) == expected


def test_of_a_request_that_was_preempted_the_last_time_counts(engine):
    tokens, request = preempted(engine)
    engine.cache.reset()
    go_on(engine)
    assert told(engine, request) == (0, 0, len(tokens), 0), "memory had lost it, and all was computed"


def test_what_vllm_has_itself_after_a_preemption_is_its_own(engine):
    tokens, request = preempted(engine)
    go_on(engine, local={request.request_id: len(tokens) // BLOCK * BLOCK})
    exact, fused, computed, hit = told(engine, request)
    assert fused == 0 and exact >= len(tokens) // BLOCK * BLOCK > hit and computed <= BLOCK


def test_aborted_while_it_is_loaded_nothing_was_exact(engine):
    tokens, hints = prompt([0, 1])
    engine.run(tokens, **hints)
    request = engine.request(tokens, **hints)
    engine.step(deliver=False)
    assert told(engine, request) == (0, 0, len(tokens), 0)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("own", [False, True], ids=["reloaded", "in vLLM's own cache"])
def test_fused_with_an_answer_and_preempted(keep, own):
    settings = FusionSettings(enabled=True, keep=keep, min_tokens=16)
    with closing(Engine(own_cache=own, fusion=settings)) as engine:
        for number in (0, 1):
            tokens, hints = prompt([number])
            engine.run(tokens, **hints)
        tokens, hints = prompt([1, 0])
        request = engine.request(tokens, **hints)
        go_on(engine, 60)
        assert engine.fusions and request.num_tokens > len(tokens) + 40
        engine.preempt(request)
        go_on(engine, 8)
        exact, fused, _, _ = told(engine, request)
        assert 80 <= exact < len(tokens) and fused > 0
