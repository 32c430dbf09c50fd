"""What the load gate decides, and what it says of it. How it fares with an engine: test_gate_engines."""

import pytest

from hand_lanes import Recorded
from ragkv.kvstore import metrics as m
from ragkv.kvstore.gate import BELIEF, FIRST, LEAST_TOKENS, PROBE, Gate

SIZES = (100, 200, 400, 1000, 4000)


def gate_of(prefill=0.001, copy=None, **tiers):
    """Costs a token, and of a tier (fixed, a byte)."""
    gate = Gate()
    for tokens in SIZES * BELIEF:
        gate.prefill.note(tokens, prefill * tokens)
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
    for _ in range(BELIEF):
        slow_copy.copy.note(10, 100.0)
    assert all(decisions(slow_copy, 50)), "what prefill costs is not known"
    assert all(decisions(gate_of(), 50, sizes={"disk": 10**12})), "what the tier costs is not known"


def test_an_inactive_gate_always_allows():
    gate = Gate(active=False)
    for _ in range(BELIEF):
        gate.prefill.note(1000, 0.001)
        gate.copy.note(1000, 1000.0)
        gate.tier("disk").note(1000, 1000.0)
    assert all(decisions(gate, 50, sizes={"disk": 1000})) and not gate.small(1)


def test_a_quick_copy_is_made_and_a_slow_one_declined():
    assert all(decisions(gate_of(copy=0.0009), 50))
    assert not any(decisions(gate_of(copy=0.0011), FIRST))


def test_a_handful_of_tokens_is_too_small():
    assert Gate().small(LEAST_TOKENS - 1) and not Gate().small(LEAST_TOKENS)


def test_a_tier_with_latency_is_declined_for_short_prompts_and_used_for_long():
    gate = gate_of(prefill=0.001, copy=0.0001, redis=(0.5, 1e-7))

    def worth(tokens):
        return gate.allows(tokens, "redis", {"redis": 1000 * tokens})

    assert not worth(100) and not worth(400)
    assert worth(1000) and worth(4000)


def test_tokens_far_behind_cost_more_to_compute():
    gate = Gate(attention_tokens=1000)
    assert gate.work(0, 1000) == 1500 and gate.work(1000, 1000) == 2500 and Gate().work(9, 5) == 5
    gate.prefill.note(1500, 1.5)
    for _ in range(BELIEF):
        gate.copy.note(1000, 2.0)
    assert not gate.pays(1000) and gate.pays(1000, start=1000)


def test_costs_of_several_tiers_add_up():
    gate = gate_of(prefill=0.001, copy=0.0004, disk=(0.0, 4e-7), redis=(0.0, 4e-7))
    assert gate.allows(1000, "disk", {"disk": 10**6})
    assert gate.allows(1000, "redis", {"disk": 5 * 10**5, "redis": 5 * 10**5})
    assert not gate.allows(1000, "redis", {"disk": 10**6, "redis": 10**6})


def test_of_many_declined_loads_one_in_sixteen_is_made():
    """With those from which it was learned; what only asks what pays counts for nothing."""
    gate = gate_of(copy=0.01)
    assert not any(gate.pays(1000) for _ in range(3 * PROBE))
    made = [n for n, load in enumerate(decisions(gate, FIRST + 1 + 3 * PROBE), 1) if load]
    assert made == [FIRST + 1, FIRST + 1 + PROBE, FIRST + 1 + 2 * PROBE, FIRST + 1 + 3 * PROBE]
    assert (BELIEF + len(made)) / (BELIEF + made[-1]) <= 1 / PROBE + 1 / made[-1]


def test_trials_are_counted_by_tier_and_size():
    """A size that pays must not keep another from being tried."""
    gate = gate_of(disk=(0.5, 0.0))
    for _ in range(FIRST):
        assert not gate.allows(100, "disk", {"disk": 10**5})
        assert gate.allows(4000, "disk", {"disk": 4 * 10**6})
        assert not gate.allows(100, "redis", {"disk": 10**5})
    assert gate.allows(100, "disk", {"disk": 10**5}) and gate.allows(100, "redis", {"disk": 10**5})


@pytest.mark.parametrize("slow", [3.0, 1000.0])
def test_a_tier_that_recovers_is_used_again(slow):
    """Only what is loaded is observed: the first trial that is quick is enough."""
    gate, sizes = gate_of(disk=(slow, 0.0)), {"disk": 10**6}
    loads = []
    for _ in range(FIRST + PROBE):
        loads.append(gate.allows(1000, "disk", sizes))
        if loads[-1]:
            gate.tier("disk").note(10**6, 0.01)
    assert loads == [False] * FIRST + [True] * PROBE


def test_a_tier_that_becomes_slow_is_left_after_so_many_loads():
    gate, sizes = gate_of(disk=(0.0, 1e-9)), {"disk": 10**6}
    for _ in range(BELIEF):
        assert gate.allows(1000, "disk", sizes)
        gate.tier("disk").note(10**6, 5.0)
    assert not any(decisions(gate, FIRST, sizes=sizes))


def test_it_says_once_that_it_begins_to_decline_and_once_that_it_ends_to():
    said, metrics = [], Recorded()
    gate = Gate(metrics=metrics, say=said.append)
    gate.prefill.note(1000, 1.0)
    assert gate.allows(1000, "memory") and metrics.get(m.GATE_STATE, "memory") == 0 and said == []
    for _ in range(BELIEF):
        gate.copy.note(1000, 2.0)
    assert not any(decisions(gate, FIRST, tier="memory")) and metrics.get(m.GATE_STATE, "memory") == 1
    assert len(said) == 1
    assert all(part in said[0] for part in ("memory", "1000 tokens", "2000 ms", "1000 ms", "1 in 16"))
    gate.copy.note(1000, 0.1)
    assert all(decisions(gate, 9, tier="memory")) and metrics.get(m.GATE_STATE, "memory") == 0
    assert len(said) == 2 and "no longer" in said[1] and "100 ms" in said[1]
