"""What a worker needs to copy: the proven layout of the engine's caches, the memory tier, movers between them."""

from dataclasses import dataclass
from typing import Any

import torch

from ragkv.config import Settings
from ragkv.connectors.vllm.faults import logger
from ragkv.connectors.vllm.identity import Shape, examine
from ragkv.connectors.vllm.layout import RAW, LayerCache, probe
from ragkv.connectors.vllm.pinning import Pinning, pin
from ragkv.connectors.vllm.sizes import device_pages, memory_pages, page_shape, step_bytes
from ragkv.connectors.vllm.transfer import DirectMover, Mover, Tier, make_mover
from ragkv.kvstore.pages import PageShape
from ragkv.kvstore.segment import Segment


@dataclass
class Equipment:
    """One worker's. `rank`: among tensor-parallel workers; `caches`: in the order of the layers."""

    shape: Shape
    page: PageShape
    caches: list[LayerCache]
    device: torch.device
    segment: Segment
    tier: Tier
    rank: int
    pinning: Pinning | None
    pool_elements: int
    staging: int
    step_bytes: int

    def make_movers(self) -> dict[bool, Mover]:
        """Movers of the memory tier (False), and of a new and empty device tier (True), if there is to be one."""
        movers: dict[bool, Mover] = {False: make_mover(self.caches, self.tier, self.staging, self.device)}
        if self.pool_elements:
            geometry = self.shape.geometry
            pool = torch.empty(self.pool_elements, dtype=RAW[geometry.itemsize], device=self.device)
            movers[True] = DirectMover(self.caches, Tier(pool, geometry, self.page.page_tokens, 1, 0))
        return movers

    def say_memory(self, movers: dict[bool, Mover], fusion: int) -> None:
        """One line: all accelerator memory that this worker takes beside vLLM's. `fusion`: bytes."""
        if self.device.type == "cpu":
            return
        pool = self.pool_elements * self.shape.geometry.itemsize
        each = {"copies": sum(m.device_bytes for m in movers.values()), "device tier": pool, "fusion": fusion}
        parts = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in each.items() if size)
        total = sum(each.values()) / 2**20
        note = "; a fused forward needs what a step of its size needs" if fusion else ""
        logger.info("ragkv: %.0f MiB of accelerator memory: %s%s", total, parts, note)

    def close(self) -> None:
        """Let the memory tier go; nothing may be copied any more."""
        if self.pinning is not None:
            self.pinning.release()
        self.segment.close()


def equip(
    vllm_config: Any, kv_cache_config: Any, settings: Settings, caches: dict[str, torch.Tensor]
) -> Equipment:
    """Prove the layout of the engine's caches and open the memory tier. LayoutError: ragkv cannot serve it."""
    shape = examine(vllm_config, kv_cache_config)
    layers = vllm_config.compilation_config.static_forward_context
    ours = {name: caches[name] for name in shape.layers}
    blocks = kv_cache_config.num_blocks
    found = probe(layers, ours, shape.geometry, blocks, vllm_config.model_config.dtype)
    page = page_shape(settings, shape)
    size = memory_pages(settings, page) * page.page_bytes
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    rank = get_tensor_model_parallel_rank()
    device = next(iter(ours.values())).device
    segment = Segment(vllm_config.kv_transfer_config.engine_id, size, populate=True)
    elements = torch.frombuffer(segment.buffer, dtype=RAW[shape.geometry.itemsize])
    pinning = pin(elements, page.page_bytes) if device.type == "cuda" else None
    return Equipment(
        shape,
        page,
        found,
        device,
        segment,
        Tier(elements, shape.geometry, page.page_tokens, shape.ranks, rank),
        rank,
        pinning,
        device_pages(settings, page) * page.page_bytes // page.ranks // page.itemsize,
        settings.transfer.staging,
        step_bytes(settings, device),
    )
