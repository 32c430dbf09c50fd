"""The scheduler side against a toy engine whose KV is a chain of hashes.

The KV of a token is a hash of the KV before it and of the token, computed from what stands in the cache, so that
a wrong page, slot, token or a load that never came shows in every later value, as it would in a real engine.
The workers are real; only their movers copy numpy arrays.
"""

import pickle
from types import SimpleNamespace

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

from ragkv.config import Settings
from ragkv.connectors.vllm.faults import Faults
from ragkv.connectors.vllm.identity import Namespaces
from ragkv.connectors.vllm.protocol import StepReport
from ragkv.connectors.vllm.scheduler import SchedulerSide
from ragkv.connectors.vllm.transfer import Done
from ragkv.connectors.vllm.worker import WorkerSide
from ragkv.kvstore import metrics as m
from ragkv.kvstore.chunking import Chunker, TokenStructure
from ragkv.kvstore.hierarchy import Hierarchy
from ragkv.kvstore.memory import MemoryTier
from ragkv.kvstore.metrics import Metrics
from ragkv.policies import make_policy

BLOCK, PAGE, MIN, MAX = 8, 4, 16, 32
BREAK = 1  # a token that holds a blank line
MASK = (1 << 62) - 1


def mix(before, token):
    return hash((int(before), int(token))) & MASK


class Request:
    """What the scheduler side reads of a vLLM request. `world`: what KV depends on beside the tokens."""

    def __init__(self, name, prompt, world=0, **features):
        self.request_id, self.world = name, world
        self.all_token_ids, self.num_prompt_tokens = list(prompt), len(prompt)
        self.num_computed_tokens = 0
        self.kv_transfer_params = self.prompt_embeds = self.lora_request = self.cache_salt = None
        self.mm_features = []
        self.blocks = []
        vars(self).update(features)

    @property
    def num_tokens(self):
        return len(self.all_token_ids)


