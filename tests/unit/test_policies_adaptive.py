"""`adaptive` against the fixed policies: at least as good as the best of them, whatever the requests look like."""

import random
from pathlib import Path

import pytest

from ragkv.benchmarks.compared import COMPARED
from ragkv.benchmarks.replay import replay
from ragkv.benchmarks.traces import as_blocks, generate_trace, read_trace
from ragkv.benchmarks.workloads import KINDS
from ragkv.policies import LRU, Adaptive

MOONCAKE = Path(__file__).parents[3] / "shared/data/traces/mooncake_conversation.jsonl"
NOISE = 0.01  # of block references
FIXED = sorted(set(COMPARED) - {"adaptive"})


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.02, 0.2])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_no_fixed_policy_is_better(kind, share):
    blocks = as_blocks(generate_trace(kind, seed=11, requests=1500))
    capacity = int(share * len(blocks.weights))
    rates = {name: replay(blocks, name, capacity).hit_rate for name in FIXED}
    assert replay(blocks, "adaptive", capacity).hit_rate > max(rates.values()) - NOISE, rates


@pytest.mark.slow
@pytest.mark.parametrize(
    ("share", "least", "lru"), [(0.01, 10.0, 5.2), (0.05, 22, 19.5), (0.1, 29, 27.8), (0.2, 34.5, 34.5)]
)
def test_a_production_trace(share, least, lru):
    if not MOONCAKE.exists():
        pytest.skip(f"no {MOONCAKE.name} in ../shared/data/traces")
    blocks = as_blocks(read_trace(MOONCAKE))
    capacity = int(share * len(blocks.weights))
    assert 100 * replay(blocks, "adaptive", capacity).hit_rate >= least
    assert 100 * replay(blocks, "lru", capacity).hit_rate >= lru


def served(policy, requests, capacity):
    """Hits of requests of single keys."""
    hits = 0
    for key in requests:
        if key in policy:
            policy.touch(key)
            hits += 1
            continue
        if len(policy) == capacity:
            policy.evict(1)
        policy.insert(key)
    return hits


def test_a_loop_too_large_is_kept_in_part():
    requests = list(range(300)) * 20
    assert served(LRU(), requests, 200) == 0
    assert served(Adaptive(), requests, 200) > 0.5 * len(requests) * 200 / 300


def test_a_scan_does_not_displace_what_is_used():
    requests = [10_000 + turn if turn % 2 else turn // 2 % 80 for turn in range(8000)]
    assert served(LRU(), requests, 100) == 0
    assert served(Adaptive(), requests, 100) > 0.8 * len(requests) / 2


def test_what_costs_more_to_make_stays():
    policy, chance = Adaptive(), random.Random(0).random
    for _ in range(6000):
        key = int(chance() * 400)
        if key in policy:
            policy.touch(key)
            continue
        if len(policy) == 100:
            policy.evict(1)
        policy.insert(key, cost=10.0 if key % 2 else 1.0)
    assert sum(key % 2 for key in range(400) if key in policy) > 90


def test_another_seed_samples_otherwise_and_decides_alike():
    requests = [turn * turn % 997 for turn in range(6000)]
    first, second = (served(Adaptive(seed), requests, 300) for seed in (1, 2))
    assert abs(first - second) < 0.02 * len(requests)
