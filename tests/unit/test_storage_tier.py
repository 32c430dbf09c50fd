"""A tier below memory, its jobs stepped by hand: what it holds, its budget, its queue, its breakers."""

import pytest

from hand_lanes import Bench, HandClock, Lower, SeenTwice, key, redis
from ragkv.benchmarks.internal.faulty_stores import Fault, on_calls
from ragkv.errors import PayloadError, StoreError
from ragkv.kvstore import metrics as m
from ragkv.kvstore.breaker import State
from ragkv.kvstore.io_pool import Wanted
from ragkv.kvstore.stores.contract import Room

A, B, C, D = map(key, range(1, 5))


@pytest.fixture
def bench():
    made = Bench(capacity=100, queue=1000)
    yield made
    made.settle()
    made.lower.check()


def rotten(reason="checksum", only=()):
    """Refuses these values."""

    def accept(value):
        if bytes(value) in only:
            raise PayloadError(reason, "payload: rotten")
        return bytes(value)

    return accept


# --- writing and reading ---


def test_what_was_written_is_read(bench):
    bench.keep(A, b"apple")
    bench.keep(B, b"banana")
    assert bench.read(B, C, A) == [b"banana", None, b"apple"]
    assert bench.metrics.get(m.WRITTEN_BYTES, "disk") == bench.metrics.get(m.READ_BYTES, "disk") == 11
    assert bench.metrics.get(m.CHUNKS, "disk") == 2 and bench.metrics.get(m.USED_BYTES, "disk") == 11


def test_what_is_free_is_told_after_a_write_where_the_backend_knows(bench):
    bench.keep(A)
    assert (m.FREE_BYTES, "disk") not in bench.metrics.gauges
    bench.store.room = lambda: Room(12345, 1 << 40)
    bench.keep(B)
    assert bench.metrics.get(m.FREE_BYTES, "disk") == 12345


def test_a_batch_is_one_call(bench):
    bench.keep(A), bench.keep(B)
    bench.read(A, B)
    assert bench.store.calls["get_many"] == 1 and bench.store.read == [A, B]


def test_a_key_is_known_once_it_is_written(bench):
    assert bench.tier.knows(A) is False
    bench.write(A)
    assert bench.tier.knows(A) is False, "its write is pending"
    bench.lower.writes.step()
    assert bench.tier.knows(A) is False, "nobody has heard of it yet"
    bench.drain()
    assert bench.tier.knows(A) is True


def test_where_others_write_too_it_must_be_asked():
    for lower in (redis(), Lower(asks=True)):
        bench = Bench(lower)
        assert bench.tier.knows(A) is None
        bench.write(A)
        assert bench.tier.knows(A) is False, "its write is pending"
        bench.settle()
        assert bench.tier.knows(A) is (None if bench.index is None else True)
        answers = []
        bench.tier.ask([B, A], answers.append)
        bench.settle()
        assert answers == [[False, True]]


def test_who_cannot_answer_has_nothing(bench):
    bench.keep(A)
    bench.store.errors["contains"] = StoreError("io", "no")
    answers = []
    bench.tier.ask([A, B], answers.append)
    bench.settle()
    assert answers == [[False, False]]
    assert bench.metrics.get(m.TIER_ERRORS, "disk", "io") == 1


def test_nothing_is_written_twice(bench):
    bench.write(A)
    assert not bench.write(A), "its write is pending"
    bench.settle()
    assert not bench.write(A), "it is there"
    assert bench.made == [A] and bench.store.calls["put"] == 1


def test_a_newer_value_replaces_an_older_one(bench):
    bench.keep(A, b"short", replaces=True)
    bench.keep(A, b"much longer", replaces=True)
    assert bench.values() == {A: b"much longer"}
    assert bench.index.used == len(b"much longer")


