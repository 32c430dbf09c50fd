"""Values of settings: how sizes are read, and what is said of values that cannot be."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from config_tools import ADMISSION_KEYS, EXTRA, PINNED, POLICY_KEYS, SIZE_KEYS, fault
from ragkv.config import load
from ragkv.config.settings import UNITS, format_size, parse_size
from ragkv.policies import ADMISSIONS, POLICIES

SECONDS_KEYS = ["redis.timeout", "placement.deadline", "placement.flush"]
FLAG_KEYS = ["disk.fsync", "disk.shared", "placement.gate"]
TEXT_KEYS = ["disk.path", "redis.url", "redis.prefix", "trace.file", "control.token_file"]


@pytest.mark.parametrize(
    "key", [*(key for key in PINNED if key.endswith("_tokens")), "device.after", "memory.priorities"]
)
@pytest.mark.parametrize(
    "value", [True, False, 64.0, 64.5, [64], {"a": 1}, None, "many", "", "64KiB", 0, -1, 10**9]
)
def test_wrong_counts_are_refused(key, value):
    section, name = key.split(".")
    message = fault({section: {name: value}})
    assert f"{key} = {value!r} (from {EXTRA}): allowed: " in message


@pytest.mark.parametrize("key", SIZE_KEYS)
@pytest.mark.parametrize(
    "value", [True, 1e9, [1], None, "", "GiB", "4G", "4 gibi", "-1GiB", "1e9", "1 2", "٤ parsecs"]
)
def test_wrong_sizes_are_refused(key, value):
    section, name = key.split(".")
    message = fault({section: {name: value}})
    assert f"{key} = {value!r} (from {EXTRA}): allowed: a whole number of bytes, or" in message


@pytest.mark.parametrize("key", ["memory.capacity", "disk.capacity", "placement.queue", "transfer.staging"])
@pytest.mark.parametrize("value", [0, -1, 1023 * 1024, "1MB"])
def test_sizes_have_a_least_value(key, value):
    section, name = key.split(".")
    size = parse_size(value)
    shown = size if size <= 0 or size % 1024 else format_size(size)
    said = f"{key} = {shown} (from {EXTRA}): allowed: at least 1MiB"
    assert fault({section: {name: value}}) == f"ragkv: {said}"


def test_other_sizes_have_other_bounds():
    assert "allowed: at least 0" in fault({"device": {"capacity": -1}})
    assert "allowed: at least 1KiB" in fault({"redis": {"max_value": 1023}})
    assert "allowed: at most 512MiB" in fault({"redis": {"max_value": "1GiB"}})
    assert load({"redis": {"max_value": "512MiB"}}, {}).settings.redis.max_value == 2**29


@pytest.mark.parametrize("key", POLICY_KEYS)
@pytest.mark.parametrize("value", ["mru", "", "LRU", 5, None, ["lru"], {"lru": 1}])
def test_wrong_policies_are_refused(key, value):
    section, name = key.split(".")
    said = f"allowed: {', '.join(sorted(POLICIES))}"
    assert fault({section: {name: value}}) == f"ragkv: {key} = {value!r} (from {EXTRA}): {said}"


@pytest.mark.parametrize("key", ADMISSION_KEYS)
@pytest.mark.parametrize("value", ["never", "", 5, None, ["always"]])
def test_wrong_admissions_are_refused(key, value):
    section, name = key.split(".")
    said = f"allowed: {', '.join(sorted(ADMISSIONS))}"
    assert fault({section: {name: value}}) == f"ragkv: {key} = {value!r} (from {EXTRA}): {said}"


@pytest.mark.parametrize("key", SECONDS_KEYS)
@pytest.mark.parametrize(
    "value", [True, False, None, "", "soon", "1s", [1], -1, -0.001, 1e10, float("nan"), float("inf"), "nan", "inf"]
)
def test_wrong_seconds_are_refused(key, value):
    section, name = key.split(".")
    assert f"{key} = {value!r} (from {EXTRA}): allowed: " in fault({section: {name: value}})


def test_seconds_have_bounds():
    assert "allowed: greater than 0" in fault({"redis": {"timeout": 0}})
    assert "allowed: less than or equal to 60" in fault({"placement": {"deadline": 60.5}})
    assert "allowed: less than or equal to 600" in fault({"placement": {"flush": 601}})


@pytest.mark.parametrize("key", FLAG_KEYS)
@pytest.mark.parametrize("value", [None, "", "maybe", 2, 0.5, [], {}])
def test_wrong_flags_are_refused(key, value):
    section, name = key.split(".")
    assert f"{key} = {value!r} (from {EXTRA}): allowed: " in fault({section: {name: value}})


@pytest.mark.parametrize("key", ["disk.write", "redis.write"])
@pytest.mark.parametrize("value", ["", "Through", "around", 1, True, None])
def test_wrong_ways_of_writing_are_refused(key, value):
    section, name = key.split(".")
    said = "allowed: 'through' or 'back'"
    assert fault({section: {name: value}}) == f"ragkv: {key} = {value!r} (from {EXTRA}): {said}"


@pytest.mark.parametrize("key", TEXT_KEYS)
@pytest.mark.parametrize("value", ["", 7, True, ["a"], {"a": 1}, b"/tmp/bytes\xff"])
def test_wrong_texts_are_refused(key, value):
    section, name = key.split(".")
    assert f"{key} = {value!r} (from {EXTRA}): allowed: " in fault({section: {name: value}})


@pytest.mark.parametrize("value", ["x" * 61, "a b", "a\n", "a{b", "a}b", "é", "a\x7f"])
def test_a_prefix_is_short_and_printable(value):
    said = "allowed: 1 to 60 printable ASCII characters but space, { and }"
    assert fault({"redis": {"prefix": value}}) == f"ragkv: redis.prefix = {value!r} (from {EXTRA}): {said}"
    for good in ("x" * 60, "team:a/b|~!"):
        assert load({"redis": {"prefix": good}}, {}).settings.redis.prefix == good


@pytest.mark.parametrize("value", [True, 0.5, -1, None, "1d", 10**9])
def test_a_value_in_redis_is_kept_for_whole_seconds(value):
    assert f"redis.ttl = {value!r} (from {EXTRA}): allowed: " in fault({"redis": {"ttl": value}})


@pytest.mark.parametrize("value", ["kv", "./kv", "../kv", "~", "~other/kv", "C:/kv"])
def test_a_path_on_disk_is_absolute(value):
    said = "allowed: an absolute path of a folder"
    assert fault({"disk": {"path": value}}) == f"ragkv: disk.path = {value!r} (from {EXTRA}): {said}"


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**63 - 1) | st.integers(0, 2**30).map(lambda n: n * 2**20))
def test_sizes_survive_the_round_trip(size):
    assert parse_size(format_size(size)) == size
    assert parse_size(size) == parse_size(str(size)) == size


@given(st.integers(2**63, 2**80))
def test_sizes_have_a_cap(size):
    for each in (size, str(size), format_size(size)):
        with pytest.raises(ValueError, match="allowed: "):
            parse_size(each)


@given(st.integers(0, 10**6), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " ", "  "]))
def test_sizes_are_read_in_any_case_and_spacing(number, unit, space):
    for text in (f"{number}{space}{unit}", f" {number}{space}{unit.lower()} ", f"{number}.0{space}{unit.upper()}"):
        assert parse_size(text) == number * UNITS[unit]


@pytest.mark.parametrize(
    ("text", "size"),
    [("0.5KiB", 512), ("1.5 GB", 1_500_000_000), ("2TiB", 2**41), ("9007199254740993", 2**53 + 1), ("0B", 0)],
)
def test_sizes_are_exact(text, size):
    assert parse_size(text) == size
