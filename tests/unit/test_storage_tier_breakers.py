"""The two breakers of a tier: a store that fails rests, reading and writing apart, and is tried again."""

import pytest

from hand_lanes import Bench, key, redis
from ragkv.errors import StoreError
from ragkv.kvstore import metrics as m
from ragkv.kvstore.breaker import State
from ragkv.kvstore.io_pool import Wanted
from ragkv.kvstore.storage_tier import NO_KEY

A, B, C, D, E, F = map(key, range(1, 7))
IO, FULL = StoreError("io", "no"), StoreError("full", "no space left")


@pytest.fixture
def bench():
    made = Bench(capacity=100, queue=1000)
    yield made
    made.settle()
    made.lower.check()


def fail_reads(bench, times=3):
    bench.store.errors["get_many"] = IO
    for _ in range(times):
        bench.read(A)


def test_reading_rests_after_three_failures_in_a_row(bench):
    bench.keep(A)
    fail_reads(bench, 2)
    del bench.store.errors["get_many"]
    bench.read(A)
    fail_reads(bench, 2)
    assert bench.tier.readable and bench.tier.knows(A) is True
    fail_reads(bench, 1)
    assert not bench.tier.readable and bench.tier.knows(A) is False
    assert bench.state("read") is State.OPEN and bench.state("write") is State.CLOSED
    assert bench.metrics.get(m.TIER_ERRORS, "disk", "io") == 5


def test_a_trial_is_made_though_nobody_asks(bench):
    bench.keep(A)
    fail_reads(bench)
    bench.tier.tick(), bench.settle()
    assert not bench.store.calls["contains"], "it rests"
    bench.clock.now += 0.5
    bench.tier.tick()
    assert bench.state("read") is State.HALF_OPEN and not bench.tier.readable
    bench.tier.tick()
    assert len(bench.lower.reads.jobs) == 1, "one trial is enough"
    asked = []
    bench.store.inner.contains = lambda keys: asked.append(keys) or [False]
    bench.settle()
    assert asked == [[NO_KEY]]
    assert bench.state("read") is State.CLOSED and bench.tier.knows(A) is True


def test_each_trial_that_fails_doubles_the_rest(bench):
    bench.store.errors["contains"] = IO
    fail_reads(bench)
    waited = []
    for _ in range(8):
        begun = bench.clock.now
        while bench.state("read") is State.OPEN:
            bench.clock.now += 0.25
            bench.tier.tick()
        waited.append(bench.clock.now - begun)
        bench.settle()
        assert bench.state("read") is State.OPEN
    assert waited == [0.5, 1, 2, 4, 8, 16, 30, 30]


def test_a_tier_that_recovers_is_scanned(bench):
    bench.keep(A)
    fail_reads(bench)
    bench.lower.values.delete([A]), bench.lower.values.put(B, [b"value"])
    bench.clock.now += 1
    bench.tier.tick(), bench.settle()
    assert bench.tier.knows(A) is False and bench.tier.knows(B) is True


def test_writing_rests_after_three_failures_and_is_tried_by_a_write(bench):
    bench.store.errors["put"] = IO
    for each in (A, B, C):
        bench.write(each), bench.settle()
    assert bench.state("write") is State.OPEN and bench.state("read") is State.CLOSED
    assert not bench.write(D) and D not in bench.made
    assert bench.metrics.get(m.UNWRITTEN_CHUNKS, "disk", m.RESTING) == 1
    bench.clock.now += 1
    assert bench.write(D)
    assert bench.state("write") is State.HALF_OPEN
    assert not bench.write(E), "one trial at a time"
    bench.settle()
    assert bench.state("write") is State.OPEN
    del bench.store.errors["put"]
    bench.clock.now += 0.5
    assert not bench.write(E), "the rest is longer now"
    bench.clock.now += 0.5
    bench.keep(E)
    assert bench.state("write") is State.CLOSED
    bench.keep(F)


def test_a_full_disk_is_read_all_the_same(bench):
    bench.keep(D, b"older"), bench.keep(A, b"there")
    bench.store.errors["put"] = FULL
    bench.write(B), bench.settle()
    assert bench.state("write") is State.OPEN, "at once: it will not have room in the next moment"
    assert D not in bench.index, "what was refused needs room"
    assert bench.read(A) == [b"there"] and bench.tier.knows(A) is True
    bench.tier.touch([A]), bench.settle()
    assert bench.tier.readable


