"""Exact reuse on a real engine: what is hit, and that answers stay plain vLLM's."""

import itertools

import pytest

from engine_tools import (
    BLOCK,
    QUESTIONS,
    abort_after,
    ask_with_params,
    break_copies,
    copies_seen,
    in_workers,
    layers,
    watch_copies,
)

ANSWER = 12


def only(answers):
    assert len(answers) == 1
    return answers[0]


def test_a_filing_asked_about_twice_is_prefilled_once(plain_smollm2, shared_smollm2, filings, tokenizer):
    """On SmolLM2."""
    document = filings[0][:1500]
    first, second = (document + tokenizer.encode(question) for question in QUESTIONS[:2])
    shared_smollm2.evict(ragkv_too=True)
    cold = only(shared_smollm2.ask([first], ANSWER))
    assert cold.cached_tokens == 0
    shared_smollm2.evict()
    warm = only(shared_smollm2.ask([second], ANSWER))
    assert warm.cached_tokens >= len(document)
    assert warm.hit_tokens == {"host": warm.cached_tokens}
    assert [cold.tokens, warm.tokens] == [only(plain_smollm2.ask([p], ANSWER)).tokens for p in (first, second)]


def test_hits_cover_all_of_a_prompt_but_its_last_token(ragkv, filings):
    prompt = filings[0][:700]
    cold = only(ragkv.ask([prompt], ANSWER))
    ragkv.evict()
    warm = only(ragkv.ask([prompt], ANSWER))
    assert warm.cached_tokens == len(prompt) - 1
    assert warm.tokens == cold.tokens


def test_an_answer_is_part_of_the_next_prompt(ragkv, filings):
    prompt = filings[1][:600]
    answer = only(ragkv.ask([prompt], 40, ignore_eos=True)).tokens
    ragkv.evict()
    following = [*prompt, *answer, *filings[2][:50]]
    assert only(ragkv.ask([following], 1)).cached_tokens == len(prompt) + len(answer) - 1


def test_a_prompt_that_turns_off_inside_a_chunk_hits_up_to_there(ragkv, filings):
    ragkv.ask([filings[0][:900]])
    ragkv.evict()
    turned = [*filings[0][:777], *filings[1][:100]]
    assert only(ragkv.ask([turned])).cached_tokens == 777


def test_vllms_own_hit_comes_first_and_ragkvs_behind_it(plain, ragkv, filings):
    prompt = filings[1][:1000]
    ragkv.ask([prompt])
    ragkv.evict()
    ragkv.ask([prompt[:300]])  # brings two full blocks back into vLLM's own cache
    warm = only(ragkv.ask([prompt], ANSWER))
    assert warm.hit_tokens == {"device": 2 * BLOCK, "host": 999 - 2 * BLOCK}
    plain.evict()
    assert warm.tokens == only(plain.ask([prompt], ANSWER)).tokens


def test_tenants_share_nothing(ragkv, filings):
    prompt = filings[0][:500]
    ragkv.ask([prompt], cache_salt="one")
    ragkv.evict()
    assert only(ragkv.ask([prompt], cache_salt="two")).cached_tokens == 0
    ragkv.evict()
    assert only(ragkv.ask([prompt])).cached_tokens == 0
    ragkv.evict()
    assert only(ragkv.ask([prompt], cache_salt="one")).cached_tokens == 499


def test_a_reset_forgets_all(ragkv, filings):
    prompt = filings[0][:500]
    ragkv.ask([prompt])
    ragkv.evict(ragkv_too=True)
    assert only(ragkv.ask([prompt])).cached_tokens == 0
    ragkv.evict()
    assert only(ragkv.ask([prompt])).cached_tokens == 499


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_an_aborted_request_leaves_only_good_kv(plain, ragkv, filings, steps):
    prompt = filings[3][:800]
    ragkv.call(abort_after, prompt, steps, 30)
    ragkv.evict()
    again = only(ragkv.ask([prompt], ANSWER))
    assert again.cached_tokens >= (len(prompt) - 1 if steps > 1 else 0)
    plain.evict()
    assert again.tokens == only(plain.ask([prompt], ANSWER)).tokens


