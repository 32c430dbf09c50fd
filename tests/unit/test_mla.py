"""MLA's one vector a token: proven through vLLM's own CPU backend, and copied bit for bit."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl

from ragkv.connectors.vllm.layout import Geometry, probe
from ragkv.connectors.vllm.streams import make_streams
from ragkv.connectors.vllm.transfer import DirectMover, StagedMover, Tier
from ragkv.errors import LayoutError

LAYERS, LATENT, ROPE, BLOCK, BLOCKS, PAGE, PAGES = 3, 24, 8, 16, 6, 8, 9
GEOMETRY = Geometry(LAYERS, 1, LATENT + ROPE, 2, BLOCK, kinds=1)
CPU = torch.device("cpu")


def world(impl=CPUMLAImpl):
    """Layers, and their caches full of noise."""
    backend = object.__new__(impl)
    backend.qk_rope_head_dim = ROPE
    chance = torch.Generator().manual_seed(3)
    noise = torch.randn(LAYERS, BLOCKS, 1, BLOCK, LATENT + ROPE, generator=chance).bfloat16()
    names = [f"layer.{number}" for number in range(LAYERS)]
    layers = {name: SimpleNamespace(impl=backend) for name in names}
    return layers, dict(zip(names, noise.unbind(), strict=True))


def movers(found):
    tiers = [Tier(torch.zeros(PAGES * PAGE * LAYERS * 32, dtype=torch.int16), GEOMETRY, PAGE, 1, 0) for _ in "ab"]
    yield DirectMover(found, tiers[0])
    yield StagedMover(found, tiers[1], 4 * PAGE * GEOMETRY.token_bytes, CPU, make_streams(CPU))


def test_what_is_stored_is_loaded_elsewhere_bit_for_bit():
    layers, caches = world()
    before = {name: cache.clone() for name, cache in caches.items()}
    found = probe(layers, caches, GEOMETRY, BLOCKS, torch.bfloat16)
    assert all(torch.equal(caches[name], before[name]) for name in caches), "not restored"
    rows, slots = torch.arange(5, 45), torch.arange(40, 80)
    for mover in movers(found):
        mover.store(rows, slots)
        mover.load(rows, slots - 40)
        mover.close()
        for name, cache in caches.items():
            flat = cache.view(-1, LATENT + ROPE)
            assert torch.equal(flat[:40], before[name].view(-1, LATENT + ROPE)[40:80])
            cache.copy_(before[name])


def test_a_token_is_the_latent_and_the_rotary_part_of_the_key():
    layers, caches = world()
    (first, *_) = probe(layers, caches, GEOMETRY, BLOCKS, torch.bfloat16)
    assert first.places.shape == (BLOCK, 1, 1, LATENT + ROPE)
    assert torch.equal(first.places[1, 0, 0], torch.arange(LATENT + ROPE) + LATENT + ROPE)


class DropsRope(CPUMLAImpl):
    def do_kv_cache_update(self, kv_c_normed, k_pe, kv_cache, *rest):
        super().do_kv_cache_update(kv_c_normed, torch.zeros_like(k_pe), kv_cache, *rest)


def test_a_backend_that_does_not_keep_all_is_refused():
    layers, caches = world(DropsRope)
    with pytest.raises(LayoutError, match="does not reach every element"):
        probe(layers, caches, GEOMETRY, BLOCKS, torch.bfloat16)