def test_a_newer_value_replaces_one_whose_write_is_pending(bench):
    assert bench.write(A, b"short", replaces=True) and bench.write(A, b"much longer", replaces=True)
    bench.lower.writes.step(), bench.drain()
    assert bench.tier.knows(A) is False, "the newer one is not there yet"
    bench.settle()
    assert bench.written == [(A, True), (A, True)]
    assert bench.values() == {A: b"much longer"} and bench.tier.knows(A) is True
    assert bench.index.used == len(b"much longer")


def test_of_two_pending_the_first_may_fail(bench):
    bench.lower.plan = on_calls({("put", 0): Fault.FAIL})
    bench.write(A, b"short", replaces=True), bench.write(A, b"longer", replaces=True)
    bench.settle()
    assert bench.written == [(A, False), (A, True)]
    assert bench.values() == {A: b"longer"} and bench.tier.knows(A) is True


def test_a_replacement_without_room_leaves_nothing_behind(bench):
    bench.keep(A, b"old", replaces=True)
    assert not bench.write(A, bytes(101), replaces=True)
    bench.settle()
    assert bench.values() == {} and A not in bench.index, "what the index does not count must not stay"
    assert bench.metrics.get(m.UNWRITTEN_CHUNKS, "disk", m.NO_ROOM) == 1


def test_another_engine_was_quicker():
    bench = Bench(redis())
    bench.lower.values.put(A, [b"theirs"])
    bench.keep(A, b"ours")
    assert bench.values() == {A: b"theirs"} and bench.store.calls["touch"] == 1
    bench.keep(A, b"newer", replaces=True)
    assert bench.values() == {A: b"newer"}, "a tail is ours to replace"


# --- the queue ---


def test_the_queue_is_bounded():
    bench = Bench(queue=10)
    assert bench.write(A, b"123456") and not bench.tier.knows(A)
    assert not bench.write(B, b"12345") and bench.made == [A], "nothing is copied in vain"
    assert bench.write(C, b"1234")
    assert bench.metrics.get(m.UNWRITTEN_CHUNKS, "disk", m.THROTTLED) == 1
    assert bench.metrics.get(m.QUEUED_BYTES, "disk") == 10
    bench.settle()
    assert bench.metrics.get(m.QUEUED_BYTES, "disk") == 0
    bench.keep(B, b"12345")


def test_busy_is_half_full():
    bench = Bench(queue=10)
    bench.write(A, b"12345")
    assert not bench.tier.busy
    bench.write(B, b"1")
    assert bench.tier.busy
    bench.settle()
    assert not bench.tier.busy


def test_a_write_that_fails_leaves_the_queue(bench):
    bench.lower.plan = on_calls({("put", 0): Fault.FAIL})
    bench.write(A)
    bench.settle()
    assert bench.written == [(A, False)] and A not in bench.index
    assert bench.metrics.get(m.TIER_ERRORS, "disk", "io") == 1 and len(bench.lower.notes) == 1
    bench.keep(A)


# --- the budget ---


def test_the_oldest_makes_room(bench):
    for each in (A, B, C):
        bench.keep(each, bytes(40)) if each is not C else bench.write(each, bytes(40))
    assert A not in bench.index and bench.index.used == 80
    assert bench.metrics.get(m.EVICTED_CHUNKS, "disk", m.CAPACITY) == 1
    bench.settle()
    assert bench.values().keys() == {B, C}


def test_a_use_keeps_a_key(bench):
    bench.keep(A, bytes(40)), bench.keep(B, bytes(40))
    bench.tier.touch([A])
    bench.keep(C, bytes(40))
    assert bench.values().keys() == {A, C}


def test_a_parent_outlives_its_child(bench):
    bench.keep(A, bytes(40)), bench.keep(B, bytes(40), parent=A), bench.keep(C, bytes(40))
    assert bench.values().keys() == {A, C}


def test_a_key_is_evicted_while_its_write_is_pending(bench):
    bench.write(A, bytes(60)), bench.write(B, bytes(60))
    assert A not in bench.index
    bench.settle()
    assert bench.written == [(A, True), (B, True)]
    assert bench.values().keys() == {B} and not bench.tier.keeps(A) and bench.tier.keeps(B)


