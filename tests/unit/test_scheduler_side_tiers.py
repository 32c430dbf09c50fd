"""The scheduler side with tiers below memory: answers that come later, restarts, hints, the device tier."""

import pytest

from hand_lanes import Lower
from ragkv.errors import StoreError
from ragkv.kvstore import metrics as m
from ragkv.kvstore.chunking import TokenChain
from ragkv.kvstore.keys import as_tokens
from toy_engine import BELOW, Engine, Request, closing, text

PROMPT = text(1, 100)


@pytest.fixture(params=BELOW.values(), ids=BELOW)
def engine(request):
    with closing(Engine(lowers=request.param())) as made:
        yield made


@pytest.fixture
def disk():
    return Lower()


@pytest.fixture
def alone(disk):
    """An engine that has one tier below, on which `PROMPT` lies."""
    with closing(Engine(lowers=[disk])) as made:
        made.run(PROMPT)
        made.restart(5.0)
        yield made


# --- restarts ---


def test_a_restart_finds_all_again(engine):
    assert engine.run(PROMPT) == 0
    assert engine.restart(5.0)
    assert engine.run(PROMPT) == 99 and engine.loaded == 2 * 99
    assert engine.run(PROMPT) == 99


def test_a_restart_finds_prompt_and_answer(engine):
    answer = text(2, 40)
    engine.run(PROMPT, answer)
    assert engine.restart(5.0)
    assert engine.run(PROMPT + answer + text(3, 30)) == 139


def test_a_second_life_adds_to_the_first(engine):
    engine.run(PROMPT)
    for turn in range(1, 4):
        assert engine.restart(5.0)
        longer = PROMPT + text(2, 30 * turn)
        assert engine.run(longer) >= 100 + 30 * (turn - 1) - 1
    engine.check()


def test_prompts_that_share_a_beginning(engine):
    prompts = [PROMPT[:67] + text(seed, 50) for seed in range(2, 6)]
    for prompt in prompts:
        engine.run(prompt)
    assert engine.restart(5.0)
    for prompt in prompts:
        engine.request(prompt)
    hits = {}
    for _ in range(4):
        hits.update(engine.step())
        engine.work()
    assert len(hits) == 4 and min(hits.values()) >= 67 and max(hits.values()) == 116
    for lower in engine.lowers:
        assert all(lower.store.read.count(key) <= 1 for key in set(lower.store.read) & first_keys(engine, prompts))


def first_keys(engine, prompts):
    """Keys of the chunks that all prompts share."""
    chunk = engine.memory.match(b"the toy engine's", chain(engine, prompts[0]), 44).chunks
    return {each.key for each in chunk}


def chain(engine, prompt):
    found = TokenChain(b"the toy engine's", engine.chunker)
    found.extend(as_tokens(prompt))
    return found


# --- the answer comes later ---


def test_the_engine_is_told_to_ask_again(alone, disk):
    request = Request("asks", PROMPT)
    assert alone.side.lookup(request, 0) is None
    assert alone.side.lookup(request, 0) is None
    disk.reads.run()
    assert alone.side.lookup(request, 0) == 99
    assert alone.side.lookup(request, 64) == 35
    alone.side.finished(request, [[]])


def test_others_go_on_meanwhile(alone, disk):
    waits, other = alone.request(PROMPT), alone.request(text(5, 30))
    assert alone.step() == {other.request_id: 0}
    assert alone.step() == {}
    disk.reads.run()
    assert alone.step() == {waits.request_id: 99}


def test_at_the_deadline_it_computes(alone, disk):
    request = alone.request(PROMPT)
    assert alone.step() == {}
    alone.pass_time(2.0)
    assert alone.step() == {request.request_id: 0}
    assert alone.metrics.get(m.WAITS, "deadline") == 1
    alone.finish(request)
    alone.settle()
    assert alone.run(PROMPT) == 99


def test_a_request_is_brought_up_once(alone, disk):
    """Preempted and resumed, it takes what memory has."""
    request = alone.request(PROMPT)
    alone.step(), alone.work(), alone.step(), alone.step()
    alone.preempt(request)
    read = len(disk.store.read)
    alone.memory.reset()
    assert alone.step() == {request.request_id: 0} and len(disk.store.read) == read


