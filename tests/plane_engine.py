"""An engine that knows what every token's KV must be in every plane, and asks the cache as a connector does."""

import zlib
from dataclasses import dataclass
from random import Random

import numpy as np

from hand_lanes import HandClock, HandCompletions, Recorded, assert_at_rest
from ragkv.kvstore.cache import KVCache
from ragkv.kvstore.chunking import Chunker, TokenChain, TokenStructure
from ragkv.kvstore.gate import Gate
from ragkv.kvstore.keys import as_tokens
from ragkv.kvstore.pages import Pages, PageShape, frame_bytes
from ragkv.kvstore.planes import Plane
from ragkv.kvstore.prompt import Prompt, Result
from ragkv.policies import make_policy

SPACE, BLOCK, END = b"s" * 16, 4, 1001
STRUCTURE = TokenStructure.of([*["a"] * END, "\n\n"])  # a paragraph ends with `END`
FULL = PageShape(1, 1, 8, 1, 4, "float32")
SLIDING = PageShape(1, 3, 3, 1, 4, "float32")
CHUNKED = PageShape(1, 2, 4, 1, 4, "float32")
PLANES = {
    "window": [Plane(SLIDING, window=20, block_tokens=BLOCK)],
    "chunks": [Plane(CHUNKED, span=32, block_tokens=BLOCK)],
    "both": [Plane(SLIDING, window=20, block_tokens=BLOCK), Plane(CHUNKED, span=32, block_tokens=BLOCK)],
    "wide": [Plane(SLIDING, window=70, block_tokens=16)],
}
NOTHING = PageShape(1, 0, 32, 1, 4, "float32")  # of plane 0, where no layer attends to all tokens
STEP = 16  # tokens: at multiples an engine with states stops
STATE = PageShape(2, 1, 1, 75, 1, "uint8", 1, 2)  # a page has 38 bytes of a rank's share
STATES = {
    "states": (FULL, [Plane(STATE, state=True, block_tokens=STEP)]),
    "states and windows": (FULL, [Plane(SLIDING, window=20, block_tokens=BLOCK), Plane(STATE, state=True)]),
    "nothing but states": (NOTHING, [Plane(STATE, state=True)]),
    "nothing but windows": (NOTHING, [Plane(SLIDING, window=20, block_tokens=BLOCK)]),
}