def test_what_is_greater_than_the_budget_is_not_taken(bench):
    bench.keep(A)
    assert not bench.write(B, bytes(101))
    assert bench.metrics.get(m.UNWRITTEN_CHUNKS, "disk", m.NO_ROOM) == 1
    assert bench.tier.knows(A) is True


def test_admission():
    bench = Bench(capacity=100, admission=SeenTwice())
    assert not bench.write(A, replaces=True)
    assert bench.metrics.get(m.UNWRITTEN_CHUNKS, "disk", m.ADMISSION) == 1
    bench.keep(A, replaces=True)
    bench.lower.admission.seen.clear()
    bench.keep(A, b"newer", replaces=True)  # what is there need not ask again


def test_a_parent_that_was_lost_is_written_again(bench):
    bench.lower.values.put(A, [bytes(50)])
    bench.tier.start(), bench.settle()
    bench.keep(B, parent=A)
    bench.lower.values.delete([A])
    assert bench.read(A) == [None]
    assert not bench.tier.keeps(A) and bench.tier.keeps(B)
    bench.keep(A, bytes(49))  # the scan had counted what it occupies
    assert bench.tier.knows(A) is True


# --- what proves bad ---


def test_a_bad_payload_is_a_miss_and_never_read_again(bench):
    bench.keep(A, b"good"), bench.keep(B, b"rotten"), bench.keep(C, b"fine")
    assert bench.read(A, B, C, accept=rotten(only=[b"rotten"])) == [b"good", None, b"fine"]
    assert bench.values().keys() == {A, C} and B not in bench.index
    assert bench.metrics.get(m.REJECTED_PAYLOADS, "disk", "checksum") == 1
    assert [kind for kind, _ in bench.lower.notes] == ["disk payload"]
    assert bench.state("read") is State.CLOSED, "the store itself works"


def test_a_bad_payload_that_cannot_be_removed_harms_no_other(bench):
    bench.keep(A, b"rotten"), bench.keep(B, b"fine")
    bench.store.errors["reject"] = StoreError("refused", "read-only")
    assert bench.read(A, B, accept=rotten(only=[b"rotten"])) == [None, b"fine"]
    assert A not in bench.index and bench.state("read") is State.CLOSED
    assert bench.metrics.get(m.REJECTED_PAYLOADS, "disk", "checksum") == 1


def test_what_has_expired_is_deleted_not_kept_for_inspection(bench):
    bench.keep(A, b"old")
    assert bench.read(A, accept=rotten("expired", [b"old"])) == [None]
    assert bench.store.calls["delete"] == 1 and not bench.store.calls["reject"]
    assert bench.metrics.get(m.REJECTED_PAYLOADS, "disk", "expired") == 1 and not bench.lower.notes


def test_the_index_forgets_what_is_not_there(bench):
    bench.keep(A)
    bench.lower.values.delete([A])
    assert bench.tier.knows(A) is True
    assert bench.read(A) == [None]
    assert bench.tier.knows(A) is False
    bench.keep(A)


def test_a_key_that_is_being_written_is_not_forgotten(bench):
    found = []
    bench.tier.read([Wanted(A, bytes)], found.extend)
    bench.write(A)
    bench.lower.reads.step(), bench.drain()
    assert found == [None]
    bench.settle()
    assert bench.tier.knows(A) is True


def test_a_read_that_fails_says_nothing_of_what_is_there(bench):
    bench.keep(A)
    bench.store.errors["get_many"] = StoreError("timeout", "slow")
    assert bench.read(A) == [None]
    del bench.store.errors["get_many"]
    assert bench.read(A) == [b"value"]


# --- what was there before ---


