"""Planes of windows in the cache, against an engine that knows what every token's KV must be in every plane."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hand_lanes import Lower, redis
from plane_engine import BLOCK, END, FULL, PLANES, SPACE, STATES, Engine, fresh, made
from ragkv.benchmarks.internal.faulty_stores import now_and_then
from ragkv.kvstore.chunking import Chunker, TokenChain, TokenStructure
from ragkv.kvstore.codec import decode, encode
from ragkv.kvstore.keys import as_tokens, mark
from ragkv.kvstore.metrics import EXPIRED
from ragkv.kvstore.pins import AT_ONCE, Pin
from ragkv.kvstore.prefix_tree import Chunk
from ragkv.kvstore.prompt import Prompt, Result


@pytest.fixture(params=PLANES)
def engine(request):
    return Engine(PLANES[request.param])


def test_the_same_prompt_and_the_next_turn_are_hit_to_the_end(engine):
    first = fresh(1, 300)
    assert engine.ask(first, answer=fresh(2, 10)) == (0, 0)
    assert engine.ask(first)[0] == 299
    turn = [*first, *fresh(2, 10), *fresh(3, 40)]
    assert engine.ask(turn)[0] == 310
    assert engine.ask(turn, computed=288)[0] == 349 - 288


def test_a_prompt_that_leaves_early_goes_on_where_planes_allow_and_marks_the_place():
    engine = Engine(PLANES["window"])
    first = fresh(1, 300)
    engine.ask(first)
    other = [*first[:150], *fresh(5, 100)]
    hit, shared = engine.ask(other, keep=lambda stop: True)
    assert (hit, shared) == (0, 150), "nothing is kept of windows in the middle"
    assert engine.ask(other)[0] == 249


@pytest.mark.parametrize("stored", [False, True], ids=["at once", "stored before"])
def test_what_is_pinned_can_go_on_however_much_comes_after(stored):
    engine, prompt = Engine(PLANES["window"]), fresh(1, 300)
    pin = Pin("desk 7", 100.0)
    if stored:
        engine.ask(prompt)
    engine.ask(prompt, pin=pin)
    for seed in range(2, 9):
        engine.ask(fresh(seed, 300))
    assert engine.ask(prompt)[0] == 299


def test_windows_take_less_than_all_of_their_plane():
    engine = Engine(PLANES["window"])
    engine.ask(fresh(1, 600))
    used = {chunk.plane: 0 for chunk in engine.cache.memory.tree}
    for chunk in engine.cache.memory.tree:
        used[chunk.plane] += len(chunk)
    assert used[0] == 600 and 20 <= used[1] <= 20 + 128 + 32


def test_a_store_that_fails_leaves_nothing(engine):
    prompt = fresh(1, 200)
    store = engine.store

    def failing(made, tokens):
        if made is None or not made.plane:
            store(made, tokens)
        else:
            engine.cache.complete_store(made, ok=False)

    engine.store = failing
    engine.ask(prompt)
    engine.store = store
    assert engine.ask(prompt)[0] in (0, 192), "where nothing is needed of chunks"
    assert engine.ask(prompt)[0] == 199


def test_windows_of_other_weights_go_with_what_was_not_confirmed(engine):
    """Their chunks were confirmed before: these stay."""
    prompt = fresh(1, 300)
    engine.ask(prompt, keep=lambda stop: False)
    before = len(engine.cache)
    engine.round, engine.weights = 1, 77
    engine.ask(prompt)
    assert engine.cache.unconfirmed == len(engine.cache) - before > 0
    engine.cache.invalidate()
    assert len(engine.cache) == before
    engine.round, engine.weights = 2, 0
    assert engine.ask(prompt)[0] in (0, 288), "where nothing is needed of chunks"
    engine.cache.confirm(2)
    assert engine.ask(prompt)[0] == 299 and not engine.cache.unconfirmed


def test_a_window_whose_time_is_over_is_not_used_though_its_chunk_lives_on(engine):
    prompt = fresh(1, 200)
    engine.ask(prompt)
    memory = engine.cache.memory
    pins = memory.pins
    windows = [chunk for chunk in memory.tree if chunk.plane]
    for number in range(AT_ONCE):  # as many as one call lets go of, before them
        pins.expire(Chunk(number.to_bytes(16), None, b"t" * 4), 1.0)
    for window in windows:
        pins.expire(window, 2.0)
    pins.due(3.0)
    assert pins.late
    chain = TokenChain(SPACE, Chunker(16, 24, 32, TokenStructure.of(["a"])))
    chain.extend(as_tokens(prompt))
    assert memory.match(SPACE, chain, 199).windows == ()


LOWERS = {"disk": Lower, "back": lambda: Lower(through=False), "redis": redis}


@pytest.fixture(params=LOWERS)
def lower(request):
    return LOWERS[request.param]()


@pytest.mark.parametrize("size", [10, 100, 400])
@pytest.mark.parametrize("planes", PLANES)
def test_after_a_restart_the_same_prompt_and_the_next_turn_are_hit_to_the_end(planes, lower, size):
    """However long the answer is: it was cut from where its prompt ended, where the next turn has no cut."""
    first, answer = fresh(1, 300), fresh(2, size)
    turn = [*first, *answer, *fresh(3, 40)]
    engine = Engine(PLANES[planes], lowers=(lower,))
    engine.ask(first, answer=answer)
    engine.cache.close(1.0)
    for prompt, hit in ((first, 299), (turn, 300 + size)):
        engine.start()
        assert engine.ask(prompt)[0] == hit
    engine.cache.close(1.0)
    engine.start()
    assert engine.ask(turn)[0] == len(turn) - 1, "what the last turn left"


@pytest.mark.parametrize("planes", PLANES)
def test_windows_that_memory_lost_come_back(planes, lower):
    first, answer = fresh(1, 300), fresh(2, 10)
    engine = Engine(PLANES[planes], lowers=(lower,))
    engine.ask(first, answer=answer)
    if not lower.through:
        engine.cache.flush(), engine.settle()
    for prompt, hit in ((first, 299), ([*first, *answer, *fresh(3, 40)], 310)):
        memory = engine.cache.memory
        memory.forget([chunk for chunk in memory.tree if chunk.plane], EXPIRED)
        assert engine.ask(prompt)[0] == hit


def test_a_longer_window_takes_the_place_of_a_shorter_one(lower):
    first = fresh(1, 300)
    engine = Engine(PLANES["window"], lowers=(lower,))
    engine.ask(first)  # of the chunk from 248 to 266 it keeps what position 300 needs
    engine.ask([*first[:270], *fresh(4, 29)], step=10, keep=lambda stop: True)
    engine.cache.close(1.0)
    engine.start()
    assert engine.ask([*first[:266], *fresh(5, 60)])[0] == 266


def test_a_shorter_window_does_not_take_the_place_of_a_longer_one(lower):
    first = fresh(1, 300)
    engine = Engine(PLANES["window"], lowers=(lower,))
    engine.ask([*first[:270], *fresh(4, 29)], step=10, keep=lambda stop: True)
    for seed in (5, 6):
        engine.cache.close(1.0)
        engine.start()
        assert engine.ask([*first[:266], *fresh(seed, 60)])[0] == 266
        engine.cache.close(1.0)
        engine.start()
        engine.ask(first, computed=280)  # which stores what position 300 needs


def test_a_longer_window_does_not_wait_until_a_shorter_one_is_written():
    lower, first = Lower(), fresh(1, 300)
    engine = Engine(PLANES["window"], lowers=(lower,))
    engine.settle, engine.check = engine.cache.tick, lambda: None  # the disk is slow
    engine.ask(first)
    assert lower.writes.jobs
    engine.ask([*first[:270], *fresh(4, 29)], step=10, keep=lambda stop: True)
    del engine.settle, engine.check
    engine.settle()
    assert engine.ask([*first[:266], *fresh(5, 60)])[0] == 266


def test_windows_are_of_one_tail_whatever_lies_in_its_place(lower):
    """Of two tails behind one chunk memory has the first without its windows; below lies the second."""
    first, second = ([*fresh(1, 280), *fresh(seed, 5)] for seed in (2, 3))
    engine = Engine(PLANES["window"], lowers=(lower,))
    engine.ask(first), engine.ask(second)
    engine.cache.flush(), engine.settle()
    memory = engine.cache.memory
    memory.forget([chunk for chunk in memory.tree if chunk.plane], EXPIRED)
    assert engine.ask(first)[0] == 284 and not lower.notes
    engine.cache.close(1.0)
    engine.start()
    assert engine.ask(second)[0] == 284


def test_a_prompt_that_ends_where_the_next_turn_is_cut(lower):
    """Its last chunk is a tail, and then is none."""
    first, answer = [*fresh(1, 299), END], fresh(2, 10)
    engine = Engine(PLANES["window"], lowers=(lower,))
    engine.ask(first, answer=answer)
    engine.ask([*first, *answer, *fresh(3, 40)])
    engine.cache.close(1.0)
    engine.start()
    assert engine.ask([*first, *fresh(4, 50)])[0] == 300


def test_time_that_an_answer_lies_here_is_not_the_tiers(lower):
    first, answer = fresh(1, 300), fresh(2, 10)
    engine = Engine(PLANES["window"], lowers=(lower,))
    engine.ask(first, answer=answer)
    engine.cache.close(1.0)
    engine.start()
    turn = [*first, *answer, *fresh(3, 40)]
    prompt = Prompt(SPACE, engine.chain(turn))
    assert engine.cache.lookup(prompt, 0, len(turn) - 1).result is Result.PENDING
    steps = 0
    while not prompt.fetch.over:
        lower.reads.run()
        engine.clock.now += 0.1  # a step of the engine
        engine.cache.tick()
        steps += 1
    assert steps > 2 and prompt.fetch.spent < 0.1 and sum(prompt.fetch.sizes.values()) > 300 * FULL.token_bytes
    engine.cache.release(prompt)


def test_windows_that_are_used_are_used_below_too(lower):
    engine = Engine(PLANES["window"], lowers=(lower,))
    prompt = fresh(1, 300)
    engine.ask(prompt)
    engine.cache.flush(), engine.settle()
    before = {key: used for key, (_, used) in lower.values.values.items()}
    engine.ask(prompt)
    windows = [chunk.key for chunk in engine.cache.memory.tree if chunk.plane and chunk.end > 299 - 20]
    assert windows and all(lower.values.values[key][1] > before[key] for key in windows)


def test_what_leads_nowhere_is_left_below(lower):
    engine = Engine(PLANES["window"], lowers=(lower,))
    first = fresh(1, 300)
    engine.ask(first)
    engine.cache.close(1.0)
    engine.start()
    lower.store.read.clear()
    assert engine.ask([*first[:150], *fresh(5, 100)])[0] == 0
    assert lower.store.read == [], "no window lies in the middle"


def test_a_tail_of_other_tokens_takes_no_windows_along(lower):
    """Of two tails behind one chunk the later lies below, while the windows are still the earlier's."""
    engine = Engine(PLANES["window"], lowers=(lower,))
    first, second = ([*fresh(1, 280), *fresh(seed, 5)] for seed in (2, 3))
    engine.ask(first)
    engine.ask(second, keep=lambda stop: False)
    engine.cache.close(1.0)
    engine.start()
    assert engine.ask(second)[0] < 280


