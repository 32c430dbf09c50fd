"""The hierarchy over the memory tier, against a model that keeps every chunk in plain dicts.

The test plays the workers: what a commit writes into a chunk's rows depends on all tokens before, so that a
page with two owners, or one that is reused too early, shows in what a match reads.
"""

from itertools import takewhile

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ragkv.kvstore import metrics as m
from ragkv.kvstore.catalogue import rows
from ragkv.kvstore.chunking import Chunker, TokenChain, TokenStructure
from ragkv.kvstore.hierarchy import Hierarchy
from ragkv.kvstore.keys import as_tokens, chain_key
from ragkv.kvstore.memory import MemoryTier
from ragkv.kvstore.metrics import Metrics
from ragkv.policies import POLICIES, make_policy

PAGE_TOKENS, PAGE_BYTES, PAGES = 4, 100, 30
CHUNKER = Chunker(16, 20, 32, TokenStructure.of(["\n\n", *"abcdefgh"]))
SPACES = [b"namespace of one", b"namespace of two"]

# Prompts share passages, with and without paragraph breaks, and end where they like.
PASSAGES = [[1] * 20 + [0], [2, 3] * 12, [4] * 9, [5, 0], [6, 7, 8] * 7 + [0], [1] * 25, [2, 3] * 8 + [0]]
prompts = st.tuples(
    st.lists(st.sampled_from(PASSAGES), min_size=1, max_size=4).map(
        lambda parts: tuple(token for part in parts for token in part)
    ),
    st.lists(st.integers(1, 4), max_size=2),
).map(lambda parts: (*parts[0], *parts[1]))
names = st.lists(st.integers(1, 60), max_size=1)
spaces = st.sampled_from(SPACES)


def chain_of(space, tokens, named=()):
    chain = TokenChain(space, CHUNKER, named)
    chain.extend(as_tokens(tokens))
    return chain


def values(space, tokens):
    """What the KV of each token looks like: it depends on all before."""
    found, value = [], SPACES.index(space)
    for token in tokens:
        value = hash((value, token))
        found.append(value)
    return found


