"""The load gate: lines through what was observed, and what they decide."""

import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from ragkv.kvstore.gate import PROBE, Gate, Line

QUICK = settings(max_examples=200, deadline=None)
fixed_costs = st.floats(0, 1)
slopes = st.floats(1e-9, 1)
amounts = st.lists(st.integers(1, 10**6), min_size=1, max_size=40)


def line_of(*observations):
    line = Line()
    for amount, seconds in observations:
        line.note(amount, seconds)
    return line


@QUICK
@given(fixed_costs, slopes, amounts)
def test_a_line_is_found_again(fixed, slope, amounts):
    line = line_of(*((amount, fixed + slope * amount) for amount in [*amounts, 10, 1000]))
    assert line.slope() == pytest.approx(slope, rel=1e-3, abs=1e-6 * (fixed + slope * 10**6))
    assert line.at(2000) == pytest.approx(fixed + slope * 2000, rel=0.01, abs=1e-6 * (fixed + slope * 10**6))


@QUICK
@given(st.lists(st.tuples(st.floats(1e-3, 1e12), st.floats(0, 1e6)), max_size=40), st.floats(1e-3, 1e12))
def test_no_cost_is_ever_below_zero(observations, amount):
    line = line_of(*observations)
    assert line.known == bool(observations)
    assert line.slope() >= 0 and line.at(amount) >= 0
    assert line.at(2 * amount) >= line.at(amount)


@pytest.mark.parametrize(
    ("amount", "seconds"),
    [(0, 1), (-1, 1), (5, -0.001), (float("nan"), 1), (5, float("nan")), (float("inf"), 1), (5, float("inf"))],
)
def test_nonsense_is_passed_over(amount, seconds):
    line = line_of((amount, seconds))
    assert not line.known and line.at(10) == 0
    line = line_of((10, 1.0), (20, 2.0), (amount, seconds))
    assert line.at(40) == pytest.approx(4.0)


def test_equal_amounts_give_a_line_through_the_origin():
    line = line_of((100, 0.4), (100, 0.6), (100, 0.5))
    assert line.slope() == pytest.approx(0.005, rel=0.05)
    assert line.at(200) == 2 * line.at(100)


def test_a_line_that_falls_is_level_and_one_that_starts_below_zero_starts_at_zero():
    falling = line_of((10, 2.0), (100, 1.0))
    assert falling.slope() == 0 and 1.0 <= falling.at(50) <= 2.0
    steep = line_of((10, 0.0), (100, 9.0))
    assert steep.at(1) == steep.slope() > 0


@pytest.mark.parametrize(("least", "most"), [(2040, 2048), (2000, 2048), (1500, 2048), (32, 2048)])
def test_noise_of_steps_that_are_nearly_alike_is_no_slope(least, most):
    """Chunked prefill makes such steps; a slope of nothing would decline every load."""
    chance, line, seen = random.Random(1), Line(), []
    for _ in range(1000):
        tokens = chance.randint(least, most)
        line.note(tokens, (0.01 + 1e-4 * tokens) * chance.gauss(1, 0.03))
        seen.append(line.slope())
    assert all(0.5e-4 < slope < 2e-4 for slope in seen[20:])


def test_old_observations_fade():
    line = line_of(*[(n, n * 1.0) for n in range(1, 50)])
    assert line.at(50) == pytest.approx(50.0)
    for n in [*range(1, 50)] * 3:
        line.note(n, n * 0.01)
    assert line.at(50) == pytest.approx(0.5, rel=0.01)


# --- what a gate decides ---


def gate_of(prefill=0.001, copy=None, **tiers):
    """Costs a token, and of a tier (fixed, a byte)."""
    gate = Gate()
    for tokens in (100, 1000, 4000):
        gate.prefill.note(tokens, 0.02 + prefill * tokens)
        if copy is not None:
            gate.copy.note(tokens, copy * tokens)
        for name, (fixed, slope) in tiers.items():
            gate.tier(name).note(1000 * tokens, fixed + slope * 1000 * tokens)
    return gate


def decisions(gate, times, tokens=1000, tier="disk", sizes=None):
    return [gate.allows(tokens, tier, sizes) for _ in range(times)]


