"""Lanes and clocks that a test moves by hand: every interleaving can be made, without threads or sleep."""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

import numpy as np

from memory_store import MemoryStore
from ragkv.benchmarks.internal.faulty_stores import FaultyStore, Plan, WrapperStore
from ragkv.kvstore import metrics as m
from ragkv.kvstore.breaker import State
from ragkv.kvstore.budget import Index
from ragkv.kvstore.cache import KVCache
from ragkv.kvstore.chunking import Chunker, TokenChain, TokenStructure
from ragkv.kvstore.gate import Gate
from ragkv.kvstore.io_pool import Completions, Wanted, Write, run
from ragkv.kvstore.keys import as_tokens
from ragkv.kvstore.metrics import METRICS, Metrics
from ragkv.kvstore.pages import Pages, PageShape
from ragkv.kvstore.prefix_tree import is_detached
from ragkv.kvstore.storage_tier import StorageTier
from ragkv.policies import AdmissionPolicy, Always, make_policy


@dataclass
class HandClock:
    """A clock that stands still."""

    now: float = 1000.0

    def __call__(self):
        return self.now


class HandCompletions(Completions):
    """Where one would wait, `meanwhile` happens, if given; if nothing comes of it, the time is over at once.
    `waiting`: outcomes that came to nobody yet."""

    def __init__(self, clock):
        super().__init__()
        self.clock, self.meanwhile, self.waiting = clock, None, 0

    def post(self, done, outcome):
        def counted(outcome):
            self.waiting -= 1
            done(outcome)

        self.waiting += 1
        super().post(counted, outcome)

    def drain(self, seconds=0.0):
        if super().drain():
            return True
        if seconds > 0 and self.meanwhile is not None:
            self.meanwhile()
            if super().drain():
                return True
        self.clock.now += seconds
        return False


class HandLane:
    """Jobs wait for `step`, which runs one here and posts its outcome. `hangs`: none ends any more."""

    def __init__(self, completions):
        self._completions = completions
        self.jobs, self.closed, self.hangs = deque(), False, False

    def submit(self, job, done):
        if not self.closed:
            self.jobs.append((job, done))

    def step(self, place=0):
        """Run the next job, or another: threads do not end in order. Whether there was one."""
        if self.hangs or not self.jobs:
            return False
        job, done = self.jobs[place % len(self.jobs)]
        del self.jobs[place % len(self.jobs)]
        self._completions.post(done, replace(run(job), ended=self._completions.clock()))
        return True

    def run(self):
        """Run all; whether there was any."""
        return sum(iter(self.step, False)) > 0

    def close(self, seconds):
        self.closed = True
        self.run()
        if self.jobs:
            self._completions.clock.now += seconds
        return not self.jobs

    def abandon(self):
        self.jobs.clear()


class Kept(WrapperStore):
    """The way of one engine to a store that outlives it. Notes the methods that are called, and the keys read;
    `errors`: what a method raises."""

    def __init__(self, inner, name):
        super().__init__(inner)
        self.name, self.calls, self.read, self.errors = name, Counter(), [], {}

    def get_many(self, keys):
        self.read += keys
        return super().get_many(keys)

    def _pass(self, method, call, nothing):
        self.calls[method] += 1
        if method in self.errors:
            raise self.errors[method]
        return call()

    def close(self):
        self.calls["close"] += 1


@dataclass
class Lower:
    """A lower tier on hand lanes. `values` outlive the engine; `plan` says which calls break. `capacity` None: the
    backend decides itself what it keeps, as Redis does."""

    name: str = "disk"
    through: bool = True
    capacity: int | None = 1 << 20
    asks: bool = False
    may_write: bool = True
    queue: int = 1 << 20
    policy: str = "lru"
    plan: Plan = lambda method, number: None
    say: Callable[[str], None] = lambda text: None
    values: MemoryStore = field(default_factory=MemoryStore)
    admission: AdmissionPolicy = field(default_factory=Always)

    def open(self, clock, metrics, completions, bit=1):
        """A tier of a new engine."""
        self.store = Kept(FaultyStore(self.values, lambda method, number: self.plan(method, number)), self.name)
        self.reads, self.writes = HandLane(completions), HandLane(completions)
        self.index = None if self.capacity is None else Index(self.capacity, make_policy(self.policy))
        self.notes = []
        self.tier = StorageTier(
            self.store,
            self.index,
            self.admission,
            self.reads,
            self.writes,
            clock,
            metrics,
            lambda kind, cause: self.notes.append((kind, cause)),
            through=self.through,
            queue_bytes=self.queue,
            asks=self.asks,
            bit=bit,
            may_write=self.may_write,
            say=lambda text: self.say(text),
        )
        return self.tier

    def stored(self):
        """What is kept, behind the tier's back."""
        return set(self.values.values)

    def spoil(self, key, change):
        """Change a value behind the tier's back."""
        value, used = self.values.values[key]
        self.values.values[key] = bytes(change(bytearray(value))), used

    def check(self):
        """Nothing is under way, and no budget exceeded."""
        assert not self.reads.jobs and not self.writes.jobs
        self.tier.check_integrity()