def test_a_scan_finds_what_is_there():
    lower = Lower()
    for each, used in ((A, 3.0), (B, 1.0), (C, 2.0)):
        lower.values.values[each] = bytes(40), used
    lower.capacity = 100
    bench = Bench(lower)
    assert bench.values().keys() == {A, C}, "the longest unused had to go"
    assert bench.tier.knows(A) and bench.tier.knows(C) and not bench.tier.knows(B)
    bench.keep(D, bytes(40))
    assert bench.values().keys() == {A, D}


def test_a_scan_that_fails_is_made_again():
    lower = Lower(plan=on_calls({("scan", 0): Fault.FAIL}))
    lower.values.put(A, [b"value"])
    bench = Bench(lower)
    assert bench.tier.knows(A) is False and bench.state("read") is State.OPEN
    bench.clock.now += 1
    bench.tier.tick(), bench.settle()
    assert bench.tier.knows(A) is True and bench.state("read") is State.CLOSED


def test_a_rescan_finds_what_others_wrote_and_drops_what_they_deleted():
    bench = Bench(asks=True, capacity=160)
    bench.keep(A, bytes(8))
    bench.lower.values.put(B, [b"theirs"])
    bench.lower.values.delete([A])
    assert A in bench.index and B not in bench.index
    bench.keep(C, bytes(4))  # more than a sixteenth of the budget by now
    assert A not in bench.index and B in bench.index and C in bench.index
    assert bench.tier.knows(A) is None and bench.tier.knows(B) is True


def test_no_rescan_of_a_private_folder():
    bench = Bench(capacity=160)
    for number in range(1, 20):
        bench.keep(key(number), bytes(50))
    assert bench.store.calls["scan"] == 1


def test_a_scan_leaves_alone_what_is_written_meanwhile(bench):
    bench.keep(A, bytes(60))
    bench.tier.start()
    bench.write(B, bytes(60)), bench.write(A, bytes(50))  # A is deleted, B written and deleted, A written
    bench.lower.writes.step(), bench.lower.writes.step()
    bench.lower.reads.step(), bench.drain()  # the scan saw B alone
    bench.settle()
    assert bench.values().keys() == {A} and bench.tier.knows(A) is True


def test_who_has_to_go_for_what_a_scan_finds_goes_even_if_its_write_is_pending(bench):
    bench.lower.values.put(A, [bytes(90)])
    bench.tier.start()
    bench.write(B, bytes(50))
    bench.lower.reads.step(), bench.drain()
    assert B not in bench.index
    bench.settle()
    assert bench.values().keys() == {A}


def test_a_scan_may_find_room_for_what_it_had_to_take_out():
    bench = Bench(asks=True, capacity=100)
    bench.lower.values.values[A] = bytes(90), 1.0
    bench.tier.start()
    bench.write(B, bytes(50))
    bench.settle()  # the scans see both
    assert bench.values().keys() == {B} and bench.tier.knows(B) is True


def test_a_scan_finds_a_parent_again_that_was_lost(bench):
    bench.keep(A), bench.keep(B, parent=A)
    bench.lower.values.delete([A]), bench.read(A)
    bench.lower.values.put(A, [b"value"])
    bench.tier.start(), bench.settle()
    assert bench.tier.knows(A) is True


# --- the end ---


def test_close_finishes_what_waits(bench):
    bench.write(A), bench.write(B)
    assert bench.tier.close(5.0)
    bench.drain()
    assert bench.written == [(A, True), (B, True)] and bench.values().keys() == {A, B}
    assert bench.store.calls["close"] == 1


def test_close_waits_no_longer_than_its_bound():
    bench = Bench(capacity=100)
    bench.write(A)
    bench.lower.writes.hangs = True
    assert not bench.tier.close(5.0)
    assert bench.clock.now == HandClock().now + 5.0
    assert not bench.lower.writes.jobs and bench.store.calls["close"] == 1


def test_after_the_end_nothing_happens():
    bench = Bench(capacity=100)
    bench.tier.close(1.0)
    bench.write(A)
    assert bench.read(A) == [] and not bench.lower.writes.jobs