def test_aborted_while_it_waits(alone, disk):
    request = alone.request(PROMPT)
    alone.step()
    alone.finish(request)
    alone.settle()
    alone.check()
    assert alone.run(PROMPT) == 99


def test_what_is_found_may_be_gone_when_it_is_taken_up(alone, disk):
    request = alone.request(PROMPT)
    alone.step(), disk.reads.run()
    free, alone.free = alone.free, []
    assert alone.step() == {}, "found, but there are no blocks"
    alone.memory.reset()
    alone.free = free
    assert alone.step() == {request.request_id: 0}


def test_sources_are_told(alone):
    request = alone.request(PROMPT)
    alone.step(), alone.work(), alone.step()
    assert alone.side.sources(request) == {"disk": 99}
    alone.finish(request), alone.settle()
    assert alone.metrics.get(m.HIT_TOKENS, "disk") == 99
    assert alone.run(PROMPT) == 99
    assert alone.metrics.get(m.HIT_TOKENS, m.MEMORY) == 99


def test_stored_tokens_are_counted_once():
    engine = Engine(workers=2)
    engine.run(PROMPT)
    assert engine.metrics.get(m.STORED_TOKENS) == 100
    engine.run(PROMPT)
    assert engine.metrics.get(m.STORED_TOKENS) == 100


# --- what goes wrong ---


def test_a_reset_forgets_what_lies_below(engine):
    engine.run(PROMPT)
    engine.reset()
    assert engine.run(PROMPT) == 0, "that was computed by other weights"
    assert engine.run(PROMPT) == 99


def test_a_reset_while_it_is_brought_up(alone, disk):
    request = alone.request(PROMPT)
    alone.step(), disk.reads.step()
    alone.reset()
    assert alone.step() == {request.request_id: 0}
    alone.finish(request), alone.settle()
    alone.check()
    assert alone.run(PROMPT) == 0


def test_a_reset_while_it_is_written(alone, disk):
    request = alone.request(text(2, 100))
    alone.step(), alone.step()
    assert disk.writes.jobs
    alone.reset()
    alone.finish(request), alone.settle()
    alone.check()
    assert alone.run(text(2, 100)) == 0


def test_a_failing_tier_costs_hits_and_nothing_else(engine):
    engine.run(PROMPT)
    engine.restart(5.0)
    for lower in engine.lowers:
        for method in ("get_many", "put", "contains", "delete", "touch"):
            lower.store.errors[method] = StoreError("timeout", "slow")
    for seed in range(6):
        assert engine.run(text(seed, 100)) == 0
        assert engine.run(text(seed, 100)) == 99, "memory works"
    for lower in engine.lowers:
        lower.store.errors.clear()
    for _ in range(6):
        engine.pass_time(40)
        engine.run(text(9, 100)[: 40 + _])
    engine.run(text(8, 100))
    engine.restart(5.0)
    assert engine.run(text(8, 100)) == 99


def test_a_failed_store_is_not_written_down(disk):
    engine = Engine(lowers=[disk])
    engine.fail("store", worker=1)
    engine.run(PROMPT)
    assert not disk.stored()
    engine.check()


def test_memory_smaller_than_the_work(disk):
    engine = Engine(pages=40, lowers=[disk])
    for _ in range(3):
        for seed in range(5):
            assert engine.run(text(seed, 100)) in (0, 99)
            engine.memory.check_integrity()
    assert engine.metrics.get(m.HIT_TOKENS, "disk") == 10 * 99
    engine.check()


# --- hints ---


def hinted(**hints):
    return {"kv_transfer_params": {"ragkv": hints}}


@pytest.mark.parametrize("unpins", [False, True], ids=["its time", "its owner"])
def test_pinned_is_not_evicted_until_its_time_or_its_owner_ends_it(unpins):
    engine = Engine(pages=120)
    engine.run(PROMPT, **hinted(pin={"owner": "desk", "seconds": 60}))
    for seed in range(2, 9):
        engine.run(text(seed, 100))
    assert engine.run(PROMPT) == 99
    if unpins:
        engine.run(text(9, 20), **hinted(unpin={"owner": "desk"}))
    else:
        engine.pass_time(61)
    for seed in range(2, 9):
        engine.run(text(seed, 100))
    assert engine.run(PROMPT) == 0 and engine.pins == 0
    engine.check()


