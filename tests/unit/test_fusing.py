"""Fusion on the scheduler side, on the toy engine: its fuser mends nothing, so whatever is kept of fused KV, or of
what was computed behind it, shows as wrong KV at the next exact hit."""

import random
from contextlib import contextmanager
from itertools import chain

import pytest

from ragkv.config.settings import FusionSettings
from ragkv.connectors.vllm.fusing import QUESTION
from ragkv.kvstore import metrics as m
from toy_engine import BLOCK, BREAK, Engine, closing, text

SYSTEM = [*text(900, 40), BREAK]
PASSAGES = [[*text(100 + n, 90 + n), BREAK] for n in range(6)]
ASKED = text(901, QUESTION + 9)
FUSE, EXACT = {"ragkv": {"fuse": True}}, {"ragkv": {"fuse": False}}


@contextmanager
def knowing(own_cache=False, **settings):
    """An engine in which passages were prefilled behind the system prompt."""
    fusion = FusionSettings(**{"enabled": True, "min_tokens": 16, **settings})
    with closing(Engine(pages=800, blocks=400, fusion=fusion, own_cache=own_cache)) as engine:
        for passage in PASSAGES:
            engine.run(SYSTEM + passage, kv_transfer_params=EXACT)
        yield engine


@pytest.fixture(params=[True, False], ids=["by setting", "by hint"])
def fused(request):
    """Such an engine, and how a request asks for fusion."""
    with knowing(enabled=request.param) as engine:
        yield engine, {} if request.param else {"kv_transfer_params": FUSE}


def prompt(*numbers):
    return [*SYSTEM, *chain.from_iterable(PASSAGES[n] for n in numbers), *ASKED]


