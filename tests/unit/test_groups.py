"""Several groups of layers, which have block tables of their own: each group's part of a page."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from ragkv.connectors.vllm.layout import Geometry, probe
from ragkv.connectors.vllm.streams import make_streams
from ragkv.connectors.vllm.transfer import DirectMover, PagePart, StagedMover, Tier

HEADS, DIM, BLOCK, BLOCKS, PAGE, PAGES, RANKS = 2, 4, 8, 12, 4, 20, 2
GROUPS = (2, 1, 3)  # layers of each group of one plane
CPU = torch.device("cpu")


class Backend:
    def do_kv_cache_update(self, layer, key, value, cache, slots):
        blocks, offsets = slots // BLOCK, slots % BLOCK
        cache[blocks, :, offsets, :DIM], cache[blocks, :, offsets, DIM:] = key, value


def group_of(layers, seed):
    """Some layers' caches full of noise, and where their elements are."""
    noise = torch.randn(layers, BLOCKS, HEADS, BLOCK, 2 * DIM, generator=torch.Generator().manual_seed(seed))
    caches = {f"layer.{seed}.{number}": each for number, each in enumerate(noise.bfloat16().unbind())}
    geometry = Geometry(layers, HEADS, DIM, 2, BLOCK)
    backends = {name: SimpleNamespace(impl=Backend()) for name in caches}
    return geometry, caches, probe(backends, caches, geometry, BLOCKS, torch.bfloat16)


def movers_of(groups, staged):
    """A mover a group and rank, over one memory: a page has some rows that are nobody's."""
    rows = 2 * PAGE * sum(GROUPS)
    frame = RANKS * rows + 5
    memory = torch.full((PAGES * frame * HEADS * DIM,), -7, dtype=torch.int16)
    starts = [2 * PAGE * sum(GROUPS[:number]) for number in range(len(GROUPS) + 1)]
    made = {}
    for rank in range(RANKS):
        for number, (geometry, _, found) in enumerate(groups):
            assert starts[number + 1] - starts[number] == 2 * PAGE * geometry.layers
            tier = Tier(memory, geometry, PAGE, RANKS, rank, PagePart(frame, rows, starts[number]))
            staging = 4 * PAGE * geometry.token_bytes
            made[rank, number] = (
                StagedMover(found, tier, staging, CPU, make_streams(CPU)) if staged else DirectMover(found, tier)
            )
    return memory.view(PAGES, frame, HEADS * DIM), made


@pytest.mark.parametrize("staged", [False, True])
def test_groups_and_ranks_share_pages_and_touch_nothing_else(staged):
    groups = [group_of(layers, seed) for seed, layers in enumerate(GROUPS)]
    before = [{name: cache.clone() for name, cache in caches.items()} for _, caches, _ in groups]
    memory, movers = movers_of(groups, staged)
    chance = torch.Generator().manual_seed(9)
    pages = torch.randperm(PAGES, generator=chance)[:5]
    rows = (pages[:, None] * PAGE + torch.arange(PAGE)).flatten()
    slots = {key: torch.randperm(BLOCKS * BLOCK, generator=chance)[: 2 * len(rows)] for key in movers}
    for key, mover in movers.items():
        mover.store(rows, slots[key][: len(rows)])
        mover.close() if not staged else mover.ordered("store")
    assert (memory[:, -5:] == -7).all(), "what is nobody's"
    others = [page for page in range(PAGES) if page not in pages.tolist()]
    assert (memory[others] == -7).all()
    for (rank, number), mover in movers.items():
        from_, to = slots[rank, number].split(len(rows))
        mover.load(rows, to)
        mover.close()
        for name, cache in groups[number][1].items():
            told = before[number][name].permute(0, 2, 1, 3).reshape(BLOCKS * BLOCK, -1)
            now = cache.permute(0, 2, 1, 3).reshape(BLOCKS * BLOCK, -1)
            assert torch.equal(now[to], told[from_])
            cache.copy_(before[number][name])


def test_pages_that_others_share_are_copied_one_by_one():
    geometry = Geometry(1, HEADS, DIM, 2, BLOCK)
    memory = torch.zeros(PAGES * 3 * 2 * PAGE * HEADS * DIM, dtype=torch.int16)
    alone = Tier(memory, geometry, PAGE, 1, 0)
    shared = Tier(memory, geometry, PAGE, 1, 0, PagePart(3 * 2 * PAGE, 3 * 2 * PAGE, 2 * PAGE))
    pages = torch.arange(6).numpy()
    assert [count for _, _, count in alone.stretches(pages)] == [6]
    found = list(shared.stretches(pages))
    assert [count for _, _, count in found] == [1] * 6
    starts = [shared.stretch(page).data_ptr() for _, page, _ in found]
    assert {after - before for before, after in pairwise(starts)} == {3 * 2 * PAGE * HEADS * DIM * 2}
