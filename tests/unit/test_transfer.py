"""Copies between cache and tier, against a plain Python model of both."""

import itertools
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ragkv.connectors.vllm.layers import LayerCache
from ragkv.connectors.vllm.layout import Geometry
from ragkv.connectors.vllm.streams import Ticket, make_streams
from ragkv.connectors.vllm.tiles import RAW
from ragkv.connectors.vllm.transfer import DirectMover, StagedMover, Tier, job_slices, make_mover
from ragkv.errors import FusionError
from simulated_device import SimulatedStreams

LAYERS, HEADS, DIM, BLOCK, BLOCKS, PAGE, PAGES = 3, 2, 4, 8, 6, 5, 9
CPU = torch.device("cpu")
SHAPE = (BLOCK, 2, HEADS, DIM)


def strided(layer, itemsize):
    """[tokens, 2, heads, dim] inside a block as it comes; all layers of a block side by side."""
    return torch.arange(BLOCK * 2 * HEADS * DIM).view(SHAPE) + layer * BLOCK * 2 * HEADS * DIM


def tangled(layer, itemsize):
    """A permutation that no strides tell."""
    order = torch.randperm(BLOCK * 2 * HEADS * DIM, generator=torch.Generator().manual_seed(3))
    return order.view(SHAPE) + layer * BLOCK * 2 * HEADS * DIM