def test_unknown_costs_allow():
    assert Gate().allows(10, "memory") and Gate().allows(10, "disk", {"disk": 10**12})
    slow_copy = Gate()
    slow_copy.copy.note(10, 100.0)
    assert all(decisions(slow_copy, 50)), "what prefill costs is not known"
    assert all(decisions(gate_of(), 50, sizes={"disk": 10**12})), "what the tier costs is not known"


def test_an_inactive_gate_always_allows():
    gate = Gate(active=False)
    gate.prefill.note(1000, 0.001)
    gate.copy.note(1000, 1000.0)
    gate.tier("disk").note(1000, 1000.0)
    assert all(decisions(gate, 50, sizes={"disk": 1000}))


def test_a_quick_copy_is_made_and_a_slow_one_declined():
    assert all(decisions(gate_of(copy=0.0009), 50))
    assert not any(decisions(gate_of(copy=0.0011), PROBE - 1))


def test_a_tier_with_latency_is_declined_for_short_prompts_and_used_for_long():
    gate = gate_of(prefill=0.001, copy=0.0001, redis=(0.5, 1e-7))

    def worth(tokens):
        return gate.allows(tokens, "redis", {"redis": 1000 * tokens})

    assert not worth(100) and not worth(500)
    assert worth(1000) and worth(4000)


def test_asking_what_pays_counts_for_no_probe():
    gate = gate_of(copy=0.01)
    assert not any(gate.pays(1000) for _ in range(3 * PROBE))
    assert decisions(gate, PROBE) == [False] * (PROBE - 1) + [True]
    assert gate_of(copy=0.0001).pays(1000) and Gate().pays(1000) and Gate(active=False).pays(1000)


def test_costs_of_several_tiers_add_up():
    gate = gate_of(prefill=0.001, copy=0.0004, disk=(0.0, 4e-7), redis=(0.0, 4e-7))
    assert gate.allows(1000, "disk", {"disk": 10**6})
    assert gate.allows(1000, "redis", {"disk": 5 * 10**5, "redis": 5 * 10**5})
    assert not gate.allows(1000, "redis", {"disk": 10**6, "redis": 10**6})


def test_one_declined_load_of_sixteen_is_made_all_the_same():
    gate = gate_of(copy=0.01)
    assert [n for n, load in enumerate(decisions(gate, 3 * PROBE), 1) if load] == [PROBE, 2 * PROBE, 3 * PROBE]


def test_probes_are_counted_by_tier_and_anew_after_a_load():
    gate = gate_of(disk=(0.0, 1e-5))
    slow, quick = {"disk": 10**6}, {"disk": 10}
    for _ in range(PROBE - 1):
        assert not gate.allows(1000, "disk", slow)
        assert not gate.allows(1000, "redis", slow)
    assert gate.allows(1000, "disk", quick)
    assert decisions(gate, PROBE, sizes=slow) == [False] * (PROBE - 1) + [True]
    assert gate.allows(1000, "redis", slow), "its own sixteenth"


def test_a_tier_that_recovers_is_used_again():
    """Only what is loaded is observed: the probes alone let the slow observations fade."""
    gate, sizes = gate_of(disk=(3.0, 0.0)), {"disk": 10**6}
    loads = []
    for _ in range(PROBE * 60):
        if gate.allows(1000, "disk", sizes):
            gate.tier("disk").note(10**6, 0.01)
            loads.append(True)
        else:
            loads.append(False)
    assert loads.count(True) > PROBE, "it never recovered"
    assert not any(loads[: PROBE - 1]) and all(loads[-PROBE * 10 :])


def test_a_tier_that_becomes_slow_is_left():
    gate, sizes = gate_of(disk=(0.0, 1e-9)), {"disk": 10**6}
    for _ in range(20):
        assert gate.allows(1000, "disk", sizes)
        gate.tier("disk").note(10**6, 0.001)
    for _ in range(20):
        gate.tier("disk").note(10**6, 5.0)
    assert decisions(gate, PROBE - 1, sizes=sizes) == [False] * (PROBE - 1)