def test_passages_in_a_new_order_are_moved_and_mended(fused):
    engine, asks = fused
    whole = prompt(3, 1, 4)
    hit = engine.run(whole, **asks)
    (fusion,) = engine.fusions
    assert engine.equipment[1].fuser.fused[0].runs == fusion.runs
    moved = sum(end - start for start, end in fusion.runs)
    assert len(whole) - QUESTION - 12 <= fusion.asked <= len(whole) - QUESTION
    assert fusion.end == hit == fusion.asked + QUESTION < len(whole), (
        "the question has blocks while it is looked at"
    )
    assert fusion.start >= len(SYSTEM + PASSAGES[3]), "the first passage is exact"
    assert fusion.budget == -(-15 * moved // 100) and fusion.selection == "query"
    assert fusion.tokens.tolist() == whole[: fusion.end] and fusion.question.tolist() == whole[-QUESTION:]
    assert engine.metrics.get(m.FUSED_TOKENS, "recomputed") == fusion.budget


def test_each_token_of_a_fused_prompt_is_counted_once(fused):
    """A hit was once counted twice: by the tier it came from, and as reused, recomputed or a gap."""
    engine, asks = fused
    before = engine.metrics.get(m.HIT_TOKENS, m.MEMORY)
    hit = engine.run(prompt(3, 1, 4), **asks)
    (fusion,) = engine.fusions
    assert engine.metrics.get(m.HIT_TOKENS, m.MEMORY) - before == fusion.start
    kinds = ("reused", "recomputed", "gap")
    assert sum(engine.metrics.get(m.FUSED_TOKENS, kind) for kind in kinds) == hit - fusion.start


def test_nothing_fused_and_nothing_behind_it_reaches_the_store(fused):
    engine, asks = fused
    whole = prompt(3, 1, 4)
    exact = engine.run(whole, answer=text(7, 60), **asks)
    exact = engine.fusions[0].start
    stored = engine.run(whole, kv_transfer_params=EXACT)
    assert stored == exact, "the toy checks what this loads"
    assert engine.run([*whole, 5, 6], kv_transfer_params=EXACT) == len(whole)


def test_an_exact_prefix_is_preferred_to_moving(fused):
    engine, asks = fused
    assert engine.run(SYSTEM + PASSAGES[2], **asks) == len(SYSTEM + PASSAGES[2]) - 1
    assert not engine.fusions


def test_a_new_document_in_the_middle_is_computed(fused):
    engine, asks = fused
    new = [*text(555, 70), BREAK]
    whole = SYSTEM + PASSAGES[0] + new + PASSAGES[1] + PASSAGES[2] + ASKED
    engine.run(whole, **asks)
    (fusion,) = engine.fusions
    moved = {position for start, end in fusion.runs for position in range(start, end)}
    gap = range(len(SYSTEM + PASSAGES[0]) + 1, len(SYSTEM + PASSAGES[0] + new) - 1)
    assert not moved & set(gap) and max(moved) > max(gap)


def test_a_new_text_that_holds_little_of_a_known_one_is_computed_and_stored(fused):
    engine, asks = fused
    whole = [*SYSTEM, *text(556, 60), BREAK, *PASSAGES[0], *text(557, 150), BREAK, *ASKED]
    engine.run(whole, **asks)
    assert not engine.fusions
    assert engine.run(whole, kv_transfer_params=EXACT) == len(whole) - 1


def test_a_request_that_says_no_is_not_fused(fused):
    engine, _ = fused
    exact = engine.run(prompt(5, 0), kv_transfer_params=EXACT)
    assert exact < len(SYSTEM + PASSAGES[5]) + 40 and not engine.fusions


def test_the_answer_tells_what_became_of_each_document(fused):
    engine, _ = fused
    whole = prompt(1, 2)
    begin, middle, end = len(SYSTEM), len(SYSTEM + PASSAGES[1]), len(SYSTEM + PASSAGES[1] + PASSAGES[2])
    documents = [{"id": "one", "start": begin, "end": middle}, {"id": "two", "start": middle, "end": end}]
    documents.append({"id": "asked", "start": end, "end": len(whole)})
    params = {"ragkv": {"documents": documents, "fuse": True}}
    request = engine.request(whole, kv_transfer_params=params)
    for _ in range(3):
        engine.step()
    engine.finish(request)
    told = request.answer["ragkv"]
    first, second, third = told["documents"]
    assert (first["id"], first["decision"]) == ("one", "reused")
    assert (second["id"], second["decision"], second["by"]) == ("two", "moved", middle - begin)
    assert second["reused_tokens"] > 80 and third["decision"] == "missing"
    (fusion,) = engine.fusions
    computed = fusion.end - fusion.start - second["reused_tokens"] + fusion.budget
    assert told["hit_tokens"] == fusion.end - computed and told["stored_tokens"] == fusion.start
    assert [engine.metrics.get(m.FUSION_DECISIONS, kind) for kind in ("reused", "moved", "missing")] == [1, 1, 1]


def test_a_budget_and_a_selection_of_its_own(fused):
    engine, _ = fused
    params = {"ragkv": {"fuse": True, "recompute_ratio": 0.5, "selection": "query"}}
    engine.run(prompt(2, 0), kv_transfer_params=params)
    (fusion,) = engine.fusions
    moved = sum(end - start for start, end in fusion.runs)
    assert fusion.budget == -(-moved // 2) and fusion.selection == "query"


@pytest.mark.parametrize(
    ("change", "word"),
    [({"lora_request": object()}, "LoRA"), ({"mm_features": [object()]}, "images")],
)
def test_what_cannot_be_fused_is_reused_exactly_and_said_once(change, word, caplog):
    with closing(Engine(pages=800, blocks=400, fusion=FusionSettings(enabled=True, min_tokens=16))) as engine:
        engine.namespace_of = lambda request: b"the namespace, 16"[:16]
        for numbers in ((0, 1), (2, 3)):
            assert engine.run(prompt(*numbers), **change) is not None
        assert not engine.fusions
        assert engine.metrics.get(m.FUSION_DECISIONS, "unsupported") == 2
    said = [record.getMessage() for record in caplog.records if "no fusion" in record.getMessage()]
    assert len(said) == 1 and word in said[0]


def test_an_engine_that_cannot_fuse_falls_back_to_exact_reuse(fused):
    engine, asks = fused
    engine.side.fusing.refusal = "keys cannot be moved under StrangeRotaryEmbedding"
    exact = engine.run(prompt(4, 1), **asks)
    assert exact >= len(SYSTEM + PASSAGES[4]) - 1 and not engine.fusions


def test_a_fusion_that_fails_is_computed_by_the_engine(fused):
    engine, asks = fused
    engine.fail("fuse")
    engine.run(prompt(3, 1, 4), **asks)
    engine.fail()
    engine.run(prompt(3, 1, 4), kv_transfer_params=EXACT)  # whatever was stored is checked
    assert engine.metrics.get(m.ERRORS, "fuse") == 1


def test_a_load_that_fails_is_not_mended(fused):
    engine, asks = fused
    engine.fail("load")
    engine.run(prompt(3, 1, 4), **asks)
    assert not engine.fusions
    engine.fail()
    engine.run(prompt(3, 1, 4), kv_transfer_params=EXACT)


def test_chunked_prefill_and_preemption_keep_nothing_fused(fused):
    engine, asks = fused
    whole = prompt(5, 2, 0)
    request = engine.request(whole, **asks)
    engine.step(budget=7), engine.step(budget=7)
    assert engine.fusions
    engine.step(budget=7)
    engine.preempt(request)
    engine.step(budget=11)
    for _ in range(40):
        engine.step(budget=11)
    engine.finish(request)
    engine.settle()
    exact = engine.fusions[0].start
    assert engine.run(whole, kv_transfer_params=EXACT) == exact


def test_two_requests_are_fused_in_one_step(fused):
    engine, asks = fused
    first, second = engine.request(prompt(3, 1), **asks), engine.request(prompt(2, 0), **asks)
    engine.step(), engine.step()
    assert len(engine.fusions) == 2
    for request in (first, second):
        engine.finish(request)
    engine.settle()


@pytest.mark.parametrize("answered", [0, 5])
def test_a_hit_that_is_only_being_computed_is_there_when_it_is_built_upon(answered):
    """vLLM names blocks when they are scheduled; a fusion is of a later step. (The toy's fuser looks whether the
    exact part is there.)"""
    with knowing(own_cache=True) as engine:
        shared = [*text(78, 20), *text(77, 3 * BLOCK)]
        unknown = engine.request(shared, prompt_embeds=object())
        for _ in range(answered):
            engine.step(sample=text(5, 50))
        second = engine.request([*unknown.all_token_ids, *PASSAGES[1], *PASSAGES[2], *ASKED])
        hits = engine.step(sample=text(5, 50))
        assert second.request_id in hits and not engine.fusions and second.local >= 3 * BLOCK
        engine.step(sample=text(5, 50))
        assert len(engine.fusions) == 1
        for request in (unknown, second):
            engine.finish(request)
        engine.settle()


def test_fused_blocks_get_names_that_no_other_request_asks_for(fused):
    engine, asks = fused
    whole = prompt(3, 1, 4)
    names = [random.Random(n).randbytes(32) for n in range(len(whole) // BLOCK)]
    request = engine.request(whole, block_hashes=list(names), **asks)
    engine.step(), engine.step()
    first = engine.fusions[0].start // BLOCK
    assert request.block_hashes[:first] == names[:first] and first > 0
    assert not set(request.block_hashes[first:]) & set(names) and len(request.block_hashes) == len(names)
    engine.finish(request)
    engine.settle()


def test_what_is_kept_in_vllms_own_cache_is_known_for_what_it_is():
    with knowing(keep=True) as engine:
        whole = prompt(3, 1, 4)
        names = [random.Random(n).randbytes(32) for n in range(len(whole) // BLOCK)]
        engine.run(whole, block_hashes=list(names))
        exact = engine.fusions[0].start
        request = engine.request(whole + text(5, 60), block_hashes=list(names), kv_transfer_params=EXACT)
        engine.step(local={request.request_id: len(names) * BLOCK})
        assert request.block_hashes == names, "kept under their own names"
        engine.finish(request)
        engine.settle()
        assert request.answer["ragkv"]["stored_tokens"] <= exact
        engine.reset()
        assert engine.knows_as_fused(names[-1]), "vLLM's own cache need not be empty, if requests are running"
