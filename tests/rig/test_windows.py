"""A model with sliding windows on the rig: loads and stores by group, on the engine that CUDA users run, and on
the one of a CPU."""

import pytest

from models.kinds import VOCABULARY, F, S, make, sliding
from rig import beside, faults
from rig.beside import Ask
from rig.engines import COMBINATIONS, SETTINGS, STEP, check_preempted, plain_engine, rig_engine
from rig.faults import Fault
from rig.passages import check_stored_order

BLOCKS = 90  # of 16 tokens, for three groups of layers
FIELDS = {
    "hidden_size": 64,
    "head_dim": 64,
    "intermediate_size": 128,
    "sliding_window": 40,
    "query_pre_attn_scalar": 32,
}
KIND = sliding("Gemma 3 of the rig", "Gemma3TextConfig", [S, S, F], **FIELDS)
GROUPS = 3


@pytest.fixture(scope="module", params=[COMBINATIONS[0], COMBINATIONS[-1]], ids=str)
def combination(request):
    return request.param


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make(KIND, tmp_path_factory.mktemp("windows") / "gemma")


@pytest.fixture(scope="module")
def plain(model):
    with plain_engine(model) as made:
        yield made


@pytest.fixture(scope="module")
def shared_rig(combination, model, tmp_path_factory):
    """Its caches are small."""
    place = tmp_path_factory.mktemp(f"windows-{combination}")
    settings = SETTINGS | {"memory": {"capacity": "1536KiB"}, "disk": {"path": str(place / "disk")}}
    with rig_engine(model, place, combination, settings, num_gpu_blocks_override=BLOCKS) as made:
        made.call(faults.wrap_stores)
        yield made


def test_the_model_has_windows_and_its_answers_depend_on_the_prompt(rig, plain, fresh):
    assert rig.call(beside.groups) == GROUPS
    prompt = fresh(150)
    changed = [(*prompt[:at], (prompt[at] + 1) % VOCABULARY, *prompt[at + 1 :]) for at in (0, 70, 149)]
    answers = plain.answers([Ask(each) for each in (prompt, *changed)])
    assert len({(answer.tokens, *answer.logprobs[0]) for answer in answers}) == 4


def test_the_same_prompt_and_the_next_turn(rig, plain, fresh):
    prompt = fresh(150)
    first = rig.answer(prompt, tokens=20)
    turn = (*prompt, *first.tokens[:-1], *fresh(30))
    rig.evict()
    again = rig.answer(prompt, tokens=20)
    rig.evict()
    following = rig.answer(turn)
    assert (first.cached, again.cached, following.cached) == (0, 149, 150 + 19)
    plain.check([Ask(prompt, 20), Ask(prompt, 20), Ask(turn)], [first, again, following])


def test_prompts_that_part(rig, plain, fresh):
    """In the windows that are kept, and before them; from there on the next finds the place."""
    prompt = fresh(300)
    near, far, next_far = ((*prompt[:at], *fresh(size)) for at, size in ((298, 15), (150, 50), (150, 60)))
    found = []
    for each in (prompt, near, far, next_far):
        found.append(rig.answer(each))
        rig.evict()
    assert found[1].cached == 298 and found[2].cached < 150 and 150 - 64 <= found[3].cached <= 150
    plain.check([Ask(each) for each in (prompt, near, far, next_far)], found)


def test_the_next_question_about_a_document_that_hints_name(rig, plain, fresh):
    """Its end is one of the places, however long the questions are."""
    document = fresh(170)
    first, second = ((*document, *fresh(size)) for size in (120, 60))
    asks = [Ask(each, hints={"documents": [{"id": "10-K", "start": 0, "end": 170}]}) for each in (first, second)]
    found = []
    for each in asks:
        found.append(rig.answer(each.prompt, hints=each.hints))
        rig.evict()
    assert [answer.cached for answer in found] == [0, 170]
    plain.check(asks, found)


def test_a_prompt_in_several_steps_beside_others(rig, plain, fresh):
    known, long = fresh(90), fresh(STEP + 120)
    rig.answer(known)
    rig.evict()
    asks = [Ask(long, 4), Ask((*known, *fresh(10)), 12), Ask(fresh(40)), Ask(known)]
    for expected in ([0, 90, 0, 89], [STEP + 119, 99, 39, 89]):
        found = rig.answers(asks)
        assert [answer.cached for answer in found] == expected
        plain.check(asks, found)
        rig.evict()


def test_passages_in_stored_order(rig, plain, fresh):
    check_stored_order(rig, plain, fresh)


def test_after_vllms_own_hit(rig, plain, fresh):
    prompt = fresh(200)
    rig.answer(prompt)
    rig.evict()
    rig.answer(prompt[:130])
    found = rig.answer(prompt)
    assert found.cached == 199
    plain.check([Ask(prompt)], [found])


@pytest.mark.parametrize("times", [1, 10_000])
@pytest.mark.parametrize("what", ["load", "store"])
def test_a_copy_that_fails(rig, plain, fresh, what, times):
    """Of one group, or of all."""
    fresh(times % 7 * 10 + len(what))  # so that the prompts are no other case's
    prompts = [fresh(120), fresh(100)]
    asks = [Ask((*prompt, *fresh(9))) for prompt in prompts]
    if what == "load":
        rig.answers([Ask(prompt) for prompt in prompts])
        rig.evict()
    plain.check(asks, rig.answers(asks, Fault(what, times)))
    for _ in range(2):
        plain.check(asks, rig.answers(asks))
        rig.evict()


@pytest.mark.parametrize("steps", [1, 3])
def test_an_abort_leaves_only_good_kv(rig, plain, fresh, steps):
    known = fresh(120)
    rig.answer(known)
    rig.evict()
    doomed = [Ask((*known, *fresh(20)), 3), Ask(fresh(60), 3)]
    others = [Ask((*each.prompt, *fresh(5))) for each in doomed]
    found, _ = rig.call(beside.abort_after, doomed, steps, others, None)
    plain.check(others, found)
    rig.evict()
    plain.check(others, rig.answers(others))


def test_so_few_blocks_that_requests_are_preempted(rig, plain, fresh):
    """Eight requests of 12 blocks, and soon of 15, in 89."""
    check_preempted(rig, plain, [Ask(fresh(94), 6) for _ in range(8)])


def test_what_memory_has_lost_comes_from_the_disk(rig, plain, fresh):
    """Full attention alone keeps twice what memory holds: how late its writes are decides nothing."""
    base = fresh(100)
    prompts = [(*base[:cut], *fresh(200)) for cut in range(5, 101, 5)]
    asks = [Ask(each) for each in (*prompts, *prompts[::-1])]
    name = 'ragkv_hit_tokens_total{tier="disk"}'
    before = rig.count(name)
    for _ in range(2):
        plain.check(asks, rig.answers(asks))
        rig.evict()
    assert rig.count(name) > before
