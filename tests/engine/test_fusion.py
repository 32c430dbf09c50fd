"""Fusion on a real engine: mended KV against an independent model, quality of each selection, and safety."""

import pytest
import torch

from engine_tools import BLOCK, ROOT, break_fusion, fused_kv, in_workers, set_turning, watch_fusion
from ragkv.benchmarks.internal.answers import ANSWER_TOKENS, STOP, measure
from ragkv.benchmarks.internal.answers_questions import build, draft
from ragkv.benchmarks.internal.fusion_measure import ask, in_full, prefill, quality, store
from ragkv.benchmarks.internal.fusion_trials import Trial
from reference import Llama, divergence

ANSWER = 12
TAIL = 32  # last tokens of a prompt, always the engine's own
SIZE, COUNT, MORE = 64, 6, 32
HOME = "The following is taken from a licence.\n\n"


@pytest.fixture(scope="module")
def llama(smollm2):
    return Llama.load(smollm2)


@pytest.fixture(scope="module")
def prose(tokenizer):
    """Running text that every clone has."""
    return tokenizer.encode((ROOT / "LICENSE").read_text(), add_special_tokens=False)


@pytest.fixture(scope="module")
def system(tokenizer):
    return tokenizer.encode(HOME, add_special_tokens=False)


def trial(prose, system, number, behind=()):
    """Running text in chunks that were each prefilled by themselves; measured over what the text says next."""
    begin = 40 + 230 * number
    text = prose[begin : begin + COUNT * SIZE + TAIL + MORE]
    chunks = [text[SIZE * n : SIZE * (n + 1)] for n in range(COUNT)]
    question = text[COUNT * SIZE : COUNT * SIZE + TAIL]
    return Trial(f"trial {number}", system, chunks, question, [list(behind)] * COUNT, text[-MORE:])


def fuse(prompt, documents, **more):
    return {"documents": documents, "fuse": True, **more}


def known(prompt, question):
    """Tokens that vLLM need not compute: the passages, and what the fusion computes of the question."""
    return len(prompt) - max(1, len(question) - TAIL)


def moved(reply):
    return sum(d["reused_tokens"] for d in reply.told["documents"] if d["decision"] == "moved")


# --- exact where it must be ---


def reference_kv(llama, made, selected):
    """K and V [layers, tokens, kv_heads, dim] of a trial's prompt, with chunks computed alone and these positions
    computed again."""
    prompt = made.prompt
    keys = torch.zeros(llama.layers, len(prompt), llama.kv_heads, llama.dim)
    values, start = keys.clone(), len(made.system)
    for chunk in made.passages:
        alone = llama.prefill(chunk)
        places = torch.full((len(chunk),), start)
        keys[:, start : start + len(chunk)] = torch.stack([llama.turn(k, places) for k in alone.keys])
        values[:, start : start + len(chunk)] = alone.values
        start += len(chunk)
    outside = [*range(len(made.system)), *range(start, len(prompt))]
    return llama.fuse(keys, values, prompt, sorted({*outside, *selected}))


@pytest.mark.parametrize(
    ("engine", "weights", "selection", "ratio"),
    [
        ("shared_ragkv", "model", "first_tokens", 1.0),
        ("shared_ragkv", "model", "first_tokens", 0.0),
        ("shared_ragkv", "model", "first_tokens", 0.15),
        ("shared_ragkv", "model", "query", 0.15),
        ("shared_smollm2", "smollm2", "query", 0.15),
    ],
)
def test_mended_kv_is_that_of_an_independent_model(
    engine, weights, prose, system, selection, ratio, tmp_path, request
):
    engine, llama = request.getfixturevalue(engine), Llama.load(request.getfixturevalue(weights))
    made = trial(prose, system, 1)
    store(engine, made)
    engine.evict()
    in_workers_of(engine, watch_fusion)
    reply = ask(
        engine, made.prompt, 1, fuse(made.prompt, made.documents(), selection=selection, recompute_ratio=ratio)
    )
    in_workers_of(engine, fused_kv, str(tmp_path / "kv"))
    keys, values, chosen, start, end = torch.load(tmp_path / "kv", weights_only=False)
    assert end == len(made.prompt) - 1 and moved(reply) == COUNT * SIZE
    assert len(chosen) == round(ratio * COUNT * SIZE + 0.4)
    wanted = reference_kv(llama, made, chosen)
    assert (keys - wanted.keys[:, start:end]).abs().max() < 1e-4 * wanted.keys.abs().max()
    assert (values - wanted.values[:, start:end]).abs().max() < 1e-4 * wanted.values.abs().max()
    if ratio == 1.0:
        full = llama.prefill(made.prompt)
        assert (keys - full.keys[:, start:end]).abs().max() < 1e-4 * full.keys.abs().max()
        assert (values - full.values[:, start:end]).abs().max() < 1e-4 * full.values.abs().max()


