"""Layouts are proven by writing through the backend: found, read and written bit for bit, or refused."""

from types import SimpleNamespace

import pytest
import torch

from ragkv.connectors.vllm.layers import Layers, Slots
from ragkv.connectors.vllm.layout import Geometry, probe
from ragkv.connectors.vllm.tiles import RAW
from ragkv.errors import LayoutError

HEADS, DIM, LAYERS, BLOCKS = 3, 6, 3, 5
KINDS = {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32}  # of the cache, by bytes an element


def encode(values, cache):
    """As a backend casts: uint8 is fp8."""
    return values.to(torch.float8_e4m3fn).view(torch.uint8) if cache.dtype is torch.uint8 else values


class Backend:
    """A layout: the shape of a block, and how K and V go into it. `kernel`: tokens a block of the tensor."""

    def shape(self, tokens):
        raise NotImplementedError

    def put(self, cache, key, value, blocks, offsets):
        raise NotImplementedError

    def do_kv_cache_update(self, layer, key, value, cache, slots):
        tokens = self.tokens(cache)
        self.put(cache, encode(key, cache), encode(value, cache), slots // tokens, slots % tokens)

    def tokens(self, cache):
        return cache.shape[2]


class CpuVec(Backend):
    """CPU, ISA `vec`: [B, H, N, 2D], K transposed inside a head, V row-major."""

    def shape(self, tokens):
        return HEADS, tokens, 2 * DIM

    def put(self, cache, key, value, blocks, offsets):
        flat = cache.view(len(cache), HEADS, -1)
        half = flat.shape[2] // 2
        flat[..., :half].view(len(cache), HEADS, DIM, -1)[blocks, :, :, offsets] = key
        flat[..., half:].view(len(cache), HEADS, -1, DIM)[blocks, :, offsets] = value


class CpuTiles(CpuVec):
    """AMX-like: K in pairs of elements, V in pairs of tokens; no strides tell it."""

    def put(self, cache, key, value, blocks, offsets):
        flat = cache.view(len(cache), HEADS, -1)
        half = flat.shape[2] // 2
        pairs = key.unflatten(-1, (-1, 2))
        flat[..., :half].view(len(cache), HEADS, DIM // 2, -1, 2)[blocks, :, :, offsets] = pairs
        tiles = flat[..., half:].view(len(cache), HEADS, -1, DIM, 2)
        tiles[blocks, :, offsets // 2, :, offsets % 2] = value


class Flash32(Backend):
    """CUDA FlashAttention in 0.32: [B, H, N, 2D]."""

    def shape(self, tokens):
        return HEADS, tokens, 2 * DIM

    def put(self, cache, key, value, blocks, offsets):
        cache[blocks, :, offsets, :DIM] = key
        cache[blocks, :, offsets, DIM:] = value


class Flash25(Backend):
    """FlashAttention in 0.25: [B, 2, N, H, D]."""

    def shape(self, tokens):
        return 2, tokens, HEADS, DIM

    def put(self, cache, key, value, blocks, offsets):
        cache[blocks, 0, offsets] = key
        cache[blocks, 1, offsets] = value


LAYOUTS = {"vec": CpuVec, "tiles": CpuTiles, "0.32": Flash32, "0.25": Flash25}


def apart(blocks, inner, dtype):
    """Each layer a tensor of its own."""
    return [torch.empty(blocks, *inner, dtype=dtype) for _ in range(LAYERS)]


def interleaved(blocks, inner, dtype):
    """Block-major: every block holds all layers, behind something that is not ours."""
    size = torch.Size(inner).numel()
    big = torch.empty(11 + blocks * LAYERS * size, dtype=dtype)[11:].view(blocks, LAYERS, *inner)
    return [big[:, layer] for layer in range(LAYERS)]


def crossed(blocks, inner, dtype):
    """Heads and tokens change places in memory (NHD under an HND view, or the other way round)."""
    swapped = (inner[1], inner[0], *inner[2:]) if len(inner) == 3 else (inner[0], inner[2], inner[1], *inner[3:])
    at = 1 if len(inner) == 3 else 2
    return [each.transpose(at, at + 1) for each in interleaved(blocks, swapped, dtype)]


def world(backend, itemsize=2, place=apart, split=1, tokens=4):
    """(layers, caches full of noise, geometry, vLLM's blocks, dtype of K and V)."""
    geometry = Geometry(LAYERS, HEADS, DIM, itemsize, tokens * split)
    caches = place(BLOCKS * split, backend.shape(tokens), KINDS[itemsize])
    noise = torch.Generator().manual_seed(1)
    for cache in caches:
        raw = RAW[itemsize]
        low, high = (0, 256) if itemsize == 1 else (torch.iinfo(raw).min, torch.iinfo(raw).max)
        cache.view(raw).copy_(torch.randint(low, high, cache.shape, generator=noise))
    layers = {f"layer.{n}": SimpleNamespace(impl=backend) for n in range(LAYERS)}
    dtype = torch.bfloat16 if itemsize == 1 else KINDS[itemsize]
    return layers, dict(zip(layers, caches, strict=True)), geometry, BLOCKS, dtype


def bits(tensor):
    return tensor.contiguous().view(RAW[tensor.element_size()]).clone()


PLACES = [apart, interleaved, crossed]
CASES = [
    pytest.param(name, itemsize, place, split, id=f"{name}-{itemsize}-{place.__name__}-{split}")
    for name in LAYOUTS
    for itemsize in KINDS
    for place in PLACES
    for split in (1, 2)
    if not (place is crossed and name in ("vec", "tiles"))  # these need unbroken heads
]


@pytest.mark.parametrize(("name", "itemsize", "place", "split"), CASES)
def test_found_and_bit_exact(name, itemsize, place, split):
    backend = LAYOUTS[name]()
    layers, caches, geometry, blocks, dtype = world(backend, itemsize, place, split)
    before = {layer: bits(cache) for layer, cache in caches.items()}
    found = probe(layers, caches, geometry, blocks, dtype)
    assert all(torch.equal(bits(cache), before[layer]) for layer, cache in caches.items()), "not restored"
    assert (found[0].views is None) == (name == "tiles")
    assert found[0].kernel_tokens * split == geometry.block_tokens

    chance = torch.Generator().manual_seed(2)
    slots = torch.randperm(blocks * geometry.block_tokens, generator=chance)[:13]
    for layer, at in zip(layers, found, strict=True):
        cache = caches[layer]
        key, value = (torch.randn(len(slots), HEADS, DIM, generator=chance).to(dtype) for _ in range(2))
        backend.do_kv_cache_update(None, key, value, cache, slots)
        written, alone = bits(cache), Layers([at])
        there, only = alone.find(slots), range(1)
        for kind, values in enumerate((key, value)):
            assert torch.equal(alone.read(there, kind, only)[0], bits(encode(values, cache)))
        cache.view(RAW[itemsize]).copy_(before[layer])
        for kind, values in enumerate((key, value)):
            alone.write(there, kind, bits(encode(values, cache))[None], only)
        assert torch.equal(bits(cache), written), "unlike the backend's own write"
        cache.view(RAW[itemsize]).copy_(before[layer])
    assert all(torch.equal(bits(cache), before[layer]) for layer, cache in caches.items())


class DropsV(Flash32):
    def put(self, cache, key, value, blocks, offsets):
        cache[blocks, :, offsets, :DIM] = key


class DropsVIntoZeros(DropsV):
    def put(self, cache, key, value, blocks, offsets):
        super().put(cache, key, value, blocks, offsets)
        cache[blocks, :, offsets, DIM:] = 0


class KTwice(Flash32):
    def put(self, cache, key, value, blocks, offsets):
        super().put(cache, key, key, blocks, offsets)


class PairsInOneByte(Flash32):
    """Two elements share a byte; the other byte is padding."""

    def put(self, cache, key, value, blocks, offsets):
        for at, values in ((0, key), (DIM, value)):
            four = (values.view(RAW[values.element_size()]) != 0).to(torch.uint8)
            packed = four[..., ::2] | four[..., 1::2] << 4
            wide = torch.stack([packed, torch.ones_like(packed)], -1).flatten(-2)
            cache[blocks, :, offsets, at : at + DIM] = wide.to(cache.dtype)


class OtherLayer(Flash32):
    """The last layer has V before K."""

    def do_kv_cache_update(self, layer, key, value, cache, slots):
        if layer.last:
            key, value = value, key
        super().do_kv_cache_update(layer, key, value, cache, slots)


class OtherBlock(Flash32):
    """Block 1 has V before K."""

    def put(self, cache, key, value, blocks, offsets):
        odd = (blocks == 1)[:, None, None]
        super().put(cache, torch.where(odd, value, key), torch.where(odd, key, value), blocks, offsets)


class Rounds(Flash32):
    """Coarser than the dtype says."""

    def put(self, cache, key, value, blocks, offsets):
        super().put(cache, (key * 4).round() / 4, value, blocks, offsets)


class Raises(Flash32):
    def put(self, cache, key, value, blocks, offsets):
        super().put(cache, key, value, blocks, offsets)
        raise RuntimeError("no kernel image")


def assert_refused(backend, itemsize, error=LayoutError, **names):
    layers, caches, geometry, blocks, dtype = world(backend, itemsize, interleaved)
    for name, layer in layers.items():
        layer.last = name == f"layer.{LAYERS - 1}"
    before = {layer: bits(cache) for layer, cache in caches.items()}
    with pytest.raises(error) as caught:
        probe(layers, caches, geometry, blocks, dtype)
    assert all(torch.equal(bits(cache), before[layer]) for layer, cache in caches.items()), "not restored"
    return str(caught.value)


@pytest.mark.parametrize("itemsize", KINDS)
@pytest.mark.parametrize(
    "backend",
    [DropsV, DropsVIntoZeros, KTwice, PairsInOneByte, OtherLayer, OtherBlock],
    ids=lambda c: c.__name__,
)
def test_refused(backend, itemsize):
    said = assert_refused(backend(), itemsize)
    assert backend is not OtherLayer or "layer.2" in said, "the refusal names the layer"


@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_cache_that_rounds_is_refused(itemsize):
    assert "does not give back" in assert_refused(Rounds(), itemsize)


def test_what_a_backend_raises_comes_out_and_the_block_is_restored():
    assert assert_refused(Raises(), 2, RuntimeError) == "no kernel image"


@pytest.mark.parametrize(
    ("change", "blocks", "says"),
    [
        ({"itemsize": 4}, BLOCKS, "2 bytes an element, not 4"),
        ({"itemsize": 8}, BLOCKS, "bytes an element"),
        ({"heads": HEADS + 1}, BLOCKS, "elements, not"),
        ({"head_dim": DIM // 2}, BLOCKS, "elements, not"),
        ({"block_tokens": 8}, BLOCKS, "elements, not"),
        ({}, BLOCKS - 1, "first dimension is 5, with 4 blocks"),
        ({}, 1, "with 1 blocks"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, blocks, says):
    layers, caches, geometry, _, dtype = world(Flash32())
    fields = {name: getattr(geometry, name) for name in Geometry.__slots__} | change
    with pytest.raises(LayoutError, match=says):
        probe(layers, caches, Geometry(**fields), blocks, dtype)


def test_layers_of_unlike_shape_or_strides_are_refused():
    layers, caches, geometry, blocks, dtype = world(Flash32())
    caches["layer.1"] = crossed(BLOCKS, Flash32().shape(4), dtype)[0]
    with pytest.raises(LayoutError, match=r"layer layer\.1 is laid out unlike layer layer.0"):
        probe(layers, caches, geometry, blocks, dtype)


def test_two_blocks_are_enough():
    layers, caches, geometry, _, dtype = world(Flash32())
    caches = {name: cache[:2] for name, cache in caches.items()}
    assert len(probe(layers, caches, geometry, 2, dtype)) == LAYERS


def one_by_one(caches, slots, kind):
    alone = [Layers([each]) for each in caches]
    return torch.cat([each.read(each.find(slots), kind, range(1)) for each in alone])


@pytest.mark.parametrize(("name", "itemsize", "place", "split"), CASES)
def test_all_layers_together_are_the_layers_one_by_one(name, itemsize, place, split):
    layers, caches, geometry, blocks, dtype = world(LAYOUTS[name](), itemsize, place, split)
    found = probe(layers, caches, geometry, blocks, dtype)
    together = Layers(found)
    assert (together.views is not None) == (place is not apart and name != "tiles"), "one storage, one kernel"
    assert together.slots == blocks * geometry.block_tokens
    slots = torch.randperm(together.slots, generator=torch.Generator().manual_seed(4))[:11]
    there, raw, every = together.find(slots), RAW[itemsize], range(LAYERS)
    for kind in (0, 1):
        read = together.read(there, kind, every)
        assert torch.equal(read[1:], together.read(there, kind, every[1:]))
        assert torch.equal(read, one_by_one(found, slots, kind))
        assert read.dtype == raw
    written = torch.randint(100, (2, LAYERS, 11, HEADS, DIM), generator=torch.Generator().manual_seed(5)).to(raw)
    for kind in (0, 1):
        together.write(there, kind, written[kind], every)
    for kind in (0, 1):
        assert torch.equal(one_by_one(found, slots, kind), written[kind])


def test_elements_that_stay_together_are_moved_together():
    """In tiles K lies in pairs, so half as many elements are to be moved; V does not."""
    layers, caches, geometry, blocks, dtype = world(CpuTiles(), 2, apart, tokens=4)
    for cache in probe(layers, caches, geometry, blocks, dtype):
        moved = Slots(cache, torch.arange(3)).addresses
        assert [len(each) for each in moved] == [3 * HEADS * DIM // 2, 3 * HEADS * DIM]


def test_layers_in_another_order_than_in_storage_are_served_one_by_one():
    layers, caches, geometry, blocks, dtype = world(Flash32(), place=interleaved)
    for order in ([0, 2, 1], [2, 1, 0], [0, 2]):
        found = probe(layers, caches, geometry, blocks, dtype)
        some = Layers([found[number] for number in order])
        assert (some.views is not None) == (order == [0, 2])
        slots = torch.tensor([1, 7])
        read = some.read(some.find(slots), 1, range(len(order)))
        assert torch.equal(read, one_by_one([found[number] for number in order], slots, 1))
