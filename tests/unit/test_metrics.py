"""The list of metrics, and the recorder."""

import re

import hypothesis.strategies as st
import msgpack
import pytest
from hypothesis import given, settings

from ragkv.kvstore import metrics as m
from ragkv.kvstore.breaker import State
from ragkv.kvstore.metrics import METRICS, Metrics, merge, split

UNITS = {"gauge": ("_bytes", "_pages", "_chunks", "_state"), "counter": ("_total",), "histogram": ("_seconds",)}
COUNTERS = [(m.LOOKUPS, {"result": "hit"}), (m.LOOKUPS, {"result": "miss"}), (m.STORED_TOKENS, {})]
HISTOGRAMS = [(m.LOAD_SECONDS, {}), (m.READ_SECONDS, {"tier": "disk"}), (m.READ_SECONDS, {"tier": "redis"})]
GAUGES = [(m.USED_BYTES, {"tier": "memory"}), (m.USED_BYTES, {"tier": "disk"})]


def test_every_constant_is_listed_and_every_listed_name_has_a_constant():
    named = {value for name, value in vars(m).items() if name.isupper() and str(value).startswith("ragkv_")}
    assert named == set(METRICS)


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_names_carry_their_unit(metric):
    assert re.fullmatch(r"ragkv_[a-z]+(_[a-z]+)*", metric.name)
    assert metric.name.endswith(UNITS[metric.kind])
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert metric.text.endswith(".") and len(set(metric.labels)) == len(metric.labels)


def test_a_state_says_what_its_numbers_mean():
    """It has no unit; the numbers are the breaker's, and yes and no."""
    told = {State.CLOSED: "in use", State.HALF_OPEN: "on trial", State.OPEN: "at rest"}
    texts = {
        m.TIER_STATE: {state.value: text for state, text in told.items()},
        m.GATE_STATE: {0: "none", 1: "all"},
    }
    assert {name for name in METRICS if name.endswith("_state")} == texts.keys()
    for name, meanings in texts.items():
        assert all(f"{number} {text}" in METRICS[name].text for number, text in meanings.items())


@pytest.mark.parametrize(
    ("name", "label", "values"),
    [
        (m.EVICTED_CHUNKS, "reason", (m.CAPACITY, m.RESET, m.SUPERSEDED, m.ABANDONED, m.EXPIRED)),
        (m.REFUSED_CHUNKS, "reason", (m.NO_ROOM, m.COLLISION, m.ADMISSION)),
        (m.UNWRITTEN_CHUNKS, "reason", (m.RESTING, m.THROTTLED, m.ADMISSION, m.NO_ROOM)),
    ],
)
def test_the_text_lists_what_a_label_may_be(name, label, values):
    metric = METRICS[name]
    assert label in metric.labels
    assert f"({', '.join(values)})" in metric.text


def test_buckets_ascend():
    assert list(m.SECONDS) == sorted(set(m.SECONDS))


def test_unknown_names_are_refused():
    metrics = Metrics()
    for record in (metrics.count, metrics.gauge, metrics.observe):
        with pytest.raises(KeyError):
            record("ragkv_nonsense_total", 1)
    assert metrics.drain() == {}


@pytest.mark.parametrize(
    ("method", "name", "labels"),
    [
        ("count", m.LOOKUPS, {}),
        ("count", m.LOOKUPS, {"result": "hit", "tier": "memory"}),
        ("count", m.LOOKUPS, {"results": "hit"}),
        ("count", m.STORED_TOKENS, {"tier": "memory"}),
        ("count", m.EVICTED_CHUNKS, {"reason": m.CAPACITY}),
        ("gauge", m.TIER_STATE, {"tier": "disk"}),
        ("observe", m.READ_SECONDS, {}),
        ("count", m.USED_BYTES, {"tier": "memory"}),
        ("count", m.LOAD_SECONDS, {}),
        ("gauge", m.LOOKUPS, {"result": "hit"}),
        ("observe", m.STORED_TOKENS, {}),
    ],
)
def test_wrong_labels_and_kinds_are_refused(method, name, labels):
    metrics = Metrics()
    with pytest.raises(ValueError, match=name):
        getattr(metrics, method)(name, 1, **labels)
    assert metrics.drain() == {}


def test_drain_gives_what_came_since():
    metrics = Metrics()
    metrics.count(m.LOOKUPS, result="hit")
    metrics.count(m.LOOKUPS, 2, result="hit")
    metrics.gauge(m.USED_PAGES, 5, tier=m.MEMORY)
    metrics.gauge(m.USED_PAGES, 7, tier=m.MEMORY)
    metrics.observe(m.LOAD_SECONDS, 0.5)
    metrics.observe(m.LOAD_SECONDS, 0.25)
    first = metrics.drain()
    assert {split(key)[0]: value for part in first.values() for key, value in part.items()} == {
        m.LOOKUPS: 3,
        m.USED_PAGES: 7,
        m.LOAD_SECONDS: [0.5, 0.25],
    }
    assert metrics.drain() == {}
    metrics.gauge(m.USED_PAGES, 7, tier=m.MEMORY)
    assert metrics.drain() == {}, "an unchanged gauge is not sent again"
    metrics.gauge(m.USED_PAGES, 8, tier=m.MEMORY)
    metrics.count(m.STORED_TOKENS)
    assert metrics.drain().keys() == {"gauges", "counters"}
    assert list(first["seconds"].values()) == [[0.5, 0.25]], "what was drained does not change any more"


def test_split_gives_the_labels_in_order():
    metrics = Metrics()
    metrics.count(m.EVICTED_CHUNKS, reason=m.CAPACITY, tier=m.DISK)
    metrics.count(m.STORED_TOKENS)
    (evicted, stored) = metrics.drain()["counters"]
    assert split(evicted) == (m.EVICTED_CHUNKS, [m.DISK, m.CAPACITY])
    assert split(stored) == (m.STORED_TOKENS, [])


records = st.one_of(
    st.tuples(st.just("count"), st.sampled_from(COUNTERS), st.integers(1, 9)),
    st.tuples(st.just("gauge"), st.sampled_from(GAUGES), st.integers(0, 9)),
    st.tuples(st.just("observe"), st.sampled_from(HISTOGRAMS), st.floats(0, 10)),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(records, max_size=8), max_size=5))
def test_merged_drains_equal_one_drain(intervals):
    """Through msgpack, as vLLM sends them between processes."""
    parts, whole, merged = Metrics(), Metrics(), {}
    for interval in intervals:
        for method, (name, labels), value in interval:
            getattr(parts, method)(name, value, **labels)
            getattr(whole, method)(name, value, **labels)
        drained = parts.drain()
        received = msgpack.unpackb(msgpack.packb(drained))
        assert received == drained
        merge(merged, received)
    assert {part: values for part, values in merged.items() if values} == whole.drain()


def test_merge_leaves_its_second_argument_alone():
    into, more = {"seconds": {"a": [1.0]}}, {"seconds": {"a": [2.0], "b": [3.0]}}
    merge(into, more)
    merge(into, more)
    assert into["seconds"] == {"a": [1.0, 2.0, 2.0], "b": [3.0, 3.0]}
    assert more == {"seconds": {"a": [2.0], "b": [3.0]}}
