"""The worker side: moves bytes between the engine's paged cache and the memory tier, as ordered.

Requests wait for their loads: a failed load is reported before the request has run, and vLLM computes it. The
orders of a step are carried out once, after its forward, by the first of `wait_for_save` and `get_finished` that
vLLM calls: which of them it calls in a step without a forward, and in which order, differs between its versions.
"""

import functools
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch

from ragkv.config import Settings
from ragkv.connectors.vllm.copying import Copier, Running
from ragkv.connectors.vllm.equipment import Equipment
from ragkv.connectors.vllm.error_boundary import Faults, in_words, logger
from ragkv.connectors.vllm.fusion_worker import TURN_DEVICE_BYTES, Fuser
from ragkv.connectors.vllm.messages import Fusion, Handshake, StepOrders, StepReport
from ragkv.connectors.vllm.sampling import WeightsObserver
from ragkv.connectors.vllm.speculation import drafts
from ragkv.connectors.vllm.streams import Event, Stream, Ticket
from ragkv.connectors.vllm.transfer import PrepareRotation
from ragkv.errors import FusionError, RagKVError
from ragkv.kvstore import metrics as m
from ragkv.kvstore.metrics import Metrics

LEAST_TOKENS = 32  # of a step whose time says something of prefill
SOME_STEPS = 64  # of the other steps one in so many is timed: they tell what a step costs by itself


class _Timed(NamedTuple):
    """What the device was timed at. `number`: under which a trace is told too, with when it `began`, in ns."""

    kind: Literal["prefills", "fusions"]
    work: float
    ticket: Ticket
    number: int = 0
    began: int = 0


