"""A toy engine whose KV is a chain of hashes.

The KV of a token is a hash of the KV before it and of the token, computed from what stands in the cache, so that
a wrong page, slot, token or a load that never came shows in every later value, as it would in a real engine.
The workers are real; only their movers copy numpy arrays. Memory holds real bytes, so lower tiers do too.
"""

import contextlib
import pickle
from collections import Counter
from types import SimpleNamespace

import numpy as np

from hand_lanes import HandClock, HandCompletions, Lower, Recorded, assert_at_rest, redis
from ragkv.config import Settings
from ragkv.config.settings import HINT_NAMES
from ragkv.connectors.vllm.error_boundary import Faults
from ragkv.connectors.vllm.fusing import Fusing
from ragkv.connectors.vllm.identity import Namespaces
from ragkv.connectors.vllm.messages import Group
from ragkv.connectors.vllm.scheduler import SchedulerSide
from ragkv.connectors.vllm.worker import WorkerSide
from ragkv.kvstore.cache import KVCache
from ragkv.kvstore.chunking import Chunker, TokenStructure
from ragkv.kvstore.device_tier import DeviceTier
from ragkv.kvstore.gate import Gate
from ragkv.kvstore.pages import Pages, PageShape
from ragkv.policies import Prioritized, make_policy
from toy_blocks import Blocks
from toy_vllm import BLOCK, BREAK, MAX, MIN, Request, Scheduler, mix, text
from toy_worker import LAYERS, PAGE, Equipment, MemoryRows

__all__ = ["BELOW", "BLOCK", "BREAK", "MAX", "MIN", "PAGE", "Engine", "Request", "closing", "mix", "text"]

# Kinds of tiers below memory.
BELOW = {
    "disk through": lambda: [Lower()],
    "disk back": lambda: [Lower(through=False)],
    "shared disk": lambda: [Lower(asks=True)],
    "redis": lambda: [redis()],
    "disk back, redis through": lambda: [Lower(through=False), redis()],
}