def test_a_disk_that_cannot_be_read_is_written_all_the_same(bench):
    fail_reads(bench)
    bench.keep(A)
    assert bench.state("read") is State.OPEN and bench.state("write") is State.CLOSED


def fill(bench):
    """Use the budget up, so that a write makes room first, by a deletion. One that fails leaves that room."""
    for number in range(10, 20):
        bench.keep(key(number), bytes(10))


def test_deletions_that_work_do_not_make_up_for_writes_that_fail(bench):
    fill(bench)
    bench.store.errors["put"] = IO
    for each, size in ((A, 10), (B, 20), (C, 30)):
        bench.write(each, bytes(size)), bench.settle()
    assert bench.store.calls["delete"] == 3 and bench.state("write") is State.OPEN


def test_a_deletion_is_no_trial(bench):
    fill(bench)
    bench.store.errors["put"] = FULL
    bench.write(A, bytes(10)), bench.settle()
    rests = []
    for _ in range(3):
        begun = bench.clock.now
        while not bench.write(A, bytes(10)):
            bench.clock.now += 0.25
        rests.append(bench.clock.now - begun)
        bench.settle()
    assert bench.store.calls["delete"] == 8 and rests == [0.5, 1, 2], "one before each write, and one behind it"


def test_uses_that_can_be_noted_do_not_make_up_for_reads_that_fail(bench):
    bench.keep(A)
    for _ in range(3):
        fail_reads(bench, 1)
        bench.tier.touch([A]), bench.settle()
    assert bench.state("read") is State.OPEN


def test_uses_that_cannot_be_noted_do_not_stop_reading(bench):
    bench.keep(A)
    bench.store.errors["touch"] = StoreError("refused", "read-only")
    bench.tier.touch([A]), bench.settle()
    assert bench.tier.readable and bench.state("write") is State.OPEN
    bench.tier.touch([A]), bench.settle()
    assert bench.store.calls["touch"] == 1, "what rests is left alone"


def test_what_is_too_large_says_nothing_of_the_tier(bench):
    bench.store.errors["put"] = StoreError("too_large", "no")
    for each in (A, B, C, D):
        bench.write(each), bench.settle()
    assert bench.state("write") is State.CLOSED and A not in bench.index


def test_a_trial_with_what_is_too_large_ends(bench):
    bench.store.errors["put"] = FULL
    bench.write(A), bench.settle()
    bench.store.errors["put"] = StoreError("too_large", "no")
    bench.clock.now += 1
    bench.write(B), bench.settle()
    assert bench.state("write") is State.OPEN
    del bench.store.errors["put"]
    bench.clock.now += 60
    bench.keep(C)


def test_what_could_not_be_deleted_is_found_again_when_writing_works(bench):
    bench.keep(A, bytes(60)), bench.keep(B, bytes(40))
    bench.store.errors["put"] = bench.store.errors["delete"] = StoreError("refused", "read-only")
    bench.write(C, bytes(60)), bench.settle()
    assert bench.values().keys() == {A, B} and A not in bench.index
    bench.store.errors.clear()
    bench.clock.now += 1
    bench.keep(D, bytes(10))
    stored = sum(len(value) for value in bench.values().values())
    assert bench.values().keys() == bench.index.keys() and stored == bench.index.used <= 100


@pytest.mark.parametrize("reason", ["full", "refused", "gone"])
def test_what_lasts_opens_at_once(reason):
    bench = Bench(redis())
    bench.store.errors["put"] = bench.store.errors["get_many"] = StoreError(reason, "no")
    bench.write(A), bench.settle(), bench.read(A)
    assert bench.state("read") is bench.state("write") is State.OPEN
    assert bench.metrics.get(m.TIER_ERRORS, "redis", reason) == 2


def test_a_bug_is_a_failure_too(bench):
    def broken(value):
        raise ZeroDivisionError

    bench.keep(A)
    assert bench.read(A, accept=broken) == [None]
    assert bench.metrics.get(m.TIER_ERRORS, "disk", "bug") == 1
    assert isinstance(bench.lower.notes[0][1], ZeroDivisionError)
    assert bench.tier.knows(A) is True


def test_a_late_success_does_not_close_a_breaker_at_rest(bench):
    bench.tier.ask([A], lambda answers: None)
    bench.store.errors["get_many"] = IO
    for _ in range(3):
        bench.tier.read([Wanted(A, bytes)], lambda found: None)
        bench.lower.reads.step(1)  # its thread is quicker than that of the question
    bench.drain()
    assert bench.state("read") is State.OPEN
    bench.settle()
    assert bench.state("read") is State.OPEN