def test_of_what_is_pinned_the_end_is_named():
    engine = Engine(pages=60)
    document = {"id": "a", "start": 0, "end": 44}
    engine.run(PROMPT, **hinted(documents=[document], pin={"owner": "x", "seconds": 9, "documents": ["a"]}))
    for seed in range(2, 6):
        engine.run(text(seed, 100))
    assert engine.run(PROMPT) == 44


def test_what_has_less_priority_goes_first():
    engine = Engine(pages=60)
    engine.run(PROMPT, **hinted(priority=2))
    for seed in range(2, 6):
        engine.run(text(seed, 100), **hinted(priority=1))
    assert engine.run(PROMPT) == 99
    engine.run(text(6, 100), **hinted(priority=9)), engine.run(text(7, 100), **hinted(priority=9))
    assert engine.run(PROMPT) < 99
    engine.check()


def test_a_time_to_live_holds_in_all_tiers(engine):
    engine.run(PROMPT, **hinted(ttl=100))
    engine.restart(5.0)
    assert engine.run(PROMPT, **hinted(ttl=50)) == 99, "it has less time, and does not make it more"
    engine.pass_time(101)
    assert engine.run(PROMPT) == 0
    found = [engine.metrics.get(m.REJECTED_PAYLOADS, lower.name, "expired") for lower in engine.lowers]
    assert sum(found) == 5


def test_after_a_reset_no_time_to_live_is_left():
    engine = Engine()
    engine.request(PROMPT, **hinted(ttl=100))
    engine.step(deliver=False)
    engine.reset()
    engine.deliver()
    engine.finish(engine.running[0])
    engine.settle()
    engine.check()


# --- the device tier ---


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_hot_is_read_from_the_device(workers):
    engine = Engine(workers=workers, device=30)
    for _ in range(4):
        engine.run(PROMPT)
    assert engine.metrics.get(m.HIT_TOKENS, m.DEVICE) > 0
    engine.check()


def test_the_device_tier_is_too_small():
    engine = Engine(device=9)
    for seed in (0, 1, 0, 2):
        for _ in range(4):
            engine.run(text(seed, 60))
    assert engine.metrics.get(m.HIT_TOKENS, m.DEVICE) > 0 and engine.memory.device.used <= 9
    engine.check()


def test_a_copy_to_the_device_that_fails_is_never_read():
    engine = Engine(device=30)
    for _ in range(2):
        engine.run(PROMPT)
    engine.fail("store")
    engine.run(PROMPT)
    engine.fail()
    assert engine.memory.device.used == 0
    assert engine.run(PROMPT) == 99
    engine.check()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_device_tier_that_lost_its_memory_is_not_read(workers):
    engine = Engine(workers=workers, device=30)
    for _ in range(4):
        engine.run(PROMPT)
    before = engine.metrics.get(m.HIT_TOKENS, m.DEVICE)
    engine.empty_device(worker=workers - 1)
    engine.run(PROMPT)  # computed: what was promised did not come
    assert engine.metrics.get(m.HIT_TOKENS, m.DEVICE) == before > 0
    assert engine.memory.device.used == 0
    assert engine.run(PROMPT) == 99, "memory still has it"
    assert engine.run(PROMPT) == 99 and engine.metrics.get(m.HIT_TOKENS, m.DEVICE) > before
    engine.check()


def test_gauges_are_set_only_where_something_has_changed(alone, disk):
    alone.run(PROMPT)
    alone.metrics.gauges.clear()
    alone.cache.tick()
    assert not alone.metrics.gauges
    alone.run(text(2, 60))
    assert alone.metrics.get(m.CHUNKS, "memory") == len(alone.memory)
    assert alone.metrics.get(m.CHUNKS, "disk") == len(disk.index) > 0