def in_workers_of(engine, function, *args):
    return engine.call(in_workers, function, *args)


def test_rotating_is_worth_it(llama, prose, system):
    """By the reference, right behind the chunks: through an engine a question stands between."""
    rotated, raw, behind_them = 0.0, 0.0, 64
    for number in range(3):
        made = trial(prose, system, number)
        begin, prompt = len(made.system), made.prompt[: len(made.system) + COUNT * SIZE]
        text = [*prompt, *made.question, *made.continuation][: len(prompt) + behind_them]
        full = llama.prefill(text)
        for turning in (True, False):
            keys = torch.zeros(llama.layers, len(text), llama.kv_heads, llama.dim)
            values = keys.clone()
            for at in range(begin, len(prompt), SIZE):
                alone = llama.prefill(prompt[at : at + SIZE])
                by = torch.full((SIZE,), at if turning else 0)
                keys[:, at : at + SIZE] = torch.stack([llama.turn(k, by) for k in alone.keys])
                values[:, at : at + SIZE] = alone.values
            fresh = [*range(begin), *range(len(prompt), len(text))]
            state = llama.fuse(keys, values, text, fresh)
            behind = divergence(full.logits[len(prompt) :], state.logits[begin:])
            rotated, raw = (rotated + behind, raw) if turning else (rotated, raw + behind)
    assert raw >= 1.8 * rotated


# --- quality, on a small fixed sample, through the engine ---


@pytest.fixture(scope="module")
def divergences(shared_smollm2, prose, system):
    """Sum of the KL of each (selection, ratio) over two trials."""
    wanted = [("none", 0.0), ("random", 0.15), ("first_tokens", 0.15), ("deviation", 0.15), ("query", 0.15)]
    wanted += [("query_deviation", 0.15), ("deviation", 0.4), ("deviation", 1.0)]
    found = dict.fromkeys(wanted, 0.0)
    for number in (1, 5):
        made = trial(prose, system, number)
        store(shared_smollm2, made)
        full = prefill(shared_smollm2, made, MORE)
        for selection, ratio in wanted:
            found[selection, ratio] += quality(shared_smollm2, made, selection, ratio, full)["kl"]
    return found


def test_everything_computed_again_is_full_prefill(divergences):
    assert divergences["deviation", 1.0] < 1e-4


def test_deviation_mends_most_of_what_reuse_breaks(divergences):
    assert divergences["deviation", 0.15] <= 0.45 * divergences["none", 0.0]
    assert divergences["random", 0.15] >= 1.8 * divergences["deviation", 0.15]


def test_the_best_selection_mends_more(divergences):
    best = min(divergences[name, 0.15] for name in ("query", "query_deviation"))
    assert best <= 0.30 * divergences["none", 0.0]


def test_more_computed_is_less_wrong(divergences):
    assert (
        divergences["none", 0.0]
        > divergences["deviation", 0.15]
        > divergences["deviation", 0.4]
        > divergences["deviation", 1.0]
    )


# --- never wrong elsewhere ---


@pytest.fixture
def passages(ragkv, filings, system):
    """Three passages, each prefilled behind the system prompt."""
    parts = [filings[n][300:700] for n in range(3)]
    for part in parts:
        ragkv.ask([[*system, *part]])
    ragkv.evict()
    return parts


def question(filings):
    return filings[3][:40]


def test_nothing_fused_is_stored_or_left_in_vllms_cache(plain, ragkv, filings, system, passages):
    prompt = [*system, *passages[1], *passages[0], *passages[2], *question(filings)]
    fused = ask(ragkv, prompt, 30, {"fuse": True})
    assert fused.cached_tokens == known(prompt, question(filings))
    exact = fused.told["stored_tokens"]
    assert len(system) + len(passages[1]) <= exact < len(system) + len(passages[1]) + 40
    own = ask(ragkv, prompt, ANSWER, {"fuse": False})  # vLLM's own cache has not been emptied
    assert own.cached_tokens <= exact
    plain.evict()
    assert own.tokens == plain.ask([prompt], ANSWER)[0].tokens
    ragkv.evict(ragkv_too=True)
    again = ask(ragkv, prompt, ANSWER, {"fuse": False})
    assert again.cached_tokens == 0 and again.tokens == own.tokens


def test_without_hints_passages_are_found_by_their_structure(ragkv, filings, system, passages):
    order = [*passages[2], *passages[0], *passages[1]]
    reply = ask(ragkv, [*system, *order, *question(filings)], 1, {"fuse": True})
    assert reply.cached_tokens > 0.97 * len(order) and moved(reply) > 0.97 * len(order[len(passages[2]) :])


