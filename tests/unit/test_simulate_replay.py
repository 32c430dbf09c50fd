"""Replays against naive models, exact counts on generated traces, the clairvoyant bound against brute force."""

from itertools import chain, combinations
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from ragkv.benchmarks.clairvoyant import most_hits
from ragkv.benchmarks.compared import COMPARED, make_compared
from ragkv.benchmarks.replay import replay
from ragkv.benchmarks.stack import Tier, replay_tiers
from ragkv.benchmarks.traces import Trace, as_blocks, generate_trace, read_trace
from ragkv.policies import make_policy
from ragkv.policies.admission import AdmissionPolicy

MOONCAKE = Path(__file__).parents[2] / ".." / "shared" / "data" / "traces" / "mooncake_conversation.jsonl"
# kind, semantics, policy -> hits of the first 800 requests of seed 1, with room for 5% of the unique blocks
GOLDEN = {
    ("conversation", "prefix"): {"lru": 8451, "lfu": 6978},
    ("conversation", "content"): {"lru": 8061, "lfu": 5325},
    ("rag", "prefix"): {"lru": 8109, "lfu": 9333},
    ("rag", "content"): {"lru": 13683, "lfu": 16609},
    ("scan", "prefix"): {"lru": 4886, "lfu": 6643},
    ("shift", "prefix"): {"lru": 6812, "lfu": 7064},
    ("mixture", "prefix"): {"lru": 6922, "lfu": 7233},
}


class NaiveTier:
    """LRU in the plainest words: the longest unused of what nothing stands on."""

    def __init__(self, capacity, weight, admits=lambda key: True):
        self.capacity, self.weight, self.admits = capacity, weight, admits
        self.used = {}  # key -> time of its last use
        self.parent = {}  # key -> what it was put on
        self.time = 0

    def touch(self, key):
        self.time += 1
        self.used[key] = self.time

    def put(self, key, parent):
        """What had to go, or None."""
        if not self.admits(key):
            return None
        parent = parent if parent in self.used else None
        held, above = set(), parent
        while above is not None:
            held.add(above)
            above = self.parent[above]
        kept, gone = dict(self.used), []
        while sum(map(self.weight, kept)) + self.weight(key) > self.capacity:
            needed = {self.parent[each] for each in kept} | held
            free = [each for each in kept if each not in needed]
            if not free:
                return None
            gone.append(min(free, key=kept.__getitem__))
            del kept[gone[-1]]
        self.used = kept
        self.parent[key] = parent
        self.touch(key)
        return gone


def naive_prefix_hits(requests, tier):
    hits = 0
    for request in requests:
        prefixes = [tuple(request[: end + 1]) for end in range(len(request))]
        matching = True
        for key in prefixes:
            matching = matching and key in tier.used
            if matching:
                hits += 1
                tier.touch(key)
            elif tier.put(key, key[:-1]) is None:
                break
    return hits


def naive_content_hits(requests, tier):
    hits = 0
    for key in chain.from_iterable(requests):
        if key in tier.used:
            hits += 1
            tier.touch(key)
        else:
            tier.put(key, None)
    return hits


class Picky(AdmissionPolicy):
    """Declines some keys, always the same."""

    def admit(self, key, weight=1, cost=1.0):
        assert weight == cost
        return key % 4 != 1


def numbering(requests):
    """Prefix -> the number that `as_blocks` gives it."""
    numbers = {}
    for request in requests:
        for end in range(len(request)):
            numbers.setdefault(tuple(request[: end + 1]), len(numbers))
    return numbers


REQUESTS = st.lists(st.lists(st.integers(0, 4), max_size=6), min_size=1, max_size=25).filter(any)
WEIGHTS = st.lists(st.integers(1, 3), min_size=5, max_size=5)


@pytest.mark.parametrize("semantics", ["prefix", "content"])
@given(requests=REQUESTS, weights=WEIGHTS, capacity=st.integers(1, 14), picky=st.booleans())
@settings(max_examples=150, deadline=None)
def test_one_tier_against_a_naive_model(semantics, requests, weights, capacity, picky):
    numbers = numbering(requests)
    if semantics == "prefix":
        naive, block, number = naive_prefix_hits, lambda key: key[-1], numbers.__getitem__
    else:
        naive, block, number = naive_content_hits, lambda key: key, lambda key: key
    tier = NaiveTier(capacity, lambda key: weights[block(key)], lambda key: not picky or number(key) % 4 != 1)
    done = replay(Trace("", requests, weights), "lru", capacity, Picky() if picky else None, semantics)
    assert done.hits == naive(requests, tier) and done.references == sum(map(len, requests))


@given(requests=REQUESTS, weights=WEIGHTS, upper=st.integers(1, 10), lower=st.integers(1, 14), picky=st.booleans())
@settings(max_examples=150, deadline=None)
def test_two_tiers_against_a_naive_model(requests, weights, upper, lower, picky):
    numbers = numbering(requests)
    first = NaiveTier(upper, lambda key: weights[key[-1]])
    second = NaiveTier(lower, first.weight, lambda key: not picky or numbers[key] % 4 != 1)
    hits = [0, 0]

    def fetch(key):
        gone = first.put(key, key[:-1])
        for victim in gone or ():
            if victim not in second.used:
                second.put(victim, victim[:-1])
        return gone is not None

    for request in requests:
        matching = True
        for end in range(1, len(request) + 1):
            key = tuple(request[:end])
            holders = [n for n, tier in enumerate((first, second)) if key in tier.used]
            matching = matching and bool(holders)
            for n in holders if matching else ():
                (first, second)[n].touch(key)
            if key not in first.used and not fetch(key):
                break
            if matching:
                hits[holders[0]] += 1
    tiers = [
        Tier("memory", make_policy("lru"), upper),
        Tier("disk", make_policy("lru"), lower, Picky() if picky else None),
    ]
    assert replay_tiers(as_blocks(Trace("", requests, weights)), tiers).hits == hits