class Mover:
    """Copies between one worker's cache and its share of the tier; told so, it fails, having written rubbish."""

    def __init__(self, cache, tier):
        self.cache, self.tier, self.fails = cache, tier, set()

    def load(self, rows, slots):
        self._fail("load", self.cache, slots)
        self.cache[slots] = self.tier[rows]
        return Done()

    def store(self, rows, slots):
        self._fail("store", self.tier, rows)
        self.tier[rows] = self.cache[slots]
        return Done()

    def _fail(self, kind, target, places):
        if kind in self.fails:
            target[places[: len(places) // 2]] = -7
            raise OSError(f"no {kind}")


class Engine:
    """vLLM's scheduler in small: block tables, admission, preemption, recovery from failed loads."""

    def __init__(self, pages=200, blocks=200, workers=2, policy="lru"):
        self.metrics = Metrics()
        self.faults = Faults(self.metrics)
        self.hierarchy = Hierarchy(MemoryTier(pages, make_policy(policy)), PAGE, 1, self.metrics)
        chunker = Chunker(MIN, 24, MAX, TokenStructure.of(["a", "\n\n", "b"]))
        namespaces = Namespaces(b"toy engine").of
        self.side = SchedulerSide(self.hierarchy, chunker, namespaces, BLOCK, workers, self.metrics, self.faults)
        self.workers = [WorkerSide(None, None, Settings(), self.metrics, self.faults) for _ in range(workers)]
        for worker in self.workers:
            worker._mover = Mover(np.full(blocks * BLOCK, -1), np.full(pages * PAGE, -2))
        self.free = list(range(1, blocks))  # block 0 is vLLM's null block
        self.waiting, self.running, self.held = [], [], {}
        self.reports = [[] for _ in self.workers]
        self.finishes = []
        self.names = 0
        self.loaded = 0  # tokens, checked

    # --- what tests do ---

    def request(self, prompt, **features):
        self.names += 1
        request = Request(f"r{self.names}", prompt, **features)
        self.waiting.append(request)
        return request

    def run(self, prompt, answer=(), local=0, budget=10**6, **features):
        """A request from start to end, alone; the tokens it had from us."""
        request = self.request(prompt, **features)
        hit = None
        for _ in range(len(prompt) + len(answer) + 4):
            got = self.step(budget=budget, local={request.request_id: local}, sample=answer)
            hit = got.get(request.request_id, hit)
            if request.num_tokens >= len(prompt) + max(len(answer), 1):
                break
        self.finish(request)
        self.settle()
        return hit

    def settle(self):
        """Step until nothing is under way."""
        for _ in range(3):
            self.step(admit=False, run=())
            self.deliver()

    def step(self, admit=True, budget=10**6, local=None, sample=(), run=None, deliver=True):
        """One step. `local`: first tokens vLLM has itself; `sample`: answers, by place; `run`: who may run.
        Returns the tokens from us of all that were taken up."""
        new, resumed, cached, hits, lost = [], [], [], {}, set()
        scheduled = {}
        runners = [r for r in self.running if run is None or r in run]
        for request in list(self.waiting) if admit else ():
            taken = self._admit(request, (local or {}).get(request.request_id, 0), hits, lost)
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
        self._give_back(request)
        request.num_computed_tokens = 0
        request.preempted = True

    def finish(self, request):
        """Done or aborted, in whatever state."""
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)
        computed = -(-request.num_computed_tokens // BLOCK)
        if self.side.finished(request, request.blocks[:computed]):
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
        self.workers[worker]._mover.fails = set(kinds)

    def check(self):
        """Nothing is under way, so nothing may be pinned or waited for."""
        assert self.hierarchy._pins == 0 and not self.side._under_way and not self.held
        assert not self.hierarchy._doomed
        self.hierarchy.check_integrity()

    # --- inside ---

    def _admit(self, request, local, hits, lost):
        needed = -(-(request.num_tokens + 1) // BLOCK)
        local = min(local // BLOCK * BLOCK, (request.num_tokens - 1) // BLOCK * BLOCK)
        external = self.side.lookup(request, local)
        assert 0 <= external <= request.num_tokens - 1 - local or external == 0
        if needed > len(self.free):
            return False
        self.waiting.remove(request)
        self.running.append(request)
        request.preempted = getattr(request, "preempted", False)
        request.blocks = []
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
        told = {id(r): getattr(r, "told", 0) for r in cached}
        output = SimpleNamespace(
            num_scheduled_tokens=scheduled,
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
                new_block_ids=[
                    ((list(r.blocks[told[id(r)] :]),) if len(r.blocks) > told[id(r)] else None) for r in cached
                ]
                + [(list(r.blocks),) for r in resumed],
                num_computed_tokens=[r.num_computed_tokens for r in [*cached, *resumed]],
            ),
        )
        together = [*new, *resumed, *cached]
        for request in together:
            request.told, request.preempted = len(request.blocks), False
        orders = pickle.loads(pickle.dumps(self.side.orders(output)))
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
            for slot in job.slots.tolist():
                if slot // BLOCK not in bad:
                    assert self._cache(worker)[slot] == truth[at[slot]], "wrong KV"
                    self.loaded += 1

    def _cache(self, worker):
        return self.workers[worker]._mover.cache

    def _seed(self, request, worker):
        return mix(request.world, 1000 + worker)

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


def text(seed, length):
    """Tokens of a text that is its seed's alone, with a paragraph now and then."""
    tokens = np.random.default_rng(seed).integers(100, 10**6, length)
    tokens[20::23] = BREAK
    return tokens.tolist()


@pytest.fixture(params=[1, 2], ids=["1 worker", "2 workers"])
def engine(request):
    made = Engine(workers=request.param)
    yield made
    made.settle()
    for each in [*made.running, *made.waiting]:
        made.finish(each)
    made.settle()
    made.check()


# --- what is found again ---


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 32, 33, 100])
def test_an_identical_prompt_computes_its_last_token_only(engine, length):
    prompt = text(1, length)
    assert engine.run(prompt) == 0
    assert engine.run(prompt) == length - 1
    assert engine.loaded == (length - 1) * len(engine.workers)


def test_a_follow_up_has_prompt_and_answer_but_the_last_token(engine):
    prompt, answer = text(1, 50), text(2, 20)
    engine.run(prompt, answer)
    assert engine.run(prompt + answer + text(3, 30)) == 50 + 19  # the last answer token was never computed


def test_a_divergence_inside_a_chunk_keeps_what_is_shared(engine):
    prompt = text(1, 100)
    engine.run(prompt)
    for shared in (1, 15, 16, 37, 50, 99):
        assert engine.run(prompt[:shared] + text(50 + shared, 40)) == shared


def test_nothing_shared_is_a_miss(engine):
    engine.run(text(1, 100))
    assert engine.run(text(2, 100)) == 0


@pytest.mark.parametrize("local", [8, 16, 40, 96])
def test_ours_begins_where_vllms_own_hit_ends(engine, local):
    prompt = text(1, 100)
    engine.run(prompt)
    assert engine.run(prompt, local=local) == 99 - local
    assert engine.loaded == (99 - local) * len(engine.workers)


def test_vllms_own_hit_beyond_ours_loads_nothing(engine):
    prompt = text(1, 100)
    engine.run(prompt[:50])
    assert engine.run(prompt, local=64) == 0
    assert engine.run(prompt) == 99  # and what came behind it was stored


def test_a_local_hit_that_does_not_end_with_a_block(engine):
    """vLLM always gives block-aligned hits; the side does not depend on it."""
    prompt = text(1, 100)
    engine.run(prompt)
    request = engine.request(prompt)
    assert engine.side.lookup(request, 13) == 86
    blocks = list(range(20, 33))
    engine.side.allocated(request, blocks, 86)
    (job,) = engine.side.take_orders().loads
    assert job.slots[0] == 21 * BLOCK + 5 and len(job.rows) == 86
    engine.side.report(StepReport({job.id: len(engine.workers)}, set()))


@pytest.mark.parametrize("budget", [1, 7, 16, 40])
def test_chunked_prefill(engine, budget):
    prompt = text(1, 120)
    assert engine.run(prompt, budget=budget) == 0
    assert engine.run(prompt + text(2, 30), budget=budget) == 120
    assert engine.run(prompt + text(2, 30), budget=budget) == 149


def test_whole_chunks_are_stored_while_the_prompt_is_prefilled(engine):
    prompt = text(1, 200)
    first = engine.request(prompt)
    for _ in range(3):
        engine.step(budget=40)
    second = engine.request(prompt)
    hits = engine.step(budget=40)
    assert 60 <= hits[second.request_id] <= 120
    assert first.num_computed_tokens == 160


def test_many_requests_in_a_step(engine):
    shared = text(1, 60)
    prompts = [shared + text(n, 10 + n) for n in range(2, 8)]
    engine.run(shared)
    for prompt in prompts:
        engine.request(prompt)
    assert set(engine.step().values()) == {60}
    for request in list(engine.running):
        engine.finish(request)
    engine.settle()
    assert [engine.run(prompt) for prompt in prompts] == [len(prompt) - 1 for prompt in prompts]


def test_the_same_prompt_twice_in_one_step_is_stored_once(engine):
    prompt = text(1, 90)
    engine.request(prompt), engine.request(prompt)
    engine.step()
    engine.settle()
    used = engine.hierarchy._memory.used
    assert used < 90 / PAGE + 8
    assert engine.run(prompt) == 89
    assert engine.hierarchy._memory.used == used


def test_a_superseded_tail_makes_room(engine):
    prompt = text(1, 40)
    engine.run(prompt[:37])
    chunks = len(engine.hierarchy)
    engine.run(prompt)
    assert len(engine.hierarchy) == chunks
    assert engine.run(prompt) == 39


def test_named_boundaries_cut(engine):
    prompt = text(1, 90)
    hint = {"ragkv": {"documents": [{"start": 18, "end": 41}]}}
    engine.run(prompt, kv_transfer_params=hint)
    assert engine.run(prompt, kv_transfer_params=hint) == 89
    assert {41 - 18} <= {len(chunk) for chunk in engine.hierarchy._catalogue.everything()}


# --- what goes wrong ---


def test_a_lookup_is_repeated_while_the_request_waits_for_blocks(engine):
    prompt = text(1, 60)
    engine.run(prompt)
    free, engine.free = engine.free, []
    request = engine.request(prompt)
    for _ in range(3):
        assert engine.step() == {}
    assert engine.hierarchy._pins == 0, "waiting pins nothing"
    engine.side.reset()  # what was found is gone, and is not loaded
    engine.free = free
    assert engine.step()[request.request_id] == 0


def test_what_is_stored_meanwhile_is_found_by_who_waits(engine):
    prompt = text(1, 60)
    waiter = Request("waiter", prompt)
    assert engine.side.lookup(waiter, 0) == 0
    engine.run(prompt)
    assert engine.side.lookup(waiter, 0) == 59
    assert engine.side.lookup(waiter, 16) == 43
    assert not engine.side.finished(waiter, [])


def test_preempted_and_resumed_with_other_blocks(engine):
    prompt = text(1, 70)
    request = engine.request(prompt)
    answer = text(2, 30)
    for _ in range(10):
        engine.step(sample=answer)
    old = set(request.blocks)
    engine.preempt(request)
    stranger = engine.request(text(3, 100))  # takes the blocks
    engine.waiting.reverse()
    engine.waiting.sort(key=lambda r: r is request)
    assert engine.step(sample=answer)[request.request_id] >= 69
    assert old != set(request.blocks)
    for _ in range(12):
        engine.step(sample=answer, run=[request])
    tokens = list(request.all_token_ids)
    engine.finish(request), engine.finish(stranger)
    engine.settle()
    assert engine.run([*tokens, 5]) == len(tokens) - 1


def test_preempted_in_the_middle_of_its_prompt(engine):
    prompt = text(1, 150)
    request = engine.request(prompt)
    engine.step(budget=40)
    engine.preempt(request)
    hit = engine.step(budget=30)[request.request_id]
    assert MIN <= hit <= 40
    engine.finish(request)
    engine.settle()
    assert engine.run(prompt) == hit + 30


def test_aborted_before_it_was_taken_up(engine):
    engine.run(text(1, 60))
    free, engine.free = engine.free, []
    request = engine.request(text(1, 60))
    engine.step()
    engine.finish(request)
    engine.free = free
    assert not engine.held and request.request_id not in engine.side._tracked


def test_aborted_while_it_is_prefilled(engine):
    prompt = text(1, 150)
    request = engine.request(prompt)
    engine.step(budget=45), engine.step(budget=40)
    engine.finish(request)
    assert engine.held, "its blocks are still read"
    engine.settle()
    assert not engine.held
    assert engine.run(prompt) == 85


def test_aborted_in_the_step_of_its_load(engine):
    prompt = text(1, 60)
    engine.run(prompt)
    request = engine.request(prompt + text(2, 60))
    engine.step(budget=10, deliver=False)
    engine.finish(request)
    engine.settle()


def test_blocks_are_kept_until_the_last_store_is_done(engine):
    request = engine.request(text(1, 60))
    engine.step()
    for _ in range(9):
        engine.step()
    engine.finish(request)
    assert engine.held == {request.request_id: request}
    orders = engine.side.take_orders()
    assert [job.finishes for job in orders.stores] == [request.request_id]
    assert {slot // BLOCK for job in orders.stores for slot in job.slots.tolist()} <= set(request.blocks)
    for index, worker in enumerate(engine.workers):
        worker.store(orders)
        assert worker.take_finished() == {request.request_id}
        engine.reports[index].append(worker.take_report())
    engine.deliver()
    engine._give_back(engine.held.pop(request.request_id))


def test_a_finish_with_nothing_new_keeps_no_blocks(engine):
    prompt = text(1, 60)
    engine.run(prompt)
    request = engine.request(prompt)
    engine.step()
    engine.finish(request)
    assert not engine.held


def test_a_failed_store_matches_never_and_is_tried_again(engine):
    prompt = text(1, 100)
    engine.fail("store", worker=len(engine.workers) - 1)  # one of them is enough
    engine.run(prompt)
    assert engine.hierarchy._memory.used == 0, "what failed keeps no room"
    engine.fail(worker=len(engine.workers) - 1)
    assert engine.run(prompt) == 0
    assert engine.run(prompt) == 99


def test_a_failed_store_before_others_that_hold(engine):
    prompt = text(1, 100)
    request = engine.request(prompt)
    engine.fail("store")
    engine.step(budget=60, deliver=False)
    engine.fail()
    engine.step(budget=60, deliver=False)  # behind chunks that never came
    engine.deliver()
    assert engine.side.lookup(Request("probe", prompt), 0) == 0
    engine.side.finished(Request("probe", prompt), [])
    engine.finish(request)
    engine.settle()
    assert engine.run(prompt) == 99  # the finish wrote them anew


@pytest.mark.parametrize("budget", [10**6, 20])
def test_a_failed_load_is_computed_and_nothing_that_rests_on_it_is_kept(engine, budget):
    prompt = text(1, 100)
    engine.run(prompt[:60])
    request = engine.request(prompt)
    engine.fail("load")
    assert engine.step(budget=budget)[request.request_id] == 60
    assert request.num_computed_tokens == 0, "vLLM starts anew"
    engine.fail()
    while request.num_tokens == 100:
        engine.step(budget=budget)
    assert engine.hierarchy._pins == 0
    engine.finish(request)
    engine.settle()
    assert engine.run(prompt) >= 60
    assert engine.run(prompt) == 99  # every load is checked


def test_a_failed_load_spoils_the_steps_that_were_ordered_before_it_was_known(engine):
    prompt = text(1, 150)
    engine.run(prompt[:60])
    request = engine.request(prompt)
    engine.fail("load", worker=len(engine.workers) - 1)
    engine.step(budget=40, deliver=False)
    engine.fail(worker=len(engine.workers) - 1)
    request.num_computed_tokens = 100  # asynchronous scheduling: the next step goes on as if all were well
    engine.step(budget=50, deliver=False)
    engine.finish(request)  # and so does an abort
    engine.settle()
    assert engine.run(prompt) <= 60


def test_a_failed_load_spoils_who_shares_the_blocks(engine):
    prompt, other = text(1, 64), text(2, 60)
    engine.run(prompt)
    first, second = engine.request(prompt), engine.request(prompt + other)
    engine.fail("load")
    engine.step(run=())
    engine.fail()
    engine.finish(first), engine.finish(second)
    engine.settle()
    assert engine.run(prompt + other) <= 64


def test_disappoint(engine, monkeypatch):
    prompt = text(1, 100)
    engine.run(prompt[:60])
    request = engine.request(prompt)

    def broken(_):
        raise KeyError("lost")

    with monkeypatch.context() as patch:
        patch.setattr(engine.hierarchy, "touch", broken)
        engine.step()
    assert request.num_computed_tokens == 0, "vLLM was told to compute"
    engine.step()
    engine.finish(request)
    engine.settle()
    assert engine.run(prompt) <= 60
    assert engine.run(prompt) == 99


def test_disappoint_without_a_promise_spoils_nothing(engine):
    request = engine.request(text(1, 40))
    engine.side.lookup(request, 0)
    engine.side.disappoint(request, [4, 5, 6], 0)
    assert engine.side.take_orders().invalid_blocks == set()


def test_disappoint_keeps_vllms_own_blocks(engine):
    engine.run(text(1, 40))
    request = engine.request(text(1, 40))
    assert engine.side.lookup(request, 16) == 23
    engine.side.disappoint(request, [4, 5, 6, 7, 8], 23)
    assert engine.side.take_orders().invalid_blocks == {6, 7, 8}


def test_reports_of_workers_come_apart():
    engine = Engine(workers=2)
    prompt = text(1, 100)
    engine.request(prompt)
    engine.step(deliver=False)
    engine.deliver(0)
    probe = Request("probe", prompt)
    assert engine.side.lookup(probe, 0) == 0, "one worker has not written yet"
    engine.deliver(1)
    assert engine.side.lookup(probe, 0) == 99
    engine.side.finished(probe, [])


def test_reports_of_unknown_jobs_are_ignored(engine):
    engine.side.report(StepReport({12345: 2}, {12345}))


def test_a_full_tier_evicts_and_stays_right():
    engine = Engine(pages=30, workers=2)
    for turn in range(3):
        for seed in range(4):
            engine.run(text(seed, 100), budget=50)
            engine.hierarchy.check_integrity()
            assert engine.run(text(seed, 100)) >= 64, turn
    evicted = f"{m.EVICTED_CHUNKS}\x1f{m.CAPACITY}"
    assert engine.metrics.drain()["counters"][evicted] > 20
    engine.check()


def test_a_tier_without_room_refuses_and_stays_right():
    engine = Engine(pages=30)
    requests = [engine.request(text(seed, 100)) for seed in range(4)]
    engine.step(deliver=False)  # all is pinned: written, not reported
    engine.step(deliver=False)
    engine.deliver()
    counters = engine.metrics.drain()["counters"]
    assert counters[f"{m.REFUSED_CHUNKS}\x1f{m.NO_ROOM}"] >= 3
    for request in requests:
        engine.finish(request)
    engine.settle()
    assert sum(engine.run(text(seed, 100)) > 0 for seed in range(4)) >= 1
    engine.check()


def test_after_a_reset_nothing_old_matches(engine):
    prompt = text(1, 100)
    engine.run(prompt[:40])
    request = engine.request(prompt)
    engine.step(deliver=False, budget=70)  # load and store under way
    engine.side.reset()
    request.world = 9  # new weights; vLLM preempts all in this case
    engine.deliver()
    engine.preempt(request)
    assert engine.step()[request.request_id] == 0
    engine.finish(request)
    engine.settle()
    engine.check()
    assert engine.hierarchy._memory.used == 0
    assert engine.run(prompt, world=9) == 0
    assert engine.run(prompt, world=9) == 99


# --- who shares with whom ---

LORA = SimpleNamespace(lora_name="a", lora_int_id=1, lora_path="/nowhere/a", load_inplace=False)
OTHER = SimpleNamespace(lora_name="b", lora_int_id=2, lora_path="/nowhere/b", load_inplace=False)


def image(identifier, offset=4):
    return SimpleNamespace(identifier=identifier, mm_position=SimpleNamespace(offset=offset, length=9))


WORLDS = [
    {},
    {"cache_salt": "x"},
    {"cache_salt": "y"},
    {"cache_salt": ""},
    {"lora_request": LORA},
    {"lora_request": OTHER},
    {"lora_request": LORA, "cache_salt": "x"},
    {"mm_features": [image("cat")]},
    {"mm_features": [image("dog")]},
    {"mm_features": [image("cat", 5)]},
    {"mm_features": [image("cat"), image("dog", 40)]},
    {"mm_features": [image("cat")], "lora_request": OTHER},
]


def test_nothing_leaks_between_worlds(engine):
    prompt = text(1, 60)
    for world, features in enumerate(WORLDS):
        assert engine.run(prompt, world=world, **features) == 0
    for world, features in enumerate(WORLDS):
        assert engine.run(prompt, world=world, **features) == 59


@pytest.mark.parametrize(
    "features",
    [
        {"prompt_embeds": object()},
        {"resumable": True},
        {"lora_request": SimpleNamespace(**{**vars(LORA), "load_inplace": True})},
    ],
    ids=["embeddings", "streamed", "inplace adapter"],
)
def test_what_cannot_be_named_is_left_alone(engine, features):
    prompt = text(1, 60)
    for _ in range(2):
        assert engine.run(prompt, text(2, 40), **features) == 0
    assert len(engine.hierarchy) == 0


# --- everything together ---


PROMPTS = st.builds(
    lambda seed, length, tail, more: text(seed, 90)[:length] + text(10 + tail, more),
    seed=st.integers(0, 1),
    length=st.sampled_from([1, 17, 40, 40, 70, 90, 90]),
    tail=st.integers(0, 1),
    more=st.sampled_from([0, 0, 5, 50]),
)
WORLD = st.sampled_from([0, 0, 0, 1])
FAILS = st.sampled_from([(), (), (), ("load",), ("store",), ("load", "store")])


class Machine(RuleBasedStateMachine):
    """All of it, interleaved. Loads are checked inside the engine."""

    def __init__(self):
        super().__init__()
        self.engine = Engine(pages=64, blocks=120, workers=2)

    def request(self, prompt, world):
        return self.engine.request(prompt, world=world, cache_salt=f"{world}" if world else None)

    @rule(prompt=PROMPTS, world=WORLD)
    def arrives(self, prompt, world):
        if len(self.engine.waiting) < 4:
            self.request(prompt, world)

    @rule(prompt=PROMPTS, world=WORLD, budget=st.sampled_from([40, 200]), fails=FAILS, worker=st.integers(0, 1))
    def is_served(self, prompt, world, budget, fails, worker):
        """A request from arrival to end; what fails, fails in its first step."""
        request = self.request(prompt, world)
        self.engine.fail(*fails, worker=worker)
        for _ in range(8):
            self.engine.step(budget=budget)
            self.engine.fail(worker=worker)
            if request.num_tokens > len(prompt):
                break
        self.engine.finish(request)

    @rule(
        budget=st.sampled_from([1, 9, 40, 200]),
        local=st.sampled_from([0, 0, 8, 32]),
        admit=st.booleans(),
        deliver=st.booleans(),
        answer=st.integers(0, 1),
        fails=FAILS,
        worker=st.integers(0, 1),
    )
    def steps(self, budget, local, admit, deliver, answer, fails, worker):
        locals_ = {request.request_id: local for request in self.engine.waiting}
        self.engine.fail(*fails, worker=worker)
        if len(self.engine.free) > 8:
            sample = text(20 + answer, 60)
            self.engine.step(admit=admit, budget=budget, local=locals_, sample=sample, deliver=deliver)
        self.engine.fail(worker=worker)

    @precondition(lambda self: self.engine.running)
    @rule(which=st.integers(0, 9))
    def preempts(self, which):
        self.engine.deliver()  # vLLM, too, works a step's output off before it preempts for the next
        self.engine.preempt(self.engine.running[which % len(self.engine.running)])

    @precondition(lambda self: self.engine.running or self.engine.waiting)
    @rule(which=st.integers(0, 9))
    def finishes(self, which):
        everyone = self.engine.running + self.engine.waiting
        self.engine.finish(everyone[which % len(everyone)])

    @rule(worker=st.integers(0, 1))
    def reports(self, worker):
        self.engine.deliver(worker)

    @rule(really=st.integers(0, 5))
    def resets(self, really):
        if not really:
            self.engine.side.reset()

    @invariant()
    def whole(self):
        self.engine.hierarchy.check_integrity()

    def teardown(self):
        for request in self.engine.running + self.engine.waiting:
            self.engine.finish(request)
        self.engine.settle()
        self.engine.check()
        assert not self.engine.side._tracked
        for seed in range(2):
            self.engine.run(text(seed, 90))
            assert self.engine.run(text(seed, 90)) > 0
        self.engine.check()


def test_machine():
    run_state_machine_as_test(Machine, settings=settings(max_examples=150, stateful_step_count=40, deadline=None))
