"""A toy engine whose weights are watched, as a connector does it."""

import contextlib
from types import SimpleNamespace

import pytest

from ragkv.connectors.vllm import sampling
from ragkv.connectors.vllm.messages import (
    Group,
)
from ragkv.connectors.vllm.sampling import PARTS
from ragkv.connectors.vllm.trust import Trust
from toy_engine import BLOCK, Engine


class Sampler:
    """Compares the engine's weights with those of the last look."""

    def __init__(self, engine):
        self._engine, self._known, self._due = engine, engine.weights, 0

    def begin(self):
        self._due = PARTS

    def go_on(self, *, whole):
        self._due -= self._due if whole else 1
        if self._engine.weights != self._known:
            return False
        return None if self._due else True


@contextlib.contextmanager
def own_models():
    """Meanwhile a toy engine is its own model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "fingerprint_model", lambda engine: engine.fingerprint())
        patch.setattr(sampling, "Sampler", lambda engine, *_: Sampler(engine))
        yield


class Watched(Engine):
    """A toy engine with a connector's trust, whose workers see which weights it has."""

    memory_tokens = float("inf")

    @property
    def model(self):
        return self

    def start(self):
        weights = getattr(self, "weights", 0)
        super().start()
        self.weights = self.trusted = weights
        self.stopping = False
        self.trust = Trust(b"engine")
        self.trust.begin([worker.handshake() for worker in self.workers], None, self.memory_tokens)
        self.trust.bind(SimpleNamespace(blocks=[], evict_blocks=lambda blocks: None))
        side = self.side
        orders, report, lookup, allocated = side.orders, side.report, side.lookup, side.allocated

        def watched_orders(output):
            side.ask(self.trust.question(output.total_num_scheduled_tokens, side, stopping=self.stopping))
            self.trust.scheduled(output)
            return orders(output)

        def watched_allocated(request, blocks, external):
            if not self.trust.allocated(request.request_id, blocks, [Group(0, 0, BLOCK)]):
                side.taint(request.request_id)
            allocated(request, blocks, external)

        def watched_report(told, *ended):
            waiting = report(told, *ended)
            if told is not None:
                self.trust.hear(told, side)
            return waiting

        def watched_lookup(request, computed):
            if not self.trust.ready(request, side):
                return None
            if not self.trust.serves(request.request_id, computed):
                side.ignore_request(request)
                return 0
            return lookup(request, computed)

        side.orders, side.report = watched_orders, watched_report
        side.lookup, side.allocated = watched_lookup, watched_allocated

    def namespace_of(self, request):
        return self.trust.namespaces.of(request)

    def confirmed_by(self):
        return self.trust.round()

    def fingerprint(self):
        self.trusted = self.weights
        return bytes([self.weights]) * 16

    def change(self, weights):
        """Behind everybody's back. What is running goes on with KV of both."""
        self.weights = weights
        for request in self.waiting:
            if request.request_id not in self.side.requests:
                request.weights = weights  # nobody has looked it up: it will be computed by them

    def request(self, prompt, **features):
        made = super().request(prompt, **features)
        if self.weights != self.trusted:
            self.fused.add(made.request_id)  # its KV may be wrong
        return made

    def finish(self, request):
        super().finish(request)
        self.trust.over(request.request_id)


def block(number, ref_cnt=0):
    """One of vLLM's blocks."""
    return SimpleNamespace(block_id=number, ref_cnt=ref_cnt, is_null=not number)


class Pool:
    """vLLM's blocks, and which of them were evicted."""

    def __init__(self, used=()):
        self.blocks, self.evicted = [block(number, number in used) for number in range(9)], []

    def evict_blocks(self, blocks):
        self.evicted.append(set(blocks))
