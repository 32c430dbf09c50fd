"""One suite for every storage backend: the contract, and a state machine against a dict.

The backends stand in `store_backends.BACKENDS`.
"""

import contextlib
import itertools
import random
import threading
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from ragkv.errors import StoreError
from ragkv.kvstore.stores.contract import Capabilities
from store_backends import BACKENDS, Backend, key, noise


@pytest.fixture(params=sorted(BACKENDS))
def backend(request, tmp_path):
    with BACKENDS[request.param](tmp_path / "store") as made:
        yield made


@pytest.fixture
def store(backend):
    return backend.store


def values(store, *keys):
    return [None if value is None else bytes(value) for value in store.get_many(keys)]


def entries(store):
    return {entry.key: entry for entry in store.scan()}


def test_a_value_comes_back(store):
    store.put(key(1), [b"value"])
    assert bytes(store.get(key(1))) == b"value"


def test_nothing_is_a_miss(store):
    assert store.get(key(1)) is None
    assert store.get_many([key(1), key(2)]) == [None, None]
    assert store.contains([key(1)]) == [False]
    assert store.delete([key(1)]) == 0
    assert list(store.scan()) == []


def test_empty_requests(store):
    store.put_many([])
    store.touch([])
    assert store.get_many([]) == [] and store.contains([]) == [] and store.delete([]) == 0


@pytest.mark.parametrize("parts", [[], [b""], [b"", b"", b""]])
def test_an_empty_value_is_there(store, parts):
    store.put(key(1), parts)
    assert values(store, key(1)) == [b""]
    assert store.contains([key(1)]) == [True]
    assert entries(store).keys() == {key(1)}


def test_a_big_value(store):
    value = noise(8 << 20)
    store.put(key(1), [value[:100], memoryview(value)[100 : 5 << 20], bytearray(value[5 << 20 :])])
    assert bytes(store.get(key(1))) == value


def test_more_parts_than_one_system_call_takes(store):
    value = noise(5000)
    store.put(key(1), [value[at : at + 1] for at in range(5000)])
    assert values(store, key(1)) == [value]


def test_every_kind_of_part(store):
    words = memoryview(bytes(range(64))).cast("I", (4, 4))
    store.put(key(1), [b"bytes", bytearray(b"array"), memoryview(b"a view")[2:], b"", words])
    assert values(store, key(1)) == [b"bytesarrayview" + bytes(range(64))]


def test_parts_are_not_kept(store):
    part = bytearray(b"before")
    store.put(key(1), [part])
    part[:] = b"after!"
    assert values(store, key(1)) == [b"before"]


def test_parts_are_not_changed(store):
    part = bytearray(b"value")
    parts = [part, b"more"]
    store.put(key(1), parts)
    assert parts == [bytearray(b"value"), b"more"] and parts[0] is part


@pytest.mark.parametrize("after", [b"", b"short", noise(70_000)])
def test_the_last_put_counts(store, after):
    store.put(key(1), [noise(1000)])
    store.put(key(1), [after])
    assert values(store, key(1)) == [after]
    assert len(entries(store)) == 1


def test_what_was_read_outlives_what_is_stored(store):
    store.put(key(1), [b"old" * 1000])
    value = store.get(key(1))
    store.put(key(1), [b"new" * 1000])
    store.delete([key(1)])
    assert bytes(value) == b"old" * 1000


@pytest.mark.parametrize("strange", [bytes(16), b"\xff" * 16, b"/../" * 4, b"\n*? []\\\x00'\"{}:;%$", b"a" * 16])
def test_keys_are_any_16_bytes(store, strange):
    store.put(strange, [b"value"])
    assert values(store, strange) == [b"value"] and store.contains([strange]) == [True]
    assert entries(store).keys() == {strange}
    assert store.delete([strange]) == 1


def test_keys_that_differ_in_one_bit_do_not_meet(store):
    keys = [(1 << bit).to_bytes(16, "big") for bit in range(128)]
    store.put_many([(each, [each]) for each in keys])
    assert values(store, *keys) == keys
    assert store.delete(keys[:64]) == 64
    assert values(store, *keys) == [None] * 64 + keys[64:]


def test_values_may_hold_any_bytes(store):
    value = bytes(range(256)) * 3 + b"\r\n$-1\r\n\x00"
    store.put(key(1), [value])
    assert values(store, key(1)) == [value]


def test_many_at_once_keep_their_order(store):
    store.put_many([(key(number), [b"value", str(number).encode()]) for number in range(40)])
    order = [key(number) for number in (39, 0, 100, 7, 7, 20)]
    assert values(store, *order) == [b"value39", b"value0", None, b"value7", b"value7", b"value20"]
    assert store.contains(order) == [True, True, False, True, True, True]


