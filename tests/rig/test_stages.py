"""Pipeline parallel 2 on the rig: stages of unlike sizes, two layers and one, two steps under way."""

import pytest

from rig.beside import Ask
from rig.engines import COMBINATIONS, SETTINGS, STEP, check_preempted, rig_engine
from rig.faults import forget_failures
from rig.test_ranks import check_failure_on_one

STAGES = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def stages(tiny_model, folder):
    settings = SETTINGS | {"disk": {"path": str(folder / "disk")}}
    with rig_engine(tiny_model, folder, COMBINATIONS[-1], settings, **STAGES) as engine:
        yield engine


@pytest.fixture
def two(stages):
    stages.call(forget_failures)
    stages.evict()
    return stages


def test_hits_in_whole_and_in_part_and_the_next_turn(two, plain, fresh):
    prompt, long = fresh(80), fresh(STEP + 72)
    cold = two.answer(prompt, tokens=20)
    following = (*prompt, *cold.tokens, *fresh(15))
    asks = [Ask(prompt, 20), Ask(following), Ask((*prompt[:50], *fresh(9))), Ask(long)]
    two.evict()
    found = two.answers(asks)
    assert [answer.cached for answer in found] == [79, 99, 50, 0]
    two.evict()
    again = two.answers(asks)
    assert [answer.cached for answer in again] == [79, len(following) - 1, 58, len(long) - 1]
    plain.check([asks[0], *asks, *asks], [cold, *found, *again])


def test_so_few_blocks_that_requests_are_preempted(two, plain, fresh):
    check_preempted(two, plain, [Ask(fresh(94), 6) for _ in range(6)])


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("point", ["load", "store"])
def test_a_failure_in_one_stage(two, plain, fresh, point, stage):
    check_failure_on_one(two, plain, fresh, point, stage)


def test_fusion_is_refused_and_the_answer_says_why(two, plain, fresh):
    prompt = fresh(60)
    told = two.answer(prompt, hints={"documents": [{"start": 0, "end": 40}], "fuse": True})
    assert "pipeline stages" in told.told["documents"][0]["reason"]
    plain.check([Ask(prompt)], [told])


def test_a_new_engine_finds_it_on_disk(stages, tiny_model, folder, plain, fresh):
    prompt = fresh(200)
    stages.answer(prompt)
    stages.rest()
    settings = SETTINGS | {"disk": {"path": str(folder / "disk")}}
    with rig_engine(tiny_model, folder / "again", COMBINATIONS[-1], settings, **STAGES) as again:
        found = again.answer(prompt)
    assert found.cached > 200 - 64
    plain.check([Ask(prompt)], [found])
