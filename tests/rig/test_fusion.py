"""Fusion on the rig: mended KV gives an independent model's answers, and at ratio 1.0 those of full prefill."""

import pytest
import torch

from reference import Llama
from rig import beside
from rig.beside import Ask
from rig.engines import NEAR, farthest

SYSTEM, PASSAGE, QUESTION, ANSWER = 16, 56, 40, 4
KNOWN = SYSTEM + 2 * PASSAGE + 32  # of the question, these are computed by the fusion


@pytest.fixture(scope="session")
def llama(tiny_model):
    return Llama.load(tiny_model)


@pytest.fixture
def moved(rig, fresh):
    """A prompt of two passages that were computed in the other order, that first prompt, and hints to fuse."""
    system, one, two, question = fresh(SYSTEM), fresh(PASSAGE), fresh(PASSAGE), fresh(QUESTION)
    first = (*system, *one, *two, *question)
    spans = [(SYSTEM, SYSTEM + PASSAGE), (SYSTEM + PASSAGE, SYSTEM + 2 * PASSAGE)]
    documents = [{"id": str(number), "start": start, "end": end} for number, (start, end) in enumerate(spans)]
    rig.answer(first, hints={"documents": documents})
    rig.evict()
    return first, (*system, *two, *one, *fresh(QUESTION)), {"documents": documents, "fuse": True}


def reference_answer(llama, first, prompt, fused, looked=0):
    """Greedy tokens and their log probabilities by the independent model: moved tokens keep the K and V that they
    had in `first`, turned to their places, but for those computed again; all others are computed over them. In
    the first `looked` layers, which a selection looked at, nothing is as it was in `first`."""
    full = llama.prefill(first)
    keys = torch.zeros(llama.layers, len(prompt), llama.kv_heads, llama.dim)
    values = keys.clone()
    held = torch.zeros(len(prompt), dtype=torch.bool)
    for start, end in fused["runs"]:
        came_from = find(first, prompt[start:end])
        by = torch.full((end - start,), start - came_from)
        old = slice(came_from, came_from + end - start)
        keys[:, start:end] = torch.stack([llama.turn(layer, by) for layer in full.keys[:, old]])
        values[:, start:end] = full.values[:, old]
        held[start:end] = True
    exact = llama.prefill(prompt)
    keys[:looked], values[:looked] = exact.keys[:looked], exact.values[:looked]
    held[fused["computed"]] = False
    state = llama.fuse(keys, values, prompt, (~held).nonzero().flatten().tolist())
    text, tokens, logprobs = list(prompt), [], []
    for _ in range(ANSWER):
        scores = state.logits[-1].log_softmax(-1)
        tokens.append(int(scores.argmax()))
        logprobs.append(float(scores.max()))
        text.append(tokens[-1])
        nothing = torch.zeros_like(state.keys[:, :1])
        keys, values = (torch.cat([side, nothing], 1) for side in (state.keys, state.values))
        state = llama.forward(keys, values, text, [len(text) - 1])
    return tuple(tokens), tuple(logprobs)


def find(text, part):
    """Where a part of a text begins, which it holds once."""
    (place,) = [at for at in range(len(text) - len(part) + 1) if text[at : at + len(part)] == part]
    return place


def fuse(rig, prompt, hints, **more):
    """One fused answer, and what was fused."""
    (answer,), fused = rig.call(beside.watch_fusion, [Ask(prompt, ANSWER, hints=hints | more)])
    assert len(fused) == 1
    return answer, fused[0]


def test_the_reference_is_plain_vllm(plain, llama, fresh):
    prompt = fresh(90)
    tokens, logprobs = reference_answer(llama, prompt, prompt, {"runs": [], "computed": []})
    answer = plain.answer(prompt, tokens=ANSWER)
    assert answer.tokens == tokens and farthest(answer.logprobs[0], logprobs) < NEAR


@pytest.mark.parametrize(
    ("ratio", "selection"), [(0.0, "deviation"), (0.15, "first_tokens"), (0.15, "deviation"), (0.15, "query")]
)
def test_a_fused_answer_is_the_independent_models(rig, plain, llama, moved, ratio, selection):
    first, prompt, hints = moved
    answer, fused = fuse(rig, prompt, hints, recompute_ratio=ratio, selection=selection)
    count = sum(end - start for start, end in fused["runs"])
    assert count > 1.8 * PASSAGE and answer.cached == KNOWN
    again = set(fused["computed"]) & {at for start, end in fused["runs"] for at in range(start, end)}
    assert len(again) == round(ratio * count + 0.4)
    looked = 2 if selection == "deviation" and ratio else 0
    tokens, logprobs = reference_answer(llama, first, prompt, fused, looked)
    assert answer.tokens == tokens and farthest(answer.logprobs[0], logprobs) < NEAR
    exact = plain.answer(prompt, tokens=ANSWER)
    assert farthest(exact.logprobs[0], answer.logprobs[0]) > NEAR, "else it shows nothing"


def test_everything_computed_again_is_full_prefill(rig, plain, moved):
    _, prompt, hints = moved
    answer, fused = fuse(rig, prompt, hints, recompute_ratio=1.0)
    assert fused["runs"] and answer.cached == KNOWN
    plain.check([Ask(prompt, ANSWER)], [answer])


def test_several_fused_in_one_step_beside_others(rig, plain, moved, fresh):
    first, prompt, hints = moved
    hints |= {"recompute_ratio": 1.0}
    other = (*prompt[: SYSTEM + 2 * PASSAGE], *fresh(QUESTION))
    asks = [Ask(prompt, hints=hints), Ask(fresh(30)), Ask(first), Ask(other, hints=hints)]
    found, fused = rig.call(beside.watch_fusion, asks)
    assert len(fused) == 2
    plain.check(asks, found)


def test_nothing_fused_is_left_to_others(rig, plain, moved):
    """Neither in vLLM's own cache nor in ours."""
    _, prompt, hints = moved
    fuse(rig, prompt, hints, recompute_ratio=0.0)
    for _ in range(2):
        exact = rig.answer(prompt, hints={"fuse": False})
        plain.check([Ask(prompt)], [exact])
        rig.evict()
    following = (*prompt, *exact.tokens, 7, 7, 7)
    plain.check([Ask(following)], [rig.answer(following, hints={"fuse": False})])


@pytest.mark.parametrize("steps", range(1, 4))
def test_an_aborted_fusion_leaves_nothing(rig, plain, moved, steps):
    first, prompt, hints = moved
    doomed = [Ask(prompt, hints=hints | {"recompute_ratio": 0.0})]
    others = [Ask(prompt, hints={"fuse": False}), Ask(first)]
    found, _ = rig.call(beside.abort_after, doomed, steps, others, None)
    plain.check(others, found)
    rig.evict()
    plain.check(others, rig.answers(others))
