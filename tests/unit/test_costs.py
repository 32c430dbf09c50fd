"""What things cost, from a few observations: what is believed of which amounts."""

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from ragkv.kvstore.gate import BELIEF, NEAR, Cost

QUICK = settings(max_examples=200, deadline=None)
amounts = st.floats(1, 1e9)
observations = st.lists(st.tuples(st.floats(1e-3, 1e12), st.just(0.0) | st.floats(1e-9, 1e6)), max_size=60)


def cost_of(*observations, times=1):
    cost = Cost()
    for _ in range(times):
        for amount, seconds in observations:
            cost.note(amount, seconds)
    return cost


@QUICK
@given(observations, amounts)
def test_no_cost_is_ever_below_zero_or_endless(observations, amount):
    cost = cost_of(*observations)
    assert cost.known == any(seconds > 0 for _, seconds in observations)
    assert 0 <= cost.least(amount) < float("inf") and 0 <= cost.typical(amount) < float("inf")
    assert (cost.typical(amount) > 0) == cost.known


@pytest.mark.parametrize(
    ("amount", "seconds"),
    [(0, 1), (-1, 1), (5, -0.001), (5, 0), (math.nan, 1), (5, math.nan), (math.inf, 1), (5, math.inf)],
)
def test_nonsense_is_passed_over(amount, seconds):
    cost = cost_of((amount, seconds))
    assert not cost.known and cost.typical(10) == cost.least(10) == 0


@QUICK
@given(st.floats(0, 1), st.floats(1e-9, 1), st.lists(st.integers(1, 10**6), min_size=1, max_size=40), amounts)
def test_a_true_cost_is_hardly_overestimated(fixed, slope, measured, amount):
    """Whatever was measured of it, where it is a fixed part and a slope: within the square root of two, in a
    range; elsewhere never."""
    cost = cost_of(*((each, fixed + slope * each) for each in measured), times=BELIEF)
    assert cost.least(amount) <= 1.4143 * (fixed + slope * amount)


@QUICK
@given(st.floats(0, 1), st.floats(1e-9, 1), st.integers(1, 10**6), st.floats(0.51, 1.99))
def test_what_was_measured_is_believed_of_like_amounts(fixed, slope, measured, factor):
    truth = fixed + slope * measured
    cost = cost_of((measured, truth), times=BELIEF)
    assert cost.least(measured) == pytest.approx(truth) == cost.typical(measured)
    assert cost.least(measured * factor) >= 0.5 * (fixed + slope * measured * factor)


def test_a_fixed_part_is_found_as_such():
    cost = cost_of((100, 1.0 + 0.1), (10_000, 1.0 + 10.0), times=BELIEF)
    assert cost.typical(3000) == pytest.approx(4.0)
    near = cost_of((1000, 2.0), (10_000, 11.0), times=BELIEF)
    assert near.least(3000) == pytest.approx(4.0)


def test_nothing_is_believed_beyond_what_was_measured():
    """A second for one token is at least a second for 3,000, and not more; large ones say nothing of tiny."""
    assert cost_of((1, 1.0), times=BELIEF).least(3000) == 1.0
    large = cost_of((2.0**20, 1.0), times=BELIEF)
    assert large.least(2.0 ** (20 - NEAR)) == pytest.approx(2.0**-NEAR)
    assert large.least(2.0 ** (19 - NEAR)) == 0


def test_a_few_slow_ones_are_not_believed():
    cost = Cost()
    for count in range(1, BELIEF + 1):
        assert cost.least(1000) == 0
        cost.note(1000, 5.0)
        assert cost.believes(1000) == (count == BELIEF)
    assert cost.least(1000) == 5.0
    cost.note(1000, 0.1)
    assert cost.least(1000) == pytest.approx(0.1), "it can be quick"


def test_a_slow_first_one_is_not_typical():
    cost = cost_of((2000, 40.0), (2965, 2.0))
    assert cost.typical(2965) == pytest.approx(2.0)
    assert cost.typical(2000) <= 2.0, "less takes no longer"
    cost = cost_of((2100, 40.0), (2965, 2.0), (2965, 2.1))
    assert cost.typical(2944) == pytest.approx(2.0, rel=0.1)


def test_what_came_later_elsewhere_bounds_what_is_old():
    cost = cost_of((3000, 300.0), times=5)
    cost.note(100, 0.2)  # more is not dearer, each
    assert cost.typical(3000) == pytest.approx(6.0)
    cost = cost_of((100, 0.1), times=5)
    cost.note(3000, 30.0)  # less is not cheaper, each
    assert cost.typical(100) == pytest.approx(1.0)


def test_old_observations_are_forgotten():
    cost = cost_of((1000, 50.0), times=50)
    for _ in range(5):
        cost.note(1000, 1.0)
    assert cost.typical(1000) == cost.least(1000) == 1.0
