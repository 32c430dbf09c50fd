"""vLLM's own blocks, when weights change: who has computed on what of before."""

import hashlib
from types import SimpleNamespace

import pytest

from hand_lanes import Lower
from ragkv.connectors.vllm.trust import OwnBlocks
from toy_engine import BLOCK, closing, text
from watched import Pool, Watched, block, own_models


@pytest.fixture(autouse=True, scope="module")
def looks():
    with own_models():
        yield


class OwnCache(Watched):
    """With a prefix cache of vLLM's own, whose names know nothing of weights."""

    def start(self):
        super().start()
        self.trust.bind(self)

    @property
    def blocks(self):
        refs = self.pool.refs
        return [block(number, refs.get(number, 0)) for number in range(400)]

    def evict_blocks(self, blocks):
        for number in blocks:
            self.pool.unname(number)

    def _name(self, request):
        names = request.block_hashes
        for start in range(len(names) * BLOCK, request.num_tokens // BLOCK * BLOCK, BLOCK):
            tokens = repr(request.all_token_ids[start : start + BLOCK]).encode()
            names.append(hashlib.sha256((names[-1] if names else b"") + tokens).digest())


def test_what_is_computed_on_old_blocks_of_vllm_is_old_too():
    """A request that began before a change goes on; a second one takes its blocks, a third one its."""
    engine = OwnCache(lowers=[Lower()], own_cache=True, pages=400, blocks=400)
    with closing(engine):
        engine.strict = False  # vLLM's own answers are wrong
        prompt, question = text(0, 96), text(5, 24)
        first = engine.request(prompt)
        engine.step(budget=48)
        engine.work()
        engine.change(1)
        for _ in range(6):
            engine.step(run=(), admit=False)
            engine.work()
        assert engine.trusted == 1, "noticed"
        engine.step(run=[first])
        engine.work()
        second = engine.request(prompt + question)
        engine.fused.add(second.request_id)
        engine.step(run=[second], budget=8)
        engine.work()
        assert second.local, "it took blocks of the first"
        engine.finish(first)
        engine.settle()
        for _ in range(3):
            engine.step(run=[second], budget=8)
            engine.work()
        third = engine.request(prompt + question + text(11, 40))
        engine.fused.add(third.request_id)
        engine.step(run=[third])
        engine.step(run=[third])
        engine.finish(third)
        engine.finish(second)
        engine.settle()
        engine.pool.forget()
        assert engine.run(prompt + question + text(11, 40)) == 0
        engine.pool.forget()
        assert engine.run(prompt + question + text(11, 40)) > 96


def step(request, *blocks):
    cached = SimpleNamespace(req_ids=[request], new_block_ids=[(list(blocks),) if blocks else None])
    return SimpleNamespace(scheduled_cached_reqs=cached)


def test_vllms_own_blocks_are_evicted_and_again_when_the_last_old_request_ends():
    blocks, pool = OwnBlocks(), Pool(used=[1])
    blocks.bind(pool)
    blocks.note("early")
    blocks.outdate({"a"})
    assert pool.evicted == [set(range(9))] and not blocks.allocated("b", [1], 1)
    for request in ("x", "a", "early"):
        blocks.over(request)
    assert len(pool.evicted) == 1, "b goes on, on blocks that nobody trusts"
    blocks.over("b")
    assert pool.evicted[1:] == [{1}] and blocks.allocated("c", [1], 1)
    blocks.outdate({"a"})
    blocks.emptied(running=False)
    assert not blocks.allocated("b", [1], 1), "vLLM says so even where it has not: somebody has blocks"
    pool.blocks[1].ref_cnt = 0
    blocks.emptied(running=True)
    assert blocks.allocated("b", [1], 1)


def test_who_takes_blocks_of_an_old_request_is_old_and_nobody_else():
    blocks, pool = OwnBlocks(), Pool(used=[1, 2])
    blocks.bind(pool)
    blocks.outdate({"a"})
    blocks.scheduled(step("a", 3))
    assert blocks.hold("b", 1) and blocks.allocated("b", [4, 5], 0), "it found nothing"
    assert blocks.allocated("c", [4, 6], 1), "what b has computed is right"
    assert not blocks.allocated("d", [4, 3, 7], 2) and not blocks.allocated("d", [4, 3, 7], 2)
    assert not blocks.allocated("e", [7], 1)
    blocks.over("a")
    assert blocks.allocated("f", [3], 0) and blocks.allocated("g", [3], 1), "it was given to another"
    blocks.scheduled(step("c", 7))
    blocks.scheduled(step("c"))
    assert blocks.allocated("h", [7], 1)
    for request in "de":
        blocks.over(request)
    assert pool.evicted[1:] == [{1, 2, 4}] and blocks.allocated("i", [1, 2], 2)


def test_requests_that_were_preempted_are_not_old():
    """As vLLM does with all of them where it pauses and clears its cache."""
    blocks, pool = OwnBlocks(), Pool()
    blocks.bind(pool)
    blocks.outdate({"a", "b"})
    assert blocks.allocated("c", [1, 2], 1) and len(pool.evicted) == 1


def test_where_vllm_does_not_show_its_blocks_they_are_trusted_once_it_has_emptied_them():
    blocks = OwnBlocks()
    blocks.outdate({"a"})
    blocks.over("a")
    assert not blocks.hold("b", 1)
    blocks.emptied(running=False)
    assert not blocks.hold("c", 1), "b goes on"
    blocks.over("b")
    blocks.over("c")
    blocks.emptied(running=True)
    assert not blocks.hold("d", 1)
    blocks.over("d")
    blocks.emptied(running=False)
    assert blocks.hold("e", 1)
