"""The worker side: moves bytes between the engine's paged cache and the memory tier, as ordered.

Loads are for requests that wait for them: what fails is told before the request has run, and vLLM computes it.
Everything of a step is carried out once, behind its forward, by whichever of `wait_for_save` and `get_finished`
vLLM calls first: what it calls in a step without a forward, and in which order, differs between its versions.
"""

import time
from collections import Counter
from typing import Any, Literal

import torch

from ragkv.config import Settings
from ragkv.connectors.vllm.copying import Copier, Running
from ragkv.connectors.vllm.faults import Faults, logger
from ragkv.connectors.vllm.identity import Shape, examine
from ragkv.connectors.vllm.layout import RAW, LayerCache, probe
from ragkv.connectors.vllm.mending import TURN_DEVICE_BYTES, make_fuser, make_turn
from ragkv.connectors.vllm.model import find_model
from ragkv.connectors.vllm.pinning import Pinning, pin
from ragkv.connectors.vllm.protocol import Fusion, Handshake, StepOrders, StepReport
from ragkv.connectors.vllm.recompute import Fuser
from ragkv.connectors.vllm.sizes import device_pages, memory_pages, page_shape, step_bytes
from ragkv.connectors.vllm.timing import Stopwatch, Timing
from ragkv.connectors.vllm.transfer import DirectMover, Mover, Tier, make_mover
from ragkv.errors import FusionError, RagKVError
from ragkv.kvstore import metrics as m
from ragkv.kvstore.metrics import Metrics
from ragkv.kvstore.segment import Segment

LEAST_TOKENS = 32  # of a step whose time says something of prefill
SOME_STEPS = 64  # of the other steps one in so many is timed: they tell what a step costs by itself


