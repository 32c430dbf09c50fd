"""A toy engine whose KV is a chain of hashes.

The KV of a token is a hash of the KV before it and of the token, computed from what stands in the cache, so that
a wrong page, slot, token or a load that never came shows in every later value, as it would in a real engine.
The workers are real; only their movers copy numpy arrays. Memory holds real bytes, so lower tiers do too.
As on Model Runner V2 nothing can be undone once a request has run: whatever it runs on must be right.
"""

import contextlib
import hashlib
import pickle
from collections import Counter
from types import SimpleNamespace

import numpy as np

from hand_lanes import HandClock, HandCompletions, Recorded
from ragkv.config import Settings
from ragkv.connectors.vllm.copying import Copier
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
from toy_blocks import Blocks
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
        self.blocks, self.told, self.preempted, self.local = [], 0, False, 0
        self.block_hashes, self.status, self.answer = [], SimpleNamespace(name="WAITING"), None
        vars(self).update(features)

    @property
    def num_tokens(self):
        return len(self.all_token_ids)


class Engine:
    """vLLM's scheduler in small: block tables, admission, requests that wait for their KV, preemption. `device`:
    pages of the device tier; `lowers`: the tiers below memory, which outlive `restart`; `step_tokens`: copied in a
    step in which others compute; `own_cache`: with a prefix cache, of what really lies in the blocks."""

    strict = True  # a request runs on nothing but the truth, unless it was fused

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
    ):
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
        self.namespaces = Namespaces(b"the toy engine's")
        self.side = SchedulerSide(
            self.placement,
            BLOCK,
            workers,
            self.metrics,
            self.faults,
            chunker=Chunker(MIN, 24, MAX, TokenStructure.of(["a", "\n\n", "b"])),
            namespace_of=self.namespaces.of,
            clock=self.clock,
            fusing=None if self.fusion is None else self._fusing(),
        )
        self.workers = [self._worker(rank, buffer) for rank in range(workers)]
        self.pool = Blocks(blocks)
        self.waiting, self.running, self.loading, self.held = [], [], {}, {}
        self.outputs = [[] for _ in self.workers]  # of steps whose output vLLM has not worked off
        self.received, self.sent = Counter(), Counter()  # by request: workers that have named it
        self.failed, self.fused, self.preempted = set(), set(), set()
        self.loaded, self.writes = 0, []  # tokens, checked
        self.work()

    def _fusing(self):
        return Fusing(self.fusion, self.placement, BLOCK, LAYERS, self.metrics)

    def _worker(self, rank, buffer):
        blocks, device = self.sizes[1], self.sizes[4]
        worker = WorkerSide(None, None, Settings(), self.metrics, self.faults)
        cache, fails = np.full(blocks * BLOCK, -1), set()
        worker._mover = Mover(cache, MemoryRows(buffer, self.sizes[2], rank), fails)
        worker._device_mover = Mover(cache, np.full(device * PAGE, -2), fails)
        movers = {False: worker._mover, True: worker._device_mover}
        worker._copier = Copier(movers, PAGE, 1, self.step_tokens, self.faults)
        worker._stopwatch = Stopwatch()
        worker._fuser = Fuser(cache, fails, BLOCK, mix)
        return worker

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
        self.pool.forget()
        self.weights += 1
        for request in self.waiting:
            if request.request_id not in self.side._tracked:
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
        held, request.answer = self.side.finished(request, request.blocks[:computed])
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
        fails = self.workers[worker]._mover.fails  # the device's mover shares them
        fails.clear()
        fails.update(kinds)

    def check(self):
        """Nothing is under way, so nothing may be pinned (but by owners) or waited for."""
        assert not self.side._under_way and not self.held and not self.side._loads._loads
        assert not self.side.has_pending_work and not self.side.has_pending_frees
        assert self.hierarchy._pins == len(self.hierarchy.holds._owners)
        assert not self.hierarchy._doomed and not self.placement._up._loading
        assert all(chunk in self.hierarchy for chunk in self.hierarchy.holds._expiries)
        self.hierarchy.check_integrity()
        for lower in self.lowers:
            lower.check()

    # --- inside ---

    def _admit(self, request, local, hits):
        """Whether it runs from now on; None: it waits for its KV; False: there are not enough blocks."""
        if request.num_computed_tokens:  # what it waited for has come
            if not self._grow(request, request.num_tokens):
                return False
            self.side.allocated(request, list(request.blocks), 0)
            return self._run(request)
        known, local = self._own_hit(request, local)
        external = self.side.lookup(request, local)
        if external is None:
            return None
        assert 0 <= external <= request.num_tokens - 1 - local or external == 0
        needed = -(-(request.num_tokens + 1) // BLOCK)
        if needed - len(known) > len([block for block in self.free if block not in known]):
            return False
        self.pool.share(known)
        request.blocks, request.local = list(known), local
        self._grow(request, local + external if external else request.num_tokens)
        if not self.own_cache:
            self._write(self._slots(request, 0, local), lambda w: self.truth(request, w)[:local])  # as a test says
        try:
            self.side.allocated(request, list(request.blocks), external)
        except Exception as error:  # as the connector does
            self.faults.note("allocated", error)
            self.side.disappoint(request, list(request.blocks), external)
        request.num_computed_tokens = local + external
        hits[request.request_id] = external
        if not external:
            return self._run(request)
        self.waiting.remove(request)
        self.loading[request.request_id] = request
        request.status.name = "WAITING_FOR_REMOTE_KVS"
        return None

    def _run(self, request):
        self.waiting.remove(request)
        self.running.append(request)
        request.status.name = "RUNNING"
        return True

    def _own_hit(self, request, local):
        """Blocks of vLLM's own prefix cache, and how many tokens it has."""
        most = (request.num_tokens - 1) // BLOCK
        if not self.own_cache:
            return [], min(local // BLOCK, most) * BLOCK
        self._name(request)
        known = self.pool.hits(request.block_hashes[:most])
        return known, len(known) * BLOCK

    def _name(self, request):
        """vLLM makes the name of each full block from the one before."""
        names = request.block_hashes
        for start in range(len(names) * BLOCK, request.num_tokens // BLOCK * BLOCK, BLOCK):
            before = names[-1] if names else repr((request.world, request.weights)).encode()
            tokens = repr(request.all_token_ids[start : start + BLOCK]).encode()
            names.append(hashlib.sha256(before + tokens).digest())

    def _schedule(self, request, budget, scheduled):
        count = min(budget, request.num_tokens - request.num_computed_tokens)
        scheduled[request.request_id] = count
        self._name_blocks(request, request.num_computed_tokens + count)

    def _name_blocks(self, request, tokens):
        if self.own_cache:
            self._name(request)
            self.pool.name(request.block_hashes[: tokens // BLOCK], request.blocks)

    def _received(self, request):
        """As vLLM's `_update_waiting_for_remote_kv`."""
        self.waiting.insert(0, request)
        request.status.name = "PREEMPTED" if request.preempted else "WAITING"
        if request.request_id in self.failed and not request.num_computed_tokens:
            self._give_back(request)
        self.failed.discard(request.request_id)
        self._check_load(request)
        self._name_blocks(request, request.num_computed_tokens)

    def _invalidate(self, invalid):
        for request in self.loading.values():
            wrong = [n for n, block in enumerate(request.blocks) if block in invalid]
            if wrong:
                request.num_computed_tokens = min(request.num_computed_tokens, wrong[0] * BLOCK)
                self.failed.add(request.request_id)
        assert not any(block in invalid for r in self.running for block in r.blocks), "it has run already"

    def _grow(self, request, tokens):
        """Blocks for so many tokens, full of rubbish; False where there are not enough."""
        more = -(-tokens // BLOCK) - len(request.blocks)
        if more > len(self.free):
            return False
        for block in self.pool.take(max(more, 0)):
            request.blocks.append(block)
            self._write(slice(block * BLOCK, (block + 1) * BLOCK), lambda _: -3)
        return True

    def _write(self, slots, values):
        """What the next step's forward does to blocks: no earlier."""
        self.writes.append((slots, values))

    def _forward(self, new, resumed, cached, scheduled, sample):
        by_id = {r.request_id: r for r in [*new, *resumed, *cached]}
        output = self._output(new, resumed, cached, scheduled)
        for request in by_id.values():
            request.told, request.preempted = len(request.blocks), False
        orders = pickle.loads(pickle.dumps(self.side.orders(output)))
        assert orders.tokens == sum(scheduled.values())
        self.fused.update(fusion.request for fusion in orders.fusions)
        for index, worker in enumerate(self.workers):
            mine = pickle.loads(pickle.dumps(orders))
            worker.preempt(mine)
            for slots, values in self.writes:
                self._cache(index)[slots] = values(index)
            worker.begin(mine)
            for name, count in scheduled.items():
                start = by_id[name].num_computed_tokens
                self._compute(index, by_id[name], start, start + count)
            worker.carry_out()
            sent, received = worker.take_finished()
            self.outputs[index].append((worker.take_report(), sent, received, worker.take_invalid_blocks()))
        self.writes.clear()
        for name, count in scheduled.items():
            request = by_id[name]
            request.num_computed_tokens += count
            place = request.num_tokens - request.num_prompt_tokens
            if request.num_computed_tokens == request.num_tokens:
                request.all_token_ids.append(sample[place] if place < len(sample) else 2)

    def _output(self, new, resumed, cached, scheduled):
        preempted, self.preempted = self.preempted, set()
        return SimpleNamespace(
            num_scheduled_tokens=scheduled,
            total_num_scheduled_tokens=sum(scheduled.values()),
            preempted_req_ids=preempted,
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

    def _compute(self, worker, request, start, end):
        cache, slots = self._cache(worker), self._slots(request, 0, end)
        if self.strict and request.request_id not in self.fused:
            assert (cache[slots[:start]] == self.truth(request, worker)[:start]).all(), "it runs on wrong KV"
        before = cache[slots[start - 1]] if start else self._seed(request, worker)
        for position in range(start, end):
            before = cache[slots[position]] = mix(before, request.all_token_ids[position])

    def _check_load(self, request):
        """What vLLM counts on now is the truth."""
        end, start = request.num_computed_tokens, request.local
        if request.request_id in self.fused or end <= start:
            return
        for worker in range(len(self.workers)):
            there = self._cache(worker)[self._slots(request, 0, end)]
            assert (there[start:] == self.truth(request, worker)[start:end]).all(), "wrong KV"
            self.loaded += end - start

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
        self.pool.give_back(request.blocks)
        request.blocks = []


@contextlib.contextmanager
def closing(engine):
    """An engine; in the end whatever runs is ended, and the books are checked."""
    yield engine
    engine.settle()
    for request in [*engine.running, *engine.waiting, *engine.loading.values()]:
        engine.finish(request)
    engine.settle()
    engine.check()
