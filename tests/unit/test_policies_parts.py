"""What policies are made of: marks, ghosts, the frequency sketch, and the table of reuse."""

import random
from collections import Counter
from math import inf

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from ragkv.policies.ghosts import Ghosts, mark
from ragkv.policies.reuse import BUCKETS, ReuseTable, bucket
from ragkv.policies.sketch import FrequencySketch


class Named:
    def __init__(self, key):
        self.key = key


def test_marks_never_change():
    assert mark(7) == 0x63CBE1E459320DD7
    assert mark(b"chunk") == 0xBC855857015DD189
    assert mark("chunk") == 0x967084F69FB29A7F
    assert mark(Named(b"chunk")) == mark(Named(b"chunk")) == mark(b"chunk")


def test_marks_of_near_keys_are_far_apart():
    marks = {mark(number) for number in range(10_000)} | {mark(b"%d" % number) for number in range(10_000)}
    assert len(marks) == 20_000
    for shift in (0, 16, 32, 48):
        counts = Counter(bits >> shift & 15 for bits in marks)
        assert len(counts) == 16 and max(counts.values()) < 1.2 * 20_000 / 16


@pytest.mark.parametrize("key", [None, 1.5, ("a", 1), Named(None)])
def test_a_key_without_a_stable_mark_is_refused(key):
    with pytest.raises(TypeError, match="allowed: bytes, str, int, or an object with such an attribute `key`"):
        mark(key)


def test_ghosts_forget_the_oldest_first():
    ghosts = Ghosts()
    for bits, weight in ((1, 5), (2, 1), (3, 2), (1, 5)):
        ghosts.add(bits, weight)
    assert (len(ghosts), ghosts.weight) == (3, 8)
    ghosts.trim(7, 3)
    assert 2 not in ghosts and ghosts.weight == 7
    ghosts.trim(7, 1)
    assert 3 not in ghosts and ghosts.weight == 5
    assert ghosts.discard(1) and not ghosts.discard(1) and ghosts.weight == 0


@given(st.lists(st.integers(0, 30), max_size=150))
@settings(deadline=None)
def test_a_sketch_counts_no_key_too_low(keys):
    sketch, counts = FrequencySketch(64), Counter()
    for key in keys:
        counts[key] += 1
        estimate = sketch.add(mark(key))
        assert min(counts[key], 15) <= estimate <= 15
    for key, count in counts.items():
        assert sketch.estimate(mark(key)) >= min(count, 15)


def test_a_wider_sketch_still_knows():
    sketch = FrequencySketch(16)
    for key in range(10):
        for _ in range(key):
            sketch.add(mark(key))
    before = [sketch.estimate(mark(key)) for key in range(40)]
    sketch.widen(100)
    assert sketch.width == 128
    assert [sketch.estimate(mark(key)) for key in range(40)] == before


def test_a_sketch_forgets_by_halves():
    sketch = FrequencySketch(16)
    for _ in range(12):
        sketch.add(mark("old"))
    for number in range(40):
        sketch.add(mark(number % 20))
    assert sketch.estimate(mark("old")) <= 8


def test_ages_fall_into_buckets_in_order():
    found = [bucket(age) for age in range(5000)]
    assert found[:16] == list(range(16)) and found == sorted(found)
    assert set(found) == set(range(found[-1] + 1)), "a bucket is skipped"
    assert bucket(1 << 40) == BUCKETS - 1


def test_what_returns_after_a_pause_is_worth_most_before_its_end():
    table = ReuseTable()
    table.waits = 10.0
    table.reused[bucket(1000)] = 4.0
    table.rebuild()
    index = [table.index[bucket(age)] for age in (1, 500, 900, 1100, 5000)]
    assert index[0] < index[1] < index[2] and index[3:] == [0.0, 0.0]
    assert index[0] == pytest.approx(0.4 / 1000, rel=0.2)


def brute_force(time, hits, at):
    """The best slope from `at` on, by trying every end."""
    slopes = [
        (hits[end] - hits[at]) / (time[end] - time[at]) for end in range(at + 1, len(time)) if time[end] > time[at]
    ]
    return max(slopes, default=0.0)


@pytest.mark.parametrize("seed", range(20))
def test_the_index_is_the_best_of_all_plans(seed):
    chance = random.Random(seed).random
    prior = ReuseTable()
    table = ReuseTable(prior)
    for each in (prior, table):
        each.waits = 1 + 50 * chance()
        for at in range(BUCKETS):
            each.reused[at] = chance() ** 8 * each.waits / 4
    span = (inf, 3000, 70)[seed % 3]
    table.rebuild(span)
    time, hits = table.expect(span)
    assert table.index == pytest.approx([brute_force(time, hits, at) for at in range(BUCKETS)])


def test_where_little_was_seen_the_prior_speaks():
    prior = ReuseTable()
    prior.waits = 1000.0
    prior.reused[bucket(100)] = 500.0
    table = ReuseTable(prior)
    assert table.index[bucket(50)] > 0
    table.waits = 10_000.0
    table.rebuild()
    assert table.index[bucket(50)] < 0.05 * prior.reused[bucket(100)] / 1000 / 50


def test_what_can_hardly_have_been_seen_yet_stands_for_more():
    table = ReuseTable()
    table.waits = 100.0
    table.reused[bucket(900)] = 5.0
    worth = []
    for span in (inf, 10_000, 1800, 1000, 100):
        table.rebuild(span)
        worth.append(table.index[0])
    assert worth == sorted(worth) and worth[2] == pytest.approx(2 * worth[0], rel=0.05)
    assert worth[3] == worth[4] == pytest.approx(4 * worth[0], rel=0.15), "four times at most"


def test_tables_add_up_and_fade():
    tables = [ReuseTable(), ReuseTable()]
    for count, table in enumerate(tables, start=1):
        table.waits = 10.0 * count
        table.reused[3] = float(count)
    total = ReuseTable()
    total.add_up(tables)
    assert (total.waits, total.reused[3]) == (30.0, 3.0)
    total.fade(0.5)
    assert (total.waits, total.reused[3]) == (15.0, 1.5)