@pytest.mark.parametrize("semantics", ["prefix", "content"])
@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_one_tier_is_a_cache(policy, semantics):
    blocks = as_blocks(generate_trace("mixture", requests=300), semantics)
    tier = Tier("memory", make_compared(policy), 200)
    assert replay_tiers(blocks, [tier]).hits == [replay(blocks, policy, 200).hits]


@pytest.mark.parametrize(("kind", "semantics"), GOLDEN)
def test_golden_counts(kind, semantics):
    blocks = as_blocks(generate_trace(kind, 1, requests=800), semantics)
    room = len(blocks.weights) // 20
    pinned = GOLDEN[kind, semantics]
    assert {policy: replay(blocks, policy, room).hits for policy in pinned} == pinned


@pytest.mark.parametrize("policy", sorted(COMPARED))
def test_a_cache_that_holds_everything_misses_each_block_once(policy):
    blocks = as_blocks(generate_trace("rag", requests=200))
    assert replay(blocks, policy, len(blocks.weights)).hits == blocks.references - len(blocks.weights)
    assert replay(blocks, policy, 0).hits == 0


def test_progress_counts_the_requests():
    blocks = as_blocks(generate_trace("shift", requests=700))
    for replayed in (
        lambda progress: replay(blocks, "lru", 100, progress=progress),
        lambda progress: replay_tiers(blocks, [Tier("memory", make_policy("lru"), 100)], progress),
    ):
        done = []
        replayed(done.append)
        assert sum(done) == 700 and len(done) > 1


def brute_force(blocks, capacity):
    """The most hits of all ways to keep and drop blocks after each reference."""
    best = {frozenset(): 0}  # what is cached -> the most hits that lead there
    for request in blocks.requests:
        best = {(cached, True): hits for cached, hits in best.items()}
        for key in request:
            following = {}
            for (cached, matching), hits in best.items():
                hit = matching and key in cached
                matching = hit or not blocks.chained
                for size in range(len(cached | {key}) + 1):
                    for kept in map(frozenset, combinations(sorted(cached | {key}), size)):
                        if sum(blocks.weights[each] for each in kept) <= capacity:
                            state = kept, matching
                            following[state] = max(following.get(state, 0), hits + hit)
            best = following
        merged = {}
        for (cached, _), hits in best.items():
            merged[cached] = max(merged.get(cached, 0), hits)
        best = merged
    return max(best.values())


TINY = st.lists(st.lists(st.integers(0, 2), max_size=3), min_size=1, max_size=5).filter(any)


@given(
    requests=TINY,
    weights=st.lists(st.integers(1, 3), min_size=3, max_size=3) | st.just([2, 2, 2]),
    capacity=st.integers(0, 8),
    semantics=st.sampled_from(["prefix", "content"]),
)
@settings(max_examples=240, deadline=None)
def test_the_bound_is_what_brute_force_finds_and_holds_for_unequal_weights(requests, weights, capacity, semantics):
    blocks = as_blocks(Trace("", requests, weights), semantics)
    bound, best = most_hits(blocks, capacity), brute_force(blocks, capacity)
    assert bound >= best and (bound == best or weights != [2, 2, 2])


@pytest.mark.parametrize("policy", sorted(COMPARED))
@given(
    requests=REQUESTS,
    weights=WEIGHTS | st.just([1] * 5),
    capacity=st.integers(1, 14),
    semantics=st.sampled_from(["prefix", "content"]),
)
@settings(max_examples=60, deadline=None)
def test_no_policy_beats_the_bound(policy, requests, weights, capacity, semantics):
    blocks = as_blocks(Trace("", requests, weights), semantics)
    assert replay(blocks, policy, capacity).hits <= most_hits(blocks, capacity)


@given(requests=REQUESTS, weights=WEIGHTS, upper=st.integers(1, 8), lower=st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_no_stack_beats_the_bound_for_its_room_together(requests, weights, upper, lower):
    blocks = as_blocks(Trace("", requests, weights))
    tiers = [Tier("memory", make_policy("lru"), upper), Tier("disk", make_policy("lfu"), lower)]
    assert sum(replay_tiers(blocks, tiers).hits) <= most_hits(blocks, upper + lower)


@pytest.mark.skipif(not MOONCAKE.exists(), reason="no Mooncake trace beside the repository")
def test_the_published_figures_of_the_mooncake_trace():
    blocks = as_blocks(read_trace(MOONCAKE))
    assert (len(blocks.requests), blocks.references, len(blocks.weights)) == (12_031, 288_500, 182_790)
    one_percent, all_of_it = len(blocks.weights) // 100, len(blocks.weights)
    assert replay(blocks, "lru", one_percent).hits / blocks.references == pytest.approx(0.053, abs=0.001)
    assert most_hits(blocks, one_percent) / blocks.references == pytest.approx(0.246, abs=0.0005)
    assert most_hits(blocks, all_of_it) == blocks.references - all_of_it
