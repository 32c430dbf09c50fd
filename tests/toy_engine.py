"""A toy engine whose KV is a chain of hashes.

The KV of a token is a hash of the KV before it and of the token, computed from what stands in the cache, so that
a wrong page, slot, token or a load that never came shows in every later value, as it would in a real engine.
The workers are real; only their movers copy numpy arrays. Memory holds real bytes, so lower tiers do too.
"""

import contextlib
import pickle
from types import SimpleNamespace

import numpy as np

from hand_lanes import HandClock, HandCompletions, Recorded
from ragkv.config import Settings
from ragkv.connectors.vllm.faults import Faults
from ragkv.connectors.vllm.fusing import Fusing
from ragkv.connectors.vllm.identity import Namespaces
from ragkv.connectors.vllm.scheduler import SchedulerSide
from ragkv.connectors.vllm.worker import WorkerSide
from ragkv.kvstore.chunking import Chunker, TokenStructure
from ragkv.kvstore.gate import Gate
from ragkv.kvstore.hierarchy import Hierarchy
from ragkv.kvstore.memory import DeviceTier, MemoryTier
from ragkv.kvstore.pages import Pages, PageShape
from ragkv.kvstore.placement import Placement
from ragkv.policies import Prioritized, make_policy
from toy_worker import LAYERS, PAGE, Fuser, MemoryRows, Mover, Stopwatch

BLOCK, MIN, MAX = 8, 16, 32
BREAK = 1  # a token that holds a blank line
MASK = (1 << 62) - 1


def mix(before, token):
    return hash((int(before), int(token))) & MASK


def text(seed, length):
    """Tokens of a text that is its seed's alone, with a paragraph now and then."""
    tokens = np.random.default_rng(seed).integers(100, 10**6, length)
    tokens[20::23] = BREAK
    return tokens.tolist()


class Request:
    """What the scheduler side reads of a vLLM request. `world`: what KV depends on beside the tokens."""

    def __init__(self, name, prompt, world=0, **features):
        self.request_id, self.world, self.weights = name, world, 0
        self.all_token_ids, self.num_prompt_tokens = list(prompt), len(prompt)
        self.num_computed_tokens = 0
        self.kv_transfer_params = self.prompt_embeds = self.lora_request = self.cache_salt = None
        self.mm_features = []
        self.blocks, self.told, self.preempted = [], 0, False
        self.block_hashes, self.status, self.answer = [], SimpleNamespace(name="WAITING"), None
        vars(self).update(features)

    @property
    def num_tokens(self):
        return len(self.all_token_ids)