def redis(**changes):
    """A lower tier that decides itself what it keeps, and that others fill too."""
    return Lower(**{"name": "redis", "capacity": None, "asks": True, **changes})


class Recorded(Metrics):
    """Keeps what was counted since the beginning."""

    def __init__(self):
        super().__init__()
        self.counted, self.gauges = Counter(), {}

    def count(self, name, value=1, **labels):
        super().count(name, value, **labels)
        self.counted[name, *(labels[label] for label in METRICS[name].labels)] += value

    def gauge(self, name, value, **labels):
        super().gauge(name, value, **labels)
        self.gauges[name, *(labels[label] for label in METRICS[name].labels)] = value

    def get(self, *key):
        """Of a counter or a gauge: name and labels."""
        return self.gauges[key] if key in self.gauges else self.counted[key]


def key(number):
    """A key of a store."""
    return number.to_bytes(16, "big")


class Bench:
    """One tier, and what became of its writes and reads."""

    def __init__(self, lower=None, **changes):
        self.lower = lower or Lower(**changes)
        self.clock, self.metrics = HandClock(), Recorded()
        self.completions = HandCompletions(self.clock)
        self.tier = self.lower.open(self.clock, self.metrics, self.completions)
        self.store, self.index = self.lower.store, self.lower.index
        self.written, self.made = [], []
        self.tier.start()
        self.settle()

    def write(self, where, value=b"value", parent=None, replaces=False, size=None):
        def make():
            self.made.append(where)
            return lambda: [value]

        write = Write(where, parent, len(value) if size is None else size, 1.0, make, replaces)
        taken = self.tier.write(write, lambda ok: self.written.append((where, ok)))
        self.tier.report()
        return taken

    def keep(self, where, value=b"value", **more):
        assert self.write(where, value, **more)
        self.settle()
        assert self.written[-1] == (where, True)

    def read(self, *keys, accept=bytes):
        """Read and settle; None where `done` was never called."""
        found = []
        self.tier.read([Wanted(each, accept) for each in keys], found.extend)
        self.settle()
        return found

    def drain(self):
        self.completions.drain()
        self.tier.report()

    def settle(self):
        self.drain()
        while self.lower.writes.run() or self.lower.reads.run():
            self.drain()

    def state(self, side):
        self.tier.report()
        return State(self.metrics.get(m.TIER_STATE, self.lower.name, side))

    def values(self):
        return {where: value for where, (value, _) in self.lower.values.values.items()}


