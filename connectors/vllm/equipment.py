"""What a worker works with: the proven layout of the engine's caches, the memory tier, movers between them, and
what looks at the model's weights and computes by them."""

from typing import Any

import torch

from ragkv.config import Settings
from ragkv.connectors.vllm.copying import Copier
from ragkv.connectors.vllm.error_boundary import Faults, logger
from ragkv.connectors.vllm.fusion_worker import Fuser, make_fuser, make_turn
from ragkv.connectors.vllm.identity import examine
from ragkv.connectors.vllm.layout import probe
from ragkv.connectors.vllm.model import find_model
from ragkv.connectors.vllm.pinning import pin
from ragkv.connectors.vllm.sampling import WeightsObserver
from ragkv.connectors.vllm.sizes import device_pages, memory_pages, page_shape, step_bytes
from ragkv.connectors.vllm.streams import compute_stream
from ragkv.connectors.vllm.tiles import RAW
from ragkv.connectors.vllm.transfer import DirectMover, Mover, PrepareRotation, Tier, make_mover
from ragkv.errors import FusionError
from ragkv.kvstore.segment import Segment


class Equipment:
    """One worker's. `shape`: of the engine's KV; `caches`: in the order of the layers; `rank`: among
    tensor-parallel workers; `device`: of the caches; `segment`: the memory tier's; `compute`: where the engine's
    forwards run."""

    def __init__(
        self, vllm_config: Any, kv_cache_config: Any, settings: Settings, caches: dict[str, torch.Tensor]
    ) -> None:
        """Prove the layout of the engine's caches and open the memory tier. LayoutError: ragkv cannot serve it."""
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

        self._vllm_config, self._kv_cache_config, self._settings = vllm_config, kv_cache_config, settings
        self.shape = examine(vllm_config, kv_cache_config)
        geometry, self._raw = self.shape.geometry, RAW[self.shape.geometry.itemsize]
        ours = {name: caches[name] for name in self.shape.layers}
        layers = vllm_config.compilation_config.static_forward_context
        self.caches = probe(layers, ours, geometry, kv_cache_config.num_blocks, vllm_config.model_config.dtype)
        self._page = page = page_shape(settings, self.shape)
        size = memory_pages(settings, page) * page.page_bytes
        self.rank, self.device = get_tensor_model_parallel_rank(), next(iter(ours.values())).device
        self.compute, self._model = compute_stream(self.device), find_model(vllm_config)
        self.segment = Segment(vllm_config.kv_transfer_config.engine_id, size, populate=True)
        elements = torch.frombuffer(self.segment.buffer, dtype=self._raw)
        self._pinning = pin(elements, page.page_bytes) if self.device.type == "cuda" else None
        self._tier = Tier(
            elements, geometry, page.page_tokens, self.shape.ranks, min(self.rank, self.shape.ranks - 1)
        )

    def make_copier(self, faults: Faults) -> Copier:
        """What carries out orders, without movers."""
        settings, token_bytes = self._settings, self.shape.geometry.token_bytes
        return Copier({}, settings.memory.page_tokens, token_bytes, step_bytes(settings, self.device), faults)

    def make_observer(self, faults: Faults) -> WeightsObserver:
        """What looks at the model's weights."""
        return WeightsObserver(self._model, self.device, self.compute, self.rank, faults)

    def make_fusion(self) -> tuple[PrepareRotation, Fuser]:
        """The rotation of moved keys, and the fuser. FusionError, or whatever an unknown model or backend raises:
        this engine cannot fuse."""
        if self._model is None:
            raise FusionError("the engine's model is not known")
        turn = make_turn(self._vllm_config, self.shape, self._model)
        return turn, make_fuser(self._vllm_config, self._kv_cache_config, self.shape, self._model, self.caches)

    def make_movers(self, prepare: PrepareRotation | None, fusion_bytes: int) -> dict[bool, Mover]:
        """Movers of the memory tier (False), and of a new and empty device tier (True), if there is to be one.
        `prepare`: what rotates keys that move, if anything can; `fusion_bytes`: that this takes of the device."""
        staging, page = self._settings.transfer.staging, self._page
        movers = {False: make_mover(self.caches, self._tier, staging, self.device, prepare)}
        if pages := device_pages(self._settings, page):
            pool = torch.empty(
                pages * page.page_bytes // page.ranks // page.itemsize, dtype=self._raw, device=self.device
            )
            tier = Tier(pool, self.shape.geometry, page.page_tokens, 1, 0)
            movers[True] = DirectMover(self.caches, tier, prepare)
        if self.device.type != "cpu":
            self._say_memory(movers, pages * page.page_bytes // page.ranks, fusion_bytes)
        return movers

    def close(self) -> None:
        """Let the memory tier go; nothing may be copied any more."""
        if self._pinning is not None:
            self._pinning.release()
        self.segment.close()

    @staticmethod
    def _say_memory(movers: dict[bool, Mover], pool: int, fusion: int) -> None:
        """One line: all accelerator memory that this worker takes beside vLLM's."""
        each = {"copies": sum(m.device_bytes for m in movers.values()), "device tier": pool, "fusion": fusion}
        parts = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in each.items() if size)
        note = "; a fused forward needs what a step of its size needs" if fusion else ""
        total = sum(each.values()) / 2**20
        logger.info("ragkv: %.0f MiB of accelerator memory: %s%s", total, parts, note)