def test_the_last_of_one_batch_counts(store):
    store.put_many([(key(1), [b"first"]), (key(2), [b"other"]), (key(1), [b"second"])])
    assert values(store, key(1), key(2)) == [b"second", b"other"]


def test_delete_counts_what_was_there(store):
    store.put_many([(key(number), [b"value"]) for number in range(4)])
    assert store.delete([key(0), key(9), key(1), key(0)]) == 2
    assert store.contains([key(number) for number in range(4)]) == [False, False, True, True]
    assert store.delete(key(number) for number in range(4)) == 2
    assert list(store.scan()) == []


def test_what_was_deleted_can_be_put_again(store):
    store.put(key(1), [b"old"])
    store.delete([key(1)])
    store.put(key(1), [b"new"])
    assert values(store, key(1)) == [b"new"]


def test_scan_finds_all_with_their_sizes(store):
    sizes = {key(number): number * 1000 for number in range(1, 50)}
    store.put_many([(each, [bytes(size)]) for each, size in sizes.items()])
    found = list(store.scan())
    assert len(found) == len(sizes) and {entry.key for entry in found} == sizes.keys()
    assert all(sizes[entry.key] <= entry.size <= sizes[entry.key] + 8192 for entry in found)


def test_scan_bears_changes_meanwhile(store):
    store.put_many([(key(number), [b"value"]) for number in range(50)])
    seen = set()
    for entry in store.scan():
        seen.add(entry.key)
        store.delete([key(number) for number in range(25)])
        store.put(key(100 + len(seen)), [b"more"])
        assert len(seen) < 1000
    assert {key(number) for number in range(25, 50)} <= seen


def test_two_scans_at_once(store):
    store.put_many([(key(number), [b"value"]) for number in range(30)])
    one, two = store.scan(), store.scan()
    pairs = list(zip(one, two, strict=True))
    assert len({a.key for a, _ in pairs}) == len({b.key for _, b in pairs}) == 30


def test_touch_makes_a_chains_root_the_last_used(store):
    chain = [key(number) for number in range(4)]
    store.put_many([(each, [b"value"]) for each in [*chain, key(8), key(9)]])
    store.touch([key(9)])
    store.touch([chain[0], key(77), *chain[1:]])
    used = {each: entry.used for each, entry in entries(store).items()}
    assert used.keys() == {*chain, key(8), key(9)}
    if any(used.values()):  # a backend that keeps an order
        assert sorted(chain, key=used.__getitem__) == chain[::-1]
        assert used[chain[0]] == max(used.values())


def test_touch_passes_over_what_is_not_there(store):
    store.touch([key(1), key(2)])
    assert list(store.scan()) == [] and store.get(key(1)) is None


def test_what_was_rejected_is_gone(store):
    store.put_many([(key(1), [b"bad"]), (key(2), [b"good"])])
    store.reject(key(1), "checksum")
    store.reject(key(3), "checksum")
    assert values(store, key(1), key(2)) == [None, b"good"]
    assert store.contains([key(1)]) == [False] and entries(store).keys() == {key(2)}
    store.put(key(1), [b"again"])
    assert values(store, key(1)) == [b"again"]


def test_rejected_twice(store):
    for value in (b"bad", b"worse"):
        store.put(key(1), [value])
        store.reject(key(1), "key")
        assert store.get(key(1)) is None


def test_what_is_put_lies_there_as_it_is(backend):
    backend.store.put(key(1), [b"one ", b"value"])
    assert backend.raw_read(key(1)) == b"one value" and backend.raw_keys() == {key(1)}
    backend.store.delete([key(1)])
    assert backend.raw_read(key(1)) is None and backend.raw_keys() == set()


def test_what_others_put_is_found(backend):
    backend.raw_write(key(1), b"theirs")
    assert values(backend.store, key(1)) == [b"theirs"]
    assert backend.store.contains([key(1)]) == [True] and entries(backend.store).keys() == {key(1)}
    backend.raw_write(key(1), b"harmed!")
    assert values(backend.store, key(1)) == [b"harmed!"]
    assert backend.store.delete([key(1)]) == 1 and backend.raw_keys() == set()


def test_two_stores_over_the_same_values(backend):
    assert backend.store.capabilities.shared == (backend.reopen is not None)
    if backend.reopen is None:
        return
    other = backend.reopen()
    backend.store.put(key(1), [b"ours"])
    assert values(other, key(1)) == [b"ours"]
    other.put(key(1), [b"theirs"])
    assert values(backend.store, key(1)) == [b"theirs"]
    other.delete([key(1)])
    assert backend.store.get(key(1)) is None


def test_a_durable_backend_keeps_what_was_put(backend):
    assert backend.store.capabilities.durable == (backend.reopen is not None)
    if backend.reopen is None:
        return
    backend.store.put_many([(key(number), [noise(100, number)]) for number in range(9)])
    backend.store.close()
    assert values(backend.reopen(), *map(key, range(9))) == [noise(100, number) for number in range(9)]


