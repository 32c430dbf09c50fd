"""What the wrappers do to the calls that pass through them."""

import pytest

from memory_store import MemoryStore
from ragkv.benchmarks.internal.faulty_stores import Fault, FaultyStore, LatencyStore, now_and_then, on_calls
from ragkv.errors import StoreError

ONE, TWO = b"1" * 16, b"2" * 16

CALLS = {
    "get": lambda store: store.get(ONE),
    "get_many": lambda store: store.get_many([ONE, TWO]),
    "put": lambda store: store.put(ONE, [b"value"]),
    "put_many": lambda store: store.put_many([(ONE, [b"value"]), (TWO, [b"other"])]),
    "delete": lambda store: store.delete([ONE]),
    "contains": lambda store: store.contains([ONE]),
    "scan": lambda store: list(store.scan()),
    "touch": lambda store: store.touch([ONE]),
    "reject": lambda store: store.reject(ONE, "checksum"),
}
BATCHES = {"get_many": "get", "put_many": "put"}


def faulty(faults):
    store = FaultyStore(MemoryStore(), on_calls(faults))
    store.inner.put(ONE, [b"a value"])
    store.inner.put(TWO, [b"another"])
    return store


@pytest.mark.parametrize("call", CALLS)
def test_latency_is_one_wait_a_call_before_it(call):
    inner = MemoryStore()
    waits = []
    store = LatencyStore(inner, 0.25, wait=lambda seconds: waits.append((seconds, len(inner.values))))
    inner.put(ONE, [b"value"])
    CALLS[call](store)
    assert waits == [(0.25, 1)]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fault, reason", [(Fault.FAIL, "io"), (Fault.TIMEOUT, "timeout")])
def test_a_fault_breaks_the_planned_call_only(call, fault, reason):
    name = BATCHES.get(call, call)
    store = faulty({(name, 2): fault})
    calls = 1 if call in BATCHES else 2
    for _ in range(calls):
        CALLS[call](store)
    with pytest.raises(StoreError) as error:
        CALLS[call](store)
    assert error.value.reason == reason
    CALLS[call](store)


def test_what_failed_was_not_done_and_what_timed_out_was():
    store = faulty({("put", 0): Fault.FAIL, ("put", 1): Fault.TIMEOUT})
    for _ in range(2):
        before = store.inner.get(ONE)
        with pytest.raises(StoreError):
            store.put(ONE, [b"new"])
    assert before == b"a value" and store.inner.get(ONE) == b"new"


@pytest.mark.parametrize(
    "call, nothing",
    [
        ("get", None),
        ("put", None),
        ("delete", 0),
        ("contains", [False]),
        ("scan", []),
        ("touch", None),
        ("reject", None),
    ],
)
def test_a_lost_call_does_nothing_and_says_so(call, nothing):
    store = faulty({(call, 0): Fault.LOSE})
    before = dict(store.inner.values)
    assert CALLS[call](store) == nothing
    assert store.inner.values == before


def test_values_come_back_harmed():
    store = faulty({("get", 1): Fault.FLIP, ("get", 2): Fault.CUT, ("get", 4): Fault.WRONG})
    assert [store.get(ONE), store.get(ONE), store.get(ONE)] == [b"a value", b"a v`lue", b"a v"]
    assert store.get_many([TWO, ONE, ONE]) == [b"another", b"another", b"a value"]
    assert store.inner.get(ONE) == b"a value", "what is stored is not"


def test_a_miss_and_an_empty_value_cannot_be_harmed():
    store = FaultyStore(MemoryStore(), lambda call, number: Fault.FLIP)
    store.put(ONE, [])
    assert store.get(TWO) is None and store.get(ONE) == b""


def test_now_and_then_is_the_same_for_the_same_seed():
    calls = [(method, number) for method in ("get", "put") for number in range(1000)]
    one, two, other = (list(map(now_and_then(0.1, seed), *zip(*calls, strict=True))) for seed in (1, 1, 2))
    assert one == two != other
    assert 100 < sum(fault is not None for fault in one) < 300
    assert {*one} == {None, *Fault}
    only = map(now_and_then(0.5, 1, [Fault.CUT]), *zip(*calls, strict=True))
    assert {*only} == {None, Fault.CUT}
    assert not any(map(now_and_then(0, 1), *zip(*calls, strict=True)))


def test_a_plan_can_be_replaced():
    store = faulty({("get", 0): Fault.FAIL})
    store.plan = on_calls({})
    assert store.get(ONE) == b"a value"