class Stack:
    """Memory and lower tiers without an engine. A chunk's bytes follow from its key."""

    SHAPE = PageShape(ranks=2, layers=1, page_tokens=4, row_elements=3, itemsize=2, dtype="float16")
    SPACE = bytes(range(16))
    by_content = False

    def __init__(self, *lowers, pages=100, deadline=2.0, gate=None):
        self.lowers = lowers
        self.wall, self.pages_wanted, self.deadline = HandClock(1e9), pages, deadline
        self.gate = gate or Gate(active=False)
        self.start()

    def start(self):
        """A new engine over what lies in the lower tiers; what the old one had under way is lost."""
        self.clock, self.metrics, self.lifts, self.told = HandClock(self.wall.now / 1e6), Recorded(), [], []
        self.completions = HandCompletions(self.clock)
        self.bytes = np.zeros((self.pages_wanted, self.SHAPE.page_bytes), dtype=np.uint8)  # of all pages
        self.pages = Pages(self.bytes.data, self.SHAPE)
        self.cache = KVCache(
            self.pages,
            make_policy("lru"),
            [
                lower.open(self.clock, self.metrics, self.completions, bit=1 << number)
                for number, lower in enumerate(self.lowers)
            ],
            self.gate,
            self.completions,
            self.metrics,
            deadline=self.deadline,
            by_content=self.by_content,
            note=lambda kind, cause: self.told.append((kind, cause)),
            clock=self.clock,
            wall=self.wall,
        )
        self.memory, self.promotion, self.tiering = self.cache.memory, self.cache.promotion, self.cache.tiering
        self.settle()

    def chain(self, tokens, named=()):
        chain = TokenChain(self.SPACE, Chunker(16, 24, 32, TokenStructure.of(["a", "\n\n"])), named)
        chain.extend(as_tokens(tokens))
        return chain

    def bytes_of(self, chunk):
        return Random(chunk.key).randbytes(self.pages.size(chunk))

    def keep(self, tokens, named=(), ttl=None):
        """Store as an engine does; the chunks that are new."""
        chain = self.chain(tokens, named)
        new = self.memory.reserve(self.SPACE, chain, len(tokens))
        for chunk in new:
            self.pages.fill(chunk, memoryview(self.bytes_of(chunk)))
            self.memory.commit(chunk)
            if ttl is not None:
                self.memory.pins.expire(chunk, self.clock() + ttl)
        self.tiering.stored(new)
        return new

    def match(self, tokens, named=()):
        """What can be read of a prompt now; its bytes are checked."""
        match = self.memory.match(self.SPACE, self.chain(tokens, named), len(tokens))
        for chunk in match.chunks:
            assert b"".join(self.pages.parts(chunk)) == self.bytes_of(chunk), "wrong KV"
        return match

    def fetch(self, tokens, named=(), computed=0):
        match = self.match(tokens, named)
        chain = self.chain(tokens, named)
        return self._lifted(self.cache.prefix.fetch(self.SPACE, chain, match, computed, len(tokens)))

    def _lifted(self, lift):
        """A request waits for it, until `let_go`."""
        self.lifts.append(lift)
        return lift

    def let_go(self):
        """Whoever waited has used what came."""
        for lift in self.lifts:
            if lift is not None:
                self.promotion.let_go(lift)
        self.lifts.clear()

    def get(self, tokens, named=()):
        """Fetch, let all lanes work, and see how much there is then."""
        fetch = self.fetch(tokens, named)
        self.settle()
        assert fetch is None or not self.promotion.waits(fetch)
        return self.match(tokens, named).length

    def settle(self):
        """Let everybody work until nothing is left to do."""
        while True:
            self.cache.tick()
            if not any(lane.run() for lower in self.lowers for lane in (lower.writes, lower.reads)):
                break
        self.let_go()

    def forget(self):
        """Memory loses everything; below nothing changes."""
        self.let_go()
        self.memory.reset()
        assert self.memory.used == 0

    def check(self):
        self.let_go()
        assert_at_rest(self.cache)
        for lower in self.lowers:
            lower.check()


class ContentStack(Stack):
    """A stack that knows its contents, in memory and below."""

    by_content = True

    def gather(self, *passages, space=Stack.SPACE):
        """Gather passages, each of all tokens of a chunk."""
        return self._lifted(self.cache.content.fetch(space, [as_tokens(tokens).tobytes() for tokens in passages]))

    def holders(self, tokens):
        """The chunks in memory that hold these tokens; their bytes are checked."""
        found = self.memory.tree.contents.holders(self.SPACE, as_tokens(tokens).tobytes(), 100)
        for chunk in found:
            made = Random(chunk.parent.source if is_detached(chunk) else chunk.key)
            assert b"".join(self.pages.parts(chunk)) == made.randbytes(self.pages.size(chunk)), "wrong KV"
        return found

    def bring(self, *passages):
        """Gather, let all lanes work, and see for each how many hold it then."""
        gather = self.gather(*passages)
        self.settle()
        assert gather is None or not self.promotion.waits(gather)
        return [len(self.holders(tokens)) for tokens in passages]


def assert_at_rest(cache):
    """Nothing is under way, so nothing may be pinned but by owners, and nothing waited for."""
    memory = cache.memory
    memory.check_integrity()
    pinned = {chunk: chunk.pins for chunk in memory.tree if chunk.pins}
    assert pinned == dict.fromkeys(memory.pins.pinned, 1) and not memory.leaving
    assert not cache.promotion.loading
    assert cache.tiering.aliases is None or cache.tiering.aliases.idle


def words(seed, length):
    """Tokens of a text that is its seed's alone, with a paragraph now and then."""
    chance = Random(seed)
    return [1 if place % 23 == 20 else chance.randrange(100, 10**6) for place in range(length)]


class SeenTwice(AdmissionPolicy):
    """Admits what it is asked about for the second time."""

    def __init__(self):
        self.seen = set()

    def admit(self, key, weight=1, cost=1.0):
        known = key in self.seen
        self.seen.add(key)
        return known
