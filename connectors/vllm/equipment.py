"""What a worker works with: the proven layout of the engine's caches, the memory tier, movers between them, and
what looks at the model's weights and computes by them."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ragkv.config import Settings
from ragkv.connectors.vllm.copying import Copier
from ragkv.connectors.vllm.error_boundary import Faults, logger
from ragkv.connectors.vllm.fusion_worker import Fuser, make_fuser, make_turn
from ragkv.connectors.vllm.identity import Shape, examine
from ragkv.connectors.vllm.layers import LayerCache
from ragkv.connectors.vllm.layout import probe
from ragkv.connectors.vllm.messages import DEVICE_MOVER
from ragkv.connectors.vllm.model import find_drafter, find_model
from ragkv.connectors.vllm.pinning import pin
from ragkv.connectors.vllm.sampling import WeightsObserver
from ragkv.connectors.vllm.sizes import device_pages, memory_pages, page_shapes, step_bytes
from ragkv.connectors.vllm.speculation import drafts
from ragkv.connectors.vllm.states import StateMover, state_caches
from ragkv.connectors.vllm.streams import compute_stream, make_streams
from ragkv.connectors.vllm.tiles import RAW
from ragkv.connectors.vllm.transfer import DirectMover, Mover, PagePart, PrepareRotation, Tier, make_mover
from ragkv.errors import FusionError
from ragkv.kvstore.pages import frame_bytes
from ragkv.kvstore.segment import Segment

WHOLE = 1 << 62  # rows that are copied at once


class Equipment:
    """One worker's. `shape`: of the engine's KV; `caches`: in the order of the layers; `rank`: among the workers,
    stage by stage of the pipeline; `device`: of the caches; `segment`: the memory tier's; `compute`: where the
    engine's forwards run; `stages`: how many there are, which run one after the other."""

    def __init__(
        self, vllm_config: Any, kv_cache_config: Any, settings: Settings, caches: dict[str, torch.Tensor]
    ) -> None:
        """Prove the layout of the engine's caches and open the memory tier. LayoutError: ragkv cannot serve it."""
        self._vllm_config, self._kv_cache_config, self._settings = vllm_config, kv_cache_config, settings
        self.shape = examine(vllm_config, kv_cache_config)
        self._raw = RAW[self.shape.geometry.itemsize]
        layers = vllm_config.compilation_config.static_forward_context
        self._found = [
            probe(
                layers,
                {name: caches[name] for name in plane.names},
                plane.geometry,
                kv_cache_config.num_blocks,
                vllm_config.model_config.dtype,
            )
            if plane.names and not plane.state
            else []
            for plane in self.shape.planes
        ]
        with_states = any(plane.state for plane in self.shape.planes)
        self._states = state_caches(caches, kv_cache_config) if with_states else {}
        self.caches, self.by_request = self._found[0], self.shape.has_windows
        self._pages = page_shapes(settings, self.shape)
        self.shares = {  # of a token's bytes, that each row of a job has, by group
            number: count * plane.geometry.token_bytes / len(plane.names) / self.shape.token_bytes / page.pages(1)
            for plane, page in zip(self.shape.planes, self._pages, strict=True)
            for number, count in zip(plane.groups, plane.sizes, strict=True)
        }
        frame = frame_bytes(self._pages)
        size = memory_pages(settings, self._pages) * frame
        self.rank, self.device = _rank(self.shape), next(iter(caches.values())).device
        self.stages = len(self.shape.stages) or 1
        self._part = self.rank * self.shape.ranks // self.shape.workers  # of each page
        self.compute, self._model = compute_stream(self.device), find_model(vllm_config)
        self.segment = Segment(vllm_config.kv_transfer_config.engine_id, size, populate=True)
        self._elements = torch.frombuffer(self.segment.buffer, dtype=self._raw)
        self._pinning = pin(self._elements, frame) if self.device.type == "cuda" else None

    def make_copier(self, faults: Faults) -> Copier:
        """What carries out orders, without movers."""
        tokens = {
            group.number: WHOLE if self._pages[group.plane].spread else self._pages[group.plane].page_tokens
            for group in self.shape.groups
        }
        return Copier({}, tokens, self.shape.token_bytes, step_bytes(self._settings, self.device), faults)

    def make_observer(self, faults: Faults) -> WeightsObserver:
        """What looks at the model's weights, and at those of a drafter that keeps KV."""
        weights = self._model
        if weights is not None and drafts(self._vllm_config):
            drafter = find_drafter(self._vllm_config)
            weights = None if drafter is None else torch.nn.ModuleList([weights, drafter])
        return WeightsObserver(weights, self.device, self.compute, self.rank, faults)

    def make_fusion(self) -> tuple[PrepareRotation, Fuser]:
        """The rotation of moved keys, and the fuser. FusionError, or whatever an unknown model or backend raises:
        this engine cannot fuse."""
        if self._model is None:
            raise FusionError("the engine's model is not known")
        fuser = make_fuser(self._vllm_config, self._kv_cache_config, self.shape, self._model, self.caches)
        return make_turn(self._vllm_config, self.shape, self._model), fuser

    def make_movers(self, prepare: PrepareRotation | None, fusion_bytes: int) -> dict[int, Mover]:
        """Movers of the memory tier, by group, and of a new and empty device tier, if there is to be one.
        `prepare`: what rotates keys that move, if anything can; `fusion_bytes`: that this takes of the device."""
        staging, page = self._settings.transfer.staging, self._pages[0]
        movers: dict[int, Mover] = {
            number: make_mover(caches, tier, staging // len(self.shape.groups), self.device, prepare)
            for number, caches, tier in self._tiers()
        }
        movers |= self._state_movers()
        pages = 0 if self.by_request else device_pages(self._settings, page)
        if pages:
            pool = torch.empty(
                pages * page.page_bytes // page.ranks // page.itemsize, dtype=self._raw, device=self.device
            )
            geometry = replace(self.shape.geometry, layers=len(self.caches))
            tier = Tier(pool, geometry, page.page_tokens, 1, 0)
            movers[DEVICE_MOVER] = DirectMover(self.caches, tier, prepare)
        if self.device.type != "cpu":
            self._say_memory(movers, pages * page.page_bytes // page.ranks, fusion_bytes)
        return movers

    def _tiers(self) -> Iterator[tuple[int, list[LayerCache], Tier]]:
        """Each group's number, the caches of its layers, and its part of the memory tier."""
        frame, ranks, rank = frame_bytes(self._pages), self.shape.ranks, self._part
        for plane, page, found in zip(self.shape.planes, self._pages, self._found, strict=True):
            if plane.state:
                continue
            row_bytes, start = page.row_elements * page.itemsize, 0
            for number, count in zip(plane.groups, plane.sizes, strict=True):
                rows = page.kinds * page.page_tokens  # of a layer
                part = PagePart(frame // row_bytes, page.layers * rows, start * rows)
                geometry = replace(plane.geometry, layers=count)
                tier = Tier(self._elements, geometry, page.page_tokens, ranks, rank, part)
                yield number, found[start : start + count], tier
                start += count

    def _state_movers(self) -> Iterator[tuple[int, StateMover]]:
        """Each group's number, and what copies its states."""
        pages = self._elements.view(torch.uint8).view(-1, frame_bytes(self._pages))
        streams, rank = make_streams(self.device), self._part
        for plane, page in zip(self.shape.planes, self._pages, strict=True):
            places, start = range(rank * page.spread, (rank + 1) * page.spread), 0
            for number in plane.groups if plane.state else ():
                layers, tokens = self._states[number], plane.geometry.block_tokens
                yield number, StateMover(layers, pages, page.page_bytes, places, start, tokens, streams)
                start += plane.geometry.head_dim * len(layers)

    def close(self) -> None:
        """Let the memory tier go; nothing may be copied any more."""
        if self._pinning is not None:
            self._pinning.release()
        self.segment.close()

    @staticmethod
    def _say_memory(movers: dict[int, Mover], pool: int, fusion: int) -> None:
        """One line: all accelerator memory that this worker takes beside vLLM's."""
        each = {"copies": sum(m.device_bytes for m in movers.values()), "device tier": pool, "fusion": fusion}
        parts = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in each.items() if size)
        note = "; a fused forward needs what a step of its size needs" if fusion else ""
        total = sum(each.values()) / 2**20
        logger.info("ragkv: %.0f MiB of accelerator memory: %s%s", total, parts, note)


def _rank(shape: Shape) -> int:
    """Of this process, among the workers of an engine."""
    from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank

    rank = int(get_tensor_model_parallel_rank())
    if shape.stages:
        rank += int(get_pp_group().rank_in_group) * (shape.workers // len(shape.stages))
    return rank
