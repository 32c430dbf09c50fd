"""Which tokens each selection takes: exactly the budget, the right ones, alike wherever it is asked."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from ragkv.config.settings import SELECTION_NAMES
from ragkv.kvstore.fusion.selection import SELECTIONS, Look, deviation_scores, early_layer, query_scores
from reference import attention

QUICK = settings(max_examples=50, deadline=None)
RUNS = [(4, 10), (10, 12), (30, 34)]
SCORED = ["deviation", "query"]


@st.composite
def many_runs(draw):
    """Runs of 1 to 20 tokens, gaps of 0 to 5."""
    runs, end = [], 0
    for gap, length in draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 20)), max_size=8)):
        runs.append((end + gap, end + gap + length))
        end += gap + length
    return runs


def spread(runs):
    return [position for start, end in runs for position in range(start, end)]


def scored(runs, seed=0):
    return torch.rand(len(spread(runs)), generator=torch.Generator().manual_seed(seed))


def test_the_registered_names_and_what_they_look_at():
    assert {name: selection.looks_at for name, selection in SELECTIONS.items()} == {
        "first_tokens": Look.NOTHING,
        "random": Look.NOTHING,
        "deviation": Look.EARLY_KEYS,
        "query": Look.QUESTION,
        "query_deviation": Look.EARLY_KEYS | Look.QUESTION,
    }
    assert set(SELECTIONS) == set(SELECTION_NAMES), "what may be configured"
    assert all(name == selection.name for name, selection in SELECTIONS.items())


@pytest.mark.parametrize(("layers", "early", "share"), [(30, 1, 0.05), (1, 0, 0.5)])
def test_layers_and_what_it_costs_to_look_at_them(layers, early, share):
    assert early_layer(layers) == early
    for selection in SELECTIONS.values():
        looks = Look.EARLY_KEYS in selection.looks_at
        assert selection.looking(layers) == pytest.approx(share if looks else 0)


@pytest.mark.parametrize("name", SELECTIONS)
@QUICK
@given(runs=many_runs(), budget=st.integers(0, 200))
def test_exactly_the_budget_ascending_and_of_the_runs(name, runs, budget):
    all_of_them = spread(runs)
    chosen = SELECTIONS[name].choose(runs, budget, scored(runs))
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == sorted(set(chosen.tolist()) & set(all_of_them))
    assert len(chosen) == min(budget, len(all_of_them))


@pytest.mark.parametrize("name", SELECTIONS)
@QUICK
@given(runs=many_runs(), budget=st.integers(0, 60))
def test_a_larger_budget_takes_no_token_away(name, runs, budget):
    fewer = SELECTIONS[name].choose(runs, budget, scored(runs)).tolist()
    assert set(fewer) <= set(SELECTIONS[name].choose(runs, budget + 1, scored(runs)).tolist())


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (0, []),
        (1, [4]),
        (2, [4, 10]),
        (3, [4, 10, 30]),
        (5, [4, 5, 10, 11, 30]),
        (8, [4, 5, 6, 10, 11, 30, 31, 32]),  # the second run is used up
        (9, [4, 5, 6, 7, 10, 11, 30, 31, 32]),
        (11, [4, 5, 6, 7, 8, 10, 11, 30, 31, 32, 33]),  # and the third
    ],
)
def test_first_tokens_takes_the_same_k_of_every_run(budget, expected):
    assert SELECTIONS["first_tokens"].choose(RUNS, budget, None).tolist() == expected


def test_query_takes_the_highest_scores():
    scores = torch.tensor([0.0, 9.0, 1.0, 1.0, 8.0, 0.0, -1.0, 2.0, 1.0, 0.5, 7.0, 0.0])
    choose = SELECTIONS["query"].choose
    assert choose(RUNS, 3, scores).tolist() == [5, 8, 32]
    assert choose(RUNS, 4, scores).tolist() == [5, 8, 11, 32]
    assert choose(RUNS, 5, scores).tolist() == [5, 6, 8, 11, 32]  # of three equal ones the first
    assert choose(RUNS, 6, scores).tolist() == [5, 6, 7, 8, 11, 32]


def test_deviation_takes_neighbours_together():
    choose = SELECTIONS["deviation"].choose
    scores = torch.tensor([0.0, 3.0, 2.0, 2.0, 1.0, 0.0, 0.5, 0.5, 0.0, 0.0, 0.0, 3.5])
    assert choose([(4, 16)], 2, scores).tolist() == [6, 7]  # 4 of 2 tokens
    assert choose([(4, 16)], 3, scores).tolist() == [6, 7, 14]  # 3.5 of 2, cut to the budget
    assert choose([(4, 16)], 6, scores).tolist() == [4, 5, 6, 7, 14, 15]
    assert choose([(4, 15), (15, 16)], 1, scores).tolist() == [15]  # 3.5 of 1, before 4 of 2
    assert choose([(4, 5), (5, 16)], 3, scores).tolist() == [5, 6, 15]  # pairs begin anew with every run


def test_a_broken_score_is_recomputed_first():
    scores = torch.zeros(12)
    scores[3], scores[8] = torch.inf, torch.nan
    assert SELECTIONS["query"].choose([(0, 12)], 1, scores).tolist() == [8]
    assert SELECTIONS["query"].choose([(0, 12)], 2, scores).tolist() == [3, 8]


@pytest.mark.parametrize("name", SCORED)
def test_equal_scores_give_the_first_positions(name):
    runs = [(7, 4007)]
    assert SELECTIONS[name].choose(runs, 9, torch.zeros(4000)).tolist() == list(range(7, 16))


def test_random_is_the_same_everywhere_and_spread_evenly():
    runs = [(0, 1000), (3000, 5000)]
    chosen = SELECTIONS["random"].choose(runs, 600, None)
    assert chosen[:8].tolist() == [9, 16, 17, 18, 19, 20, 22, 29]
    assert 150 < (chosen < 1000).sum() < 250
    assert 250 < (chosen % 2).sum() < 350
    steps = chosen.diff()
    assert 80 < (steps == 1).sum() < 160  # as chance would have it, neither lumps nor a grid
    assert steps[steps < 1000].max() > 15


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("runs", [[(4, 4)], [(5, 4)], [(3, 6), (5, 9)], [(5, 9), (1, 3)], [(-1, 3)]])
def test_runs_that_cannot_be(name, runs):
    with pytest.raises(ValueError, match="runs"):
        SELECTIONS[name].choose(runs, 1, torch.zeros(max(0, sum(end - start for start, end in runs))))


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_budget_below_nothing(name):
    with pytest.raises(ValueError, match="budget -1"):
        SELECTIONS[name].choose(RUNS, -1, torch.zeros(12))


@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize("scores", [None, torch.zeros(11), torch.zeros(12, 1)])
def test_scores_that_do_not_fit(name, scores):
    with pytest.raises(ValueError, match=rf"selection {name}: scores .* need \[12\]"):
        SELECTIONS[name].choose(RUNS, 1, scores)


def test_deviation_scores_are_squared_distances():
    new = torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[0.0, 0.0], [3.0, -1.0]]])
    old = torch.tensor([[[1.0, 0.0], [0.0, 5.0]], [[0.0, 0.0], [3.0, -1.0]]])
    assert deviation_scores(new, old).tolist() == [29.0, 0.0]


def test_deviation_scores_do_not_lose_what_bfloat16_would():
    new = torch.full((1, 8, 64), 1.0, dtype=torch.bfloat16)
    old = torch.full((1, 8, 64), 1.0 + 2**-7, dtype=torch.bfloat16)
    scores = deviation_scores(new, old)
    assert scores.dtype == torch.float32
    assert scores.item() == pytest.approx(8 * 64 * 2**-14, rel=1e-6)


def test_deviation_scores_of_other_shapes():
    with pytest.raises(ValueError, match="shapes differ"):
        deviation_scores(torch.zeros(3, 2, 4), torch.zeros(3, 1, 4))


def sample(dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    queries = 3 * torch.randn(7, 6, 8, generator=generator)
    return queries.to(dtype), torch.randn(40, 2, 8, generator=generator).to(dtype)


def test_query_scores_are_the_reference_attention():
    queries, keys = sample()
    expected = attention(queries, keys, torch.ones(7, 40, dtype=torch.bool)).sum(0).mean(0)
    torch.testing.assert_close(query_scores(queries, keys, 8**-0.5), expected)
    assert query_scores(queries, keys, 8**-0.5).sum().item() == pytest.approx(6)


def test_query_scores_are_float32_from_bfloat16():
    scores = query_scores(*sample(torch.bfloat16), 8**-0.5)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, query_scores(*sample(), 8**-0.5), atol=0.02, rtol=0.05)


def test_scores_of_ranks_add_up():
    queries, keys = sample()
    whole = query_scores(queries, keys, 0.3)
    parts = query_scores(queries[:, :3], keys[:, :1], 0.3) + query_scores(queries[:, 3:], keys[:, 1:], 0.3)
    torch.testing.assert_close(parts, whole)
    other = keys.flip(0)
    parts = deviation_scores(keys[:, :1], other[:, :1]) + deviation_scores(keys[:, 1:], other[:, 1:])
    torch.testing.assert_close(parts, deviation_scores(keys, other))


def test_query_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="6 query heads, 4"):
        query_scores(torch.zeros(1, 6, 8), torch.zeros(3, 4, 8), 1.0)
