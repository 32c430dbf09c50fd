"""`RagKVConnector`: what vLLM sees. It holds one of two sides, and lets nothing out but answers."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    SupportsHMA,
)

from ragkv.connectors.vllm.announcing import Announcer
from ragkv.connectors.vllm.builder import make_cache, make_side
from ragkv.connectors.vllm.error_boundary import Faults, gives, guarded, in_words, logger
from ragkv.connectors.vllm.identity import engine_identity, examine
from ragkv.connectors.vllm.lifecycle import duties_of, watch_stop
from ragkv.connectors.vllm.messages import Handshake, StepOrders, StepReport, Tables
from ragkv.connectors.vllm.multi import among_others, told_late
from ragkv.connectors.vllm.plugin import check_settings
from ragkv.connectors.vllm.scheduler import SchedulerSide
from ragkv.connectors.vllm.sizes import memory_pages, page_shapes, planes
from ragkv.connectors.vllm.stats import RagKVPromMetrics, RagKVStats, hit_sources
from ragkv.connectors.vllm.trust import Trust
from ragkv.connectors.vllm.worker import WorkerSide
from ragkv.errors import ConfigError
from ragkv.kvstore.metrics import Metrics
from ragkv.kvstore.pages import frame_bytes
from ragkv.kvstore.segment import Segment
from ragkv.preflight import has_lower_tier

NO_TOKENS = (0, False)


class RagKVConnector(KVConnectorBase_V1, SupportsHMA):
    """Exact reuse of KV from host memory. Where the engine cannot be served it stands aside, and says why."""

    _announcer: Announcer | None = None
    _among_others = False
    _told_late = False  # workers' word comes with their first report, not with vLLM's handshake
    _refusal: str | None = None  # why this process stands aside
    requires_kv_delivery = False  # a cache: a store that is dropped is a later miss

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._metrics = Metrics()
        self.faults = Faults(self._metrics)
        self.scheduler_side: SchedulerSide | None = None  # only once all workers have proven their part
        self._proposed: SchedulerSide | None = None
        self._workers = 0
        self.worker_side: WorkerSide | None = None
        self._segment: Segment | None = None
        try:
            self._open(vllm_config, role, kv_cache_config)
        except ConfigError:  # the one thing that stops an engine's start, on purpose
            raise
        except Exception as error:  # whatever it is: the engine serves
            self._stand_aside(in_words(error))
            logger.debug("ragkv: why", exc_info=error)

    def _open(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        self._trust, transfer = Trust(b""), vllm_config.kv_transfer_config
        self._told_late, self._among_others = told_late(transfer), among_others(transfer)
        transfer.kv_load_failure_policy = "recompute"  # a failed load is a miss
        self._settings = check_settings(transfer).settings
        if role is KVConnectorRole.SCHEDULER:
            self._stop = watch_stop(vllm_config, self._settings)
            self._proposed = self._make_scheduler_side()
        else:
            self.worker_side = WorkerSide(vllm_config, kv_cache_config, self._settings, self._metrics, self.faults)

    # --- scheduler side ---

    def _make_scheduler_side(self) -> SchedulerSide:
        config, settings = self._vllm_config, self._settings
        shape = examine(config, self._kv_cache_config)
        pages, self._workers = page_shapes(settings, shape), shape.workers
        size = memory_pages(settings, pages) * frame_bytes(pages)
        populate = has_lower_tier(settings)  # this side fills pages then
        self._segment = Segment(config.kv_transfer_config.engine_id, size, populate=populate)
        self._trust = Trust(engine_identity(config, shape, *(page.page_tokens for page in pages)))
        stores = duties_of(config.kv_transfer_config).stores
        cache = make_cache(
            settings,
            pages,
            self._segment.buffer,
            config.model_config.get_hidden_size(),
            self._metrics,
            self.faults,
            planes=planes(shape, pages),
            stores=stores,
        )
        self._announcer = Announcer(settings, cache)
        return make_side(config, settings, shape, cache, self._trust, self._metrics, self.faults)

    def _stand_aside(self, why: str) -> None:
        logger.warning("ragkv: this engine runs without KV reuse: %s", why)
        self._refusal = why
        sides, self.scheduler_side, self._proposed = (self.scheduler_side, self._proposed), None, None
        for side in filter(None, sides):
            with contextlib.suppress(Exception):  # what cannot be closed goes with the process
                side.close(0.0)
        with contextlib.suppress(Exception):
            self._close_segment()

    def set_xfer_handshake_metadata(self, metadata: Mapping[Any, Any]) -> None:
        """All workers' word, once at start. Reuse begins here: when each has proven the layout of its cache,
        and maps the very segment that this side maps. Its name is needed no more then."""
        if not self._told_late:
            self._begin_reuse([each for each in metadata.values() if isinstance(each, Handshake)])

    def _begin_reuse(self, hands: Sequence[Handshake]) -> None:
        try:
            self._take_word(hands)
        except Exception as error:
            self._stand_aside(in_words(error))

    def _take_word(self, hands: Sequence[Handshake]) -> None:
        if self._proposed is None or self._segment is None:
            return
        refusals = [hand.refusal for hand in hands if hand.refusal]
        if len(hands) != self._workers:
            refusals.append(f"{len(hands)} of {self._workers} workers answered")
        if any(hand.segment != self._segment.identity for hand in hands):
            refusals.append("a worker maps another segment of shared memory")
        if refusals:
            self._stand_aside(refusals[0])
        else:
            self.scheduler_side, self._proposed = self._proposed, None
            self._trust.begin(hands, self._vllm_config, self.scheduler_side.memory_tokens)
            self._segment.unlink()
            refusal = next((h.no_fusion for h in hands if h.no_fusion), None)
            if self.scheduler_side.fusing is not None:
                self.scheduler_side.fusing.refusal = refusal
            self._announce(refusal)

    @guarded(gives(None))
    def _announce(self, no_fusion: str | None) -> None:
        if self._announcer is not None:
            self._announcer.started(self._trust.namespaces.engine, self._workers, no_fusion)

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Mapping[Any, Any]) -> None:
        """The same, as newer versions of vLLM call it."""
        self.set_xfer_handshake_metadata(metadata)

    def _not_looked_up(self, request: Any, _computed: int) -> tuple[int | None, bool]:
        assert self.scheduler_side is not None
        self.scheduler_side.ignore_request(request)
        return NO_TOKENS

    @guarded(_not_looked_up)
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that can be loaded while the request waits; None: ask again in the next step."""
        if self.scheduler_side is None:
            return NO_TOKENS
        if not self._trust.ready(request, self.scheduler_side):
            return None, False
        if not self._trust.serves(request.request_id, num_computed_tokens):
            self.scheduler_side.ignore_request(request)
            return NO_TOKENS
        tokens = self.scheduler_side.lookup(request, num_computed_tokens)
        return tokens, bool(tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The request was taken up, and waits until `num_external_tokens` are loaded into its blocks."""
        if self.scheduler_side is not None:
            side, tables = self.scheduler_side, blocks.get_block_ids()
            if not self._trust.allocated(request.request_id, tables, side.groups):
                side.taint(request.request_id)
            self._allocated(request, tables, num_external_tokens)

    def _not_allocated(self, request: Any, tables: Tables, external: int) -> None:
        assert self.scheduler_side is not None
        self.scheduler_side.fail_allocation(request, tables, external)

    @guarded(_not_allocated)
    def _allocated(self, request: Any, tables: Tables, external: int) -> None:
        assert self.scheduler_side is not None
        self.scheduler_side.allocated(request, tables, external)

    def _orders_so_far(self, _scheduler_output: Any) -> StepOrders:
        """After a fault: the loads, which vLLM counts on; the books of the requests may be wrong now."""
        if self.scheduler_side is None:
            return StepOrders()
        self.scheduler_side.invalidate_in_flight()
        return self.scheduler_side.take_orders()

    @guarded(_orders_so_far)
    def build_connector_meta(self, scheduler_output: Any) -> StepOrders:
        """This step's orders."""
        if self.scheduler_side is not None and self._stop.due():
            return self._write_down_now(self.scheduler_side)
        if self.scheduler_side is None:
            return StepOrders()
        side, tokens = self.scheduler_side, scheduler_output.total_num_scheduled_tokens
        side.ask(self._trust.question(tokens, side, stopping=self._stop.asked))
        self._trust.scheduled(scheduler_output)
        if self._announcer is not None:
            self._announcer.look()
        return self.scheduler_side.orders(scheduler_output)

    @guarded(gives(None))
    def update_connector_output(self, connector_output: Any) -> None:
        """The workers' report on what was ordered, and requests whose transfers have ended on all of them."""
        report = connector_output.kv_connector_worker_meta
        if self._proposed is not None and isinstance(report, StepReport) and report.handshakes:
            self._begin_reuse(report.handshakes)
        if self.scheduler_side is None:
            return
        if self._among_others and getattr(connector_output, "invalid_block_ids", None):
            self.scheduler_side.invalidate_in_flight()  # perhaps of another connector: its blocks hold no KV
        report = report if isinstance(report, StepReport) else None
        received = connector_output.finished_recving
        told = report, connector_output.finished_sending or (), received or ()
        try:
            waiting = self.scheduler_side.report(*told)
        except Exception as error:  # requests wait for what follows from it
            self.faults.note("report", error)
            waiting = self.scheduler_side.lost(*told)
        if waiting:
            received -= waiting
        if report is not None:
            self._trust.hear(report, self.scheduler_side)

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """vLLM's own blocks, which it gives newer connectors."""
        if self._proposed is not None or self.scheduler_side is not None:
            self._trust.bind(gpu_block_pool)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """As `request_finished_all_groups`, for engines without the hybrid memory allocator."""
        return self.request_finished_all_groups(request, (block_ids,))

    def _not_finished(self, request: Any, _blocks: tuple[list[int], ...]) -> tuple[bool, dict[str, Any] | None]:
        assert self.scheduler_side is not None
        self.scheduler_side.forget(request.request_id)
        return False, None

    @guarded(_not_finished)
    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The request ended; True keeps its blocks until its last tokens are stored; and what its answer tells."""
        if self.scheduler_side is None:
            return False, None
        self._trust.over(request.request_id)
        return self.scheduler_side.finished(request, [list(table) for table in block_ids])

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[Any, int]:
        """How many of the tokens came from where; what was brought up for this request counts as its source's."""
        found = self.scheduler_side.sources(request) if self.scheduler_side is not None else {}
        return hit_sources(found, num_external_tokens)

    @guarded(gives(False))
    def has_pending_push_work(self) -> bool:
        """Whether vLLM must go on stepping, though no request runs or waits: for stores that are not over, or not
        confirmed."""
        side = self.scheduler_side
        if side is not None:
            self._trust.notice(side)
        return side is not None and (side.has_pending_work or (self._trust.settled and side.unconfirmed))

    def has_pending_block_frees(self) -> bool:
        """Whether blocks will be free soon, so that nobody need be preempted."""
        return self.scheduler_side is not None and self.scheduler_side.has_pending_frees

    @guarded(gives(False))
    def reset_cache(self) -> bool:
        """Forget all KV."""
        if self.scheduler_side is not None:
            self._trust.doubt(running=bool(self.scheduler_side.requests))
            self.scheduler_side.reset()
        return True

    # --- worker side ---

    @guarded(gives(None))
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Prove the caches' layout."""
        if self.worker_side is not None:
            self.worker_side.register(kv_caches)
            if self._told_late:
                self.worker_side.tell_late()

    @guarded(gives(Handshake("a worker could not give its word")))
    def get_handshake_metadata(self) -> Handshake | None:
        """Whether this worker can take part."""
        if self.worker_side is None or self._told_late:
            return Handshake(self._refusal) if self._refusal and not self._told_late else None
        return self.worker_side.handshake()

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """A step begins."""
        super().bind_connector_metadata(connector_metadata)
        if self.worker_side is not None and isinstance(connector_metadata, StepOrders):
            self.worker_side.begin(connector_metadata)

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """Blocks of preempted requests are about to be overwritten."""
        if self.worker_side is not None and isinstance(kv_connector_metadata, StepOrders):
            self.worker_side.preempt(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing yet: requests wait for their loads, so these follow the forward of others."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: no request runs before its KV has come."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to do by layer: stores follow the forward as a whole."""

    def wait_for_save(self) -> None:
        """Load, mend and store, after the forward."""
        if self.worker_side is not None:
            self.worker_side.carry_out()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose stores are done, and requests whose KV has come or will not. (Some versions of vLLM call
        for saves later than for this, or not at all in a step without a forward.)"""
        if self.worker_side is None:
            return None, None
        self.worker_side.carry_out(drafted=False)
        sent, received = self.worker_side.take_finished()
        return sent or None, received or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """As `get_finished`, and requests whose KV did not come, where blocks cannot tell (vLLM 0.32 on)."""
        results = super().get_transfer_results(finished_req_ids)
        if self.worker_side is not None:
            results.failed_recving |= self.worker_side.take_unloaded()
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that vLLM must compute itself."""
        return set() if self.worker_side is None else self.worker_side.take_invalid_blocks()

    def build_connector_worker_meta(self) -> StepReport | None:
        """Jobs that ended."""
        return None if self.worker_side is None else self.worker_side.take_report()

    def get_kv_connector_stats(self) -> RagKVStats | None:
        """Metrics since the last call."""
        data = self._metrics.drain()
        return RagKVStats(data=data) if data else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> RagKVStats:
        """A record that came from another process."""
        return RagKVStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> RagKVPromMetrics:
        """ragkv's metrics, in vLLM's registry."""
        return RagKVPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        """Unmap shared memory; the scheduler side, or the last worker, removes it."""
        if self.worker_side is not None:
            self.worker_side.close()
        for side in (self.scheduler_side, self._proposed):
            if side is not None:
                self._end(side)
        self.scheduler_side = self._proposed = None
        self._close_segment()

    def _end(self, side: SchedulerSide) -> None:
        written = side.close(self._settings.placement.flush)
        if self._announcer is not None:
            self._announcer.ended(written=written)

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        """The caches may lose their memory and get other memory at the same addresses (vLLM 0.33)."""
        return True

    def unregister_kv_caches(self) -> None:
        """The engine goes to sleep; nothing is under way."""
        if self.worker_side is not None:
            self.worker_side.let_go_of_caches()

    def restore_kv_caches(self) -> None:
        """The engine's caches have memory again."""
        if self.worker_side is not None:
            self.worker_side.take_caches_again()

    def _write_down_now(self, side: SchedulerSide) -> StepOrders:
        """vLLM will kill the engine soon, with answers still running: this step's loads are the last that are
        ordered, and what waits is written down before the step."""
        self.scheduler_side = None
        orders = side.take_orders()
        self._end(side)
        return orders

    def _close_segment(self) -> None:
        if self._segment is not None:
            self._segment.close(unlink=True)
            self._segment = None