def common(a, b):
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Machine(RuleBasedStateMachine):
    policy = ""

    def __init__(self):
        super().__init__()
        self.metrics = Metrics()
        self.tier = MemoryTier(PAGES, make_policy(self.policy))
        self.hierarchy = Hierarchy(self.tier, PAGE_TOKENS, PAGE_BYTES, self.metrics)
        self.memory = np.zeros(PAGES * PAGE_TOKENS, dtype=np.int64)
        self.gauges, self.counters = {}, {}
        # The model: each living chunk with all tokens up to its end; those that match; holders.
        self.alive = {}
        self.ready = set()
        self.writing = []
        self.loads = []
        self.doomed = set()
        self.dead = []
        self.answers = {}

    # --- what the model knows ---

    def held(self):
        """All that a pin keeps, and what stands before it."""
        found = set()
        for chunk in [*self.writing, *(match.chunks[-1] for match, _ in self.loads)]:
            while chunk is not None and chunk.pages:
                found.add(chunk)
                chunk = chunk.parent
        return found

    def readable(self, chunk):
        while chunk.pages:
            if chunk not in self.ready:
                return False
            chunk = chunk.parent
        return True

    def pages_of(self, chunks):
        return sum(len(chunk.pages) // 4 for chunk in chunks)

    def stored(self, space, chain, end):
        """The chunk of this chain that ends there, or in the open tail there, if it lives."""
        key, start = space, 0
        for at, following in zip(chain.ends, chain.keys, strict=True):
            if at <= end:
                key, start = following, at
        if start < end:
            key = chain_key(key, chain.tokens[start:end].tobytes())
        return next((chunk for chunk in self.alive if chunk.key == key), None)

    def forget(self, chunks):
        for chunk in chunks:
            del self.alive[chunk]
            self.ready.discard(chunk)
            self.dead.append(chunk)

    def check_match(self, space, chain, limit):
        tokens = tuple(chain.tokens.tolist())
        match = self.hierarchy.match(space, chain, limit)
        assert match.length <= min(limit, len(tokens))
        assert all(chunk in self.alive and self.readable(chunk) for chunk in match.chunks)
        found = rows(match.chunks, PAGE_TOKENS)[: match.length]
        assert set((found // PAGE_TOKENS).tolist()) <= {
            page for chunk in match.chunks for page in np.frombuffer(chunk.pages, np.int32).tolist()
        }
        assert self.memory[found].tolist() == values(space, tokens[: match.length])
        stored = [path for chunk, (at, path) in self.alive.items() if at == space and self.readable(chunk)]
        longest = max((common(path, tokens[:limit]) for path in stored), default=0)
        whole = list(takewhile(lambda end: tokens[:end] in stored and self.stored(space, chain, end), chain.ends))
        assert min([limit, *whole[-1:]] if whole else [0]) <= match.length <= longest
        if not self.ambiguous():
            assert match.length == longest
        return match

    def ambiguous(self):
        """Whether a chunk is the beginning of its sibling: then a match need not be the longest."""
        chunks = list(self.alive)
        return any(
            a is not b and a.parent is b.parent and b.tokens.startswith(a.tokens) for a in chunks for b in chunks
        )

    # --- what may happen ---

    @rule(space=spaces, tokens=prompts, named=names, less=st.integers(0, 9))
    def reserve(self, space, tokens, named, less):
        chain, upto = chain_of(space, tokens, named), max(1, len(tokens) - less)
        held, used = self.held(), self.tier.used
        before = dict(self.alive)
        rewritten = {chunk for chunk in before if chunk not in self.ready and chunk not in self.writing}
        new = self.hierarchy.reserve(space, chain, upto)
        for start, chunk in new:
            end = start + len(chunk)
            assert end <= upto and not chunk.ready
            assert chunk.tokens == as_tokens(tokens[start:end]).tobytes()
            assert len(chunk.pages) // 4 == -(-len(chunk) // PAGE_TOKENS)
            assert end == upto or end in chain.ends
            assert chunk not in before or chunk in rewritten
            self.memory[rows([chunk], PAGE_TOKENS)] = 0
            self.alive[chunk] = (space, tuple(tokens[:end]))
        self.writing += [chunk for _, chunk in new]
        gone = [chunk for chunk in before if chunk not in self.hierarchy._catalogue]
        assert not held & set(gone), "what is held was evicted"
        self.forget(gone)
        fresh = self.pages_of(chunk for _, chunk in new if chunk not in before)
        assert used + fresh > PAGES or not gone, "evicted without need"
        assert used + fresh - self.pages_of(gone) == self.tier.used
        self.check_refusal(space, chain, upto)

    def check_refusal(self, space, chain, upto):
        """What was left out had no room, or stands in a longer chunk already."""
        tokens = tuple(chain.tokens.tolist())
        ends = [end for end in chain.ends if end < upto]
        line = list(takewhile(bool, (self.stored(space, chain, end) for end in [*ends, upto])))
        if len(line) > len(ends):
            return
        start, end = [0, *ends, upto][len(line) :][:2]
        held = self.held().union(line)
        covered = end == upto and any(
            at == space and path[:upto] == tokens[:upto] for at, path in self.alive.values()
        )
        need = -(-(end - start) // PAGE_TOKENS)
        assert covered or need > PAGES - self.pages_of(held | self.doomed)

    @precondition(lambda self: self.writing)
    @rule(data=st.data())
    def commit(self, data):
        chunk = self.writing.pop(data.draw(st.integers(0, len(self.writing) - 1)))
        if chunk in self.alive:
            space, path = self.alive[chunk]
            self.memory[rows([chunk], PAGE_TOKENS)] = values(space, path)[-len(chunk) :]
            self.ready.add(chunk)
        self.hierarchy.commit(chunk)
        self.settle()

    @precondition(lambda self: self.writing)
    @rule(data=st.data())
    def abandon(self, data):
        chunk = self.writing.pop(data.draw(st.integers(0, len(self.writing) - 1)))
        self.hierarchy.abandon(chunk)
        if chunk in self.alive and not any(other.parent is chunk for other in self.alive):
            self.forget([chunk])
        self.settle()

    @precondition(lambda self: self.alive or self.dead)
    @rule(data=st.data())
    def discard(self, data):
        chunk = data.draw(st.sampled_from([*self.alive, *self.dead[-4:]]))
        self.hierarchy.discard(chunk)
        pinned = chunk in self.writing or any(match.chunks[-1] is chunk for match, _ in self.loads)
        if chunk in self.alive and not pinned and not any(other.parent is chunk for other in self.alive):
            self.forget([chunk])

    @rule(space=spaces, tokens=prompts, named=names, less=st.integers(0, 9))
    def match(self, space, tokens, named, less):
        self.check_match(space, chain_of(space, tokens, named), max(0, len(tokens) - less))

    @rule(space=spaces, tokens=prompts)
    def load(self, space, tokens):
        match = self.check_match(space, chain_of(space, tokens), len(tokens) - 1)
        if match:
            self.hierarchy.touch(match)
            self.hierarchy.pin(match.chunks[-1:])
            self.loads.append((match, values(space, tokens[: match.length])))

    @precondition(lambda self: self.loads)
    @rule(data=st.data())
    def unload(self, data):
        match, expected = self.loads.pop(data.draw(st.integers(0, len(self.loads) - 1)))
        read = self.memory[rows(match.chunks, PAGE_TOKENS)[: match.length]].tolist()
        assert read == expected, "its pages were written while it was read"
        self.hierarchy.unpin(match.chunks[-1:])
        self.settle()

    @rule()
    def reset(self):
        held = self.held()
        self.hierarchy.reset()
        self.doomed |= held
        self.forget(list(self.alive))
        assert len(self.hierarchy) == 0
        self.settle()

    def settle(self):
        """What a reset left goes as soon as nothing holds it."""
        self.doomed &= self.held()

    # --- what always holds ---

    @invariant()
    def agree(self):
        self.hierarchy.check_integrity()
        assert len(self.hierarchy) == len(self.alive)
        assert self.tier.used == self.pages_of(self.alive) + self.pages_of(self.doomed) <= PAGES
        for part, values_now in self.metrics.drain().items():
            {"gauges": self.gauges, "counters": self.counters}[part].update(values_now)
        for name, value in ((m.USED_PAGES, self.tier.used), (m.CHUNKS, len(self.alive))):
            assert self.gauges[name + m.SEPARATOR + m.MEMORY] == value, name

    @invariant()
    def version_tells_of_changes(self):
        chain = chain_of(SPACES[0], [*PASSAGES[0], *PASSAGES[1], *PASSAGES[4]])
        answer = self.hierarchy.match(SPACES[0], chain, 60)
        assert self.answers.get(self.hierarchy.version, answer) == answer
        self.answers = {self.hierarchy.version: answer}

    def teardown(self):
        for chunk in reversed(self.writing):
            self.hierarchy.abandon(chunk)
        for match, _ in self.loads:
            self.hierarchy.unpin(match.chunks[-1:])
        assert not self.hierarchy._doomed
        victims = self.tier.make_room(PAGES)
        assert victims is not None and len(victims) == len(self.hierarchy), "not all can be evicted"
        assert self.tier.used == 0
        assert sorted(np.frombuffer(self.tier.take(PAGES), np.int32).tolist()) == list(range(PAGES))


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_state_machine(policy):
    machine = type(f"{policy}Machine", (Machine,), {"policy": policy})
    run_state_machine_as_test(machine, settings=settings(max_examples=200, stateful_step_count=40, deadline=None))


@pytest.fixture(params=sorted(POLICIES))
def tier(request):
    return MemoryTier(8, make_policy(request.param))


@pytest.fixture
def hierarchy(tier):
    made = Hierarchy(tier, PAGE_TOKENS, PAGE_BYTES, Metrics())
    yield made
    made.check_integrity()


SPACE = SPACES[0]


def stored(hierarchy, tokens, upto=None):
    chain = chain_of(SPACE, tokens)
    for _, chunk in hierarchy.reserve(SPACE, chain, len(tokens) if upto is None else upto):
        hierarchy.commit(chunk)
    return chain


def counted(hierarchy):
    counters = hierarchy._metrics.drain().get("counters", {})
    return {tuple(key.split(m.SEPARATOR)): value for key, value in counters.items()}


def test_a_namespace_outlives_the_eviction_of_its_last_chunk(hierarchy):
    stored(hierarchy, [1] * 32)
    chain = stored(hierarchy, [2] * 32)
    assert hierarchy.match(SPACE, chain, 32).length == 32
    assert not hierarchy.match(SPACE, chain_of(SPACE, [1] * 32), 32)
    assert counted(hierarchy)[m.EVICTED_CHUNKS, m.CAPACITY] == 1


def test_looking_up_keeps_nothing(hierarchy):
    for number in range(100):
        hierarchy.match(number.to_bytes(16, "big"), chain_of(SPACE, [1] * 32), 32)
    assert not hierarchy._catalogue._roots


def test_a_tail_that_is_being_written_is_no_collision(hierarchy):
    chain = chain_of(SPACE, [1] * 10)
    ((_, first),) = hierarchy.reserve(SPACE, chain, 10)
    assert hierarchy.reserve(SPACE, chain, 10) == []
    hierarchy.commit(first)
    assert (m.REFUSED_CHUNKS, m.COLLISION) not in counted(hierarchy)


def test_a_tail_within_a_stored_one_is_not_stored_again(hierarchy, tier):
    stored(hierarchy, [1] * 12)
    assert hierarchy.reserve(SPACE, chain_of(SPACE, [1] * 10), 10) == []
    assert tier.used == 3


def test_what_is_too_large_evicts_nothing_and_is_counted(hierarchy, tier):
    chain = stored(hierarchy, [1] * 10)
    hierarchy.pin(hierarchy.match(SPACE, chain, 10).chunks)
    assert hierarchy.reserve(SPACE, chain_of(SPACE, [2] * 26), 26) == []
    assert counted(hierarchy)[m.REFUSED_CHUNKS, m.NO_ROOM] == 1
    assert tier.used == 3 and len(hierarchy) == 1


def test_the_rest_is_left_out_where_room_ends(hierarchy, tier):
    chain = chain_of(SPACE, [1] * 20 + [0] + [2] * 20)
    ((at, chunk),) = hierarchy.reserve(SPACE, chain, 41)
    assert (at, len(chunk), tier.used) == (0, 21, 6)
    hierarchy.commit(chunk)
    assert hierarchy.match(SPACE, chain, 41).length == 21


def test_an_abandoned_chunk_with_others_behind_it_is_written_anew(hierarchy):
    chain = chain_of(SPACE, [1] * 16 + [0] + [2] * 8)
    (_, first), (_, second) = hierarchy.reserve(SPACE, chain, 25)
    hierarchy.commit(second)
    hierarchy.abandon(first)
    assert not hierarchy.match(SPACE, chain, 25)
    ((at, again),) = hierarchy.reserve(SPACE, chain, 25)
    assert at == 0 and again is first
    hierarchy.commit(again)
    assert hierarchy.match(SPACE, chain, 25).chunks == (first, second)


def test_an_abandoned_leaf_is_gone(hierarchy, tier):
    chain = chain_of(SPACE, [1] * 16 + [0] + [2] * 8)
    for _, chunk in reversed(hierarchy.reserve(SPACE, chain, 25)):
        hierarchy.abandon(chunk)
    assert tier.used == 0 and len(hierarchy) == 0
    assert counted(hierarchy)[m.EVICTED_CHUNKS, m.ABANDONED] == 2


def test_what_a_reset_leaves_goes_when_its_own_pin_goes(hierarchy, tier):
    """Not only when nothing at all is pinned, which under load is never."""
    one, two = stored(hierarchy, [1] * 12), stored(hierarchy, [2] * 12)
    first, second = (hierarchy.match(SPACE, chain, 12).chunks for chain in (one, two))
    hierarchy.pin(first)
    hierarchy.pin(second)
    hierarchy.reset()
    assert len(hierarchy) == 0 and tier.used == 6
    assert not hierarchy.match(SPACE, one, 12)
    hierarchy.unpin(first)
    assert tier.used == 3
    stored(hierarchy, [3] * 20)
    hierarchy.reset()
    assert tier.used == 3
    hierarchy.unpin(second)
    assert tier.used == 0
    assert counted(hierarchy)[m.EVICTED_CHUNKS, m.RESET] == 3


def test_what_is_written_while_a_reset_comes_never_matches(hierarchy, tier):
    chain = chain_of(SPACE, [1] * 12)
    ((_, old),) = hierarchy.reserve(SPACE, chain, 12)
    hierarchy.reset()
    ((_, new),) = hierarchy.reserve(SPACE, chain, 12)
    hierarchy.commit(old)
    assert not hierarchy.match(SPACE, chain, 12)
    hierarchy.discard(old)
    hierarchy.commit(new)
    assert hierarchy.match(SPACE, chain, 12).chunks == (new,) and tier.used == 3


def test_pages_come_back_and_more_than_all_are_refused(tier):
    assert np.frombuffer(tier.take(8), np.int32).tolist() == list(range(8))
    with pytest.raises(IndexError, match="1 pages asked for, 0 free"):
        tier.take(1)
    assert tier.make_room(1) is None and tier.used == 8
