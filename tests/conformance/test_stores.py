"""The suite of `ragkv.testing.stores` on every backend, and what is asked of ours beyond the contract.

The backends stand in `store_backends.BACKENDS`.
"""

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import invariant, rule

from ragkv.testing.stores import SOME_KEY, StoreMachine, StoreTests, entries, key, run_threads, values
from store_backends import BACKENDS


class TestStores(StoreTests):
    @pytest.fixture(params=sorted(BACKENDS), autouse=True)
    def chosen(self, request):
        self.backend = BACKENDS[request.param]

    @pytest.fixture
    def raw(self, store, folder):
        return self.backend.raw(store, folder)

    def open_store(self, folder):
        return self.backend.open(folder)

    def machine(self, folder):
        return RawMachine(self.backend, folder)

    def test_what_outlives_a_store(self, store):
        assert store.capabilities.shared == store.capabilities.durable == self.backend.lasting

    def test_what_is_put_lies_there_as_it_is(self, store, raw):
        store.put(key(1), [b"one ", b"value"])
        assert raw.read(key(1)) == b"one value" and raw.keys() == {key(1)}
        store.delete([key(1)])
        assert raw.read(key(1)) is None and raw.keys() == set()

    def test_what_others_put_is_found(self, store, raw):
        raw.write(key(1), b"theirs")
        assert values(store, key(1)) == [b"theirs"]
        assert store.contains([key(1)]) == [True] and entries(store).keys() == {key(1)}
        raw.write(key(1), b"harmed!")
        assert values(store, key(1)) == [b"harmed!"]
        assert store.delete([key(1)]) == 1 and raw.keys() == set()

    def test_values_occupy_little_more_than_their_size(self, store):
        sizes = {key(number): number * 1000 for number in range(1, 50)}
        store.put_many([(each, [bytes(size)]) for each, size in sizes.items()])
        assert all(entry.size <= sizes[each] + 8192 for each, entry in entries(store).items())

    def test_one_of_many_deletes_counts(self, store):
        keys = [key(number) for number in range(50)]
        store.put_many([(each, [b"value"]) for each in keys])
        deleted = []
        run_threads(lambda _: deleted.extend(store.delete([each]) for each in keys), count=4)
        assert sum(deleted) == len(keys)


class RawMachine(StoreMachine):
    """With a hand that puts values behind the store's back."""

    def __init__(self, backend, folder):
        super().__init__(lambda: backend.open(folder))
        self.raw = backend.raw(self.store, folder)

    @rule(each=SOME_KEY, value=st.binary(max_size=40))
    def put_behind_its_back(self, each, value):
        self.raw.write(each, value)
        self.kept[each] = value

    @invariant()
    def agree_behind_its_back(self):
        assert self.raw.keys() == self.kept.keys()