def test_hints_never_fail_a_request(ragkv, filings):
    prompt = filings[0][:400]
    before = ragkv.metrics().get('ragkv_errors_total{kind="hints"}', 0)
    good = {"ragkv": {"documents": [{"id": "10-K", "start": 3, "end": 203}]}}
    wanted, _ = ragkv.call(ask_with_params, prompt, ANSWER, good)
    for number, bad in enumerate(({"ragkv": 7}, {"ragkv": {"documents": [{"start": 5}]}}, {"ragkv": {"x": 1}}), 1):
        ragkv.evict()
        assert ragkv.call(ask_with_params, prompt, ANSWER, bad) == (wanted, 399)
        assert ragkv.metrics()['ragkv_errors_total{kind="hints"}'] == before + number


def test_bytes_come_back_bit_for_bit_in_every_layer(ragkv, model, filings):
    prompts = [filings[n][: 300 + 77 * n] for n in range(4)]
    ragkv.call(in_workers, watch_copies)
    ragkv.ask(prompts, ANSWER)
    ragkv.evict()
    ragkv.ask(prompts, ANSWER)
    (log,) = ragkv.call(in_workers, copies_seen)
    assert log["layers"] == layers(model)
    assert sum(tokens for tokens, *_ in log["load"]) >= sum(len(prompt) - 1 for prompt in prompts)
    stored = sum(tokens for tokens, *_ in log["store"])
    assert stored >= sum(len(prompt) for prompt in prompts) * 0.5  # the filings begin alike
    for _, equal, filled in itertools.chain(log["load"], log["store"]):
        assert equal == 2 * log["layers"] and filled


@pytest.mark.parametrize("kind", ["load", "store"])
def test_a_failing_copy_is_a_miss(plain, ragkv, filings, kind):
    prompt = filings[4][:650]
    errors = f'ragkv_errors_total{{kind="{kind}"}}'
    before = ragkv.metrics().get(errors, 0)
    if kind == "load":
        ragkv.ask([prompt])
    ragkv.evict()
    ragkv.call(in_workers, break_copies, kind, 1)
    failed = only(ragkv.ask([prompt], ANSWER))
    plain.evict()
    wanted = only(plain.ask([prompt], ANSWER)).tokens
    assert failed.tokens == wanted
    assert ragkv.metrics()[errors] == before + 1
    for _ in range(2):  # the engine goes on, and what it stores now is good
        ragkv.evict()
        after = only(ragkv.ask([prompt], ANSWER))
        assert after.tokens == wanted
    assert after.cached_tokens == len(prompt) - 1


def border_lengths():
    """Lengths around the borders of pages, chunks and blocks."""
    marks = (16, 32, 128, 256, 384, 512, 640)
    return [mark + off for mark in marks for off in (-1, 0, 1)]


def test_sixty_prompts_give_plain_vllms_answers(plain, ragkv, filings, tokenizer):
    """Filings, questions and lengths mixed, one to eight at a time, cold, then warm."""
    questions = [tokenizer.encode(question) for question in QUESTIONS]
    prompts = [filings[n % 6][:length] for n, length in enumerate(border_lengths())]
    prompts += [[*filings[n % 6][: 90 + 13 * n], *questions[n % 3]] for n in range(42)]
    assert len(prompts) >= 60
    plain.evict()
    wanted = [answer.tokens for answer in plain.ask(prompts, ANSWER)]
    for _ in range(2):
        start, sizes = 0, itertools.cycle(range(1, 9))
        got = []
        while start < len(prompts):
            size = next(sizes)
            got += [answer.tokens for answer in ragkv.ask(prompts[start : start + size], ANSWER)]
            start += size
            if size % 3:
                ragkv.evict()
        assert got == wanted
    metrics = ragkv.metrics()
    assert metrics['ragkv_hit_tokens_total{tier="memory"}'] > sum(map(len, prompts)) * 0.7


def test_a_space_so_small_that_requests_are_preempted(plain, small, filings):
    prompts = [filings[n % 6][: 200 + 9 * n] for n in range(16)]
    plain.evict()
    wanted = [answer.tokens for answer in plain.ask(prompts, 60, ignore_eos=True)]
    before = small.metrics().get("vllm:num_preemptions_total", 0)
    for _ in range(2):
        assert [answer.tokens for answer in small.ask(prompts, 60, ignore_eos=True)] == wanted
    assert small.metrics()["vllm:num_preemptions_total"] > before
    assert (
        small.metrics()['ragkv_used_bytes{tier="memory"}']
        <= small.metrics()['ragkv_capacity_bytes{tier="memory"}']
    )
    assert small.metrics()['ragkv_evicted_chunks_total{tier="memory",reason="capacity"}'] > 0
