"""The suite of storage backends: the contract, and a state machine against a dict.

class TestDictStore(StoreTests):
    def open_store(self, folder):
        return DictStore()
"""

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from ragkv.errors import StoreError
from ragkv.kvstore.stores.contract import Capabilities, Entry, Store

CALLS: dict[str, Callable[[Store], object]] = {
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


def key(number: int) -> bytes:
    """The key of a number."""
    return number.to_bytes(16, "big")


def noise(size: int, seed: int = 0) -> bytes:
    """So many bytes, the same at every call."""
    return random.Random(seed).randbytes(size)


def values(store: Store, *keys: bytes) -> list[bytes | None]:
    """What a store has under keys."""
    return [None if value is None else bytes(value) for value in store.get_many(keys)]


def entries(store: Store) -> dict[bytes, Entry]:
    """What a store finds when it is scanned, by key."""
    return {entry.key: entry for entry in store.scan()}


def run_threads(work: Callable[[int], object], count: int = 8) -> None:
    """Do work on several threads at once, each with a number of its own; AssertionError where any fails."""
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
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


class StoreTests:
    """Every store passes these. `open_store` is all that a subclass owes."""

    def open_store(self, folder: Path) -> Store:
        """A store over the values that belong to `folder`: in it, or elsewhere under its name. It is not there yet
        at the first call. A durable or shared backend is opened several times for one folder, and finds what was
        put."""
        raise NotImplementedError

    def machine(self, folder: Path) -> "StoreMachine":
        """The state machine over the values of a folder."""
        return StoreMachine(lambda: self.open_store(folder))

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return tmp_path / "store"

    @pytest.fixture
    def store(self, folder: Path) -> Iterator[Store]:
        made = self.open_store(folder)
        yield made
        made.close()

    def test_a_value_comes_back(self, store: Store) -> None:
        store.put(key(1), [b"value"])
        assert values(store, key(1)) == [b"value"]

    def test_nothing_is_a_miss(self, store: Store) -> None:
        assert store.get(key(1)) is None
        assert store.get_many([key(1), key(2)]) == [None, None]
        assert store.contains([key(1)]) == [False]
        assert store.delete([key(1)]) == 0
        assert list(store.scan()) == []

    def test_empty_requests(self, store: Store) -> None:
        store.put_many([])
        store.touch([])
        assert store.get_many([]) == [] and store.contains([]) == [] and store.delete([]) == 0

    @pytest.mark.parametrize("parts", [[], [b""], [b"", b"", b""]])
    def test_an_empty_value_is_there(self, store: Store, parts: list[bytes]) -> None:
        store.put(key(1), parts)
        assert values(store, key(1)) == [b""]
        assert store.contains([key(1)]) == [True]
        assert entries(store).keys() == {key(1)}

    def test_a_big_value(self, store: Store) -> None:
        value = noise(8 << 20)
        store.put(key(1), [value[:100], memoryview(value)[100 : 5 << 20], bytearray(value[5 << 20 :])])
        assert values(store, key(1)) == [value]

    def test_thousands_of_parts(self, store: Store) -> None:
        value = noise(5000)
        store.put(key(1), [value[at : at + 1] for at in range(5000)])
        assert values(store, key(1)) == [value]

    def test_every_kind_of_part(self, store: Store) -> None:
        words = memoryview(bytes(range(64))).cast("I", (4, 4))
        store.put(key(1), [b"bytes", bytearray(b"array"), memoryview(b"a view")[2:], b"", words])
        assert values(store, key(1)) == [b"bytesarrayview" + bytes(range(64))]

    def test_parts_are_not_kept(self, store: Store) -> None:
        part = bytearray(b"before")
        store.put(key(1), [part])
        part[:] = b"after!"
        assert values(store, key(1)) == [b"before"]

    def test_parts_are_not_changed(self, store: Store) -> None:
        part = bytearray(b"value")
        parts: list[bytes | bytearray] = [part, b"more"]
        store.put(key(1), parts)
        assert parts == [bytearray(b"value"), b"more"] and parts[0] is part

    @pytest.mark.parametrize("size", [0, 5, 70_000])
    def test_the_last_put_counts(self, store: Store, size: int) -> None:
        store.put(key(1), [noise(1000)])
        store.put(key(1), [noise(size)])
        assert values(store, key(1)) == [noise(size)]
        assert len(entries(store)) == 1

    def test_what_was_read_outlives_what_is_stored(self, store: Store) -> None:
        store.put(key(1), [b"old" * 1000])
        value = store.get(key(1))
        store.put(key(1), [b"new" * 1000])
        store.delete([key(1)])
        assert value is not None and bytes(value) == b"old" * 1000

    @pytest.mark.parametrize(
        "strange", [bytes(16), b"\xff" * 16, b"/../" * 4, b"\n*? []\\\x00'\"{}:;%$", b"a" * 16]
    )
    def test_keys_are_any_16_bytes(self, store: Store, strange: bytes) -> None:
        store.put(strange, [b"value"])
        assert values(store, strange) == [b"value"] and store.contains([strange]) == [True]
        assert entries(store).keys() == {strange}
        assert store.delete([strange]) == 1

    def test_keys_that_differ_in_one_bit_do_not_meet(self, store: Store) -> None:
        keys = [(1 << bit).to_bytes(16, "big") for bit in range(128)]
        store.put_many([(each, [each]) for each in keys])
        assert values(store, *keys) == keys
        assert store.delete(keys[:64]) == 64
        assert values(store, *keys) == [None] * 64 + keys[64:]

    def test_values_may_hold_any_bytes(self, store: Store) -> None:
        value = bytes(range(256)) * 3 + b"\r\n$-1\r\n\x00"
        store.put(key(1), [value])
        assert values(store, key(1)) == [value]

    def test_many_at_once_keep_their_order(self, store: Store) -> None:
        store.put_many([(key(number), [b"value", str(number).encode()]) for number in range(40)])
        order = [key(number) for number in (39, 0, 100, 7, 7, 20)]
        assert values(store, *order) == [b"value39", b"value0", None, b"value7", b"value7", b"value20"]
        assert store.contains(order) == [True, True, False, True, True, True]

    def test_the_last_of_one_batch_counts(self, store: Store) -> None:
        store.put_many([(key(1), [b"first"]), (key(2), [b"other"]), (key(1), [b"second"])])
        assert values(store, key(1), key(2)) == [b"second", b"other"]

    def test_delete_counts_what_was_there(self, store: Store) -> None:
        store.put_many([(key(number), [b"value"]) for number in range(4)])
        assert store.delete([key(0), key(9), key(1), key(0)]) == 2
        assert store.contains([key(number) for number in range(4)]) == [False, False, True, True]
        assert store.delete(key(number) for number in range(4)) == 2
        assert list(store.scan()) == []

    def test_what_was_deleted_can_be_put_again(self, store: Store) -> None:
        store.put(key(1), [b"old"])
        store.delete([key(1)])
        store.put(key(1), [b"new"])
        assert values(store, key(1)) == [b"new"]

    def test_scan_finds_all_with_their_sizes(self, store: Store) -> None:
        sizes = {key(number): number * 1000 for number in range(1, 50)}
        store.put_many([(each, [bytes(size)]) for each, size in sizes.items()])
        found = list(store.scan())
        assert len(found) == len(sizes) and {entry.key for entry in found} == sizes.keys()
        assert all(sizes[entry.key] <= entry.size for entry in found)

    def test_scan_bears_changes_meanwhile(self, store: Store) -> None:
        store.put_many([(key(number), [b"value"]) for number in range(50)])
        seen: set[bytes] = set()
        for entry in store.scan():
            seen.add(entry.key)
            store.delete([key(number) for number in range(25)])
            store.put(key(100 + len(seen)), [b"more"])
            assert len(seen) < 1000, "it ends"
        assert {key(number) for number in range(25, 50)} <= seen

    def test_two_scans_at_once(self, store: Store) -> None:
        store.put_many([(key(number), [b"value"]) for number in range(30)])
        one, two = store.scan(), store.scan()
        pairs = list(zip(one, two, strict=True))
        assert len({a.key for a, _ in pairs}) == len({b.key for _, b in pairs}) == 30

    def test_touch_makes_a_chains_root_the_last_used(self, store: Store) -> None:
        chain = [key(number) for number in range(4)]
        store.put_many([(each, [b"value"]) for each in [*chain, key(8), key(9)]])
        store.touch([key(9)])
        store.touch([chain[0], key(77), *chain[1:]])
        used = {each: entry.used for each, entry in entries(store).items()}
        assert used.keys() == {*chain, key(8), key(9)}
        if any(used.values()):  # a backend that keeps an order
            assert sorted(chain, key=used.__getitem__) == chain[::-1]
            assert used[chain[0]] == max(used.values())

    def test_touch_passes_over_what_is_not_there(self, store: Store) -> None:
        store.touch([key(1), key(2)])
        assert list(store.scan()) == [] and store.get(key(1)) is None

    def test_what_was_rejected_is_gone(self, store: Store) -> None:
        store.put_many([(key(1), [b"bad"]), (key(2), [b"good"])])
        store.reject(key(1), "checksum")
        store.reject(key(3), "checksum")
        assert values(store, key(1), key(2)) == [None, b"good"]
        assert store.contains([key(1)]) == [False] and entries(store).keys() == {key(2)}
        store.put(key(1), [b"again"])
        assert values(store, key(1)) == [b"again"]

    def test_rejected_twice(self, store: Store) -> None:
        for value in (b"bad", b"worse"):
            store.put(key(1), [value])
            store.reject(key(1), "key")
            assert store.get(key(1)) is None

    @pytest.mark.parametrize("call", CALLS)
    def test_after_close_every_call_says_so(self, store: Store, call: str) -> None:
        store.put(key(1), [b"value"])
        store.close()
        with pytest.raises(StoreError) as error:
            CALLS[call](store)
        assert error.value.reason == "closed"

    def test_close_twice(self, store: Store) -> None:
        store.close()
        store.close()

    def test_it_says_what_it_is(self, store: Store) -> None:
        assert store.name and store.name == store.name.lower()
        assert isinstance(store.capabilities, Capabilities)

    def test_threads_with_keys_of_their_own(self, store: Store) -> None:
        def work(number: int) -> None:
            for turn in range(20):
                each = key(1000 * number + turn)
                store.put(each, [noise(3000, turn)])
                assert values(store, each) == [noise(3000, turn)]
                if turn % 2:
                    assert store.delete([each]) == 1

        run_threads(work)
        assert entries(store).keys() == {key(1000 * n + turn) for n in range(8) for turn in range(0, 20, 2)}

    def test_threads_on_the_same_keys_see_whole_values_only(self, store: Store) -> None:
        whole = [bytes([letter]) * (20_000 + 5000 * letter) for letter in range(4)]

        def work(number: int) -> None:
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

    def test_two_stores_over_the_same_values(self, store: Store, folder: Path) -> None:
        if not store.capabilities.shared:
            pytest.skip("not shared")
        other = self.open_store(folder)
        try:
            store.put(key(1), [b"ours"])
            assert values(other, key(1)) == [b"ours"]
            other.put(key(1), [b"theirs"])
            assert values(store, key(1)) == [b"theirs"]
            other.delete([key(1)])
            assert store.get(key(1)) is None
        finally:
            other.close()

    def test_a_durable_backend_keeps_what_was_put(self, store: Store, folder: Path) -> None:
        if not store.capabilities.durable:
            pytest.skip("not durable")
        store.put_many([(key(number), [noise(100, number)]) for number in range(9)])
        store.close()
        again = self.open_store(folder)
        try:
            assert values(again, *map(key, range(9))) == [noise(100, number) for number in range(9)]
        finally:
            again.close()

    def test_state_machine(self, tmp_path: Path) -> None:
        folders = (tmp_path / str(number) for number in itertools.count())
        run_state_machine_as_test(
            lambda: self.machine(next(folders)),  # type: ignore[arg-type]  # a factory is what it documents
            settings=settings(max_examples=60, stateful_step_count=25, deadline=None),
        )


SOME_KEY = st.integers(0, 5).map(key)
SOME_KEYS = st.lists(SOME_KEY, max_size=6)
SOME_PARTS = st.lists(st.binary(max_size=40), max_size=4)


class StoreMachine(RuleBasedStateMachine):
    """A store beside a dict; what is rejected is deleted."""

    def __init__(self, open_store: Callable[[], Store]) -> None:
        super().__init__()
        self.open_store, self.kept = open_store, dict[bytes, bytes]()
        self.store = open_store()

    def teardown(self) -> None:
        self.store.close()

    @rule(each=SOME_KEY, parts=SOME_PARTS)
    def put(self, each: bytes, parts: list[bytes]) -> None:
        self.store.put(each, parts)
        self.kept[each] = b"".join(parts)

    @rule(items=st.lists(st.tuples(SOME_KEY, SOME_PARTS), max_size=5))
    def put_many(self, items: list[tuple[bytes, list[bytes]]]) -> None:
        self.store.put_many(items)
        self.kept.update((each, b"".join(parts)) for each, parts in items)

    @rule(keys=SOME_KEYS)
    def delete(self, keys: list[bytes]) -> None:
        assert self.store.delete(keys) == len(self.kept.keys() & set(keys))
        for each in keys:
            self.kept.pop(each, None)

    @rule(each=SOME_KEY)
    def reject(self, each: bytes) -> None:
        self.store.reject(each, "checksum")
        self.kept.pop(each, None)

    @rule(keys=SOME_KEYS)
    def touch(self, keys: list[bytes]) -> None:
        self.store.touch(keys)

    @rule(keys=SOME_KEYS)
    def get_many(self, keys: list[bytes]) -> None:
        assert values(self.store, *keys) == [self.kept.get(each) for each in keys]

    @rule()
    def reopen(self) -> None:
        if self.store.capabilities.durable:
            self.store.close()
            self.store = self.open_store()

    @invariant()
    def agree(self) -> None:
        keys = [key(number) for number in range(6)]
        assert self.store.contains(keys) == [each in self.kept for each in keys]
        assert sorted(entry.key for entry in self.store.scan()) == sorted(self.kept)
