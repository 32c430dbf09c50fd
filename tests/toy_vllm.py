"""The toy engine's scheduler: vLLM's in small, with block tables, requests that wait for their KV, and a forward.

As on Model Runner V2 nothing can be undone once a request has run: whatever it runs on must be right.
"""

import hashlib
import pickle
from types import SimpleNamespace

import numpy as np

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


class Scheduler:
    """What happens in a step. `Engine` has the state."""

    strict = True  # a request runs on nothing but the truth, unless it was fused

    def _admit(self, request, local, hits):
        """Whether it runs from now on; None: it waits for its KV; False: there are not enough blocks."""
        if request.num_computed_tokens:  # what it waited for has come
            if not self._grow(request, request.num_tokens):
                return False
            self.side.allocated(request, [list(request.blocks)], 0)
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
            self.side.allocated(request, [list(request.blocks)], external)
        except Exception as error:  # as the connector does
            self.faults.note("allocated", error)
            self.side.fail_allocation(request, [list(request.blocks)], external)
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
        return self.equipment[worker].cache

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