class WorkerSide:
    """One worker's hands. Made before the caches exist; `register` proves their layout or gives up reuse."""

    def __init__(
        self, vllm_config: Any, kv_cache_config: Any, settings: Settings, metrics: Metrics, faults: Faults
    ) -> None:
        self._vllm_config, self._kv_cache_config = vllm_config, kv_cache_config
        self._settings, self._metrics, self._faults = settings, metrics, faults
        self._refusal: str | None = "the engine's caches were never registered"
        self._mover: Mover | None = None
        self._device_mover: Mover | None = None
        self._copier = Copier({}, 1, 1, 1, faults)
        self._stopwatch: Stopwatch | None = None
        self._forward: tuple[int, Any] | None = None  # tokens and beginning of the step under way
        self._timings: list[tuple[Literal["prefills", "fusions"], float, Timing]] = []
        self._mended: list[tuple[Fusion, int, Timing]] = []  # fusions to be timed, and when they began
        self._fuser: Fuser | None = None
        self._no_fusion: str | None = "the engine's model is not known"
        self._steps = 0
        self._segment: Segment | None = None
        self._pinning: Pinning | None = None
        self._orders: StepOrders | None = None  # of the step under way, until they are carried out
        self._block_tokens = 1
        self._report = StepReport()
        self._waiting: Counter[str] = Counter()  # loads that are not over, by request
        self._finishing: set[str] = set()  # ended requests whose blocks vLLM keeps
        self._sent: set[str] = set()
        self._received: set[str] = set()
        self._invalid: set[int] = set()

    def register(self, caches: dict[str, torch.Tensor]) -> None:
        """Prove the layout of the engine's caches and open the memory tier."""
        try:
            self._connect(caches)
            self._refusal = None
        except RagKVError as error:
            self._refusal = str(error)
        except Exception as error:  # an unknown backend may fail in any way while it is probed
            self._refusal = f"{type(error).__name__} while its layout was probed: {error}"
            logger.debug("ragkv: the probe failed", exc_info=error)

    def handshake(self) -> Handshake:
        """What the scheduler side must know of this worker."""
        identity = None if self._segment is None else self._segment.identity
        return Handshake(self._refusal, identity, self._no_fusion)

    def preempt(self, orders: StepOrders) -> None:
        """Blocks of preempted requests are about to be overwritten: what is being stored of them is read first."""
        if orders.preempted:
            self._copier.flush(orders.preempted)
            orders.preempted = set()

    def begin(self, orders: StepOrders) -> None:
        """A step begins."""
        self.preempt(orders)
        self._orders = orders
        self._steps += 1
        self._forward = None
        if self._stopwatch is not None and (orders.tokens >= LEAST_TOKENS or self._steps % SOME_STEPS == 0):
            self._forward = orders.tokens, self._stopwatch.start()

    def carry_out(self) -> None:
        """Do what was ordered in this step, behind its forward; again: nothing but note what has ended."""
        orders, self._orders = self._orders, None
        if orders is not None:
            self._forward_over()
            self._take(orders)
            self._copier.carry_out(orders)
            for fusion in orders.fusions:
                self._fuse(fusion, orders.block_tokens)
        self._collect()

    def take_report(self) -> StepReport | None:
        """Jobs that ended since the last call."""
        report = self._report
        if report == StepReport():
            return None
        self._report = StepReport()
        return report

    def take_finished(self) -> tuple[set[str], set[str]]:
        """Requests whose blocks vLLM may free now, and requests that need not wait for their KV any more."""
        sent, received = self._sent, self._received
        self._sent, self._received = set(), set()
        return sent, received

    def take_invalid_blocks(self) -> set[int]:
        """Blocks that should have been loaded and were not."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def close(self) -> None:
        """Let the memory tier go, once nothing is copied any more."""
        self._copier.close()
        self._mover = self._device_mover = self._fuser = None
        if self._pinning is not None:
            self._pinning.release()
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    def _take(self, orders: StepOrders) -> None:
        """Note what was ordered."""
        self._block_tokens = orders.block_tokens
        self._waiting.update(job.request for job in orders.loads)
        self._copier.add(orders.loads, is_load=True)
        self._copier.add(orders.stores, is_load=False)
        for request in orders.cancelled:
            self._copier.cancel(request)
        for request, blocks in orders.given_up.items():
            self._invalid.update(blocks)
            self._received.add(request)
        self._finishing |= orders.finishing

    def _forward_over(self) -> None:
        if self._forward is not None and self._stopwatch is not None:
            tokens, beginning = self._forward
            self._timings.append(("prefills", tokens, self._stopwatch.stop(beginning)))
        self._forward = None

    def _fuse(self, fusion: Fusion, block_tokens: int) -> None:
        """Mend one request's moved tokens. Where that fails vLLM computes them."""
        self._received.add(fusion.request)
        assert self._stopwatch is not None
        beginning, started, began = self._stopwatch.start(), time.perf_counter(), time.time_ns()
        try:
            if self._fuser is None:
                raise FusionError("an order to fuse, and no way to")
            self._fuser.fuse(fusion)
        except Exception as error:  # whatever it is: the engine computes what was to be fused
            self._faults.note("fuse", error)
            self._invalid.update(fusion.blocks[fusion.start // block_tokens :].tolist())
            self._report.unfused.add(fusion.request)
            self._note_time(fusion.timed, began, failed=True)
            return
        timing = self._stopwatch.stop(beginning)
        self._timings.append(("fusions", fusion.work, timing))
        self._mended += [(fusion, began, timing)] if fusion.timed else []
        self._metrics.observe(m.FUSION_SECONDS, time.perf_counter() - started)

    def _collect(self) -> None:
        """Note the jobs whose copies have ended, whom that concerns, and the times that are known."""
        for running in self._copier.collect():
            self._end(running)
        for request in [each for each in self._finishing if not self._copier.stores_left(each)]:
            self._finishing.discard(request)
            self._sent.add(request)
        unknown = []
        for kind, tokens, timing in self._timings:
            if (seconds := timing.seconds()) is None:
                unknown.append((kind, tokens, timing))
            else:
                getattr(self._report, kind).append((tokens, seconds))
        self._timings = unknown
        for each in self._mended[:]:
            fusion, began, timing = each
            if timing.seconds() is not None:
                self._note_time(fusion.timed, began, timing.seconds())
                self._mended.remove(each)

    def _end(self, running: Running) -> None:
        job = running.job
        self._report.done[job.id] = 1
        self._note_time(job.id if job.timed else 0, running.began, failed=running.failed)
        if running.failed:
            self._report.failed.add(job.id)
        else:
            self._metrics.observe(m.LOAD_SECONDS if running.is_load else m.STORE_SECONDS, running.seconds)
        if not running.is_load:
            return
        if running.failed:
            self._invalid.update((job.slots // self._block_tokens).tolist())
        elif not job.device and running.seconds:
            self._report.copies.append((len(job.rows), running.seconds))
        self._waiting[job.request] -= 1
        if not self._waiting[job.request]:
            del self._waiting[job.request]
            if not job.fused:
                self._received.add(job.request)

    def _note_time(self, number: int, began: int, seconds: float | None = None, *, failed: bool = False) -> None:
        """Report when something ended: as the device has timed it, else now. Number 0: nobody wants to know."""
        if number:
            ended = time.time_ns() if seconds is None else began + round(seconds * 1e9)
            self._report.times[number] = began, ended, 1, failed

    def _connect(self, caches: dict[str, torch.Tensor]) -> None:
        shape = examine(self._vllm_config, self._kv_cache_config)
        layers = self._vllm_config.compilation_config.static_forward_context
        ours = {name: caches[name] for name in shape.layers}
        blocks = self._kv_cache_config.num_blocks
        found = probe(layers, ours, shape.geometry, blocks, self._vllm_config.model_config.dtype)
        page = page_shape(self._settings, shape)
        size = memory_pages(self._settings, page) * page.page_bytes
        self._segment = Segment(self._vllm_config.kv_transfer_config.engine_id, size, populate=True)
        elements = torch.frombuffer(self._segment.buffer, dtype=RAW[shape.geometry.itemsize])
        device = next(iter(ours.values())).device
        if device.type == "cuda":
            self._pinning = pin(elements, page.page_bytes)
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

        tier = Tier(elements, shape.geometry, page.page_tokens, shape.ranks, get_tensor_model_parallel_rank())
        if copies := device_pages(self._settings, page):
            share = copies * page.page_bytes // page.ranks // page.itemsize
            pool = torch.empty(share, dtype=RAW[page.itemsize], device=device)
            self._device_mover = DirectMover(found, Tier(pool, shape.geometry, page.page_tokens, 1, 0))
        self._stopwatch = Stopwatch(device)
        self._mover = make_mover(found, tier, self._settings.transfer.staging, device)
        self._equip(page.page_tokens, shape.geometry.token_bytes, device)
        if (model := find_model(self._vllm_config)) is not None:
            self._learn_model(model, found, shape)
        if device.type != "cpu":
            self._say_memory(copies * page.page_bytes // page.ranks)

    def _say_memory(self, pool: int) -> None:
        """All accelerator memory that this worker takes beside vLLM's."""
        copies = sum(mover.device_bytes for mover in (self._mover, self._device_mover) if mover is not None)
        fusion = TURN_DEVICE_BYTES if self._fuser is not None else 0
        each = {"copies": copies, "device tier": pool, "fusion": fusion}
        parts = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in each.items() if size)
        total = sum(each.values()) / 2**20
        logger.info(
            "ragkv: %.0f MiB of accelerator memory: %s; a fused forward needs what a step needs", total, parts
        )

    def _equip(self, page_tokens: int, token_bytes: int, device: torch.device) -> None:
        """Give the movers to the copier."""
        movers = {False: self._mover, True: self._device_mover}
        self._copier = Copier(
            {kind: mover for kind, mover in movers.items() if mover is not None},
            page_tokens,
            token_bytes,
            step_bytes(self._settings, device),
            self._faults,
        )

    def _learn_model(self, model: Any, found: list[LayerCache], shape: Shape) -> None:
        """From now on moved tokens can be mended, if this model is of a kind that can be."""
        try:
            turn = make_turn(self._vllm_config, shape, model)
            self._fuser = make_fuser(self._vllm_config, self._kv_cache_config, shape, model, found)
        except RagKVError as error:
            self._no_fusion = str(error)
        except Exception as error:  # an unknown model or backend may fail in any way
            self._no_fusion = f"{type(error).__name__} while fusion was prepared: {error}"
            logger.debug("ragkv: no fusion", exc_info=error)
        else:
            self._no_fusion = None
            for mover in (self._mover, self._device_mover):
                if mover is not None:
                    mover.turn = turn
