"""Copies of states: bit for bit, this rank's pages alone, and what layers of another group have left alone."""

import pytest
import torch
from vllm.v1.kv_cache_interface import MambaSpec

from engine_config import caches, spec
from ragkv.connectors.vllm.states import StateMover, describe_state, state_caches
from ragkv.connectors.vllm.streams import Streams, make_streams
from ragkv.errors import FusionError, LayoutError

BLOCKS, SIZES, PAGE, FRAME, TOKENS = 6, (70, 34), 40, 48, 128  # bytes a layer; a rank's share takes 3 pages
RANKS, SPREAD = 2, 3


def some(seed, *shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def layers():
    return [some(n, BLOCKS, size) for n, size in enumerate(SIZES)]


@pytest.fixture
def pages():
    return some(9, 20, FRAME)


def mover(layers, pages, rank=0, start=0):
    places = range(rank * SPREAD, (rank + 1) * SPREAD)
    return StateMover(layers, pages, PAGE, places, start, TOKENS, make_streams(torch.device("cpu")))


def rows(*pages):
    """Of a state in these pages, those of all ranks."""
    return torch.tensor([page * RANKS * SPREAD + place for place, page in enumerate(pages)])


def slots(block):
    return torch.full((RANKS * SPREAD,), block * TOKENS + 17)


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_state_comes_back_bit_for_bit_in_another_block(layers, pages, rank):
    before, caches = pages.clone(), [each.clone() for each in layers]
    copier, where = mover(layers, pages, rank), rows(3, 11, 7, 2, 19, 5)
    assert copier.store(where, slots(4)).query()
    mine = [(3, 11, 7), (2, 19, 5)][rank]
    held = torch.cat([pages[page, :PAGE] for page in mine])[: sum(SIZES)]
    assert held.equal(torch.cat([each[4] for each in caches]))
    others = [page for page in range(20) if page not in mine]
    assert pages[others].equal(before[others]) and pages[:, PAGE:].equal(before[:, PAGE:])
    assert copier.load(where, slots(1)).query()
    for cache, was in zip(layers, caches, strict=True):
        assert cache[1].equal(was[4])
        assert cache[[0, 2, 3, 4, 5]].equal(was[[0, 2, 3, 4, 5]])


def test_layers_of_two_groups_share_a_states_pages(layers, pages):
    first, second = mover(layers[:1], pages), mover(layers[1:], pages, start=SIZES[0])
    where = rows(3, 11, 7, 2, 19, 5)
    first.store(where, slots(2)), second.store(where, slots(5))
    held = torch.cat([pages[page, :PAGE] for page in (3, 11, 7)])[: sum(SIZES)]
    assert held.equal(torch.cat([layers[0][2], layers[1][5]]))
    second.load(where, slots(1))
    assert layers[1][1].equal(layers[1][5])


@pytest.mark.parametrize(("block", "page"), [(0, 3), (BLOCKS, 3), (1, 20)])
def test_blocks_and_pages_that_do_not_exist_are_refused(layers, pages, block, page):
    copier = mover(layers, pages)
    for copy in (copier.load, copier.store):
        with pytest.raises(IndexError, match="there are no such"):
            copy(rows(page, 1, 2, 4, 5, 6), slots(block))
    with pytest.raises(FusionError):
        copier.load(rows(0, 1, 2, 4, 5, 6), slots(1), torch.zeros(6))


def test_a_store_waits_for_forwards_and_later_forwards_for_it(layers, pages):
    class Noted:
        def __init__(self, name, told):
            self.name, self.told = name, told

        def submit(self, work):
            self.told.append((self.name, "work"))
            work()

        def record(self):
            return (self.name, len(self.told))

        def wait(self, event):
            self.told.append((self.name, "waits for", event[0]))

        def synchronize(self):
            pass

    told = []
    copier = StateMover(
        layers,
        pages,
        PAGE,
        range(SPREAD),
        0,
        TOKENS,
        Streams(*(Noted(n, told) for n in ("compute", "load", "store"))),
    )
    copier.store(rows(3, 11, 7, 2, 19, 5), slots(4))
    copier.fence_stores()
    copier.load(rows(3, 11, 7, 2, 19, 5), slots(1))
    assert told == [
        ("store", "waits for", "compute"),
        ("store", "work"),
        ("compute", "waits for", "store"),
        ("load", "waits for", "compute"),
        ("load", "work"),
    ]


def mamba(**change):
    given = {"block_size": TOKENS, "shapes": ((3, 8), (2, 4, 4)), "dtypes": (torch.bfloat16, torch.float32)}
    return MambaSpec(**given | {"mamba_cache_mode": "align"} | change)


def test_what_a_state_is_tells_shapes_dtypes_and_the_order_of_convolutions(monkeypatch):
    named = {
        describe_state(each)
        for each in (mamba(), mamba(shapes=((3, 8), (4, 2, 4))), mamba(dtypes=(torch.float32,) * 2))
    }
    assert len(named) == 3
    monkeypatch.setenv("VLLM_SSM_CONV_STATE_LAYOUT", "DS")
    assert describe_state(mamba()) not in named
    for change, says in (
        ({"mamba_cache_mode": "none"}, "mode none"),
        ({"num_speculative_blocks": 1}, "beside states"),
    ):
        with pytest.raises(LayoutError, match=says):
            describe_state(mamba(**change))


def test_states_must_lie_as_vllm_says():
    given = caches(spec(), mamba(), layers=("layer.0",))
    given.num_blocks = BLOCKS
    size = mamba().state_content_size_bytes
    cache = torch.zeros(BLOCKS, 1, 1, size, dtype=torch.int8)
    found = state_caches({"layer.0": cache}, given)
    assert [tuple(each.shape) for each in found[1]] == [(BLOCKS, size)] and list(found) == [1]
    for wrong in (cache[1:], cache[..., 1:], cache.to(torch.int16)):
        with pytest.raises(LayoutError, match=r"layer layer\.0: states of"):
            state_caches({"layer.0": wrong}, given)