@dataclass
class Engine:
    """Asks the cache as a connector does, and has each plane's KV where layers still attend to it."""

    planes: list
    pages: int = 400
    lowers: tuple = ()
    round: int = 0  # that confirms what is stored
    weights: int = 0  # 0: those of the namespace
    full: PageShape = FULL  # pages of plane 0

    def __post_init__(self):
        self.shapes = [self.full, *(plane.shape for plane in self.planes)]
        self.states = [number for number, plane in enumerate(self.planes, 1) if plane.state]
        self.frame = frame_bytes(self.shapes)
        self.start()

    def start(self):
        """A new process, over what lies in lower tiers."""
        self.buffer = np.zeros((self.pages, self.frame), dtype=np.uint8)
        pages, clock, metrics = Pages(self.buffer.data, self.full, self.shapes[1:]), HandClock(), Recorded()
        self.clock, completions = clock, HandCompletions(clock)
        tiers = [each.open(clock, metrics, completions, 1 << n) for n, each in enumerate(self.lowers)]
        self.cache = KVCache(
            pages,
            make_policy("lru"),
            tiers,
            Gate(active=False),
            completions,
            metrics,
            planes=self.planes,
            clock=clock,
        )
        self.settle()

    def chain(self, tokens):
        stops = {(len(tokens) - 1) // STEP * STEP} - {0} if self.states else set()
        chain = TokenChain(SPACE, Chunker(16, 24, 32, STRUCTURE), (), sorted({*stops, len(tokens)}))
        chain.extend(as_tokens(tokens))
        return chain

    def work(self):
        """What lower tiers have to do is done. Whether there was any."""
        self.cache.tick()
        return sum(lane.run() for lower in self.lowers for lane in (lower.writes, lower.reads)) > 0

    def settle(self):
        while self.work():
            pass
        self.cache.tick()

    def forget(self):
        """Memory loses all."""
        self.settle()
        self.cache.reset()

    def ask(self, tokens, computed=0, step=64, keep=None, answer=(), pin=None):
        """How many tokens were hit beyond `computed`; what was loaded is checked, what was computed is stored."""
        chain = self.chain(tokens)
        prompt = Prompt(SPACE, chain, pin=pin)
        self.cache.tick()
        while (found := self.cache.lookup(prompt, computed, len(tokens) - 1)).result is Result.PENDING:
            assert self.work() or prompt.fetch.over, "it waits for nothing"
        end = computed + found.tokens
        if found.result is Result.HIT:
            self.load(prompt, tokens, computed, end)
        if pin is not None:
            self.cache.pin(prompt, len(tokens) - 1)
        shared = prompt.match.shared
        self.cache.release(prompt)
        every = [*tokens, *answer]
        chain.extend(as_tokens(answer))
        last = (len(tokens) - 1) // STEP * STEP
        between = {*range(end + step, len(tokens), step), *([last] if self.states and last > end else [])}
        stops = [*sorted(between), len(tokens), *([len(every)] if answer else [])]
        for start, stop in zip([end, *stops], stops, strict=False):
            whole = max((cut for cut in chain.ends if cut <= stop), default=0)
            upto = stop if stop >= len(tokens) else whole
            self.store(self.cache.prepare_store(prompt, upto, self.round), every)
            wanted = stop >= len(tokens) or (self.states and stop == last)
            if (wanted if keep is None else keep(stop)) and upto:
                live = [plane.first(start) for plane in self.planes]
                for number in self.states:
                    live[number - 1] = upto - 1 if upto == stop else upto
                for store in self.cache.windows.prepare_stores(prompt, upto, live, self.round):
                    assert store.positions.min() >= live[store.plane - 1], "of what the engine does not have"
                    self.store(store, every)
        self.settle()
        self.check()
        return found.tokens, shared

    def load(self, prompt, tokens, computed, end):
        loads = self.cache.prepare_load(prompt, computed, end)
        self.cache.touch(prompt)
        had = [set() for _ in self.shapes]
        for load in loads:
            for row, position in zip(load.rows.tolist(), load.positions.tolist(), strict=True):
                expected = self.expected(tokens, row, position, load.plane)
                assert (self.cell(row, load.plane) == expected).all(), (
                    f"wrong KV at {position}, plane {load.plane}"
                )
                had[load.plane].add(position)
            self.cache.complete_load(load, ok=True)
        firsts = [computed, *(max(computed, plane.first(end)) for plane in self.planes)]
        assert had == [set(range(first, end)) for first in firsts], "all that it takes, and no more"

    def store(self, store, tokens):
        if store is not None:
            for row, position in zip(store.rows.tolist(), store.positions.tolist(), strict=True):
                self.cell(row, store.plane)[:] = self.expected(tokens, row, position, store.plane) ^ self.weights
            self.cache.complete_store(store, ok=True)

    def expected(self, tokens, row, position, plane):
        """What a row must hold: of a state, another value in each of its pages."""
        place = row % self.shapes[plane].pages(1) if plane in self.states else 0
        return (value(tokens, position, plane) + place) % (256 if plane in self.states else 1 << 32)

    def cell(self, row, plane):
        """A token's elements in all layers, K and V; or what a page has of a state."""
        shape = self.shapes[plane]
        if plane in self.states:
            page, place = divmod(row, shape.pages(1))
            last = place % shape.spread == shape.spread - 1
            return self.buffer[
                page, : shape.rank_bytes - (shape.spread - 1) * shape.page_bytes if last else shape.page_bytes
            ]
        page, offset = divmod(row, shape.page_tokens)
        whole = self.buffer[page, : shape.page_bytes].view(np.uint32)
        return whole.reshape(shape.layers * shape.kinds, shape.page_tokens)[:, offset]

    def check(self):
        assert_at_rest(self.cache)
        for lower in self.lowers:
            lower.check()


def value(tokens, position, plane):
    """What a token's KV depends on: the plane, and all tokens up to it."""
    return zlib.crc32(np.array([plane, *tokens[: position + 1]], dtype=np.int32).tobytes())


def fresh(seed, size):
    chance = Random(seed)
    return [chance.randrange(1, 1000) for _ in range(size)]


def made(planes, pages=400, lowers=()):
    """An engine with planes of that name."""
    full, others = STATES[planes] if planes in STATES else (FULL, PLANES[planes])
    return Engine(others, pages, lowers, full=full)