class Engine(Scheduler):
    """vLLM's scheduler in small: block tables, admission, requests that wait for their KV, preemption. `device`:
    pages of the device tier; `lowers`: the tiers below memory, which outlive `restart`; `step_tokens`: copied in a
    step in which others compute; `own_cache`: with a prefix cache, of what really lies in the blocks; `duties`: of
    its role; `control`: what makes its control, of a cache and a clock."""

    model = None  # at whose weights the workers look

    def __init__(
        self,
        pages=200,
        blocks=200,
        workers=2,
        policy="lru",
        device=0,
        lowers=(),
        gate=None,
        fusion=None,
        step_tokens=10**6,
        own_cache=False,
        duties=None,
        control=None,
    ):
        self.duties, self.control = duties or {}, control
        self.sizes = pages, blocks, workers, policy, device
        self.fusion, self.step_tokens, self.own_cache = fusion, step_tokens, own_cache
        self.lowers, self.gate = lowers, gate
        self.wall = HandClock(1e9)
        self.names = 0
        self.start()

    def start(self):
        """Begin, with empty memory and caches."""
        pages, blocks, workers, policy, device = self.sizes
        self.clock, self.metrics, self.weights = HandClock(self.wall.now / 1e6), Recorded(), 0
        self.completions = HandCompletions(self.clock)
        self.faults = Faults(self.metrics)
        shape = PageShape(workers, LAYERS, PAGE, 1, 4, "float32")
        buffer = bytearray(b"\xfe" * (pages * shape.page_bytes))
        self.cache = KVCache(
            Pages(buffer, shape),
            Prioritized(lambda: make_policy(policy), 10),
            [
                lower.open(self.clock, self.metrics, self.completions, bit=1 << number)
                for number, lower in enumerate(self.lowers)
            ],
            self.gate or Gate(active=False),
            self.completions,
            self.metrics,
            device=DeviceTier(device, make_policy("lru"), 2) if device else None,
            by_content=self.fusion is not None and (self.fusion.enabled or "fuse" in self._allowed),
            note=self.faults.note,
            clock=self.clock,
            wall=self.wall,
        )
        self.memory = self.cache.memory
        self.namespaces = Namespaces(b"the toy engine's")
        self.chunker = Chunker(MIN, 24, MAX, TokenStructure.of(["a", "\n\n", "b"]))
        self.side = SchedulerSide(
            self.cache,
            [Group(0, 0, BLOCK)],
            workers,
            self.metrics,
            self.faults,
            chunker=self.chunker,
            namespace_of=lambda request: self.namespace_of(request),
            confirmed_by=lambda: self.confirmed_by(),
            control=self.control and self.control(self.cache, self.clock),
            fusing=None if self.fusion is None else self._fusing(),
            **self.duties,
        )
        self.equipment = [
            Equipment(
                rank,
                np.full(blocks * BLOCK, -1),
                MemoryRows(buffer, workers, rank),
                device * PAGE,
                self.step_tokens,
                (BLOCK, mix),
                self.model,
            )
            for rank in range(workers)
        ]
        self.workers = [self._worker(each) for each in self.equipment]
        self.pool = Blocks(blocks)
        self.waiting, self.running, self.loading, self.held = [], [], {}, {}
        self.outputs = [[] for _ in self.workers]  # of steps whose output vLLM has not worked off
        self.received, self.sent = Counter(), Counter()  # by request: workers that have named it
        self.failed, self.fused, self.preempted = set(), set(), set()
        self.loaded, self.writes = 0, []  # tokens, checked
        self.work()

    @property
    def _allowed(self):
        return self.duties.get("allow", HINT_NAMES)

    def _fusing(self):
        return Fusing(self.fusion, self.cache, BLOCK, LAYERS, self.metrics)

    def _worker(self, equipment):
        worker = WorkerSide(None, None, Settings(), self.metrics, self.faults, lambda *_: equipment)
        worker.register({})
        return worker

    def namespace_of(self, request):
        return self.namespaces.of(request)

    def confirmed_by(self):
        return 0

    @property
    def fusions(self):
        """What the first worker has fused."""
        return self.equipment[0].fuser.fused

    def knows_as_fused(self, name):
        """Whether a block of that name in vLLM's own cache is known to hold fused KV."""
        tainted = []
        request = SimpleNamespace(block_hashes=[name])
        self.side.fusing.inherit(SimpleNamespace(request=request, taint=tainted.append), BLOCK)
        return tainted == [0]

    @property
    def pins(self):
        """Pins of all chunks in memory."""
        return sum(chunk.pins for chunk in self.memory.tree)

    @property
    def free(self):
        return self.pool.free

    @free.setter
    def free(self, blocks):
        self.pool.free = blocks

    # --- what tests do ---

    def request(self, prompt, **features):
        self.names += 1
        request = Request(f"r{self.names}", prompt, **features)
        request.weights = self.weights
        self.waiting.append(request)
        return request

    def run(self, prompt, answer=(), local=0, budget=10**6, **features):
        """A request from start to end, alone, all lanes at work; the tokens it had from us."""
        request = self.request(prompt, **features)
        hit = None
        for _ in range(len(prompt) + len(answer) + 9):
            got = self.step(budget=budget, local={request.request_id: local}, sample=answer)
            hit = got.get(request.request_id, hit)
            if request.num_tokens >= len(prompt) + max(len(answer), 1):
                break
            self.work()
        self.finish(request)
        self.settle()
        return hit

    def settle(self):
        """Step until nothing is under way."""
        for _ in range(5):
            self.step(admit=False, run=())
            self.deliver()
            self.work()

    def work(self):
        """Let all lanes work until nothing is left to do."""
        while True:
            self.cache.tick()
            if not any(lane.run() for lower in self.lowers for lane in (lower.writes, lower.reads)):
                return

    def pass_time(self, seconds):
        self.clock.now += seconds
        self.wall.now += seconds

    def restart(self, seconds=None):
        """The process dies, or ends within so many seconds; whether all was written down. Another one begins."""
        complete = False if seconds is None else self.side.close(seconds)
        self.start()
        return complete

    def reset(self):
        """New weights, in place. What nobody has looked up yet will be computed by them."""
        self.side.reset()
        self.namespaces.renew()
        self.pool.forget()
        self.weights += 1
        for request in self.waiting:
            if request.request_id not in self.side.requests:
                request.weights = self.weights

    def step(self, admit=True, budget=10**6, local=None, sample=(), run=None, deliver=True):
        """One step. `local`: first tokens vLLM has itself; `sample`: answers, by place; `run`: who may run.
        Returns the tokens from us of all that were taken up, to run or to wait for them."""
        new, resumed, cached, hits = [], [], [], {}
        scheduled = {}
        runners = [r for r in self.running if run is None or r in run]
        for request in list(self.waiting) if admit else ():
            taken = self._admit(request, (local or {}).get(request.request_id, 0), hits)
            if taken is None:
                continue
            if not taken:
                break
            (resumed if request.preempted else new).append(request)
            self._schedule(request, budget, scheduled)
        for request in runners:
            if request.num_computed_tokens < request.num_tokens and self._grow(request, request.num_tokens):
                cached.append(request)
                self._schedule(request, budget, scheduled)
        self._forward(new, resumed, cached, scheduled, sample)
        if deliver:
            self.deliver()
        return hits

    def preempt(self, request):
        self.running.remove(request)
        self.waiting.insert(0, request)
        request.status.name = "PREEMPTED"
        self._give_back(request)
        request.num_computed_tokens = 0
        request.preempted = True
        self.preempted.add(request.request_id)

    def finish(self, request):
        """Done or aborted, in whatever state."""
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)
        waits = self.loading.pop(request.request_id, None) is not None
        computed = -(-request.num_computed_tokens // BLOCK)
        request.status.name = "FINISHED"
        held, request.answer = self.side.finished(request, [request.blocks[:computed]])
        assert not (held and waits), "its blocks would be freed twice"
        if held or waits:
            self.held[request.request_id] = request
        else:
            self._give_back(request)

    def deliver(self, *workers):
        """vLLM works off the outputs of these workers (of all by default), which it aggregates."""
        total, ended, invalid = None, ([], []), set()
        for worker in workers or range(len(self.workers)):
            for report, sent, received, blocks in self.outputs[worker]:
                if report is not None:
                    total = report if total is None else total.aggregate(report)
                for counter, names, over in ((self.sent, sent, ended[0]), (self.received, received, ended[1])):
                    for name in names:
                        counter[name] += 1
                        if counter[name] == len(self.workers):
                            over.append(name)
                            del counter[name]
                invalid |= blocks
            self.outputs[worker].clear()
        self._invalidate(invalid)
        withheld = self.side.report(pickle.loads(pickle.dumps(total)), *ended)
        for name in ended[1]:
            if name in withheld:
                continue
            if name in self.loading:
                self._received(self.loading.pop(name))
            else:
                self._give_back(self.held.pop(name))
        for name in ended[0]:
            self._give_back(self.held.pop(name))

    def fail(self, *kinds, worker=0):
        fails = self.equipment[worker].fails  # of all its movers
        fails.clear()
        fails.update(kinds)

    def empty_device(self, worker=0):
        """A worker's device tier loses its memory, and nobody is told."""
        self.workers[worker].let_go_of_caches()
        self.workers[worker].take_caches_again()

    def check(self):
        """Nothing is under way, so nothing may be pinned (but by owners) or waited for."""
        assert self.side.idle and not self.held
        assert_at_rest(self.cache)
        for lower in self.lowers:
            lower.check()


@contextlib.contextmanager
def closing(engine):
    """An engine; in the end whatever runs is ended, and the books are checked."""
    yield engine
    engine.settle()
    for request in [*engine.running, *engine.waiting, *engine.loading.values()]:
        engine.finish(request)
    engine.settle()
    engine.check()