class World:
    """One rank's cache, and the tier that all ranks share, as tensors and as a dictionary of elements."""

    def __init__(self, places, itemsize, ranks, rank, segment=None, seed=0):
        self.chance = torch.Generator().manual_seed(seed + rank)
        self.geometry = Geometry(LAYERS, HEADS, DIM, itemsize, BLOCK)
        self.ranks, self.rank, self.itemsize, self.places = ranks, rank, itemsize, places
        size = BLOCK * 2 * HEADS * DIM
        self.storage = self.noise(BLOCKS * LAYERS * size)
        whole = self.storage.view(BLOCKS, LAYERS * size)
        self.caches = [
            LayerCache(whole[:, layer * size : (layer + 1) * size], BLOCK, places(layer, itemsize))
            for layer in range(LAYERS)
        ]
        shape = (PAGES, ranks, LAYERS, 2, PAGE, HEADS, DIM)
        self.segment = self.noise(torch.Size(shape).numel()) if segment is None else segment
        self.pages = self.segment.view(shape)
        self.tier = Tier(self.segment, self.geometry, PAGE, ranks, rank)

    def noise(self, count):
        raw = RAW[self.itemsize]
        low, high = (0, 256) if self.itemsize == 1 else (torch.iinfo(raw).min, torch.iinfo(raw).max)
        return torch.randint(low, high, (count,), generator=self.chance, dtype=torch.int64).to(raw)

    def mover(self, kind, prepare=None):
        if kind == "direct":
            return DirectMover(self.caches, self.tier, prepare)
        pages = int(kind.removeprefix("staged"))  # pages in half the staging buffer
        staging = 2 * pages * PAGE * self.geometry.token_bytes
        return StagedMover(self.caches, self.tier, staging, CPU, make_streams(CPU), prepare)

    def in_cache(self, slot):
        """A slot's elements [layers, 2, heads, dim], found without the code under test."""
        first = slot // BLOCK * LAYERS * BLOCK * 2 * HEADS * DIM
        return torch.stack([self.storage[first + self.places(layer, 0)[slot % BLOCK]] for layer in range(LAYERS)])

    def in_tier(self, row):
        return self.pages[row // PAGE, self.rank, :, :, row % PAGE]

    def some(self, tokens):
        """`tokens` random rows and slots, each no more than once."""
        rows = torch.randperm(PAGES * PAGE, generator=self.chance)[:tokens]
        slots = torch.randperm(BLOCKS * BLOCK, generator=self.chance)[:tokens]
        return rows, slots


MOVERS = ["direct", "staged1", "staged2", "staged99"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("places", [strided, tangled], ids=["strided", "table"])
@pytest.mark.parametrize("mover", MOVERS)
def test_store_and_load_copy_just_what_was_addressed(mover, places, itemsize, ranks):
    segment = None
    for rank in range(ranks):
        world = World(places, itemsize, ranks, rank, segment, seed=itemsize)
        segment = world.segment
        copies = world.mover(mover)
        for tokens in (1, 7, 30):
            rows, slots = world.some(tokens)
            cache, tier = world.storage.clone(), world.segment.clone()
            assert copies.store(rows, slots).query()
            assert torch.equal(world.storage, cache), "a store wrote the cache"
            for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
                assert torch.equal(world.in_tier(row), world.in_cache(slot))
            untouched = torch.ones(PAGES, ranks, dtype=torch.bool)
            untouched[rows // PAGE, rank] = False
            assert torch.equal(world.pages[untouched], tier.view_as(world.pages)[untouched])

            rows, slots = world.some(tokens)
            expected = world.storage.clone()
            before = {slot: world.in_cache(slot).clone() for slot in range(BLOCKS * BLOCK)}
            tier = world.segment.clone()
            assert copies.load(rows, slots).query()
            assert torch.equal(world.segment, tier), "a load wrote the tier"
            loaded = dict(zip(slots.tolist(), rows.tolist(), strict=True))
            for slot in before:
                want = world.in_tier(loaded[slot]) if slot in loaded else before[slot]
                assert torch.equal(world.in_cache(slot), want)
            assert not torch.equal(world.storage, expected)


META = torch.device("meta")  # computes nothing, and refuses operands of another device, as accelerators do


@pytest.mark.parametrize("places", [strided, tangled], ids=["strided", "table"])
@pytest.mark.parametrize("stacked", [True, False], ids=["one storage", "apart"])
def test_copies_mix_no_devices(places, stacked):
    """Nothing that a copy computes with on the device lies on the CPU."""
    geometry, size = Geometry(LAYERS, HEADS, DIM, 2, BLOCK), BLOCK * 2 * HEADS * DIM
    whole = torch.empty(BLOCKS, LAYERS * size, dtype=torch.int16, device=META)
    alone = [torch.empty(BLOCKS, size, dtype=torch.int16, device=META) for _ in range(LAYERS)]
    caches = [
        LayerCache(whole[:, n * size : (n + 1) * size], BLOCK, places(n, 2))
        if stacked
        else LayerCache(alone[n], BLOCK, places(n, 2) - n * size)
        for n in range(LAYERS)
    ]
    elements = PAGES * PAGE * geometry.token_bytes // 2
    pool = Tier(torch.empty(elements, dtype=torch.int16, device=META), geometry, PAGE, 1, 0)
    memory = Tier(torch.empty(elements, dtype=torch.int16), geometry, PAGE, 1, 0)
    rows, slots = torch.arange(7), torch.arange(7) + 3
    direct = DirectMover(caches, pool)
    assert direct.load(rows, slots).query() and direct.store(rows, slots).query()
    staged = StagedMover(caches, memory, 4 * PAGE * geometry.token_bytes, META, make_streams(CPU))
    assert staged.load(rows, slots).query()  # (of "meta" nothing can be copied back)


@pytest.mark.parametrize("mover", MOVERS)
def test_one_row_may_be_loaded_into_many_slots(mover):
    world = World(strided, 2, 1, 0)
    rows, slots = torch.tensor([7, 7, 12, 7]), torch.tensor([40, 3, 0, 17])
    world.mover(mover).load(rows, slots)
    for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
        assert torch.equal(world.in_cache(slot), world.in_tier(row))


@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("mover", MOVERS)
def test_moved_keys_are_turned_on_the_way_and_values_are_not(mover, itemsize):
    """The turn here: add layer and shift to every element, so that a wrong layer, token or side shows."""
    world = World(strided, itemsize, 2, 1, seed=5)
    rows, slots = world.some(25)
    shifts = torch.randint(-90, 90, (25,), generator=world.chance)

    def prepare(by):
        def turn(layers, raw):
            assert raw.shape == (len(layers), len(by), HEADS, DIM)
            more = 10 * torch.tensor(layers)[:, None] + by
            return raw + (more % 251)[:, :, None, None].to(raw.dtype)

        return turn

    world.mover(mover, prepare).load(rows, slots, shifts)
    for row, slot, by in zip(rows.tolist(), slots.tolist(), shifts.tolist(), strict=True):
        want = world.in_tier(row).clone()
        for layer in range(LAYERS):
            want[layer, 0] += torch.tensor((10 * layer + by) % 251).to(want.dtype)
        assert torch.equal(world.in_cache(slot), want)


@pytest.mark.parametrize("mover", ["direct", "staged1"])
def test_moved_keys_are_not_loaded_where_nothing_turns_them(mover):
    world = World(strided, 2, 1, 0)
    before = world.storage.clone()
    with pytest.raises(FusionError, match="rotate"):
        world.mover(mover).load(torch.tensor([3]), torch.tensor([9]), torch.tensor([4]))
    assert torch.equal(world.storage, before)


def test_nothing_to_copy():
    world = World(strided, 2, 1, 0)
    none = torch.empty(0, dtype=torch.int64)
    before = world.storage.clone(), world.segment.clone()
    for mover in ("direct", "staged1"):
        assert world.mover(mover).store(none, none).query() and world.mover(mover).load(none, none).query()
    assert torch.equal(world.storage, before[0]) and torch.equal(world.segment, before[1])


def test_the_cpu_needs_no_staging():
    world = World(strided, 2, 1, 0)
    mover = make_mover(world.caches, world.tier, 1, CPU, None)
    assert isinstance(mover, DirectMover) and mover.device_bytes == 0 and mover.most_tokens > 1 << 40


def test_staging_is_as_large_as_it_says():
    world = World(strided, 2, 2, 0)
    mover = world.mover("staged3")
    assert mover.most_tokens == 3 * PAGE
    staging = mover.staging.nbytes
    assert staging == 2 * 3 * PAGE * world.geometry.token_bytes < mover.device_bytes


@pytest.mark.parametrize("mover", MOVERS)
@pytest.mark.parametrize(("row", "slot"), [(PAGES * PAGE, 0), (-1, 0), (0, BLOCKS * BLOCK), (0, -1)])
@pytest.mark.parametrize("kind", ["load", "store"])
def test_nothing_is_ordered_of_what_reaches_outside(mover, row, slot, kind):
    """A device does not survive it, so the host looks."""
    world = World(strided, 2, 1, 0)
    before = world.storage.clone(), world.segment.clone()
    with pytest.raises(IndexError, match=r"there are \d+"):
        getattr(world.mover(mover), kind)(torch.tensor([3, row]), torch.tensor([3, slot]))
    assert torch.equal(world.storage, before[0]) and torch.equal(world.segment, before[1])


@pytest.mark.parametrize("mover", MOVERS)
def test_what_else_a_mover_owes_where_all_is_over_at_once(mover):
    world = World(strided, 2, 1, 0)
    copies = world.mover(mover)
    copies.fence_stores()
    assert copies.ordered("load").query() and copies.ordered("store").query()
    copies.close()
    copies.close()


def test_a_ticket_tells_how_long_the_device_was_at_it():
    """Not how long it waited: for forwards, or for other copies."""
    world, device = World(strided, 2, 1, 0), SimulatedStreams(lambda ready: 0)
    mover = StagedMover(world.caches, world.tier, 2 * PAGE * world.geometry.token_bytes, CPU, device)
    for _ in range(5):
        device.compute.submit(lambda: None)
    rows, slots = torch.arange(3 * PAGE), torch.arange(3 * PAGE)
    tickets = [mover.load(rows, slots), mover.load(rows[:PAGE], slots[:PAGE])]
    assert [ticket.seconds() for ticket in tickets] == [None, None]
    device.finish()
    fetches_and_scatters = [2 * 3, 2 * 1]
    assert [ticket.seconds() for ticket in tickets] == [n + 1 for n in fetches_and_scatters]
    assert mover.ordered("load").seconds() is None
    direct = world.mover("direct").load(rows, slots)
    assert direct.query() and direct.seconds() > 0


def test_a_ticket_keeps_what_is_read_until_the_copy_is_over():
    class Kept:
        pass

    device = SimulatedStreams(lambda ready: 0)
    kept = Kept()
    alive = weakref.ref(kept)
    ticket = Ticket(device.load.record(), kept=[kept])
    del kept
    assert not ticket.query() and alive() is not None
    device.finish()
    assert ticket.query() and alive() is None


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 7))), st.integers(1, 20))
def test_pieces_are_cut_between_pages_and_as_large_as_may_be(pages, most):
    rows = np.array([page * 7 + offset for page, size in pages for offset in range(size)], dtype=np.int64)
    found = job_slices(rows, 7, most)
    assert [row for part in found for row in rows[part].tolist()] == rows.tolist()
    assert all(part.start == before.stop for before, part in itertools.pairwise(found))
    for number, part in enumerate(found):
        numbers = rows[part] // 7
        assert part.stop - part.start <= most or len(set(numbers.tolist())) == 1
        if number:
            assert numbers[0] != rows[part.start - 1] // 7, "a page is not split"
            before = found[number - 1]
            first_page = next((i for i, n in enumerate(numbers) if n != numbers[0]), len(numbers))
            assert part.start - before.start + first_page > most, "more would have fitted"


@pytest.mark.parametrize(("ranks", "edge", "wanted"), [(1, 100, 3), (1, 4, 5), (2, 100, 6)])
def test_adjacent_pages_are_one_copy_but_for_the_ends_of_what_is_pinned_at_once(ranks, edge, wanted, monkeypatch):
    world = World(strided, 2, ranks, ranks - 1)
    monkeypatch.setattr("ragkv.connectors.vllm.transfer.piece_pages", lambda size: edge)
    pages = np.array([0, 2, 3, 4, 7, 8])
    found = list(world.tier.stretches(pages))
    assert len(found) == wanted
    assert [page + n for _, page, count in found for n in range(count)] == pages.tolist()
    assert [place for place, _, _ in found] == [0, *itertools.accumulate(n for _, _, n in found)][:-1]
    for _, page, count in found:
        assert ranks == 1 or count == 1
        assert page // edge == (page + count - 1) // edge
        stretch = world.tier.stretch(page, count)
        assert torch.equal(stretch.view(RAW[2]).flatten(), world.pages[page : page + count, ranks - 1].flatten())
