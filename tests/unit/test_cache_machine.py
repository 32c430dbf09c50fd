"""`KVCache` against a dictionary: the KV of every prompt that was ever stored, by what it was computed from.

The machine plays the engine: it writes what a store says and reads what a load says, when that ends, so that a
page with two owners, or one that is given away too early, shows in what is read. Two lower tiers do their I/O in
any order, fail, lose values and have them spoiled; the engine crashes and starts again.
"""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from hand_lanes import ContentStack, Lower, assert_at_rest, redis, words
from ragkv.errors import StoreError
from ragkv.kvstore.chunking import Chunker, TokenChain, TokenStructure
from ragkv.kvstore.keys import as_tokens, chain_key
from ragkv.kvstore.pages import PageShape, rows
from ragkv.kvstore.pins import Pin
from ragkv.kvstore.prefix_tree import is_detached, origin
from ragkv.kvstore.prompt import Prompt, Result

PAGE = 4
MASK = (1 << 62) - 1
CHUNKER = Chunker(16, 24, 32, TokenStructure.of(["a", "\n\n"]))
PASSAGES = [words(seed, length) for seed, length in ((1, 16), (2, 18), (3, 17), (4, 20))]
SPACES = [b"namespace of one", b"namespace of two"]
texts = st.lists(st.sampled_from(range(4)), min_size=1, max_size=3)


def truth(space, tokens):
    """What the KV of each token looks like: it depends on all before."""
    found, value = [], SPACES.index(space)
    for token in tokens:
        value = hash((value, token)) & MASK
        found.append(value)
    return np.array(found, dtype=np.int64)


