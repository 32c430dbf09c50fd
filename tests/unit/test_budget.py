"""A tier on a file system that is smaller than its budget, or that others fill: simulated, and a real one."""

import os
import subprocess
import sys
import time

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from hand_lanes import Bench, HandClock, Lower, key
from memory_store import MemoryStore
from ragkv.errors import StoreError
from ragkv.kvstore import metrics as m
from ragkv.kvstore.budget import LOOK_SECONDS, MOST_FILES, MOST_RESERVE, PATIENCE_SECONDS, Budget, Index, there
from ragkv.kvstore.io_pool import Completions, Lane, Write
from ragkv.kvstore.metrics import Metrics
from ragkv.kvstore.storage_tier import StorageTier
from ragkv.kvstore.stores.contract import Room
from ragkv.kvstore.stores.disk import DiskStore
from ragkv.policies import Always, make_policy

GIB = 1 << 30


class SmallStore(MemoryStore):
    """Values on a file system of `total` bytes and `all_files` files, of which others take `others` bytes and
    `strange` files, and a quota that nothing tells of leaves `quota` bytes to us."""

    def __init__(self, total, all_files=None):
        super().__init__()
        self.total, self.all_files, self.quota = total, all_files, total
        self.others = self.strange = 0

    def used(self):
        return sum(len(value) for value, _ in self.values.values())

    def put(self, key, parts):
        size = sum(map(len, parts)) - len(self.values.get(key, (b"",))[0])
        new = key not in self.values
        if self.used() + size > min(self.quota, self.total - self.others):
            raise StoreError("full", "no space left on device")
        if new and self.all_files is not None and len(self.values) + self.strange + 1 > self.all_files:
            raise StoreError("full", "no space left on device")
        super().put(key, parts)

    def room(self):
        free = max(0, self.total - self.others - self.used())
        if self.all_files is None:
            return Room(free, self.total)
        return Room(free, self.total, max(0, self.all_files - self.strange - len(self.values)), self.all_files)


def bench_on(store, capacity=1 << 40):
    lines = []
    lower = Lower(values=store, capacity=capacity, say=lines.append)
    bench = Bench(lower)
    bench.lines, bench.number = lines, 0
    return bench


def write(bench, size=100):
    """A new value, and time for what follows; whether it is kept."""
    bench.number += 1
    bench.clock.now += 1
    bench.tier.tick()
    bench.write(key(bench.number), bytes(size))
    bench.settle()
    return key(bench.number) in bench.values()


def look(bench, times=2):
    for _ in range(times):
        bench.clock.now += LOOK_SECONDS
        bench.tier.tick(), bench.settle()


def crowd(bench, wanted):
    """Others take what is free, look after look, until they have what they want."""
    store = bench.lower.values
    for _ in range(30):
        store.others = min(wanted, store.total - store.used())
        look(bench, 1)


def check(bench):
    assert bench.index.keys() == bench.values().keys()
    bench.lower.check()


# --- the arithmetic ---


def test_a_twentieth_at_most_1_gib_is_left_to_others():
    assert there(Room(1000, 1000), 0, 0) == (950, sys.maxsize)
    assert there(Room(300, 1000), 200, 4)[0] == 450, "what is held is there too"
    assert there(Room(900 * GIB, 1000 * GIB), 0, 0)[0] == 900 * GIB - MOST_RESERVE
    assert there(Room(10, 1000), 0, 0)[0] == 0


def test_files_run_out_too():
    assert there(Room(1000, 1000, 60, 100), 200, 4) == (1150, 59)
    assert there(Room(1000, 1000, 1, 100), 200, 4)[1] == 0, "the reserve is gone"
    assert there(Room(1000, 1000, 10, 10), 0, 0)[1] == 9, "one is for what is being written"
    assert there(Room(1000, 1000, 10**9, 10**9), 0, 0)[1] == 10**9 - MOST_FILES


# --- a tier ---


def test_a_file_system_smaller_than_the_budget_goes_on():
    store = SmallStore(2000)
    bench = bench_on(store)
    assert all(write(bench) for _ in range(200)), "each new value is kept"
    assert 1700 < store.used() <= 1900 and not bench.metrics.get(m.TIER_ERRORS, "disk", "full")
    assert bench.metrics.get(m.CAPACITY_BYTES, "disk") == bench.index.capacity == 1900
    assert len(bench.lines) == 1 and "disk tier: room for 0 MiB of 1048576 MiB" in bench.lines[0]
    check(bench)


def test_few_files_go_on_too():
    store = SmallStore(10**6, all_files=40)
    bench = bench_on(store)
    assert sum(write(bench) for _ in range(200)) > 195
    assert 30 < len(store.values) <= 38 and "38 files" in bench.lines[-1] and len(bench.lines) == 2
    assert write(bench, 3000) and all(write(bench, 1) for _ in range(50)), "of whatever size"
    check(bench)


def test_what_was_there_before_counts_as_ours():
    store = SmallStore(2000)
    for number in range(1000, 1015):
        store.put(key(number), [bytes(100)])
    bench = bench_on(store)
    assert len(bench.index) == 15 and bench.index.capacity == 1900, "nothing had to go for a start"


def test_others_fill_the_file_system_and_leave_it_again():
    store = SmallStore(2000)
    bench = bench_on(store)
    for _ in range(30):
        write(bench)
    crowd(bench, 1000)
    assert store.others == 1000 and 800 <= store.used() <= 900 and len(bench.lines) == 2, (
        "less than half of what was told"
    )
    assert all(write(bench) for _ in range(20))
    crowd(bench, 2000)
    assert not store.values and not write(bench)
    store.others = 0
    look(bench)
    assert all(write(bench) for _ in range(30)) and store.used() > 1700
    check(bench)