FORGED = {
    "longer": lambda header: replace(header, shape=(header.shape[0] + 1, *header.shape[1:])),
    "shorter": lambda header: replace(header, shape=(header.shape[0] - 1, *header.shape[1:])),
    "earlier": lambda header: replace(header, position=header.position - 1),
    "later": lambda header: replace(header, position=header.position + 1),
    "other plane": lambda header: replace(header, tokens=mark(2)),
    "key": lambda header: replace(header, key=b"k" * 16),
    "parent": lambda header: replace(header, parent=b"p" * 16),
    "dtype": lambda header: replace(header, dtype="int8", shape=(*header.shape[:-1], 4 * header.shape[-1])),
    "heads": lambda header: replace(header, shape=(header.shape[0], 3, 1, *header.shape[3:])),
    "namespace": lambda header: replace(header, namespace=b"n" * 16),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_window_that_does_not_fit_is_not_taken(what):
    engine, lower = Engine(PLANES["window"], lowers=(disk := Lower(),)), disk
    prompt = fresh(1, 300)
    engine.ask(prompt)
    engine.cache.close(1.0)
    for key, (value, used) in list(lower.values.values.items()):
        header, raw = decode(value)
        if header.plane:
            header = FORGED[what](header)
            raw = bytes(raw)[: header.raw_bytes].ljust(header.raw_bytes, b"x")
            lower.values.values[key] = b"".join(map(bytes, encode(header, [raw]))), used
    engine.start()
    assert engine.ask(prompt)[0] == 0
    engine.cache.close(1.0)
    engine.start()
    assert engine.ask(prompt)[0] == 299, "they are written anew"


@given(
    st.data(),
    st.sampled_from(sorted(PLANES | STATES)),
    st.sampled_from([14, 40, 400]),
    st.sampled_from(sorted(LOWERS)),
)
def test_whatever_is_asked_no_kv_is_wrong(data, planes, pages, lower):
    lowers = (LOWERS[lower](),) if data.draw(st.booleans()) else ()
    for each in lowers:
        each.plan = now_and_then(data.draw(st.sampled_from([0.0, 0.1])), data.draw(st.integers(0, 99)))
    engine = made(planes, pages, lowers)
    trunk = fresh(7, 260)
    for number in range(data.draw(st.integers(1, 8))):
        what = data.draw(st.sampled_from(["nothing", "nothing", "restart", "forget"]))
        if what == "restart":
            engine.cache.close(1.0)
            engine.start()
        elif what == "forget":
            engine.forget()
        cut = data.draw(st.integers(0, len(trunk)))
        prompt = [*trunk[:cut], *fresh(number % 3 + 20, data.draw(st.integers(1, 60)))]
        step = data.draw(st.sampled_from([8, 33, 64, 500]))
        marks = data.draw(st.sampled_from([None, lambda stop: True, lambda stop: stop % 2 == 0]))
        answer = fresh(number + 50, data.draw(st.sampled_from([0, 1, 9, 40, 120])))
        computed = data.draw(st.sampled_from([0, 0, 1, 2])) * BLOCK * 5
        engine.ask(prompt, min(computed, (len(prompt) - 1) // BLOCK * BLOCK), step, marks, answer)