class Engine(ContentStack):
    """A cache whose pages hold values: the halves of each are a token's K and V."""

    SHAPE = PageShape(ranks=1, layers=1, page_tokens=PAGE, row_elements=1, itemsize=4, dtype="float32")

    def start(self):
        super().start()
        self.halves = self.bytes.view(np.int32).reshape(-1, 2, PAGE)

    def work(self):
        """Let all lanes work until nothing is left to do."""
        while True:
            self.cache.tick()
            if not sum(lane.run() for lower in self.lowers for lane in (lower.writes, lower.reads)):
                return

    def write(self, where, values):
        for half, shift in enumerate((0, 31)):
            self.halves[where // PAGE, half, where % PAGE] = values >> shift & (1 << 31) - 1

    def read(self, where):
        low, high = (self.halves[where // PAGE, half, where % PAGE].astype(np.int64) for half in (0, 1))
        return high << 31 | low


class Machine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.engine = Engine(Lower(capacity=80 << 10, asks=True), redis(), pages=30)
        self.model = {}  # by chain key of every chunk that was stored, what it was computed from
        self.waiting, self.loads, self.stores = [], [], []
        self.number = 0

    @property
    def cache(self):
        return self.engine.cache

    def prompt(self, space, parts, ttl=None, pin=None):
        """A prompt, cut at its passages, and its tokens."""
        tokens = [token for part in parts for token in PASSAGES[part]]
        ends = np.cumsum([len(PASSAGES[part]) for part in parts]).tolist()
        key, start = space, 0
        for end in ends:
            key = chain_key(key, as_tokens(tokens[start:end]).tobytes())
            self.model[key] = space, tuple(tokens[:end])
            start = end
        chain = TokenChain(space, CHUNKER, ends)
        chain.extend(as_tokens(tokens))
        assert chain.ends == ends
        return Prompt(space, chain, ttl=ttl, pin=pin), tokens

    # --- lookups and loads ---

    @rule(space=st.sampled_from(SPACES), parts=texts, computed=st.integers(0, 20), idle=st.booleans())
    def ask(self, space, parts, computed, idle):
        prompt, tokens = self.prompt(space, parts)
        self.look_up(prompt, tokens, min(computed, len(tokens) - 1), idle)

    @rule(parts=texts)
    def ask_until_it_is_answered(self, parts):
        """The lower tiers do all that is asked of them meanwhile."""
        prompt, tokens = self.prompt(SPACES[0], parts)
        self.look_up(prompt, tokens, 0, idle=True)
        for _ in range(9):
            if not (self.waiting and self.waiting[-1][0] is prompt):
                return
            self.waiting.pop()
            self.engine.work()
            self.look_up(prompt, tokens, 0, idle=True)
        raise AssertionError("it waits for ever")

    @rule(parts=texts, restart=st.booleans())
    def keep_for_later(self, parts, restart):
        """A prompt is stored and written; perhaps the engine ends then, and another begins."""
        self.keep(SPACES[0], parts)
        self.engine.work()
        if restart:
            self.restart(5.0)

    @precondition(lambda self: self.waiting)
    @rule(idle=st.booleans())
    def ask_again(self, idle):
        self.look_up(*self.waiting.pop(0), idle)

    def look_up(self, prompt, tokens, computed, idle):
        found = self.cache.lookup(prompt, computed, len(tokens) - 1, idle=idle)
        if found.result is Result.PENDING:
            self.waiting.append((prompt, tokens, computed))
        elif found.result is Result.MISS:
            assert found.tokens == 0
            self.by_content(prompt, tokens, computed)
        else:
            end = computed + found.tokens
            assert computed < end < len(tokens)
            assert any(
                space == prompt.namespace and path[:end] == tuple(tokens[:end])
                for space, path in self.model.values()
            ), "it was never stored"
            loads = self.cache.prepare_load(prompt, computed, end)
            there = np.concatenate([load.positions for load in loads])
            assert sorted(there.tolist()) == list(range(computed, end))
            self.loads += [(load, truth(prompt.namespace, tokens)[load.positions]) for load in loads]
            assert self.cache.touch(prompt) is None, "there is no device tier"
            self.cache.release(prompt)

    def by_content(self, prompt, tokens, computed):
        limit = len(tokens)
        found = self.cache.lookup_content(prompt, computed, limit)
        if found.result is Result.PENDING:
            self.waiting.append((prompt, tokens, computed))
            return
        if found.result is Result.HIT:
            load = self.cache.prepare_moved_load(prompt.passages)
            expected, at = [], 0
            for piece in prompt.passages:
                space, path = self.computed_from(piece.chunk)
                start = origin(piece.chunk)[1] + piece.first
                assert space == prompt.namespace and piece.start - piece.shift == start
                assert path[start : start + len(piece)] == tuple(tokens[piece.start : piece.end])
                expected.append(truth(space, path)[start : start + len(piece)])
                assert (load.shifts[at : at + len(piece)] == piece.shift).all()
                at += len(piece)
            self.loads.append((load, np.concatenate(expected)))
        self.cache.release(prompt)

    def computed_from(self, chunk):
        """By the model: a whole chunk, or the open tail of one."""
        key = chunk.parent.source if is_detached(chunk) else chunk.key
        if key not in self.model:
            space, path = (
                self.model[chunk.parent.key] if chunk.parent.parent is not None else (chunk.parent.key, ())
            )
            return space, (*path, *np.frombuffer(chunk.tokens, np.int32).tolist())
        return self.model[key]

    @precondition(lambda self: self.loads)
    @rule(data=st.data(), ok=st.booleans())
    def end_load(self, data, ok):
        load, expected = self.loads.pop(data.draw(st.integers(0, len(self.loads) - 1)))
        assert (self.engine.read(load.rows) == expected).all(), "its pages were written while it was read"
        self.cache.complete_load(load, ok=ok)

    # --- stores ---

    @rule(
        space=st.sampled_from(SPACES),
        parts=texts,
        less=st.sampled_from([0, 0, 3]),
        ttl=st.sampled_from([None, None, 5]),
        pin=st.sampled_from([None, None, Pin("desk", 4)]),
        confirmed=st.booleans(),
    )
    def begin_store(self, space, parts, less, ttl, pin, confirmed):
        prompt, tokens = self.prompt(space, parts, ttl, pin)
        self.number += not confirmed
        store = self.cache.prepare_store(prompt, len(tokens) - less, 0 if confirmed else self.number)
        if store is not None:
            self.stores.append((store, truth(space, tokens)[store.positions]))

    @precondition(lambda self: self.stores)
    @rule(data=st.data(), ok=st.sampled_from([True, True, False]))
    def end_store(self, data, ok):
        store, values = self.stores.pop(data.draw(st.integers(0, len(self.stores) - 1)))
        self.engine.write(store.rows, values if ok else np.zeros_like(values))
        self.cache.complete_store(store, ok=ok)

    @rule(space=st.sampled_from(SPACES), parts=texts)
    def keep(self, space, parts):
        """A prompt that is computed and stored without trouble is found, where nothing else is in use."""
        prompt, tokens = self.prompt(space, parts)
        busy = self.loads or self.stores or self.waiting or self.engine.completions.waiting
        busy = busy or any(lane.jobs for lower in self.engine.lowers for lane in (lower.reads, lower.writes))
        store = self.cache.prepare_store(prompt, len(tokens))
        if store is not None:
            self.engine.write(store.rows, truth(space, tokens)[store.positions])
            self.cache.complete_store(store, ok=True)
        if not busy and not self.cache.memory.pins.pinned:
            assert self.cache.stored_tokens(prompt, len(tokens)) == len(tokens)

    @rule()
    def confirm(self):
        self.cache.confirm(self.number)
        assert not self.cache.unconfirmed

    @rule()
    def invalidate(self):
        self.cache.invalidate()
        assert not self.cache.unconfirmed

    # --- time, and what goes wrong ---

    @rule(tier=st.integers(0, 1), write=st.booleans(), place=st.integers(0, 3), times=st.integers(1, 4))
    def work(self, tier, write, place, times):
        lower = self.engine.lowers[tier]
        for _ in range(times):
            if write:
                lower.writes.step()
            else:
                lower.reads.step(place)
        self.cache.tick()

    @rule(seconds=st.sampled_from([0, 0.5, 3]))
    def time(self, seconds):
        self.engine.clock.now += seconds
        self.engine.wall.now += seconds
        self.cache.tick()

    @rule()
    def flush(self):
        if self.cache.flush():
            self.cache.end_flush()

    @rule()
    def unpin(self):
        self.cache.unpin(b"", "desk")

    @rule()
    def reset(self):
        self.cache.reset()
        assert len(self.cache) == 0

    @rule(seconds=st.sampled_from([None, 5.0]))
    def restart(self, seconds):
        """A crash, or an end: what was in flight is lost; below memory all is as it was."""
        if seconds is not None:
            self.cache.close(seconds)
        self.engine.start()
        self.waiting, self.loads, self.stores = [], [], []

    @precondition(lambda self: any(lower.stored() for lower in self.engine.lowers))
    @rule(data=st.data(), lose=st.booleans())
    def harm(self, data, lose):
        lower = data.draw(st.sampled_from([lower for lower in self.engine.lowers if lower.stored()]))
        key = data.draw(st.sampled_from(sorted(lower.stored())))
        if lose:
            lower.values.delete([key])
        else:
            at = data.draw(st.integers(0, 10**6))
            lower.spoil(key, lambda value: value.__setitem__(at % len(value), value[at % len(value)] ^ 1) or value)

    @rule(tier=st.integers(0, 1), method=st.sampled_from(["get_many", "contains", "put", "delete"]))
    def fail(self, tier, method):
        errors = self.engine.lowers[tier].store.errors
        if errors.pop(method, None) is None:
            errors[method] = StoreError("timeout", "slow")

    # --- what always holds ---

    @invariant()
    def what_can_be_read_is_what_was_computed(self):
        self.cache.memory.check_integrity()
        for chunk in self.cache.memory.everything():
            space, path = self.computed_from(chunk)
            start = origin(chunk)[1]
            assert origin(chunk)[0] == space
            there = self.engine.read(rows([chunk], PAGE))
            assert (there == truth(space, path)[start : start + len(chunk)]).all()

    @invariant()
    def no_request_waits_for_nothing(self):
        for prompt, *_ in self.waiting:
            for fetch in (prompt.fetch, prompt.content_fetch):
                assert (
                    fetch is None
                    or fetch.over
                    or self.engine.completions.waiting
                    or any(lower.reads.jobs for lower in self.engine.lowers)
                )

    def teardown(self):
        for lower in self.engine.lowers:
            lower.store.errors.clear()
        for load, _ in self.loads:
            self.cache.complete_load(load, ok=True)
        for store, _ in self.stores:
            self.cache.complete_store(store, ok=False)
        for prompt, *_ in self.waiting:
            self.cache.release(prompt)
        self.cache.unpin(b"", "desk")
        self.engine.settle()
        assert_at_rest(self.cache)
        for lower in self.engine.lowers:
            lower.check()
        assert all(fetch is None or fetch.over for prompt, *_ in self.waiting for fetch in (prompt.fetch,))


@pytest.mark.slow
def test_state_machine():
    run_state_machine_as_test(Machine, settings=settings(max_examples=150, stateful_step_count=40, deadline=None))