class WorkerSide:
    """One worker. It is made before the caches exist; `register` proves their layout or refuses reuse. `equip`:
    what makes its equipment then."""

    def __init__(
        self,
        vllm_config: Any,
        kv_cache_config: Any,
        settings: Settings,
        metrics: Metrics,
        faults: Faults,
        equip: Callable[[Any, Any, Settings, dict[str, torch.Tensor]], Equipment] = Equipment,
    ) -> None:
        self._equip = functools.partial(equip, vllm_config, kv_cache_config, settings)
        self._metrics, self._faults = metrics, faults
        self._refusal: str | None = "the engine's caches were never registered"
        self._equipment: Equipment | None = None
        self._copier = Copier({}, {0: 1}, 1, 1, faults)
        self._turn: PrepareRotation | None = None  # rotates keys that move
        self._weights = WeightsObserver(None, torch.device("cpu"), Stream(), 0, faults)
        self._compute: Stream | None = None  # where the engine's forwards run
        self._forward: tuple[float, Event] | None = None  # work and beginning of the step under way
        self._timed: list[_Timed] = []  # whose seconds are not known yet
        self._fuser: Fuser | None = None
        self._no_fusion: str | None = "the engine's model is not known"
        self._steps = 0
        self._orders: StepOrders | None = None  # of the step under way, until they are carried out
        self._drafts = drafts(vllm_config)
        self._block_tokens = 1
        self._report = StepReport()
        self._waiting: Counter[str] = Counter()  # loads that are not over, by request
        self._finishing: set[str] = set()  # ended requests whose blocks vLLM keeps
        self._sent: set[str] = set()
        self._received: set[str] = set()
        self._invalid: set[int] = set()
        self._unloaded: set[str] = (
            set()
        )  # requests that vLLM must compute, where blocks do not tell whose they are

    def register(self, caches: dict[str, torch.Tensor]) -> None:
        """Prove the layout of the engine's caches and open the memory tier."""
        try:
            self._equipment = self._equip(caches)
            self._begin_copying(self._equipment)
            self._refusal = None
        except RagKVError as error:
            self._refusal = str(error)
        except Exception as error:  # an unknown backend may fail in any way while it is probed
            self._refusal = f"while a cache's layout was probed: {in_words(error)}"
            logger.debug("ragkv: the probe failed", exc_info=error)

    def handshake(self) -> Handshake:
        """What the scheduler side must know of this worker."""
        made = self._equipment
        if made is not None:
            try:
                return Handshake(
                    self._refusal, made.segment.identity, self._no_fusion, made.rank, self._weights.look()
                )
            except Exception as error:  # of the system, or of a model of an unknown kind
                self._refusal = in_words(error)
        return Handshake(self._refusal, None, self._no_fusion)

    def tell_late(self) -> None:
        """Give the handshake with the next report."""
        self._report.handshakes = [self.handshake()]

    def let_go_of_caches(self) -> None:
        """The engine goes to sleep: its caches lose their memory, and the device tier goes with them. Orders until
        `take_caches_again` fail. Safe to call twice."""
        self._copier.equip({})

    def take_caches_again(self) -> None:
        """The caches have memory again, empty and at the same addresses. Safe to call twice."""
        if self._equipment is not None and not self._copier.equipped:
            self._equip_copier(self._equipment)

    def preempt(self, orders: StepOrders) -> None:
        """Blocks of preempted requests are about to be overwritten: what is being stored of them is read first."""
        if orders.preempted:
            self._copier.flush(orders.preempted)
            orders.preempted = set()

    def begin(self, orders: StepOrders) -> None:
        """A step begins."""
        if self._orders is not None:  # of a step that came to no end
            self._forward = None
            self.carry_out()
        self.preempt(orders)
        self._weights.observe(orders.asked, orders.tokens, self._report)
        self._orders = orders
        self._steps += 1
        self._forward = None
        if self._compute is not None and (orders.tokens >= LEAST_TOKENS or self._steps % SOME_STEPS == 0):
            self._forward = orders.work, self._compute.record()

    def carry_out(self, *, drafted: bool = True) -> None:
        """Carry out the orders of this step, after its forward. A second call only notes which copies have
        ended; so does one before a drafter has written its KV, which has `drafted` if it is to run."""
        if not drafted and self._drafts and self._orders is not None and self._orders.tokens:
            self._collect()
            return
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

    def take_unloaded(self) -> set[str]:
        """Requests whose KV did not come, of an engine whose block numbers do not tell that."""
        unloaded, self._unloaded = self._unloaded, set()
        return unloaded

    def close(self) -> None:
        """Wait for all copies, then close the memory tier."""
        self._copier.equip({})
        self._weights.close()
        self._fuser = None
        if self._equipment is not None:
            self._equipment.close()
            self._equipment = None

    def _take(self, orders: StepOrders) -> None:
        """Note what was ordered."""
        self._block_tokens = orders.block_tokens
        self._waiting.update(job.request for job in orders.loads)
        self._copier.add(orders.loads, is_load=True)
        self._copier.add(orders.stores, is_load=False)
        for request in orders.cancelled:
            self._copier.cancel(request)
        for request, blocks in orders.given_up.items():
            self._lose(request, blocks)
            self._received.add(request)
        self._finishing |= orders.finishing

    def _lose(self, request: str, blocks: list[int]) -> None:
        """What should have been loaded into these blocks of a request was not."""
        if self._equipment is not None and self._equipment.by_request:
            self._unloaded.add(request)
        else:
            self._invalid.update(blocks)

    def _forward_over(self) -> None:
        if self._forward is not None and self._compute is not None:
            work, start = self._forward
            self._timed.append(_Timed("prefills", work, Ticket(self._compute.record(), start)))
        self._forward = None

    def _fuse(self, fusion: Fusion, block_tokens: int) -> None:
        """Mend one request's moved tokens. Where that fails vLLM computes them."""
        self._received.add(fusion.request)
        assert self._compute is not None
        start, started, began = self._compute.record(), time.perf_counter(), time.time_ns()
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
        ticket = Ticket(self._compute.record(), start)
        self._timed.append(_Timed("fusions", fusion.work, ticket, fusion.timed, began))
        self._metrics.observe(m.FUSION_SECONDS, time.perf_counter() - started)

    def _collect(self) -> None:
        """Note the jobs whose copies have ended, whom that concerns, and the times that are known."""
        for running in self._copier.collect():
            self._end(running)
        for request in [each for each in self._finishing if not self._copier.stores_left(each)]:
            self._finishing.discard(request)
            self._sent.add(request)
        timed, self._timed = self._timed, []
        stages = 1 if self._equipment is None else self._equipment.stages
        for each in timed:
            if (seconds := each.ticket.seconds()) is None:
                self._timed.append(each)
            else:
                getattr(self._report, each.kind).append((each.work, seconds * stages))
                self._note_time(each.number, each.began, seconds)

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
            self._lose(job.request, (job.slots // self._block_tokens).tolist())
        elif not job.device and running.seconds:
            share = self._equipment.shares[job.group] if self._equipment is not None else 1.0
            self._report.copies.append((len(job.rows) * share, running.seconds))
        self._waiting[job.request] -= 1
        if not self._waiting[job.request]:
            del self._waiting[job.request]
            if not job.fused:
                self._received.add(job.request)

    def _note_time(self, number: int, began: int, seconds: float | None = None, *, failed: bool = False) -> None:
        """Report when something ended: by the device's clock if it is known, else now. Number 0: not traced."""
        if number:
            ended = time.time_ns() if seconds is None else began + round(seconds * 1e9)
            self._report.times[number] = began, ended, 1, failed

    def _begin_copying(self, made: Equipment) -> None:
        self._compute, self._copier = made.compute, made.make_copier(self._faults)
        self._weights = made.make_observer(self._faults)
        try:
            self._turn, self._fuser = made.make_fusion()
            self._no_fusion = None
        except Exception as error:  # an unknown model or backend may fail in any way
            self._no_fusion = in_words(error)
            logger.debug("ragkv: no fusion", exc_info=error)
        self._equip_copier(made)

    def _equip_copier(self, made: Equipment) -> None:
        self._copier.equip(made.make_movers(self._turn, TURN_DEVICE_BYTES if self._fuser is not None else 0))
