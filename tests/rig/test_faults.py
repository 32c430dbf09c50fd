"""Faults on the rig: whatever fails, answers and log probabilities stay plain vLLM's, then and ever after."""

import itertools

import pytest

from rig import beside
from rig.beside import Ask
from rig.engines import BLOCK
from rig.faults import Fault

LOAD, STORE, FUSE = Fault("load"), Fault("store"), Fault("fuse")
ALWAYS = 10_000


def known(rig, *prompts):
    """Let the store, but not vLLM's own cache, know some prompts."""
    rig.answers([Ask(prompt) for prompt in prompts])
    rig.evict()


def check_for_good(rig, plain, *asks):
    """What a fault has left, in vLLM's own cache, and below: once from each."""
    for _ in range(2):
        plain.check(asks, rig.answers(asks))
        rig.evict()


# --- a load that fails: the four rows ---


def test_a_failed_load_is_a_recompute(rig, plain, fresh):
    prompt = fresh(100)
    known(rig, prompt)
    failed = rig.answer(prompt, LOAD)
    plain.check([Ask(prompt)], [failed])
    check_for_good(rig, plain, Ask(prompt))
    assert rig.answer(prompt).cached == 99


def test_a_failed_load_after_a_hit_of_vllms_own(rig, plain, fresh):
    prompt = fresh(100)
    known(rig, prompt)
    rig.answer(prompt[:40])
    plain.check([Ask(prompt)], [rig.answer(prompt, LOAD)])
    check_for_good(rig, plain, Ask(prompt))


def test_failed_loads_beside_other_requests(rig, plain, fresh):
    """Some load well, some fail, some share what fails, some have nothing to load."""
    first, second, third = (fresh(70) for _ in range(3))
    known(rig, first, second, third)
    asks = [
        Ask(first, 4),
        Ask(fresh(20), 6),
        Ask((*first, *fresh(9))),
        Ask(second),
        Ask(third, 5),
        Ask(first[:50]),
    ]
    plain.check(asks, rig.answers(asks, LOAD))
    check_for_good(rig, plain, *asks)


def test_every_load_fails(rig, plain, fresh):
    prompts = [fresh(60) for _ in range(3)]
    known(rig, *prompts)
    asks = [Ask((*prompt, *fresh(9))) for prompt in prompts]
    plain.check(asks, rig.answers(asks, Fault("load", ALWAYS)))
    check_for_good(rig, plain, *asks)


def test_a_failed_load_of_a_long_prompt(rig, plain, fresh):
    """Computed in several steps instead."""
    prompt = fresh(200)
    known(rig, prompt)
    plain.check([Ask(prompt)], [rig.answer(prompt, LOAD)])
    check_for_good(rig, plain, Ask(prompt))


@pytest.mark.parametrize("steps", range(1, 5))
def test_a_failed_load_then_an_abort(rig, plain, fresh, steps):
    """What others with that prefix find in vLLM's own cache then, and in ours."""
    prompt = fresh(90)
    known(rig, prompt)
    others = [Ask((*prompt[:80], *fresh(10))), Ask(prompt)]
    found, struck = rig.call(beside.abort_after, [Ask((*prompt, *fresh(10)), 8)], steps, others, LOAD)
    assert struck
    plain.check(others, found)
    check_for_good(rig, plain, *others)


def test_a_failed_load_then_a_preemption(rig, plain, fresh):
    """39 blocks: three that are in vLLM's own cache take 27 and want a 28th in the second step, where the last
    request, whose load has failed, has the others."""
    running = [fresh(9 * BLOCK) for _ in range(3)]
    last = fresh(12 * BLOCK - 2)
    rig.answer(last)
    rig.evict()
    for prompt in running:
        rig.answer(prompt, tokens=1)
    asks = [*(Ask(prompt, 5) for prompt in running), Ask(last, 5)]
    before = rig.count("vllm:num_preemptions_total")
    found = rig.answers(asks, Fault("load", ALWAYS))
    assert rig.count("vllm:num_preemptions_total") > before
    plain.check(asks, found)
    following = Ask((*last, *found[-1].tokens, *fresh(9)))
    check_for_good(rig, plain, following)


def test_failed_loads_under_pressure_then_the_next_turns(rig, plain, fresh):
    prompts = [fresh(94) for _ in range(6)]
    for some in (prompts[:3], prompts[3:]):
        known(rig, *some)
    asks = [Ask(prompt, 6) for prompt in prompts]
    before = rig.count("vllm:num_preemptions_total")
    found = rig.answers(asks, Fault("load", 4))
    assert rig.count("vllm:num_preemptions_total") > before
    plain.check(asks, found)
    turns = [Ask((*each.prompt, *answer.tokens, *fresh(5))) for each, answer in zip(asks, found, strict=True)]
    for some in (turns[:3], turns[3:]):
        check_for_good(rig, plain, *some)


