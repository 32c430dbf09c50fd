"""A draft model's KV is kept with the model's, on both model runners. The draft model is the model itself, so all
that it drafts is accepted if its KV is right."""

import pytest

from rig.engines import COMBINATIONS, SETTINGS, rig_engine

ANSWER, DRAFTED = 13, 3


@pytest.fixture(scope="module", params=[COMBINATIONS[0], COMBINATIONS[-1]], ids=str)
def drafting(request, tiny_model, tmp_path_factory):
    combination = request.param
    speculation = {"method": "draft_model", "model": str(tiny_model), "num_speculative_tokens": DRAFTED}
    folder = tmp_path_factory.mktemp(f"drafting-{combination}")
    with rig_engine(tiny_model, folder, combination, SETTINGS, speculative_config=speculation) as engine:
        yield engine


def test_what_a_drafter_has_of_a_prompt_is_given_back_with_the_models(drafting, plain, fresh):
    prompt, accepted = fresh(190), []
    for cached in (0, 189, 189):
        before = drafting.count("vllm:spec_decode_num_accepted_tokens_total")
        found = drafting.answer(prompt, tokens=ANSWER)
        accepted.append(drafting.count("vllm:spec_decode_num_accepted_tokens_total") - before)
        assert found.cached == cached and found.tokens == plain.answer(prompt, tokens=ANSWER).tokens
        drafting.evict()
    assert accepted == [ANSWER - ANSWER // (DRAFTED + 1) - 1] * 3
