"""Exact reuse on the rig: what is hit, and that answers and log probabilities are plain vLLM's."""

import itertools

import pytest

from rig import beside
from rig.beside import Ask
from rig.engines import BLOCK, STEP, check_preempted, differences
from rig.passages import check_stored_order


def test_it_is_the_engine_that_it_claims_to_be(rig, combination):
    facts = rig.call(beside.engine_facts)
    assert facts["backend"] == "TRITON_ATTN"
    assert facts["async"] is facts["batch_queue"] is combination.asynchronous
    runner = {1: "vllm.v1.worker.cpu_model_runner", 2: "vllm.v1.worker.cpu.model_runner"}
    assert facts["runner"] == runner[combination.runner]


def test_the_cache_is_written_as_vllms_kernel_does(rig):
    """In its place the rig takes a quicker function. (In fp8 they differ: the interpreter rounds 1.97 to 1.)"""
    assert rig.call(beside.same_writes)


@pytest.mark.parametrize("window", [(-1, -1), (9, 0)], ids=["full", "window"])
def test_attention_is_what_vllms_kernel_computes(rig, window):
    """In its place three of the four combinations take a quicker function."""
    assert rig.call(beside.farthest_attention, window) < 1e-5


def test_answers_depend_on_the_whole_prompt(plain, fresh):
    """Else no comparison of answers would prove anything."""
    prompt = fresh(90)
    changed = [(*prompt[:at], (prompt[at] + 1) % 512, *prompt[at + 1 :]) for at in (0, 30, 60, 89)]
    answers = plain.answers([Ask(each) for each in (prompt, *changed, fresh(90), fresh(90))])
    for one, other in itertools.combinations(answers, 2):
        assert [*differences([one], [other])]


def test_a_whole_hit(rig, plain, fresh):
    prompt = fresh(100)
    cold = rig.answer(prompt)
    rig.evict()
    warm = rig.answer(prompt)
    assert (cold.cached, warm.cached) == (0, 99)
    plain.check([Ask(prompt)] * 2, [cold, warm])


def test_a_partial_hit_ends_at_the_first_other_token(rig, plain, fresh):
    prompt = fresh(100)
    turned = (*prompt[:77], *fresh(23))
    rig.answer(prompt)
    rig.evict()
    warm = rig.answer(turned)
    assert warm.cached == 77
    plain.check([Ask(turned)], [warm])


def test_vllms_own_hit_comes_first_and_ours_after_it(rig, plain, fresh):
    prompt = fresh(100)
    rig.answer(prompt)
    rig.evict()
    rig.answer(prompt[:40])  # brings two whole blocks back into vLLM's own cache
    before = rig.count("vllm:prefix_cache_hits_total")
    warm = rig.answer(prompt)
    assert warm.cached == 99
    assert rig.count("vllm:prefix_cache_hits_total") - before == 2 * BLOCK
    plain.check([Ask(prompt)], [warm])


def test_an_answer_is_part_of_the_next_prompt(rig, plain, fresh):
    prompt = fresh(70)
    answer = rig.answer(prompt, tokens=20)
    rig.evict()
    following = (*prompt, *answer.tokens, *fresh(15))
    warm = rig.answer(following)
    assert warm.cached == len(prompt) + 19, "the last token of an answer has no KV"
    plain.check([Ask(prompt, 20), Ask(following)], [answer, warm])


def test_several_requests_a_step(rig, plain, fresh):
    """Known, known in part, and new ones, two of them alike."""
    known, begun = fresh(60), fresh(50)
    rig.answers([Ask(known), Ask(begun)])
    rig.evict()
    asks = [Ask(known), Ask((*begun, *fresh(10))), Ask(fresh(40)), Ask((*known[:30], *fresh(9))), Ask(known)]
    found = rig.answers(asks)
    assert [answer.cached for answer in found[:4]] == [59, 50, 0, 30]
    plain.check(asks, found)


def test_a_prompt_in_several_steps(rig, plain, fresh):
    """Longer than a step, stored in parts, and its hit begins and ends inside of a step."""
    prompt = fresh(STEP + 72)
    cold = rig.answer(prompt)
    rig.evict()
    longer = (*prompt[:150], *fresh(STEP + 12))
    warm = rig.answer(longer)
    assert (cold.cached, warm.cached) == (0, 150)
    plain.check([Ask(prompt), Ask(longer)], [cold, warm])


