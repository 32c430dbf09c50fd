"""From the lower tiers up into memory: what is read, who waits for it, and how long."""

import pytest

from hand_lanes import Lower, Stack, redis, words
from ragkv.errors import StoreError
from ragkv.kvstore import metrics as m
from ragkv.kvstore.gate import BELIEF, FIRST, LEAST_TOKENS, Gate
from ragkv.kvstore.keys import tail_key

TEXT = words(1, 60)  # chunks of 21 and 23 tokens, and a tail of 16


@pytest.fixture
def disk():
    return Lower()


@pytest.fixture
def stack(disk):
    made = Stack(disk)
    yield made
    made.settle()
    made.check()


def emptied(stack, *texts):
    """Memory has lost what was kept, the tiers have it."""
    for each in texts or [TEXT]:
        stack.keep(each)
    stack.settle()
    stack.forget()
    for lower in stack.lowers:
        lower.store.read.clear()
    return stack


# --- what is found again ---


@pytest.mark.parametrize("lower", [Lower, lambda: Lower(asks=True), redis], ids=["private", "shared", "redis"])
def test_what_memory_lost_comes_back(lower):
    stack = emptied(Stack(lower()))
    assert stack.get(TEXT) == 60
    assert stack.metrics.get(m.PROMOTED_TOKENS, stack.lowers[0].name) == 60
    assert stack.metrics.get(m.WAITS, "loaded") == 1
    assert stack.fetch(TEXT) is None, "nothing is lacking"
    stack.check()


@pytest.mark.parametrize("length", [3, 4, 15, 16, 21, 22, 32, 44, 45, 100])
def test_a_restart_finds_whole_chunks_and_the_tail(stack, length):
    stack.keep(words(1, length)), stack.settle()
    stack.start()
    assert stack.match(words(1, length)).length == 0
    assert stack.get(words(1, length)) == (length if length >= 4 else 0), "less than a page is not worth it"