def test_the_next_turn_after_a_failed_load(rig, plain, fresh):
    """It may be computed on what the failure left, and stored; vLLM's own cache is emptied then."""
    prompt = fresh(80)
    known(rig, prompt)
    answer = rig.answer(prompt, LOAD, tokens=6)
    plain.check([Ask(prompt, 6)], [answer])
    second = Ask((*prompt, *answer.tokens, *fresh(20)), 5)
    answers = rig.answers([second])
    plain.check([second], answers)
    rig.evict()
    third = Ask((*second.prompt, *answers[0].tokens, *fresh(10)))
    answers = rig.answers([third])
    assert answers[0].cached >= 80, "the first turn at least is still there"
    plain.check([third], answers)
    check_for_good(rig, plain, third)


# --- fusion ---


def swapped(rig, fresh):
    """As in `test_fusion`: a prompt of known passages in another order, and hints to fuse them."""
    system, one, two = fresh(16), fresh(56), fresh(56)
    documents = [{"id": "a", "start": 16, "end": 72}, {"id": "b", "start": 72, "end": 128}]
    rig.answer((*system, *one, *two, *fresh(40)), hints={"documents": documents})
    rig.evict()
    return (*system, *two, *one, *fresh(40)), {"documents": documents, "fuse": True, "recompute_ratio": 0.15}


@pytest.mark.parametrize("fault", [FUSE, LOAD, Fault("load", after=1)], ids=["fuse", "load", "second load"])
def test_a_fusion_that_fails_is_full_prefill(rig, plain, fresh, fault):
    """Also where what it moves, or what is exact before it, cannot be loaded."""
    prompt, hints = swapped(rig, fresh)
    found = rig.answers([Ask(prompt, hints=hints)], fault)
    plain.check([Ask(prompt)], found)
    check_for_good(rig, plain, Ask(prompt, hints={"fuse": False}))


def test_a_fusion_that_fails_beside_one_that_does_not(rig, plain, fresh):
    prompt, hints = swapped(rig, fresh)
    exactly = hints | {"recompute_ratio": 1.0}
    other = (*prompt[:128], *fresh(40))
    asks = [Ask(prompt, hints=exactly), Ask(fresh(30)), Ask(other, hints=exactly)]
    plain.check(asks, rig.answers(asks, FUSE))
    check_for_good(rig, plain, Ask(prompt, hints={"fuse": False}), Ask(other, hints={"fuse": False}))


@pytest.mark.parametrize("steps", range(1, 4))
def test_a_failed_fusion_then_an_abort(rig, plain, fresh, steps):
    fresh(300 * steps)  # what is known exactly is not fused
    prompt, hints = swapped(rig, fresh)
    others = [Ask(prompt, hints={"fuse": False})]
    found, struck = rig.call(beside.abort_after, [Ask(prompt, hints=hints)], steps, others, FUSE)
    assert struck or steps < 3, "it is fused once it is loaded, a step or two later"
    plain.check(others, found)
    check_for_good(rig, plain, *others)


# --- stores, and the scheduler's side ---


def test_a_failed_store_is_a_later_miss(rig, plain, fresh):
    prompt = fresh(60)
    asks = [Ask(prompt), Ask((*prompt[:40], *fresh(20)))]
    plain.check(asks, rig.answers(asks, Fault("store", ALWAYS)))
    rig.evict()
    missed = rig.answer(prompt)
    assert missed.cached == 0
    plain.check([Ask(prompt)], [missed])
    rig.evict()
    assert rig.answer(prompt).cached == 59


SCHEDULING = [
    Fault(point, done=done)
    for point, done in itertools.product(("lookup", "allocated", "orders", "report", "finished"), (False, True))
    if not (done and point == "orders")  # its last act is to hand over what it ordered
]


@pytest.mark.parametrize("fault", SCHEDULING, ids=lambda f: f"{f.point}-{'after' if f.done else 'before'}")
def test_a_fault_on_the_scheduler_side(rig, plain, fresh, fault):
    """Before the part has done anything, and after it has done all."""
    first, second = fresh(60), fresh(50)
    known(rig, first, second)
    asks = [Ask((*first, *fresh(9))), Ask(fresh(30)), Ask(second)]
    plain.check(asks, rig.answers(asks, fault))
    check_for_good(rig, plain, *asks)
