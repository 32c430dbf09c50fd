"""The hierarchy over the memory tier, against a model that keeps every chunk in plain dicts.

The test plays the workers: what a commit writes into a chunk's rows depends on all tokens before, so that a
page with two owners, or one that is reused too early, shows in what a match reads.
"""

from collections import Counter
from itertools import takewhile

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from hand_lanes import Recorded
from memory_tier_tools import (
    PAGE_BYTES,
    PAGE_TOKENS,
    PASSAGES,
    SPACES,
    Door,
    chain_of,
    common,
    names,
    prompts,
    spaces,
    values,
)
from ragkv.kvstore import metrics as m
from ragkv.kvstore.device_tier import DeviceTier
from ragkv.kvstore.keys import as_tokens, chain_key
from ragkv.kvstore.memory_tier import MemoryTier
from ragkv.kvstore.pages import rows
from ragkv.kvstore.pins import NEVER
from ragkv.policies import POLICIES, make_policy

PAGES, DEVICE_PAGES, OWNERS = 30, 12, ["desk 1", "desk 2"]


class Machine(RuleBasedStateMachine):
    policy = ""

    def __init__(self):
        super().__init__()
        self.metrics = Recorded()
        self.device = DeviceTier(DEVICE_PAGES, make_policy(self.policy), after=1)
        self.door = Door()
        self.tier = MemoryTier(
            *(PAGES, make_policy(self.policy), PAGE_TOKENS, PAGE_BYTES, self.metrics, self.door, self.device),
            attention_tokens=50.0,
            evicting=self.evicting,
            by_content=True,
        )
        self.memory = np.zeros(PAGES * PAGE_TOKENS, dtype=np.int64)
        self.device_memory = np.zeros(DEVICE_PAGES * PAGE_TOKENS, dtype=np.int64)
        self.gone = Counter()  # chunks, by why they went
        # The model: each living chunk with all tokens up to its end; those that match; holders.
        self.alive = {}
        self.ready = set()
        self.writing = []
        self.loads = []
        self.doomed = set()
        self.dead = []
        self.answers = {}
        self.paths = {}  # of all chunks that ever were
        self.demoted = []  # what the last call evicted, as it was told
        self.copies = []  # ordered to the device tier
        self.now, self.until, self.expiries = 0.0, {}, {}

    # --- what the model knows ---

    def held(self):
        """All that a pin keeps, and what stands before it."""
        found = set()
        for chunk in self.pinned():
            while chunk is not None and chunk.pages:
                found.add(chunk)
                chunk = chunk.parent
        return found

    def pinned(self):
        return {*self.writing, *(match.chunks[-1] for match, _ in self.loads), *(chunk for _, chunk in self.until)}

    def has_children(self, chunk):
        return any(other.parent is chunk for other in self.alive)

    def behind(self, chunk):
        """A living chunk, and all that stand behind it."""
        return [chunk, *(each for other in self.alive if other.parent is chunk for each in self.behind(other))]

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
            self.expiries.pop(chunk, None)
            self.dead.append(chunk)

    def doom(self, chunks, reason):
        """They match no more; no owner keeps them; what is held otherwise keeps its pages."""
        gone = set(chunks)
        self.until = {key: until for key, until in self.until.items() if key[1] not in gone}
        self.doomed |= gone
        self.gone[reason] += len(gone)
        self.settle()
        self.forget(chunks)

    def evicting(self, chunk):
        """The hook: the chunk's bytes are still there, and those behind it went before."""
        space, path = self.alive[chunk]
        assert chunk in self.ready and chunk not in self.held()
        assert self.memory[rows([chunk], PAGE_TOKENS)].tolist() == values(space, path)[-len(chunk) :]
        assert not any(
            other.parent is chunk and other in self.ready for other in set(self.alive) - set(self.demoted)
        )
        self.demoted.append(chunk)

    def check_match(self, space, chain, limit):
        tokens = tuple(chain.tokens.tolist())
        match = self.tier.match(space, chain, limit)
        assert match.length <= min(limit, len(tokens))
        assert all(chunk in self.alive and self.readable(chunk) for chunk in match.chunks)
        found = rows(match.chunks, PAGE_TOKENS)[: match.length]
        assert set((found // PAGE_TOKENS).tolist()) <= {
            page for chunk in match.chunks for page in np.frombuffer(chunk.pages, np.int32).tolist()
        }
        assert self.memory[found].tolist() == values(space, tokens[: match.length])
        for chunk in match.chunks:
            if chunk in self.device:
                copy = self.device_memory[rows([chunk], PAGE_TOKENS, device=True)].tolist()
                assert copy == values(*self.paths[chunk])[-len(chunk) :], "the device tier holds something else"
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

    @rule(
        space=spaces,
        tokens=prompts,
        named=names,
        less=st.integers(0, 9),
        door=st.sampled_from([True, True, False]),
        seconds=st.sampled_from([NEVER, NEVER, 1, 7]),
    )
    def reserve(self, space, tokens, named, less, door, seconds):
        self.door.open = door
        chain, upto = chain_of(space, tokens, named), max(1, len(tokens) - less)
        held, used = self.held(), self.tier.used
        before = dict(self.alive)
        rewritten = {chunk for chunk in before if chunk not in self.ready and chunk not in self.pinned()}
        self.demoted.clear()
        new = self.tier.reserve(space, chain, upto, until=self.now + seconds)
        for chunk in new:
            start, end = chunk.position, chunk.position + len(chunk)
            assert end <= upto and not chunk.ready
            assert chunk.tokens == as_tokens(tokens[start:end]).tobytes()
            assert len(chunk.pages) // 4 == -(-len(chunk) // PAGE_TOKENS)
            assert end == upto or end in chain.ends
            assert chunk in rewritten if chunk in before else self.door.open
            self.memory[rows([chunk], PAGE_TOKENS)] = 0
            self.alive[chunk] = self.paths[chunk] = (space, tuple(tokens[:end]))
        self.writing += new
        self.wanted(space, chain, upto, self.now + seconds, before)
        gone = [chunk for chunk in before if chunk not in self.tier.tree]
        assert not held & set(gone), "what is held was evicted"
        assert self.demoted == [chunk for chunk in self.demoted if chunk in gone and chunk in self.ready]
        assert set(self.demoted) == self.ready & set(gone)
        self.forget(gone)
        self.gone[m.CAPACITY] += len(gone)
        fresh = self.pages_of(chunk for chunk in new if chunk not in before)
        assert used + fresh > PAGES or not gone, "evicted without need"
        assert used + fresh - self.pages_of(gone) == self.tier.used
        if self.door.open:
            self.check_refusal(space, chain, upto)

    def wanted(self, space, chain, upto, until, before):
        """What is new goes at that time, what was there before no earlier."""
        for end in [*(end for end in chain.ends if end < upto), upto]:
            chunk = self.stored(space, chain, end)
            if chunk is None or chunk not in self.tier:
                return
            if chunk in self.expiries or (chunk not in before and until < NEVER):
                self.expiries[chunk] = max(until, self.expiries.get(chunk, 0.0))

    @rule(space=spaces, tokens=prompts, named=names)
    def store(self, space, tokens, named):
        """A prompt that is computed and stored without trouble."""
        before = set(self.writing)
        self.reserve(space, tokens, named, 0, True, NEVER)
        for chunk in [chunk for chunk in self.writing if chunk not in before]:
            self.finish(chunk)

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
        self.finish(data.draw(st.sampled_from(self.writing)))

    def finish(self, chunk):
        self.writing.remove(chunk)
        if chunk in self.alive:
            space, path = self.alive[chunk]
            self.memory[rows([chunk], PAGE_TOKENS)] = values(space, path)[-len(chunk) :]
            self.ready.add(chunk)
        self.tier.commit(chunk)
        self.settle()

    @precondition(lambda self: self.writing)
    @rule(data=st.data())
    def abandon(self, data):
        chunk = self.writing.pop(data.draw(st.integers(0, len(self.writing) - 1)))
        self.tier.abandon(chunk)
        while chunk in self.alive and chunk not in self.ready | self.pinned() and not self.has_children(chunk):
            self.doom([chunk], m.ABANDONED)
            chunk = chunk.parent
        self.settle()

    @precondition(lambda self: self.alive or self.dead)
    @rule(data=st.data())
    def discard(self, data):
        chunk = data.draw(st.sampled_from([*self.alive, *self.dead[-4:]]))
        self.tier.discard(chunk)
        if chunk in self.alive and chunk not in self.pinned() and not self.has_children(chunk):
            self.doom([chunk], m.SUPERSEDED)

    @rule(space=spaces, tokens=prompts, named=names, less=st.integers(0, 9))
    def match(self, space, tokens, named, less):
        self.check_match(space, chain_of(space, tokens, named), max(0, len(tokens) - less))

    @precondition(lambda self: self.ready)
    @rule(data=st.data(), more=st.lists(st.integers(1, 4), min_size=1, max_size=9))
    def ask_again(self, data, more):
        """A prompt that goes on behind what is stored."""
        space, path = self.alive[
            data.draw(st.sampled_from([chunk for chunk in self.alive if chunk in self.ready]))
        ]
        self.load(space, (*path, *more))

    @rule(space=spaces, tokens=prompts)
    def load(self, space, tokens):
        match = self.check_match(space, chain_of(space, tokens), len(tokens) - 1)
        if match:
            due = self.tier.touch(match)
            assert not due or due[-1] is not match.chunks[-1] or sum(map(len, match.chunks)) == match.length
            self.copies += [(chunk, chunk.device) for chunk in due]
            self.tier.pin(match.chunks[-1:])
            self.loads.append((match, values(space, tokens[: match.length])))

    @precondition(lambda self: self.loads)
    @rule(data=st.data())
    def unload(self, data):
        match, expected = self.loads.pop(data.draw(st.integers(0, len(self.loads) - 1)))
        read = self.memory[rows(match.chunks, PAGE_TOKENS)[: match.length]].tolist()
        assert read == expected, "its pages were written while it was read"
        self.tier.unpin(match.chunks[-1:])
        self.settle()

    @precondition(lambda self: len(self.alive) > 6)
    @rule()
    def reset(self):
        self.tier.reset()
        self.doom(list(self.alive), m.RESET)
        self.until = {}
        assert len(self.tier) == 0
        self.settle()

    @precondition(lambda self: len(self.alive) > 2)
    @rule(data=st.data())
    def drop_with_all_behind(self, data):
        chunk = data.draw(st.sampled_from([*self.alive, *self.dead[-2:]]))
        self.tier.forget([chunk], m.EXPIRED)
        if chunk in self.alive:
            self.doom(self.behind(chunk), m.EXPIRED)
        self.settle()

    @precondition(lambda self: self.ready)
    @rule(data=st.data(), owner=st.sampled_from(OWNERS), seconds=st.integers(1, 9))
    def hold(self, data, owner, seconds):
        chunk = data.draw(st.sampled_from([chunk for chunk in self.alive if chunk in self.ready]))
        fits = self.pages_of({chunk, *(chunk for _, chunk in self.until)}) <= PAGES // 4
        assert self.tier.pins.hold(owner, chunk, self.now + seconds) == fits
        if fits:
            self.until[owner, chunk] = self.now + seconds

    @rule(owner=st.sampled_from(OWNERS))
    def release(self, owner):
        self.tier.pins.release(owner)
        self.until = {key: until for key, until in self.until.items() if key[0] != owner}
        self.settle()

    @precondition(lambda self: self.ready)
    @rule(data=st.data(), seconds=st.integers(1, 9))
    def expire(self, data, seconds):
        chunk = data.draw(st.sampled_from([chunk for chunk in self.alive if chunk in self.ready]))
        self.tier.pins.expire(chunk, self.now + seconds)
        self.expiries[chunk] = max(self.now + seconds, self.expiries.get(chunk, 0.0))

    @rule(seconds=st.integers(0, 5))
    def tick(self, seconds):
        self.now += seconds
        self.tier.tick(self.now)
        self.until = {key: until for key, until in self.until.items() if until > self.now}
        self.settle()
        for chunk in [chunk for chunk, at in self.expiries.items() if at <= self.now]:
            if chunk in self.alive:
                self.doom(self.behind(chunk), m.EXPIRED)

    @precondition(lambda self: self.copies)
    @rule(well=st.booleans())
    def copy(self, well):
        """A step copies a chunk to the device tier, from an engine's cache that no eviction reaches."""
        chunk, pages = self.copies.pop(0)
        grid = np.frombuffer(pages, np.int32)[:, None] * PAGE_TOKENS + np.arange(PAGE_TOKENS)
        self.device_memory[grid.reshape(-1)[: len(chunk)]] = (
            values(*self.paths[chunk])[-len(chunk) :] if well else 0
        )
        self.tier.device.made(chunk, pages, ok=well)

    def settle(self):
        """What was dropped while held goes as soon as nothing holds it."""
        self.doomed &= self.held()

    # --- what always holds ---

    @invariant()
    def agree(self):
        self.tier.check_integrity()
        self.tier.report()
        assert len(self.tier) == len(self.alive)
        assert self.tier.used == self.pages_of(self.alive) + self.pages_of(self.doomed) <= PAGES
        for name, value in ((m.USED_PAGES, self.tier.used), (m.CHUNKS, len(self.alive))):
            assert self.metrics.get(name, m.MEMORY) == value, name
        for reason, count in self.gone.items():
            assert self.metrics.get(m.EVICTED_CHUNKS, m.MEMORY, reason) == count, reason
        held = {chunk for _, chunk in self.until}
        assert self.metrics.get(m.PINNED_BYTES) == self.pages_of(held) * PAGE_BYTES <= PAGES * PAGE_BYTES // 2

    @invariant()
    def the_device_tier_copies_what_is_in_memory(self):
        copied = [chunk for chunk in self.paths if chunk.device]
        assert set(copied) <= self.alive.keys() | self.doomed
        assert sum(len(chunk.device) // 4 for chunk in copied) == self.device.used
        assert all(len(chunk.device) == len(chunk.pages) for chunk in copied)
        assert len(self.device) == sum(chunk in self.device for chunk in copied) <= len(copied)

    @invariant()
    def version_tells_of_changes(self):
        chain = chain_of(SPACES[0], [*PASSAGES[0], *PASSAGES[1], *PASSAGES[4]])
        answer = self.tier.match(SPACES[0], chain, 60)
        assert self.answers.get(self.tier.version, answer) == answer
        self.answers = {self.tier.version: answer}

    def teardown(self):
        for chunk in reversed(self.writing):
            self.tier.abandon(chunk)
        for match, _ in self.loads:
            self.tier.unpin(match.chunks[-1:])
        self.tier.pins.forget()
        self.writing, self.loads, self.until, self.door.open = [], [], {}, True
        assert not self.tier.leaving
        chain = chain_of(SPACES[0], [9] * PAGES * PAGE_TOKENS)
        new = self.tier.reserve(SPACES[0], chain, PAGES * PAGE_TOKENS)
        pages = np.concatenate([np.frombuffer(chunk.pages, np.int32) for chunk in new])
        assert sorted(pages.tolist()) == list(range(PAGES)), "not all can be evicted"


@pytest.mark.slow
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_state_machine(policy):
    machine = type(f"{policy}Machine", (Machine,), {"policy": policy})
    run_state_machine_as_test(machine, settings=settings(max_examples=80, stateful_step_count=50, deadline=None))