class Engine:
    """vLLM's scheduler in small: block tables, admission, preemption, recovery from failed loads. `device`: pages
    of the device tier; `lowers`: the tiers below memory, which outlive `restart`; `duties`: what its role lets
    it do."""

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
        duties=None,
    ):
        self.sizes = pages, blocks, workers, policy, device
        self.duties = duties or {}
        self.fusion = fusion
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
        self.hierarchy = Hierarchy(
            MemoryTier(pages, Prioritized(lambda: make_policy(policy), 10)),
            PAGE,
            shape.page_bytes,
            self.metrics,
            device=DeviceTier(device, make_policy("lru"), 2) if device else None,
        )
        self.placement = Placement(
            self.hierarchy,
            Pages(buffer, shape),
            [lower.open(self.clock, self.metrics, self.completions) for lower in self.lowers],
            self.gate or Gate(active=False),
            self.completions,
            self.metrics,
            clock=self.clock,
            wall=self.wall,
        )
        chunker = Chunker(MIN, 24, MAX, TokenStructure.of(["a", "\n\n", "b"]))
        self.namespaces = Namespaces(b"the toy engine's")
        self.side = SchedulerSide(
            self.placement,
            chunker,
            self.namespaces.of,
            BLOCK,
            workers,
            self.metrics,
            self.faults,
            clock=self.clock,
            fusing=None if self.fusion is None else self._fusing(),
            **self.duties,
        )
        self.workers = [WorkerSide(None, None, Settings(), self.metrics, self.faults) for _ in range(workers)]
        for rank, worker in enumerate(self.workers):
            cache, fails = np.full(blocks * BLOCK, -1), set()
            worker._mover = Mover(cache, MemoryRows(buffer, workers, rank), fails)
            worker._device_mover = Mover(cache, np.full(device * PAGE, -2), fails)
            worker._stopwatch = Stopwatch()
            worker._fuser = Fuser(cache, fails, BLOCK, mix)
        self.free = list(range(1, blocks))  # block 0 is vLLM's null block
        self.waiting, self.running, self.held = [], [], {}
        self.reports = [[] for _ in self.workers]
        self.finishes = []
        self.loaded = 0  # tokens, checked
        self.work()

    def _fusing(self):
        return Fusing(self.fusion, self.placement, BLOCK, LAYERS, self.metrics)

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
        for _ in range(len(prompt) + len(answer) + 6):
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
        for _ in range(3):
            self.step(admit=False, run=())
            self.deliver()
            self.work()

    def work(self):
        """Let all lanes work until nothing is left to do."""
        while True:
            self.placement.tick()
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
        self.weights += 1
        for request in self.waiting:
            if request.request_id not in self.side._tracked:
                request.weights = self.weights

    def step(self, admit=True, budget=10**6, local=None, sample=(), run=None, deliver=True):
        """One step. `local`: first tokens vLLM has itself; `sample`: answers, by place; `run`: who may run.
        Returns the tokens from us of all that were taken up."""
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
        for request in runners:
            if request.num_computed_tokens < request.num_tokens and self._grow(request, request.num_tokens):
                cached.append(request)
        for request in [*new, *resumed, *cached]:
            count = min(budget, request.num_tokens - request.num_computed_tokens)
            scheduled[request.request_id] = count
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

    def finish(self, request):
        """Done or aborted, in whatever state."""
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)
        computed = -(-request.num_computed_tokens // BLOCK)
        held, request.answer = self.side.finished(request, request.blocks[:computed])
        request.status.name = "FINISHED"
        if held:
            self.held[request.request_id] = request
        else:
            self._give_back(request)

    def deliver(self, *workers):
        """Reports of these workers (of all by default), as vLLM aggregates them."""
        total = None
        for worker in workers or range(len(self.workers)):
            for report in self.reports[worker]:
                total = report if total is None else total.aggregate(report)
            self.reports[worker].clear()
        if total is not None:
            self.side.report(pickle.loads(pickle.dumps(total)))

    def fail(self, *kinds, worker=0):
        fails = self.workers[worker]._mover.fails  # the device's mover shares them
        fails.clear()
        fails.update(kinds)

    def check(self):
        """Nothing is under way, so nothing may be pinned (but by owners) or waited for."""
        assert not self.side._under_way and not self.held
        assert self.hierarchy._pins == len(self.hierarchy.holds._owners)
        assert not self.hierarchy._doomed and not self.placement._up._loading
        assert all(chunk in self.hierarchy for chunk in self.hierarchy.holds._expiries)
        self.hierarchy.check_integrity()
        for lower in self.lowers:
            lower.check()

    # --- inside ---

    def _admit(self, request, local, hits):
        """Whether there was room for it; None: it waits for its KV."""
        needed = -(-(request.num_tokens + 1) // BLOCK)
        local = min(local // BLOCK * BLOCK, (request.num_tokens - 1) // BLOCK * BLOCK)
        external = self.side.lookup(request, local)
        if external is None:
            return None
        assert 0 <= external <= request.num_tokens - 1 - local or external == 0
        if needed > len(self.free):
            return False
        self.waiting.remove(request)
        self.running.append(request)
        request.status.name, request.blocks = "RUNNING", []
        self._grow(request, request.num_tokens)
        for worker in range(len(self.workers)):  # vLLM's own prefix cache
            self._cache(worker)[self._slots(request, 0, local)] = self.truth(request, worker)[:local]
        try:
            self.side.allocated(request, list(request.blocks), external)
        except Exception:  # as the connector does
            self.side.disappoint(request, list(request.blocks), external)
        request.num_computed_tokens = local + external
        hits[request.request_id] = external
        return True

    def _grow(self, request, tokens):
        """Blocks for so many tokens, full of rubbish; False where there are not enough."""
        more = -(-tokens // BLOCK) - len(request.blocks)
        if more > len(self.free):
            return False
        for block in self.free[: max(more, 0)]:
            request.blocks.append(block)
            for worker in range(len(self.workers)):
                self._cache(worker)[block * BLOCK : (block + 1) * BLOCK] = -3
        del self.free[: max(more, 0)]
        return True

    def _forward(self, new, resumed, cached, scheduled, sample):
        output = SimpleNamespace(
            num_scheduled_tokens=scheduled,
            total_num_scheduled_tokens=sum(scheduled.values()),
            scheduled_new_reqs=[
                SimpleNamespace(
                    req_id=r.request_id,
                    block_ids=(list(r.blocks),),
                    num_computed_tokens=r.num_computed_tokens,
                )
                for r in new
            ],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[r.request_id for r in [*cached, *resumed]],
                resumed_req_ids={r.request_id for r in resumed},
                new_block_ids=[(list(r.blocks[r.told :]),) if len(r.blocks) > r.told else None for r in cached]
                + [(list(r.blocks),) for r in resumed],
                num_computed_tokens=[r.num_computed_tokens for r in [*cached, *resumed]],
            ),
        )
        together = [*new, *resumed, *cached]
        for request in together:
            request.told, request.preempted = len(request.blocks), False
        orders = pickle.loads(pickle.dumps(self.side.orders(output)))
        assert orders.tokens == sum(scheduled.values())
        invalid = set()
        for index, worker in enumerate(self.workers):
            worker.load(orders)
            bad = worker.take_invalid_blocks()
            invalid |= bad
            self._check_loads(index, orders, bad)
            for request in together:
                start, count = request.num_computed_tokens, scheduled[request.request_id]
                self._compute(index, request, start, start + count)
            worker.store(orders)
            for name in worker.take_finished():
                self.finishes.append((index, name))
            report = worker.take_report()
            if report is not None:
                self.reports[index].append(report)
        self._after(together, scheduled, invalid, sample)
        for name in list(self.held):
            if all((index, name) in self.finishes for index in range(len(self.workers))):
                self._give_back(self.held.pop(name))

    def _after(self, together, scheduled, invalid, sample):
        for request in together:
            start = request.num_computed_tokens
            request.num_computed_tokens += scheduled[request.request_id]
            wrong = [n for n, block in enumerate(request.blocks[: -(-start // BLOCK)]) if block in invalid]
            if wrong:
                request.num_computed_tokens = wrong[0] * BLOCK
                continue
            place = request.num_tokens - request.num_prompt_tokens
            if request.num_computed_tokens == request.num_tokens:
                request.all_token_ids.append(sample[place] if place < len(sample) else 2)

    def _compute(self, worker, request, start, end):
        cache, slots = self._cache(worker), self._slots(request, 0, end)
        before = cache[slots[start - 1]] if start else self._seed(request, worker)
        for position in range(start, end):
            before = cache[slots[position]] = mix(before, request.all_token_ids[position])

    def _check_loads(self, worker, orders, bad):
        for job in orders.loads:
            request = next(r for r in self.running if job.slots[0] // BLOCK in r.blocks)
            truth = self.truth(request, worker)
            slots = self._slots(request, 0, request.num_tokens)
            at = {slot: position for position, slot in enumerate(slots.tolist())}
            for slot in job.slots.tolist() if job.shifts is None else ():
                if slot // BLOCK not in bad:
                    assert self._cache(worker)[slot] == truth[at[slot]], "wrong KV"
                    self.loaded += 1

    def _cache(self, worker):
        return self.workers[worker]._mover.cache

    def _seed(self, request, worker):
        return mix(mix(request.world, request.weights), 1000 + worker)

    def truth(self, request, worker):
        values, before = [], self._seed(request, worker)
        for token in request.all_token_ids:
            before = mix(before, token)
            values.append(before)
        return np.array(values, dtype=np.int64)

    def _slots(self, request, start, end):
        positions = np.arange(start, end)
        return np.array(request.blocks, dtype=np.int64)[positions // BLOCK] * BLOCK + positions % BLOCK

    def _give_back(self, request):
        self.free.extend(request.blocks)
        request.blocks = []


@contextlib.contextmanager
def closing(engine):
    """An engine; in the end whatever runs is ended, and the books are checked."""
    yield engine
    engine.settle()
    for request in [*engine.running, *engine.waiting]:
        engine.finish(request)
    engine.settle()
    engine.check()
