"""Planes of windows in the cache, against an engine that knows what every token's KV must be in every plane."""

import zlib
from dataclasses import dataclass
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragkv.kvstore.cache import KVCache
from ragkv.kvstore.chunking import Chunker, TokenChain, TokenStructure
from ragkv.kvstore.gate import Gate
from ragkv.kvstore.io_pool import Completions
from ragkv.kvstore.keys import as_tokens
from ragkv.kvstore.metrics import Metrics
from ragkv.kvstore.pages import Pages, PageShape, frame_bytes
from ragkv.kvstore.pins import AT_ONCE
from ragkv.kvstore.planes import Plane
from ragkv.kvstore.prefix_tree import Chunk
from ragkv.kvstore.prompt import Prompt, Result
from ragkv.policies import make_policy

SPACE, BLOCK = b"s" * 16, 4
FULL = PageShape(1, 1, 8, 1, 4, "float32")
SLIDING = PageShape(1, 3, 3, 1, 4, "float32")
CHUNKED = PageShape(1, 2, 4, 1, 4, "float32")
PLANES = {
    "window": [Plane(SLIDING, window=20, block_tokens=BLOCK)],
    "chunks": [Plane(CHUNKED, span=32, block_tokens=BLOCK)],
    "both": [Plane(SLIDING, window=20, block_tokens=BLOCK), Plane(CHUNKED, span=32, block_tokens=BLOCK)],
    "wide": [Plane(SLIDING, window=70, block_tokens=16)],
}


@dataclass
class Engine:
    """Asks the cache as a connector does, and has each plane's KV where layers still attend to it."""

    planes: list
    pages: int = 400
    round: int = 0  # that confirms what is stored
    weights: int = 0  # 0: those of the namespace

    def __post_init__(self):
        self.shapes = [FULL, *(plane.shape for plane in self.planes)]
        self.frame = frame_bytes(self.shapes)
        self.buffer = np.zeros((self.pages, self.frame), dtype=np.uint8)
        pages = Pages(self.buffer.data, FULL, self.shapes[1:])
        self.cache = KVCache(
            pages, make_policy("lru"), [], Gate(active=False), Completions(), Metrics(), planes=self.planes
        )

    def ask(self, tokens, computed=0, step=64, keep=None, answer=()):
        """How many tokens were hit beyond `computed`; what was loaded is checked, what was computed is stored."""
        chain = TokenChain(SPACE, Chunker(16, 24, 32, TokenStructure.of(["a"])))
        chain.extend(as_tokens(tokens))
        prompt = Prompt(SPACE, chain)
        self.cache.tick()
        found = self.cache.lookup(prompt, computed, len(tokens) - 1)
        end = computed + found.tokens
        if found.result is Result.HIT:
            self.load(prompt, tokens, computed, end)
        shared = prompt.match.shared
        self.cache.release(prompt)
        every = [*tokens, *answer]
        chain.extend(as_tokens(answer))
        stops = [*range(end + step, len(tokens), step), len(tokens), *([len(every)] if answer else [])]
        for start, stop in zip([end, *stops], stops, strict=False):
            whole = max((cut for cut in chain.ends if cut <= stop), default=0)
            upto = stop if stop >= len(tokens) else whole
            self.store(self.cache.prepare_store(prompt, upto, self.round), every)
            if (stop >= len(tokens) if keep is None else keep(stop)) and upto:
                live = [plane.first(start) for plane in self.planes]
                for store in self.cache.windows.prepare_stores(prompt, upto, live, self.round):
                    assert store.positions.min() >= live[store.plane - 1], "of what the engine does not have"
                    self.store(store, every)
        self.check()
        return found.tokens, shared

    def load(self, prompt, tokens, computed, end):
        loads = self.cache.prepare_load(prompt, computed, end)
        self.cache.touch(prompt)
        had = [set() for _ in self.shapes]
        for load in loads:
            for row, position in zip(load.rows.tolist(), load.positions.tolist(), strict=True):
                expected = value(tokens, position, load.plane)
                assert (self.cell(row, load.plane) == expected).all(), (
                    f"wrong KV at {position}, plane {load.plane}"
                )
                had[load.plane].add(position)
            self.cache.complete_load(load, ok=True)
        firsts = [computed, *(max(computed, plane.first(end)) for plane in self.planes)]
        assert had == [set(range(first, end)) for first in firsts]

    def store(self, store, tokens):
        if store is not None:
            for row, position in zip(store.rows.tolist(), store.positions.tolist(), strict=True):
                self.cell(row, store.plane)[:] = value(tokens, position, store.plane) ^ self.weights
            self.cache.complete_store(store, ok=True)

    def cell(self, row, plane):
        """A token's elements in all layers, K and V."""
        shape = self.shapes[plane]
        page, offset = divmod(row, shape.page_tokens)
        whole = self.buffer[page, : shape.page_bytes].view(np.uint32)
        return whole.reshape(shape.layers * shape.kinds, shape.page_tokens)[:, offset]

    def check(self):
        self.cache.memory.check_integrity()


def value(tokens, position, plane):
    """What a token's KV depends on: the plane, and all tokens up to it."""
    return zlib.crc32(np.array([plane, *tokens[: position + 1]], dtype=np.int32).tobytes())


def fresh(seed, size):
    chance = Random(seed)
    return [chance.randrange(1, 1000) for _ in range(size)]


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


@given(st.data(), st.sampled_from(sorted(PLANES)), st.sampled_from([14, 40, 400]))
def test_whatever_is_asked_no_kv_is_wrong(data, planes, pages):
    engine = Engine(PLANES[planes], pages)
    trunk = fresh(7, 260)
    for number in range(data.draw(st.integers(1, 8))):
        cut = data.draw(st.integers(0, len(trunk)))
        prompt = [*trunk[:cut], *fresh(number % 3 + 20, data.draw(st.integers(1, 60)))]
        step = data.draw(st.sampled_from([8, 33, 64, 500]))
        marks = data.draw(st.sampled_from([None, lambda stop: True, lambda stop: stop % 2 == 0]))
        engine.ask(prompt, 0, step, marks, fresh(50 + number, data.draw(st.sampled_from([0, 0, 5, 40]))))
