"""The worker side: moves bytes between the engine's paged cache and the memory tier, as ordered."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ragkv.config import Settings
from ragkv.connectors.vllm.faults import Faults, logger
from ragkv.connectors.vllm.identity import Shape, examine
from ragkv.connectors.vllm.layout import RAW, LayerCache, probe
from ragkv.connectors.vllm.mending import make_fuser, make_turn
from ragkv.connectors.vllm.model import find_model
from ragkv.connectors.vllm.protocol import Fusion, Handshake, Job, StepOrders, StepReport
from ragkv.connectors.vllm.recompute import Fuser
from ragkv.connectors.vllm.sizes import device_pages, memory_pages, page_shape
from ragkv.connectors.vllm.timing import Stopwatch, Timing
from ragkv.connectors.vllm.transfer import DirectMover, Mover, Ticket, Tier, Turn, make_mover, pin_memory
from ragkv.errors import FusionError, RagKVError
from ragkv.kvstore import metrics as m
from ragkv.kvstore.metrics import Metrics
from ragkv.kvstore.segment import Segment

LEAST_TOKENS = 32  # of a step whose time says something of prefill
SOME_STEPS = 64  # of the other steps one in so many is timed: they tell what a step costs by itself


@dataclass(slots=True)
class _Running:
    """A job whose copy may still be under way. `began`: ns since 1970; `timing`: of a load."""

    job: Job
    ticket: Ticket
    began: int
    timing: Timing | None


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
        self._make_movers: Callable[[], tuple[Mover, Mover | None]] | None = None  # once the layout is proven
        self._stopwatch: Stopwatch | None = None
        self._forward: tuple[int, Any] | None = None  # tokens and beginning of the step under way
        self._timings: list[tuple[Literal["prefills", "copies", "fusions"], float, Timing]] = []
        self._mended: list[tuple[Fusion, int, Timing]] = []  # fusions to be timed, and when they began
        self._fuser: Fuser | None = None
        self._turn: Turn | None = None  # of the movers, while there are none
        self._no_fusion: str | None = "the engine's model is not known"
        self._steps = 0
        self._segment: Segment | None = None
        self._running: list[_Running] = []
        self._report = StepReport()
        self._finished: set[str] = set()
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

    def tell_late(self) -> None:
        """Give the handshake with the next report."""
        self._report.handshakes = [self.handshake()]

    def begin(self, orders: StepOrders) -> None:
        """A step begins. (vLLM calls for loads before the forward only where there are any, else behind it.)"""
        self._steps += 1
        self._forward = None
        if self._stopwatch is not None and (orders.tokens >= LEAST_TOKENS or self._steps % SOME_STEPS == 0):
            self._forward = orders.tokens, self._stopwatch.start()

    def load(self, orders: StepOrders) -> None:
        """Carry out a step's loads. A load that fails is reported by its blocks, and vLLM computes them."""
        self._not_loaded(orders.invalid_blocks)
        if orders.loads:
            self._carry_out(orders.loads, m.LOAD_SECONDS, orders.block_tokens)
            for fusion in orders.fusions:
                self._fuse(fusion, orders.block_tokens)
            if self._forward is not None and self._stopwatch is not None:
                self._forward = orders.tokens, self._stopwatch.start()

    def store(self, orders: StepOrders) -> None:
        """Carry out a step's stores, after its forward."""
        if self._forward is not None and self._stopwatch is not None:
            tokens, beginning = self._forward
            self._timings.append(("prefills", tokens, self._stopwatch.stop(beginning)))
            self._forward = None
        if orders.stores:
            self._carry_out(orders.stores, m.STORE_SECONDS, None)
        self._collect()

    def take_report(self) -> StepReport | None:
        """Jobs that ended since the last call."""
        report = self._report
        if report == StepReport():
            return None
        self._report = StepReport()
        return report

    def take_finished(self) -> set[str]:
        """Requests whose blocks vLLM may free now."""
        finished, self._finished = self._finished, set()
        return finished

    def take_invalid_blocks(self) -> set[int]:
        """Blocks that should have been loaded and were not."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def close(self) -> None:
        """Let the memory tier go."""
        self._mover = self._device_mover = self._make_movers = None
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    def let_go_of_caches(self) -> None:
        """The engine goes to sleep, and its caches lose their memory, and with them what lies in the device tier.
        Orders until `take_caches_again` fail. Safe to call twice."""
        if self._mover is not None:
            self._turn = self._mover.turn
        self._mover = self._device_mover = None

    def take_caches_again(self) -> None:
        """The caches have memory again, empty and at the same addresses. Safe to call twice."""
        if self._mover is None and self._make_movers is not None and self._segment is not None:
            self._mover, self._device_mover = self._make_movers()
            for mover in (self._mover, self._device_mover):
                if mover is not None:
                    mover.turn = self._turn

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

    def _fuse(self, fusion: Fusion, block_tokens: int) -> None:
        """Mend one request's moved tokens. Where that fails vLLM computes them."""
        blocks = set(fusion.blocks[fusion.start // block_tokens :].tolist())
        assert self._stopwatch is not None
        beginning, started, began = self._stopwatch.start(), time.perf_counter(), time.time_ns()
        try:
            if self._fuser is None:
                raise FusionError("an order to fuse, and no way to")
            if not self._fuser.agreed(self._invalid.isdisjoint(fusion.blocks.tolist())):
                self._not_loaded(blocks)
                self._note_time(fusion.timed, began, failed=True)
                return
            self._fuser.fuse(fusion)
        except Exception as error:  # whatever it is: the engine computes what was to be fused
            self._faults.note("fuse", error)
            self._not_loaded(blocks)
            self._report.unfused += 1
            self._note_time(fusion.timed, began, failed=True)
            return
        timing = self._stopwatch.stop(beginning)
        self._timings.append(("fusions", fusion.work, timing))
        self._mended += [(fusion, began, timing)] if fusion.timed else []
        self._metrics.observe(m.FUSION_SECONDS, time.perf_counter() - started)

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
        if device.type == "cuda" and not pin_memory(elements):
            logger.warning("ragkv: shared memory could not be pinned; copies will be slower")
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

        tier = Tier(elements, shape.geometry, page.page_tokens, shape.ranks, get_tensor_model_parallel_rank())
        share = device_pages(self._settings, page) * page.page_bytes // page.ranks // page.itemsize

        def make_movers() -> tuple[Mover, Mover | None]:
            below = None
            if share:
                pool = torch.empty(share, dtype=RAW[page.itemsize], device=device)
                below = DirectMover(found, Tier(pool, shape.geometry, page.page_tokens, 1, 0))
            return make_mover(found, tier, self._settings.transfer.staging, device), below

        self._stopwatch = Stopwatch(device)
        self._make_movers = make_movers
        self._mover, self._device_mover = make_movers()
        if (model := find_model(self._vllm_config)) is not None:
            self._learn_model(model, found, shape)

    def _carry_out(self, jobs: list[Job], clock: str, block_tokens: int | None) -> None:
        """Move all jobs of a step, those of each tier at once. `block_tokens` is given for loads."""
        started = time.perf_counter()
        kinds = itertools.product((False, True), (False, True))
        for device, moved in kinds:
            if several := [job for job in jobs if job.device is device and (job.shifts is not None) is moved]:
                self._move(several, self._device_mover if device else self._mover, block_tokens)
        self._collect()
        self._metrics.observe(clock, time.perf_counter() - started)

    def _move(self, jobs: list[Job], mover: Mover | None, block_tokens: int | None) -> None:
        began, timing = time.time_ns(), None
        try:
            if mover is None or self._stopwatch is None:
                raise RagKVError("orders without a tier to carry them out")
            rows = torch.cat([torch.from_numpy(job.rows) for job in jobs])
            slots = torch.cat([torch.from_numpy(job.slots) for job in jobs])
            shifts = [torch.from_numpy(job.shifts) for job in jobs if job.shifts is not None]
            beginning = self._stopwatch.start()
            if block_tokens is None:
                ticket = mover.store(rows, slots)
            else:
                ticket = mover.load(rows, slots, torch.cat(shifts)) if shifts else mover.load(rows, slots)
        except Exception as error:  # whatever it is: these jobs failed, and are reported so
            self._faults.note("store" if block_tokens is None else "load", error)
            for job in jobs:
                self._end(job, began, None, failed=True)
                if block_tokens is not None:
                    self._not_loaded(set((job.slots // block_tokens).tolist()))
            return
        if block_tokens is not None:
            timing = self._stopwatch.stop(beginning)
            self._timings += [("copies", len(rows), timing)] if mover is self._mover else []
        self._running.extend(_Running(job, ticket, began, timing) for job in jobs)

    def _not_loaded(self, blocks: set[int]) -> None:
        """The forward will run on blocks that lack what was promised: whatever it computes is not to be kept."""
        self._invalid |= blocks
        self._report.tainted |= bool(blocks)

    def _collect(self) -> None:
        """Note the jobs whose copies have ended, and the times that are known."""
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
                self._note_time(fusion.timed, began, timing)
                self._mended.remove(each)
        still = []
        for running in self._running:
            try:
                ended, failed = running.ticket.query(), False
            except Exception as error:  # the device reports what went wrong since the copy was ordered
                self._faults.note("copy", error)
                ended = failed = True
            if ended:
                self._end(running.job, running.began, running.timing, failed=failed)
            else:
                still.append(running)
        self._running = still

    def _end(self, job: Job, began: int, timing: Timing | None, *, failed: bool) -> None:
        self._report.done[job.id] = 1
        self._note_time(job.id if job.timed else 0, began, timing, failed=failed)
        if failed:
            self._report.failed.add(job.id)
        if job.finishes is not None:
            self._finished.add(job.finishes)

    def _note_time(self, number: int, began: int, timing: Timing | None = None, *, failed: bool = False) -> None:
        """Report when something ended: as the device has timed it, else now. Number 0: nobody wants to know."""
        if number:
            seconds = None if failed or timing is None else timing.seconds()
            ended = time.time_ns() if seconds is None else began + round(seconds * 1e9)
            self._report.times[number] = began, ended, 1, failed
