"""An engine on a simulated device. It uses a mover as the contract allows, and overwrites whatever may be reused.

Every block and page holds one number, everywhere. The engine's books say which number each must hold: a forward
checks what it reads when it runs, and a ticket that is done is checked at once. As soon as the contract lets a
block or a page go, another number is written over it.
"""

from dataclasses import dataclass
from itertools import count

import torch

from ragkv.connectors.vllm.layers import LayerCache
from ragkv.connectors.vllm.layout import Geometry
from ragkv.connectors.vllm.transfer import StagedMover, Tier
from simulated_device import SimulatedStreams, TamperedStreams

LAYERS, HEADS, DIM, TOKENS, BLOCKS, PAGES = 2, 1, 4, 2, 6, 6  # a page is as large as a block
CPU = torch.device("cpu")
GEOMETRY = Geometry(LAYERS, HEADS, DIM, 2, TOKENS)
PAGE_BYTES = GEOMETRY.token_bytes * TOKENS


@dataclass
class Copy:
    """A copy under way: (block, page, number) of each; `kind`: load or store."""

    kind: str
    ticket: object
    parts: list
    failed: bool = False


class Engine:
    """`chance`: decides everything; `broken`: what the mover's streams leave out."""

    def __init__(self, chance, broken=None, tamper=None):
        self.chance, self.numbers = chance, count(1)
        self.storage = torch.zeros(BLOCKS, LAYERS, TOKENS, 2, HEADS, DIM, dtype=torch.int16)
        self.pages = torch.zeros(PAGES, LAYERS, 2, TOKENS, HEADS, DIM, dtype=torch.int16)
        size = TOKENS * 2 * HEADS * DIM
        places = torch.arange(size).view(TOKENS, 2, HEADS, DIM)
        caches = [LayerCache(self.storage[:, n].flatten(1), TOKENS, places + n * size) for n in range(LAYERS)]
        self.device = SimulatedStreams(chance.randrange)
        self.streams = TamperedStreams(self.device, broken or {})
        tier = Tier(self.pages.view(-1), GEOMETRY, TOKENS, 1, 0)
        self.mover = StagedMover(caches, tier, 4 * PAGE_BYTES, CPU, self.streams)  # two pages in each half
        if tamper is not None:
            tamper(self.mover)
        self.free, self.owned = set(range(BLOCKS)), {}  # blocks; the number in each of a running request's
        self.filled = {}  # the number in each page that nobody writes
        self.copies = []

    # --- what an engine does ---

    def forward(self):
        """Reads blocks of running requests, and writes new ones."""
        reads = {block: self.owned[block] for block in self._some(self.owned)}
        writes = {block: next(self.numbers) for block in self._some(self.free)}
        self.free -= writes.keys()
        self.owned |= writes

        def run():
            for block, number in reads.items():
                self._expect(self.storage[block], number, f"a forward reads block {block}")
            for block, number in writes.items():
                self.storage[block] = number

        self.device.compute.submit(run)

    def finish_request(self):
        """Its blocks are free at once, though forwards that use them may still be under way."""
        for block in self._some(self.owned.keys() - self._under("store", 0)):
            self.free.add(block)
            del self.owned[block]

    def store(self):
        """Blocks of a running request into pages that hold nothing of worth."""
        blocks = self._some(self.owned.keys() - self._under("store", 0))
        pages = self._some(set(range(PAGES)) - self._under("load", 1) - self._under("store", 1))
        parts = [(b, p, self.owned[b]) for b, p in zip(blocks, pages, strict=False)]
        for _, page, _ in parts:
            self.filled.pop(page, None)
        self._order("store", parts)

    def load(self):
        """Pages into free blocks."""
        pages, blocks = self._some(self.filled), self._some(self.free)
        parts = [(b, p, self.filled[p]) for b, p in zip(blocks, pages, strict=False)]
        self.free -= {block for block, _, _ in parts}
        self._order("load", parts)

    def preempt(self):
        """Blocks of a request that are being stored are taken away from it, and written at once by another."""
        blocks = [block for block in self._some(self._under("store", 0)) if block in self.owned]
        self.mover.fence_stores()
        for block in blocks:
            number = self.owned[block] = next(self.numbers)
            self.device.compute.submit(lambda block=block, number=number: self.storage[block].fill_(number))

    def reuse_page(self):
        """Others write into pages that nobody holds, from the host."""
        for page in self._some(set(range(PAGES)) - self._under("load", 1) - self._under("store", 1)):
            self.filled[page] = next(self.numbers)
            self.pages[page] = self.filled[page]

    def poll(self):
        """Look at tickets, and at all pages that nobody writes."""
        for copy in list(self.copies):
            if copy.ticket.query():
                self.copies.remove(copy)
                self._end(copy)
        for page, number in self.filled.items():
            self._expect(self.pages[page], number, f"page {page} is left alone")

    def run_device(self):
        """Some of its work."""
        for _ in range(self.chance.randrange(6)):
            self.device.step()

    def fail(self):
        """The next copy raises half-way."""
        trapped = self.chance.choice([self.streams.load, self.streams.store])
        trapped.trap = self.chance.choice((2, 3, 1, 0))

    def close(self):
        """Then nothing may be under way, and all memory goes to others."""
        self.mover.close()
        assert not self.device.load.queue and not self.device.store.queue, "copies are under way after close"
        self.poll()
        assert not self.copies
        self.pages.fill_(next(self.numbers))
        after = self.pages.clone()
        self.mover.close()
        self.forward()
        self.device.finish()
        assert torch.equal(self.pages, after)
        for block, number in self.owned.items():
            self._expect(self.storage[block], number, f"block {block} at the end")

    # --- its books ---

    def _order(self, kind, parts):
        if not parts:
            return
        tokens = torch.arange(TOKENS)
        slots, rows = (torch.cat([part[place] * TOKENS + tokens for part in parts]) for place in (0, 1))
        order = self.mover.load if kind == "load" else self.mover.store
        try:
            self.copies.append(Copy(kind, order(rows, slots), parts))
        except OSError:
            self.copies.append(Copy(kind, self.mover.ordered(kind), parts, failed=True))

    def _end(self, copy):
        for block, page, number in copy.parts:
            if copy.kind == "store" and copy.failed:
                self.filled[page] = next(self.numbers)
                self.pages[page] = self.filled[page]  # given to others
            elif copy.kind == "store":
                self._expect(self.pages[page], number, f"page {page} was stored")
                self.filled[page] = number
            elif copy.failed:
                self.free.add(block)
            else:
                self._expect(self.storage[block], number, f"block {block} was loaded")
                self.owned[block] = number

    def _under(self, kind, place):
        """Blocks (place 0) or pages (1) of copies under way."""
        return {part[place] for copy in self.copies if copy.kind == kind for part in copy.parts}

    def _some(self, of):
        of = sorted(of)
        return self.chance.sample(of, self.chance.randrange(min(len(of), 4) + 1))

    def _expect(self, found, number, what):
        assert bool((found == number).all()), f"{what}: {found.flatten().tolist()}, not {number}"


ACTIONS = ("forward", "finish_request", "store", "load", "preempt", "reuse_page", "poll", "run_device", "fail")


def play(chance, broken=None, tamper=None, steps=40):
    """A life of the engine. AssertionError: some bytes were not what they must be."""
    engine = Engine(chance, broken, tamper)
    for _ in range(steps):
        getattr(engine, chance.choice(ACTIONS))()
    engine.close()
    return engine