def test_so_few_blocks_that_requests_are_preempted(rig, plain, fresh):
    """Six requests of 6 blocks, and soon of 7, in 39."""
    check_preempted(rig, plain, [Ask(fresh(94), 6) for _ in range(6)])


@pytest.mark.parametrize("steps", range(5))
def test_an_abort_leaves_only_good_kv(rig, plain, fresh, steps):
    """Before its load is ordered, while it waits for it, while it runs, and when it has ended already; then others
    with its prefix, at once, and after vLLM's own cache was emptied."""
    known = fresh(80)
    rig.answer(known)
    rig.evict()
    doomed = [Ask((*known, *fresh(20)), 3), Ask(fresh(60), 3)]
    others = [Ask((*doomed[0].prompt, *fresh(5))), Ask((*doomed[1].prompt, *fresh(5))), Ask(known)]
    found, _ = rig.call(beside.abort_after, doomed, steps, others, None)
    plain.check(others, found)
    assert found[2].cached == 79
    rig.evict()
    found = rig.answers(others)
    assert found[0].cached >= 100
    plain.check(others, found)


def test_an_abort_while_a_request_waits_to_be_looked_up_again(rig, plain, fresh):
    """As where more is on its way from a lower tier."""
    known = fresh(80)
    rig.answer(known)
    rig.evict()
    others = [Ask(known), Ask((*known[:50], *fresh(20)))]
    found, struck = rig.call(beside.abort_after, [Ask(known)], 2, others, beside.faults.Fault("wait", times=2))
    assert struck == 2
    assert [answer.cached for answer in found] == [79, 50]
    plain.check(others, found)


def test_several_answers_to_a_prompt(rig, plain, fresh):
    prompt = plain.clearest([fresh(60) for _ in range(12)])
    rig.answer(prompt)
    rig.evict()
    several = rig.answer(prompt, count=3)
    assert len(several.texts) == 3 and several.cached == 59
    plain.check([Ask(prompt)], [several])


def test_log_probabilities_of_the_prompt(rig, plain, fresh):
    """vLLM reads no cache for such a request; what it computes is stored all the same."""
    prompt = fresh(80)
    rig.answer(prompt)
    rig.evict()
    scored = rig.answer(prompt, scored=True)
    assert len(scored.scores) == 79
    plain.check([Ask(prompt, scored=True)], [scored])
    other = fresh(80)
    scored = rig.answer(other, scored=True)
    rig.evict()
    warm = rig.answer(other)
    assert warm.cached == 79
    plain.check([Ask(other, scored=True), Ask(other)], [scored, warm])


def test_tenants_share_nothing(rig, plain, fresh):
    prompt = fresh(60)
    cached = []
    for salt in ("one", "two", None, "one"):
        answer = rig.answer(prompt, salt=salt)
        cached.append(answer.cached)
        plain.check([Ask(prompt)], [answer])
        rig.evict()
    assert cached == [0, 0, 0, 59]


def test_passages_in_stored_order(rig, plain, fresh):
    check_stored_order(rig, plain, fresh)


def test_a_hot_prompt_comes_from_the_device_tier(rig, plain, fresh):
    prompt = fresh(100)
    name = 'ragkv_hit_tokens_total{tier="device"}'
    rig.answer(prompt)
    before = rig.count(name)
    for _ in range(3):
        rig.evict()
        warm = rig.answer(prompt)
        assert warm.cached == 99
        plain.check([Ask(prompt)], [warm])
    assert rig.count(name) - before >= 0.3 * len(prompt)


def test_what_memory_has_lost_comes_from_the_disk(rig, plain, fresh):
    prompt, others = fresh(100), [fresh(120) for _ in range(12)]
    rig.answer(prompt)
    for start in range(0, len(others), 4):
        rig.answers([Ask(each, 1) for each in others[start : start + 4]])
    rig.evict()
    name = 'ragkv_hit_tokens_total{tier="disk"}'
    before = rig.count(name)
    warm = rig.answer(prompt)
    assert warm.cached == 99 and rig.count(name) > before
    plain.check([Ask(prompt)], [warm])