def test_a_new_document_in_the_middle_and_another_at_the_end(plain, ragkv, filings, system, passages):
    prompt = [*system, *passages[1], *filings[4][:200], *passages[0], *filings[5][:150]]
    reply = ask(ragkv, prompt, ANSWER, {"fuse": True, "recompute_ratio": 1.0})
    assert 0 < len(prompt) - reply.cached_tokens < 200 and moved(reply) > 380
    plain.evict()
    assert reply.tokens == plain.ask([prompt], ANSWER)[0].tokens


def test_behind_a_full_and_a_partial_hit_of_vllms_own(plain, ragkv, filings, system, passages):
    begin = [*system, *passages[1], *filings[4][:200]]
    for first in (begin, begin[: BLOCK + 20]):
        ragkv.evict()
        ask(ragkv, first, 1, {"fuse": False})
        prompt = [*begin, *passages[0], *question(filings)]
        reply = ask(ragkv, prompt, ANSWER, {"fuse": True, "recompute_ratio": 1.0})
        assert moved(reply) > 380
        plain.evict()
        assert reply.tokens == plain.ask([prompt], ANSWER)[0].tokens


def test_several_requests_in_one_step(plain, ragkv, filings, system, passages):
    orders = [(1, 0, 2), (2, 1, 0), (0, 2, 1)]
    prompts = [[*system, *(t for n in order for t in passages[n]), *question(filings)] for order in orders]
    params = {"extra_args": {"kv_transfer_params": {"ragkv": {"fuse": True, "recompute_ratio": 1.0}}}}
    answers = ragkv.ask(prompts, ANSWER, **params)
    assert [answer.cached_tokens for answer in answers] == [known(prompts[0], question(filings))] * 3
    plain.evict()
    assert [a.tokens for a in answers] == [a.tokens for a in plain.ask(prompts, ANSWER)]


def test_in_steps_of_256_tokens_and_with_preemptions(small, plain, filings, system):
    """Twelve blocks: three such requests cannot all be held."""
    small.evict(ragkv_too=True)
    parts = [filings[n][300:500] for n in range(2)]
    for part in parts:
        small.ask([[*system, *part]])
    prompts = [[*system, *parts[1], *parts[0], *filings[n][:150]] for n in (3, 4, 5)]
    params = {"extra_args": {"kv_transfer_params": {"ragkv": {"fuse": True, "recompute_ratio": 1.0}}}}
    small.evict()
    answers = small.ask(prompts, 60, ignore_eos=True, **params)
    assert answers[0].cached_tokens >= 390
    plain.evict()
    assert [a.tokens for a in answers] == [a.tokens for a in plain.ask(prompts, 60, ignore_eos=True)]


def test_a_fusion_that_fails_is_computed_by_the_engine(plain, ragkv, filings, system, passages):
    in_workers_of(ragkv, break_fusion)
    prompt = [*system, *passages[1], *passages[0], *question(filings)]
    reply = ask(ragkv, prompt, ANSWER, {"fuse": True})
    plain.evict()
    assert reply.tokens == plain.ask([prompt], ANSWER)[0].tokens
    ragkv.evict()
    again = ask(ragkv, prompt, ANSWER, {"fuse": False})
    assert again.tokens == reply.tokens


def test_keys_that_are_not_turned_are_seen(shared_smollm2, prose, system):
    """The quality measure is no constant: without rotation the same request is worse."""
    made = trial(prose, system, 0)
    store(shared_smollm2, made)
    full = prefill(shared_smollm2, made, MORE)
    turned = quality(shared_smollm2, made, "none", 0.0, full)["kl"]
    in_workers_of(shared_smollm2, set_turning, False)
    try:
        raw = quality(shared_smollm2, made, "none", 0.0, full)["kl"]
    finally:
        in_workers_of(shared_smollm2, set_turning, True)
    assert raw > 1.2 * turned > 0.01


def test_answers_are_measured_against_full_prefill(shared_ragkv, tokenizer):
    asked = build(tokenizer, 0, draft(0, 3, 250), 250)
    settings = [("full", 1.0), ("ordered", 0.0), ("none", 0.0), ("deviation", 1.0)]
    full, ordered, moved_only, mended = measure(shared_ragkv, tokenizer, asked, settings)["rows"]
    assert full["answer"] and full["answer"] == mended["answer"] != moved_only["answer"]
    in_order = in_full(shared_ragkv, asked.stored, ANSWER_TOKENS, stop=STOP)
    assert ordered["answer"] == tokenizer.decode(in_order.tokens, skip_special_tokens=True).strip()
    assert full["reused"] == 0 and min(ordered["reused"], moved_only["reused"], mended["reused"]) > 0.9
