"""Tiles of tokens are read and written as their elements one by one would be, whatever order these lie in."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ragkv.connectors.vllm.layers import LayerCache, Layers
from ragkv.connectors.vllm.layout import Geometry, probe
from ragkv.connectors.vllm.tiles import RAW, Scratch, Tiles, find_tiles
from ragkv.connectors.vllm.transfer import DirectMover, Tier
from ragkv.errors import LayoutError

BLOCKS, TOKENS, LAYERS, PAGE = 4, 64, 2, 8


def amx(heads, dim, itemsize=2, tile=16, tokens=TOKENS):
    """Intel's: K's dimensions in groups that fill four bytes, for a tile of tokens; V's tokens in such groups, for
    16 dimensions."""
    group = 4 // itemsize
    t, h, d = torch.arange(tokens)[:, None, None], torch.arange(heads)[:, None], torch.arange(dim)
    head = h * 2 * tokens * dim
    keys = head + t // tile * tile * dim + d // group * tile * group + t % tile * group + d % group
    values = tokens * dim + head + d // 16 * tokens * 16 + t // group * 16 * group + d % 16 * group + t % group
    return torch.stack([keys.expand(tokens, heads, dim), values.expand(tokens, heads, dim)], 1)


def by_dimension(heads, dim, tile=16, tokens=TOKENS):
    """Of each tile, one dimension of all tokens after the other: nothing to be put together."""
    t, k = torch.arange(tokens)[:, None, None, None], torch.arange(2)[:, None, None]
    h, d = torch.arange(heads)[:, None], torch.arange(dim)
    return ((k * heads + h) * (tokens // tile) + t // tile) * tile * dim + d * tile + t % tile


LAYOUTS = {
    "amx, as SmolLM2": (amx(3, 64), 2),
    "amx, one head": (amx(1, 128), 2),
    "amx, tiles of 32": (amx(2, 32, tile=32), 2),
    "amx, bytes": (amx(2, 64, itemsize=1), 1),
    "by dimension": (by_dimension(2, 16), 2),
    "by dimension, words": (by_dimension(1, 32), 4),
}


def noise(count, itemsize, seed=0):
    raw, chance = RAW[itemsize], torch.Generator().manual_seed(seed)
    low, high = (0, 256) if itemsize == 1 else (torch.iinfo(raw).min, torch.iinfo(raw).max)
    return torch.randint(low, high, (count,), generator=chance, dtype=torch.int64).to(raw)


def one_by_one(places, kind, slots):
    """Where the elements of some slots lie, [tokens, heads, dim]."""
    return places[slots % TOKENS, kind] + (slots // TOKENS * places.numel())[:, None, None]


@pytest.mark.parametrize("name", LAYOUTS)
def test_whole_tiles(name):
    places, itemsize = LAYOUTS[name]
    storage = noise(BLOCKS * places.numel(), itemsize)
    tiles = find_tiles(storage, places, places.numel())
    assert tiles is not None and tiles[0].tokens == tiles[1].tokens <= 32
    scratch, size = Scratch(), tiles[0].tokens
    blocks, offsets = torch.tensor([2, 0, 3, 2]), torch.tensor([1, 0, TOKENS // size - 1, 0]) * size
    slots = (blocks * TOKENS + offsets)[:, None] + torch.arange(size)
    for kind, each in enumerate(tiles):
        there, rows = one_by_one(places, kind, slots.flatten()), each.rows(blocks, offsets)
        assert torch.equal(each.read(rows, scratch), storage[there])
        new, expected = noise(there.numel(), itemsize, 1).view(there.shape), storage.clone()
        expected[there] = new
        each.write(rows, new, scratch)
        assert torch.equal(storage, expected)


def test_tiles_are_as_small_as_will_do():
    found = {
        name: find_tiles(noise(BLOCKS * p.numel(), i), p, p.numel())[0].tokens for name, (p, i) in LAYOUTS.items()
    }
    assert found == {
        "amx, as SmolLM2": 16,
        "amx, one head": 16,
        "amx, tiles of 32": 32,
        "amx, bytes": 16,
        "by dimension": 16,
        "by dimension, words": 16,
    }


def changed(at, by):
    places = amx(2, 64)
    flat = places.view(-1)
    flat[at], flat[by] = flat[by].clone(), flat[at].clone()
    return places


@pytest.mark.parametrize(
    ("places", "stride"),
    [
        pytest.param(changed(0, 1), None, id="two elements of one token have changed places"),
        pytest.param(changed(-1, 77), None, id="two elements of two tokens have"),
        pytest.param(amx(2, 64).flip(0), None, id="tokens lie backwards"),
        pytest.param(torch.randperm(TOKENS * 2 * 128).view(TOKENS, 2, 2, 64), None, id="no order"),
        pytest.param(amx(2, 64) + 1, None, id="runs that begin where no word does"),
        pytest.param(amx(2, 64), 2 * TOKENS * 128 + 8, id="blocks that are no whole number of runs apart"),
        pytest.param(amx(1, 16, tokens=15, tile=15), None, id="an odd number of tokens"),
    ],
)
def test_other_layouts_have_none(places, stride):
    size = stride or places.numel()
    assert find_tiles(noise(BLOCKS * size + 8, 2), places, size) is None


def test_an_accelerators_have_none():
    places = amx(2, 64)
    assert (
        find_tiles(torch.empty(places.numel(), dtype=torch.int16, device="meta"), places, places.numel()) is None
    )


def world(places, itemsize):
    storages = [noise(BLOCKS * places.numel(), itemsize, seed) for seed in range(LAYERS)]
    caches = [LayerCache(each.view(BLOCKS, -1), TOKENS, places) for each in storages]
    return storages, caches


RUNS = st.lists(st.tuples(st.integers(0, BLOCKS * TOKENS - 1), st.integers(1, 80)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(
    runs=RUNS, name=st.sampled_from(list(LAYOUTS)), order=st.sampled_from(["ascending", "descending", "as given"])
)
def test_any_slots(runs, name, order):
    """Whole tiles and the rest, through all layers, both ways."""
    places, itemsize = LAYOUTS[name]
    storages, caches = world(places, itemsize)
    layers = Layers(caches)
    slots = list(
        dict.fromkeys(slot for start, n in runs for slot in range(start, min(start + n, BLOCKS * TOKENS)))
    )
    slots = torch.tensor(slots if order == "as given" else sorted(slots, reverse=order == "descending"))
    found = layers.find(slots)
    assert len(layers.groups) == LAYERS and found.in_tiles % 16 == 0
    for kind in (0, 1):
        there = one_by_one(places, kind, slots)
        for number, storage in enumerate(storages):
            group = layers.groups[number]
            assert torch.equal(layers.read(found, kind, group)[0], storage[there])
            new, expected = noise(there.numel(), itemsize, 9).view(there.shape), storage.clone()
            expected[there] = new
            layers.write(found, kind, new[None], group)
            assert torch.equal(storage, expected)


def test_whole_tiles_are_found():
    _, caches = world(*LAYOUTS["amx, as SmolLM2"])
    layers = Layers(caches)

    def in_tiles(*slots):
        return layers.find(torch.tensor(slots)).in_tiles

    assert in_tiles(*range(64)) == 64
    assert in_tiles(*range(1, 64)) == 48
    assert in_tiles(*range(15)) == in_tiles(0) == 0
    assert in_tiles(*range(48, 80)) == 32, "the last of one block and the first of the next"
    assert in_tiles(*range(8), *range(9, 17)) == 0, "one is missing"
    assert in_tiles(*range(15, -1, -1)) == 0
    assert in_tiles(5, *range(16, 32), 7) == 16


@pytest.mark.parametrize("tokens", [1, 15, 16, 100, 256])
def test_copies_are_those_of_a_layout_without_tiles(tokens):
    """In a tier whose pages are smaller than a tile."""
    places, itemsize = LAYOUTS["amx, as SmolLM2"]
    geometry = Geometry(LAYERS, 3, 64, itemsize, TOKENS)
    chance = torch.Generator().manual_seed(tokens)
    pages = torch.randperm(2 * BLOCKS * TOKENS // PAGE, generator=chance)
    rows = (pages[:, None] * PAGE + torch.arange(PAGE)).flatten()[:tokens]
    start = int(torch.randint(BLOCKS * TOKENS - tokens + 1, (1,), generator=chance))
    slots = torch.arange(start, start + tokens)
    seen = []
    for tiled in (True, False):
        storages, caches = world(places, itemsize)
        if not tiled:
            for cache in caches:
                cache.tiles = None
        segment = noise(2 * BLOCKS * TOKENS * geometry.token_bytes // itemsize, itemsize, 5)
        mover = DirectMover(caches, Tier(segment, geometry, PAGE, 1, 0))
        mover.store(rows, slots)
        stored = segment.clone()
        mover.load(rows.flip(0), slots)
        seen.append((stored, segment, *storages))
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))


class Backend:
    """Writes as `places` say."""

    def __init__(self, places):
        self._places = places

    def do_kv_cache_update(self, layer, key, value, cache, slots):
        flat = cache.view(-1)
        for kind, values in enumerate((key, value)):
            flat[one_by_one(self._places, kind, slots)] = values


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (None, None),
        ("read", "does not give back what was written"),
        ("write", "cannot be written back"),
    ],
)
def test_tiles_are_proven_like_all_else(harm, message, monkeypatch):
    places, _ = LAYOUTS["amx, as SmolLM2"]
    caches = {f"layer.{n}": torch.randn(BLOCKS, 3, TOKENS, 128).bfloat16() for n in range(LAYERS)}
    layers = {name: SimpleNamespace(impl=Backend(places)) for name in caches}
    read, write = Tiles.read, Tiles.write
    if harm == "read":
        monkeypatch.setattr(Tiles, "read", lambda self, rows, scratch: read(self, rows, scratch).roll(1, 0))
    if harm == "write":
        monkeypatch.setattr(
            Tiles, "write", lambda self, rows, raw, scratch: write(self, rows, raw.roll(1, 0), scratch)
        )
    geometry = Geometry(LAYERS, 3, 64, 2, TOKENS)
    if message is None:
        before = [cache.clone() for cache in caches.values()]
        assert all(each.tiles for each in probe(layers, caches, geometry, BLOCKS, torch.bfloat16))
        assert all(torch.equal(one, other) for one, other in zip(before, caches.values(), strict=True))
    else:
        with pytest.raises(LayoutError, match=message):
            probe(layers, caches, geometry, BLOCKS, torch.bfloat16)