def test_others_that_fill_it_at_once_cost_no_more_than_was_lacking():
    store = SmallStore(2000)
    bench = bench_on(store)
    for _ in range(30):
        write(bench)
    store.others = 2000 - store.used()  # before anybody has looked
    write(bench)
    assert 1500 < store.used() <= 1900
    look(bench)
    assert write(bench)
    check(bench)


def test_a_quota_that_nothing_tells_of():
    store = SmallStore(10**6)
    store.quota = 2000
    bench = bench_on(store)
    kept = [write(bench) for _ in range(600)]
    assert sum(kept[300:]) > 270, "refused now and then, when more is tried"
    assert store.used() > 1000
    store.quota = 10**6
    for _ in range(15):
        bench.clock.now += PATIENCE_SECONDS
        bench.tier.tick(), bench.settle()
    assert bench.index.capacity > 10**5, "it grows again"
    check(bench)


def test_one_refusal_of_many_queued_writes_counts_once():
    store = SmallStore(10**6)
    bench = bench_on(store)
    for number in range(1, 101):
        bench.keep(key(number), bytes(100))
    store.quota = store.used()
    for number in range(200, 260):
        bench.write(key(number), bytes(100))
    bench.settle()
    assert len(store.values) >= 98, "and not one for each that was refused"
    check(bench)


def test_a_file_system_that_tells_late_of_what_is_free_again():
    """It is not all evicted for that."""
    store = SmallStore(2000)
    bench = bench_on(store)
    for _ in range(30):
        write(bench)
    late = store.room()
    store.room = lambda: late._replace(free=50)  # lacks 50, and goes on lacking them
    before = bench.clock.now
    for _ in range(40):
        bench.clock.now += 0.1
        bench.number += 1
        bench.write(key(bench.number), bytes(100)), bench.settle()
        bench.tier.tick(), bench.settle()
    assert bench.clock.now < before + LOOK_SECONDS and store.used() >= 1700


def test_who_only_reads_gives_nothing_up():
    store = SmallStore(2000)
    for number in range(1000, 1019):
        store.put(key(number), [bytes(100)])
    bench = Bench(Lower(values=store, capacity=1 << 40, may_write=False))
    store.others = 2000
    look(bench)
    assert len(store.values) == len(bench.index) == 19


def test_no_more_than_one_look_waits():
    bench = bench_on(SmallStore(2000))
    bench.lower.writes.hangs = True
    for _ in range(50):
        bench.clock.now += LOOK_SECONDS
        bench.tier.tick()
    assert len(bench.lower.writes.jobs) <= 1
    bench.lower.writes.hangs = False


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("write"), st.integers(1, 400)),
            st.tuples(st.just("others"), st.integers(0, 4000)),
            st.tuples(st.just("strange"), st.integers(0, 60)),
            st.tuples(st.just("quota"), st.integers(0, 4000)),
            st.tuples(st.just("wait"), st.integers(1, 40)),
        ),
        max_size=60,
    )
)
def test_whatever_room_there_was_it_is_used_once_there_is_some(steps):
    store = SmallStore(4000, all_files=60)
    bench = bench_on(store)
    for what, number in steps:
        if what == "write":
            write(bench, number)
        elif what == "wait":
            bench.clock.now += number
            bench.tier.tick(), bench.settle()
        else:
            setattr(store, what, number)
        bench.index.check_integrity()
    store.others, store.strange, store.quota = 1000, 0, 4000
    for _ in range(20):
        bench.clock.now += PATIENCE_SECONDS
        bench.tier.tick(), bench.settle()
    for _ in range(60):
        write(bench)
    assert sum(write(bench) for _ in range(10)) >= 9
    assert 2000 < store.used() <= 3000
    check(bench)


def test_steps_of_a_budget_double_until_it_is_what_was_set():
    clock, index = HandClock(), Index(10_000, make_policy("lru"))
    budget = Budget(index, clock, lambda text: None)
    for number in range(50):
        index.add(key(number), 100, None, 1.0)
    assert budget.refused(None, 5000, 50, 100) == [key(0)] and index.capacity == 4900
    steps = 0
    while index.capacity < 10_000:
        assert budget.grow() == [], "not yet"
        clock.now += PATIENCE_SECONDS
        budget.grow()
        steps += 1
    assert steps == 6  # 4900 + 100 + 200 + 400 + 800 + 1600 + 3200


# --- a real file system ---


@pytest.fixture(params=["size=24m", "size=64m,nr_inodes=20"])
def small(tmp_path, request):
    """A folder on a file system with that little room."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", request.param, "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system is mounted here: needs root, and the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_small_file_system_goes_on(small):
    store, completions, lines, kept = DiskStore(small / "kv"), Completions(), [], []
    tier = StorageTier(
        store,
        Index(64 << 30, make_policy("lru")),
        Always(),
        Lane("r", 1, completions),
        Lane("w", 1, completions),
        time.monotonic,
        Metrics(),
        lambda kind, cause: lines.append(f"{kind} {cause}"),
        through=True,
        queue_bytes=1 << 30,
        asks=False,
        say=lines.append,
    )
    tier.start()
    completions.drain(30.0)
    for number in range(100):
        assert tier.write(Write(key(number), None, 1 << 20, 1.0, lambda: lambda: [bytes(1 << 20)]), kept.append)
        while len(kept) <= number:
            assert completions.drain(30.0)
        tier.tick()
    assert all(kept) and {line.split(":")[0] for line in lines} == {"disk tier"}
    assert len(tier.index) > 12 and len(lines) <= 2
    assert tier.close(30.0)