CALLS = {
    "get": lambda store: store.get(key(1)),
    "get_many": lambda store: store.get_many([key(1)]),
    "put": lambda store: store.put(key(1), [b"value"]),
    "put_many": lambda store: store.put_many([(key(1), [b"value"])]),
    "delete": lambda store: store.delete([key(1)]),
    "contains": lambda store: store.contains([key(1)]),
    "scan": lambda store: list(store.scan()),
    "touch": lambda store: store.touch([key(1)]),
    "reject": lambda store: store.reject(key(1), "checksum"),
}


@pytest.mark.parametrize("call", CALLS)
def test_after_close_every_call_says_so(store, call):
    store.put(key(1), [b"value"])
    store.close()
    with pytest.raises(StoreError) as error:
        CALLS[call](store)
    assert error.value.reason == "closed"


def test_close_twice(store):
    store.close()
    store.close()


def test_it_says_what_it_is(store):
    assert store.name and store.name == store.name.lower()
    assert isinstance(store.capabilities, Capabilities)


def run_threads(work, count=8):
    errors = []

    def guarded(number):
        try:
            work(number)
        except BaseException as error:  # reported by the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def test_threads_with_keys_of_their_own(store):
    def work(number):
        for round in range(20):
            each = key(1000 * number + round)
            store.put(each, [noise(3000, round)])
            assert values(store, each) == [noise(3000, round)]
            if round % 2:
                assert store.delete([each]) == 1

    run_threads(work)
    assert entries(store).keys() == {key(1000 * n + round) for n in range(8) for round in range(0, 20, 2)}


def test_threads_on_the_same_keys_see_whole_values_only(store):
    whole = [bytes([letter]) * (20_000 + 5000 * letter) for letter in range(4)]

    def work(number):
        chance = random.Random(number)
        for _ in range(40):
            each = key(chance.randrange(2))
            if number % 2:
                letter = chance.randrange(4)
                store.put(each, [whole[letter][:100], whole[letter][100:]])
            elif chance.random() < 0.1:
                store.delete([each])
            else:
                assert store.get_many([each])[0] in [None, *whole]

    run_threads(work)


def test_one_of_many_deletes_counts(store):
    keys = [key(number) for number in range(50)]
    store.put_many([(each, [b"value"]) for each in keys])
    deleted = []
    run_threads(lambda _: deleted.extend(store.delete([each]) for each in keys), count=4)
    assert sum(deleted) == len(keys)


class StoreMachine(RuleBasedStateMachine):
    """The store against a dict; what is rejected is deleted."""

    make: Callable[[], contextlib.AbstractContextManager[Backend]]
    some_key = st.integers(0, 5).map(key)
    some_keys = st.lists(some_key, max_size=6)
    some_parts = st.lists(st.binary(max_size=40), max_size=4)

    def __init__(self):
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.backend = self.stack.enter_context(self.make())
        self.store, self.model = self.backend.store, {}

    def teardown(self):
        self.stack.close()

    @rule(each=some_key, parts=some_parts)
    def put(self, each, parts):
        self.store.put(each, parts)
        self.model[each] = b"".join(parts)

    @rule(items=st.lists(st.tuples(some_key, some_parts), max_size=5))
    def put_many(self, items):
        self.store.put_many(items)
        self.model.update((each, b"".join(parts)) for each, parts in items)

    @rule(each=some_key, value=st.binary(max_size=40))
    def put_behind_its_back(self, each, value):
        self.backend.raw_write(each, value)
        self.model[each] = value

    @rule(keys=some_keys)
    def delete(self, keys):
        assert self.store.delete(keys) == len(self.model.keys() & set(keys))
        for each in keys:
            self.model.pop(each, None)

    @rule(each=some_key)
    def reject(self, each):
        self.store.reject(each, "checksum")
        self.model.pop(each, None)

    @rule(keys=some_keys)
    def touch(self, keys):
        self.store.touch(keys)

    @rule(keys=some_keys)
    def get_many(self, keys):
        assert values(self.store, *keys) == [self.model.get(each) for each in keys]

    @rule()
    def reopen(self):
        if self.backend.reopen is not None:
            self.store.close()
            self.store = self.backend.reopen()

    @invariant()
    def agree(self):
        keys = [key(number) for number in range(6)]
        assert self.store.contains(keys) == [each in self.model for each in keys]
        assert sorted(entry.key for entry in self.store.scan()) == sorted(self.model)
        assert self.backend.raw_keys() == self.model.keys()


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_state_machine(name, tmp_path):
    folders = (tmp_path / str(number) for number in itertools.count())
    machine = type(f"{name}Machine", (StoreMachine,), {"make": lambda self: BACKENDS[name](next(folders))})
    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=25, deadline=None))
