"""Tensor parallel 2 on the rig: a failure on one rank of two."""

import pytest

from engine_tools import in_workers
from rig.beside import Ask
from rig.engines import COMBINATIONS, SETTINGS, rig_engine
from rig.faults import Fault, break_rank, forget_failures, mend_rank

TWO = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


@pytest.fixture(scope="session")
def ranks(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with rig_engine(tiny_model, folder, COMBINATIONS[-1], SETTINGS, **TWO) as engine:
        yield engine


@pytest.fixture
def two(ranks):
    ranks.call(forget_failures)
    ranks.evict()
    return ranks


def ask_broken(two, fault, rank, asks):
    """Answers while a fault is there in one rank."""
    two.call(in_workers, break_rank, fault, rank)
    found = two.answers(asks)
    assert sum(two.call(in_workers, mend_rank)) > 0
    return found


def test_hits_on_two_ranks(two, plain, fresh):
    prompt = fresh(80)
    cold = two.answer(prompt)
    two.evict()
    warm = two.answer(prompt)
    assert (cold.cached, warm.cached) == (0, 79)
    plain.check([Ask(prompt)] * 2, [cold, warm])


def check_failure_on_one(two, plain, fresh, point, rank):
    """A load or a store that fails in one of two workers leaves answers plain vLLM's, then and afterwards."""
    begin = 100 * (2 * (point == "store") + rank)  # what was stored already is not stored again
    prompt = fresh(400)[begin : begin + 80]
    if point == "load":
        two.answer(prompt)
        two.evict()
    asks = [Ask(prompt, 6), Ask(fresh(20))]
    plain.check(asks, ask_broken(two, Fault(point), rank, asks))
    for _ in range(2):
        plain.check(asks, two.answers(asks))
        two.evict()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("point", ["load", "store"])
def test_a_failure_on_one_rank(two, plain, fresh, point, rank):
    check_failure_on_one(two, plain, fresh, point, rank)


def test_a_fusion_whose_load_fails_on_one_rank(two, plain, fresh):
    """(A forward that raises on one rank of two leaves the other waiting for it, as vLLM's own does.)"""
    system, one, other = fresh(16), fresh(56), fresh(56)
    prompt = (*system, *other, *one, *fresh(40))
    spans = [{"id": "a", "start": 16, "end": 72}, {"id": "b", "start": 72, "end": 128}]
    two.answer((*system, *one, *other, *fresh(40)), hints={"documents": spans})
    two.evict()
    hints = {"documents": spans, "fuse": True, "recompute_ratio": 1.0}
    plain.check([Ask(prompt)], ask_broken(two, Fault("load"), 1, [Ask(prompt, hints=hints)]))
    exact = Ask(prompt, hints={"fuse": False})
    for _ in range(2):
        plain.check([exact], two.answers([exact]))
        two.evict()