@pytest.mark.parametrize("shared", [20, 21, 40, 44, 45, 50, 59, 60])
def test_a_restart_finds_what_a_prompt_shares(stack, shared):
    stack.keep(TEXT), stack.settle()
    stack.start()
    found = stack.get(TEXT[:shared] + words(2, 30))
    assert found == (shared if shared >= 44 else shared // 21 * 21), "inside a whole chunk nothing can be found"


def test_of_several_tails_behind_a_parent_the_latest_is_found(stack):
    stack.keep(TEXT[:50]), stack.settle()
    stack.keep(TEXT[:46] + words(3, 9)), stack.settle()
    stack.start()
    assert stack.get(TEXT[:46] + words(3, 9)) == 55
    stack.start()
    assert stack.get(TEXT[:50]) == 46, "as much as the latest shares"


def test_a_tail_that_shares_nothing_is_left_below(stack):
    stack.keep(TEXT), stack.settle()
    stack.start()
    assert stack.get(TEXT[:44] + words(3, 16)) == 44
    assert len(stack.memory) == 2


def test_a_tail_that_became_a_whole_chunk_is_found(stack):
    """A prompt may end where, as the next shows, a chunk ends."""
    stack.keep(TEXT[:44]), stack.settle()
    stack.keep(words(1, 90)), stack.settle()
    stack.start()
    assert stack.get(words(1, 90)) == 90


@pytest.mark.parametrize("lower", [Lower, redis], ids=["disk", "redis"])
def test_a_tail_is_not_read_where_memory_has_it(lower):
    stack = Stack(lower())
    stack.keep(TEXT), stack.settle()
    assert stack.fetch(TEXT + words(2, 5)) is None, "it ends in the same chunk"
    stack.fetch(TEXT + words(2, 60)), stack.settle()
    assert stack.lowers[0].store.read == []


def test_a_tail_that_memory_got_meanwhile_is_not_read():
    stack = emptied(Stack(redis()))
    stack.keep(TEXT[:44], named=[44]), stack.settle()
    fetch = stack.fetch(TEXT)
    stack.keep(TEXT)
    stack.lowers[0].reads.step(), stack.cache.tick()
    assert not stack.promotion.waits(fetch) and stack.lowers[0].store.read == []


def test_what_stands_behind_a_chunk_of_memory_is_found(stack):
    emptied(stack)
    stack.keep(TEXT[:25]), stack.settle()
    assert stack.match(TEXT).length == 25
    assert stack.get(TEXT) == 60


def test_a_prompt_may_be_spread_over_tiers():
    quick, slow = Lower("disk"), redis()
    stack = emptied(Stack(quick, slow))
    first, second = stack.chain(TEXT).keys
    quick.values.delete([second]), quick.index.drop(second)
    fetch = stack.fetch(TEXT)
    stack.settle()
    assert stack.match(TEXT).length == 60
    assert first in quick.store.read and slow.store.read == [second]
    assert sorted(fetch.sources.values()) == ["disk", "disk", "redis"]


def test_nothing_is_read_behind_a_gap(stack, disk):
    emptied(stack)
    first, _ = stack.chain(TEXT).keys
    disk.values.delete([first]), disk.index.drop(first)
    assert stack.get(TEXT) == 0 and disk.store.read == []


def test_less_than_a_page_is_not_worth_a_look(stack):
    emptied(stack)
    assert stack.fetch(TEXT, computed=57) is None
    assert stack.fetch(TEXT, computed=56) is not None


def test_who_has_computed_more_than_there_is_loads_nothing(stack, disk):
    emptied(stack)
    stack.fetch(TEXT + words(2, 40), computed=64)
    stack.settle()
    assert disk.store.read == [] and stack.metrics.get(m.WAITS, "declined") == 1


# --- who waits, and how long ---


def test_a_fetch_is_over_when_all_has_come(stack, disk):
    emptied(stack)
    fetch = stack.fetch(TEXT)
    assert stack.promotion.waits(fetch)
    disk.reads.step()
    assert stack.promotion.waits(fetch), "read, but nobody has heard of it"
    stack.cache.tick()
    assert stack.promotion.waits(fetch), "the tail is still to come"
    disk.reads.step(), stack.cache.tick()
    assert not stack.promotion.waits(fetch)
    assert stack.match(TEXT).length == 60


def test_reads_may_end_in_any_order(stack, disk):
    emptied(stack)
    fetch = stack.fetch(TEXT)
    disk.reads.step(1), stack.cache.tick()
    assert stack.promotion.waits(fetch) and stack.match(TEXT).length == 0
    disk.reads.step(), stack.cache.tick()
    assert not stack.promotion.waits(fetch) and stack.match(TEXT).length == 60


def test_at_the_deadline_it_is_a_miss_and_the_load_goes_on(stack, disk):
    emptied(stack)
    fetch = stack.fetch(TEXT)
    stack.clock.now += 1.999
    assert stack.promotion.waits(fetch)
    stack.clock.now += 0.001
    assert not stack.promotion.waits(fetch) and stack.match(TEXT).length == 0
    assert stack.metrics.get(m.WAITS, "deadline") == 1
    second = stack.fetch(TEXT)
    stack.settle()
    assert stack.match(TEXT).length == 60 and not stack.promotion.waits(second)
    assert all(disk.store.read.count(key) == 1 for key in stack.chain(TEXT).keys), "the second waited for the same"
    assert stack.metrics.get(m.WAITS, "loaded") == 1 and stack.metrics.get(m.WAITS, "deadline") == 1


def test_a_tier_that_hangs_is_put_to_rest(stack, disk):
    """No job of it ever ends: three requests wait for it, no more, and it serves again once it answers."""
    emptied(stack)
    disk.store.delete([tail_key(stack.chain(TEXT).keys[-1])])
    for number in range(3):
        fetch = stack.fetch(TEXT)
        stack.clock.now += 2
        assert not stack.promotion.waits(fetch)
        assert stack.metrics.get(m.TIER_ERRORS, "disk", "deadline") == number + 1
    assert stack.fetch(TEXT) is None
    stack.settle()
    assert stack.match(TEXT).length == 44, "all but the tail"
    emptied(stack)
    stack.clock.now += 1
    stack.settle()
    assert stack.get(TEXT) == 60


def test_an_answer_after_the_deadline_orders_nothing():
    stack = emptied(Stack(redis()))
    fetch = stack.fetch(TEXT)
    stack.clock.now += 2
    assert not stack.promotion.waits(fetch)
    stack.settle()
    assert stack.lowers[0].store.read == [] and stack.memory.used == 0
    assert stack.get(TEXT) == 60


def test_an_engine_with_nothing_else_to_do_stands_still_for_a_load(stack, disk):
    emptied(stack)
    fetch = stack.fetch(TEXT)
    begun = stack.clock.now
    assert stack.promotion.waits(fetch, 0.0, 0.005) and stack.clock.now == pytest.approx(begun + 0.005)
    stack.completions.meanwhile = disk.reads.run
    assert not stack.promotion.waits(fetch, 0.0, 0.005) and stack.match(TEXT).length == 60
    assert stack.clock.now < begun + 0.01, "it goes on as soon as all has come"


def test_an_answer_that_comes_at_once_saves_a_step():
    stack = Stack(redis())
    stack.completions.meanwhile = stack.lowers[0].reads.run
    fetch = stack.fetch(TEXT)
    assert not stack.promotion.waits(fetch, 0.002), "nothing is there"
    begun = stack.clock.now
    stack.completions.meanwhile = None
    fetch = stack.fetch(TEXT)
    assert stack.promotion.waits(fetch, 0.002) and stack.clock.now == pytest.approx(begun + 0.002)
    stack.settle()


def test_two_requests_share_a_read(stack, disk):
    emptied(stack)
    first, second = stack.fetch(TEXT), stack.fetch(TEXT[:44] + words(2, 30))
    stack.settle()
    keys = stack.chain(TEXT).keys
    assert [disk.store.read.count(key) for key in keys] == [1, 1]
    assert not stack.promotion.waits(first) and not stack.promotion.waits(second)
    assert stack.metrics.get(m.WAITS, "loaded") == 2


def test_behind_a_chunk_on_its_way_more_is_read(stack, disk):
    longer = words(1, 90)
    emptied(stack, longer)
    stack.fetch(longer[:44])
    stack.fetch(longer)
    stack.settle()
    assert stack.match(longer).length == 90
    assert sorted(disk.store.read).count(stack.chain(longer).keys[0]) == 1


def test_what_another_request_computes_is_not_read(stack, disk):
    emptied(stack)
    new = stack.memory.reserve(stack.SPACE, stack.chain(TEXT), 21)
    assert stack.fetch(TEXT) is None and disk.store.read == []
    for chunk in new:
        stack.memory.abandon(chunk)


# --- is it worth it ---


SIZE = 44 * Stack.SHAPE.token_bytes  # of what of TEXT a tier can give


def gate(prefill, tier):
    """Seconds a token, and seconds a byte of the disk."""
    made = Gate()
    made.prefill.note(64, 64 * prefill)
    for _ in range(BELIEF):
        made.tier("disk").note(SIZE, SIZE * tier)
    return made


def test_a_slow_tier_is_declined_and_probed_now_and_then():
    disk = Lower()
    stack = emptied(Stack(disk, gate=gate(prefill=0.001, tier=1.0)))
    for _ in range(FIRST):
        assert stack.fetch(TEXT) is None
    assert stack.metrics.get(m.GATE_DECISIONS, "disk", "decline") == FIRST
    fetch = stack.fetch(TEXT)
    assert fetch is not None and stack.promotion.waits(fetch)
    stack.clock.now += 0.001  # it has become quick
    stack.settle()
    assert stack.match(TEXT).length == 60
    assert stack.metrics.get(m.GATE_DECISIONS, "disk", "load") == 1


def test_what_an_answer_lay_here_is_no_cost_of_the_tier():
    """The engine asks once a step, and a step of other requests may be long."""
    disk = Lower()
    stack = emptied(Stack(disk, gate=Gate()))
    stack.fetch(TEXT)
    stack.clock.now += 0.5
    disk.reads.run()
    stack.clock.now += 60.0
    stack.settle()
    assert stack.gate.tier("disk").typical(SIZE) == pytest.approx(0.5)


def test_a_few_tokens_are_not_brought_up():
    for gate, none in ((Gate(), True), (Gate(active=False), False)):
        stack = emptied(Stack(Lower(asks=True), gate=gate))
        assert (stack.fetch(TEXT[: LEAST_TOKENS // 2]) is None) == none
        stack.settle()


def test_what_there_is_may_not_be_worth_it_though_all_of_it_would_be():
    prompt = TEXT + words(5, 2000)
    slow = Gate()
    slow.prefill.note(64, 0.64)
    for size in (SIZE, 1e4, 1e6) * BELIEF:
        slow.tier("disk").note(size, 1.0)  # a second, whatever it is
    stack = emptied(Stack(Lower(), gate=slow))
    fetch = stack.fetch(prompt)
    assert fetch is not None and not stack.promotion.waits(fetch)
    assert stack.metrics.get(m.WAITS, "declined") == 1
    assert stack.metrics.get(m.GATE_DECISIONS, "disk", "decline") == 1
    assert stack.memory.used == 0


# --- what goes wrong ---


def test_a_read_that_fails_leaves_nothing_and_is_made_again(stack, disk):
    emptied(stack)
    disk.store.errors["get_many"] = StoreError("timeout", "slow")
    assert stack.get(TEXT) == 0
    assert stack.memory.used == 0 and stack.metrics.get(m.WAITS, "missed") == 1
    disk.store.errors.clear()
    assert stack.get(TEXT) == 60


def test_a_failure_spread_over_batches_leaves_nothing(stack, disk, monkeypatch):
    emptied(stack)
    monkeypatch.setattr("ragkv.kvstore.promotion.BATCH_BYTES", 1)  # every chunk by itself
    disk.store.errors["get_many"] = StoreError("timeout", "slow")
    stack.fetch(TEXT)
    assert len(disk.reads.jobs) == 3
    disk.reads.step(), stack.cache.tick()  # the parent first
    stack.settle()
    assert stack.memory.used == 0


def test_a_chunk_that_is_not_there_after_all(stack, disk):
    longer = words(1, 90)
    emptied(stack, longer)
    keys = stack.chain(longer).keys
    disk.values.delete([keys[1]])
    assert stack.get(longer) == 21
    stack.keep(longer), stack.settle()  # it was computed, and stands before what came
    assert stack.match(longer).length == 90
    stack.forget()
    assert stack.get(longer) == 90, "and was written again"


def test_without_room_the_beginning_is_loaded():
    stack = emptied(Stack(Lower(), pages=14))  # of 4 tokens
    assert stack.get(words(1, 60)) == 44, "6 + 6 pages; 4 more are too many"
    stack.check()


def test_a_parent_that_memory_loses_between_question_and_answer():
    stack = emptied(Stack(redis(), pages=26))
    stack.keep(TEXT[:25]), stack.settle()
    fetch = stack.fetch(TEXT)
    assert stack.promotion.waits(fetch)
    stack.keep(words(7, 100))  # makes room
    assert stack.match(TEXT).length == 0
    stack.lowers[0].reads.step()  # the answer: without its parent nothing of it can be loaded
    stack.cache.tick()
    assert not stack.promotion.waits(fetch) and stack.lowers[0].store.read == []
    stack.settle()
    assert stack.get(TEXT) == 60


def test_a_reset_while_it_is_brought_up(stack, disk):
    emptied(stack)
    fetch = stack.fetch(TEXT)
    disk.reads.step()
    stack.memory.reset()
    assert stack.memory.used > 0, "a thread may be writing there"
    stack.settle()
    assert stack.match(TEXT).length == 0 and not stack.promotion.waits(fetch)
    assert stack.memory.used == 0


def test_a_tail_whose_parent_was_dropped_is_not_attached(stack, disk):
    emptied(stack)
    stack.keep(TEXT[:44]), stack.settle()
    stack.fetch(TEXT)
    parent = stack.match(TEXT).chunks[-1]
    stack.memory.forget([parent], m.EXPIRED)
    stack.settle()
    assert tail_key(parent.key) in disk.store.read and stack.match(TEXT).length == 21
