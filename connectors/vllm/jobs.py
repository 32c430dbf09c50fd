"""The books of what workers were ordered to copy: who waits for it, what it fills, and what becomes of it."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Container, Sequence

import numpy as np

from ragkv.connectors.vllm.error_boundary import Faults
from ragkv.connectors.vllm.fusing import Fusing
from ragkv.connectors.vllm.hints import Hints, with_problem
from ragkv.connectors.vllm.loading import Loads
from ragkv.connectors.vllm.messages import Indices, Job, Question, StepOrders, StepReport, slots_between
from ragkv.connectors.vllm.tracking import Tracked, UnderWay
from ragkv.kvstore import metrics as m
from ragkv.kvstore.catalogue import Chunk, rows
from ragkv.kvstore.metrics import Metrics
from ragkv.kvstore.placement import Placement

PINNED_ALL = "ragkv.pin: a tenant's owners, or all, have pinned all that they may of the memory tier"


class Jobs:
    """Orders in the making, and jobs under way. `workers`: that must do each; `confirmed_by`: the number that will
    confirm what has been computed until now (`Placement.confirm`)."""

    def __init__(
        self,
        placement: Placement,
        block_tokens: int,
        workers: int,
        metrics: Metrics,
        faults: Faults,
        clock: Callable[[], float] = time.monotonic,
        fusing: Fusing | None = None,
        confirmed_by: Callable[[], int] = lambda: 0,
    ) -> None:
        self._placement, self._hierarchy = placement, placement.hierarchy
        self._block_tokens, self._workers = block_tokens, workers
        self._metrics, self._faults, self._clock = metrics, faults, clock
        self.fusing, self._confirmed_by = fusing, confirmed_by
        self._tracked: dict[str, Tracked | None] = {}
        self._under_way: dict[int, UnderWay] = {}
        self._loads = Loads()
        self._storing: Counter[str] = Counter()  # stores under way, by request
        self._ending: set[str] = set()  # ended requests whose blocks vLLM keeps until their stores are done
        self._orders = StepOrders(block_tokens=block_tokens)
        self._jobs = 0

    @property
    def has_pending_work(self) -> bool:
        """Whether workers have something to do, or to tell, that no request waits for."""
        return bool(self._storing) or self._orders.pending

    @property
    def has_pending_frees(self) -> bool:
        """Whether stores under way keep blocks of requests that have ended."""
        return bool(self._ending)

    def take_orders(self) -> StepOrders:
        """What has been ordered so far."""
        orders, self._orders = self._orders, StepOrders(block_tokens=self._block_tokens)
        return orders

    def report(
        self, report: StepReport | None, sent: Collection[str] = (), received: Collection[str] = ()
    ) -> set[str]:
        """What the workers have done; requests whose blocks are free now, and requests that need not wait for
        their KV any more. Those of the latter that must wait all the same: vLLM must not hear of them yet."""
        if report is not None:
            self._note(report)
        self._ending.difference_update(sent)
        for request in received:
            try:
                self._received(request)
            except Exception as error:  # one request's trouble must not lose the others
                self._faults.note("received", error)
        return {request for request in received if request in self._loads}

    def lost(
        self, report: StepReport | None, sent: Collection[str] = (), received: Collection[str] = ()
    ) -> set[str]:
        """As `report`, after that has failed: jobs that are not settled yet have failed. Must not fail itself."""
        self.distrust()
        for job, workers in report.done.items() if report is not None else ():
            self._done(job, workers, failed=True)
        self._ending.difference_update(sent)
        for request in received:
            self._loads.received(request, self._orders)
        return {request for request in received if request in self._loads}

    def distrust(self) -> None:
        """The books may be wrong: keep nothing of what is under way."""
        for under_way in self._under_way.values():
            under_way.failed |= under_way.is_store
        self._forget_requests()

    def forget(self, request: str) -> None:
        """A request ended, and what was due then failed: vLLM frees its blocks now, so that nothing that is still
        being stored of them is kept. Must not fail itself."""
        if (tracked := self._tracked.pop(request, None)) is not None:
            self._let_go(tracked)
        self._orders.finishing.discard(request)  # vLLM does not wait for it
        self._ending.discard(request)
        self._take_back(self._orders.stores, {request})
        for under_way in self._under_way.values():
            under_way.failed |= under_way.is_store and under_way.request == request
        self._loads.cancel(request, self._orders)

    def reset(self) -> None:
        """Forget all KV. What requests under way still compute is not stored (their prefix may be outdated), and
        what is being loaded for them is not used."""
        self._placement.outdate()
        self._hierarchy.reset()
        self._forget_requests()
        self._loads.outdate(self._orders)

    @property
    def block_tokens(self) -> int:
        """Tokens of one of the engine's blocks."""
        return self._block_tokens

    def ask(self, asked: Question) -> None:
        """What workers shall look at in this step goes with its orders, whatever becomes of the others."""
        self._orders.asked = asked

    def taint(self, request: str) -> None:
        """Nothing that a request computes is exact: it began on KV of other weights."""
        tracked = self._tracked.get(request)
        if tracked is not None:
            tracked.taint(0)

    @property
    def memory_tokens(self) -> int:
        """Tokens that memory has room for."""
        return self._hierarchy.pages * self._hierarchy.page_tokens

    @property
    def unconfirmed(self) -> bool:
        """Whether some KV that is kept, or being stored, waits to be confirmed."""
        return self._placement.unconfirmed > 0 or bool(self._storing)

    def confirm(self, number: int) -> None:
        """As `Placement.confirm`."""
        self._placement.confirm(number)

    def outdate(self) -> None:
        """Drop all KV that is not confirmed, and what requests under way still load and store."""
        self._placement.outdate()
        self.distrust()
        self._loads.outdate(self._orders)

    @property
    def requests(self) -> set[str]:
        """All that were looked up and have not ended."""
        return set(self._tracked)

    def _forget_requests(self) -> None:
        for tracked in self._tracked.values():
            if tracked is not None:
                self._let_go(tracked)
        self._tracked = dict.fromkeys(self._tracked)

    def _hold(self, tracked: Tracked, chunks: Sequence[Chunk]) -> None:
        """Keep what a lookup has found, and nothing else, for a request, until it is used or looked up again."""
        if tuple(chunks) != tracked.held:
            self._hierarchy.pin(chunks)
            self._hierarchy.unpin(tracked.held)
            tracked.held = tuple(chunks)

    def _let_go(self, tracked: Tracked) -> None:
        """Nothing is kept for a request any more."""
        self._hold(tracked, ())
        self._placement.let_go(tracked.fetch, tracked.gather)

    def _note(self, report: StepReport) -> None:
        for work, seconds in report.prefills:
            self._placement.gate.prefill.note(work, seconds)
        for tokens, seconds in report.copies:
            self._placement.gate.copy.note(tokens, seconds)
        for work, seconds in report.fusions:
            self._placement.gate.fuse.note(work, seconds)
        for request in report.unfused:
            self._loads.unfused(request)
        if report.unfused and self.fusing is not None:
            self.fusing.failed(len(report.unfused))
        for job, workers in report.done.items():
            self._done(job, workers, failed=job in report.failed)

    def _done(self, job: int, workers: int, *, failed: bool) -> None:
        """So many workers have done a job; with the last it is over."""
        if (under_way := self._under_way.get(job)) is not None:
            under_way.workers -= workers
            under_way.failed |= failed
            if under_way.workers <= 0:
                self._job_over(job, under_way)

    def _job_over(self, job: int, under_way: UnderWay) -> None:
        del self._under_way[job]
        if under_way.is_store:
            self._storing[under_way.request] -= 1
            if not self._storing[under_way.request]:
                del self._storing[under_way.request]
        try:
            self._settle(under_way)
        except Exception as error:  # one job's trouble must not lose the others
            self._faults.note("settle", error)
        if not under_way.is_store:
            self._loads.job_over(under_way.request, job, self._orders, failed=under_way.failed)

    def _received(self, request: str) -> None:
        """A request has what it waited for, or will compute it."""
        load, tracked = self._loads.received(request, self._orders), self._tracked.get(request)
        if load is None:
            return
        if load.failed or load.unwanted or tracked is None:
            for job in load.after:
                self._fail(job)
            if tracked is not None:
                tracked.refused = True
                tracked.sources, tracked.mended = {}, 0
            return
        self._orders.stores += load.after
        for tier, tokens in tracked.sources.items():
            self._metrics.count(m.HIT_TOKENS, tokens, tier=tier)

    def _copies_of_hot(
        self, tracked: Tracked, hot: Sequence[Chunk], places: dict[Chunk, int], blocks: list[int]
    ) -> Job:
        """A job that copies chunks to the device tier, from the engine's cache, once they are loaded there."""
        where = [slots_between(blocks, places[c], places[c] + len(c), self._block_tokens) for c in hot]
        job = self._new_job(
            tracked, rows(hot, self._hierarchy.page_tokens, device=True), np.concatenate(where), device=True
        )
        pages = [chunk.device for chunk in hot]
        self._give_out(job, UnderWay(job.request, list(hot), self._workers, is_store=True, pages=pages))
        return job

    def _order_store(self, tracked: Tracked, new: list[tuple[int, Chunk]]) -> None:
        """Order the store of reserved chunks, each with its first position."""
        chunks = [chunk for _, chunk in new]
        slots = [slots_between(tracked.blocks, at, at + len(chunk), self._block_tokens) for at, chunk in new]
        job = self._new_job(tracked, rows(chunks, self._hierarchy.page_tokens), np.concatenate(slots))
        tail, last = tracked.tail, chunks[-1]
        covers = tail is not None and any(chunk.parent is tail.parent for chunk in chunks)
        under_way = UnderWay(
            job.request,
            chunks,
            self._workers,
            is_store=True,
            superseded=tail if covers else None,
            hints=tracked.hints,
            starts=[at for at, _ in new],
            namespace=tracked.namespace,
            tenant=tracked.tenant,
            confirmed_by=self._confirmed_by(),
        )
        self._give_out(job, under_way)
        self._orders.stores.append(job)
        if last.open:
            tracked.tail = last
        elif covers:
            tracked.tail = None

    def _give_out(self, job: Job, under_way: UnderWay) -> None:
        self._under_way[job.id] = under_way
        if under_way.is_store:
            self._storing[job.request] += 1

    def _take_back(self, jobs: list[Job], requests: Container[str]) -> None:
        """Jobs of some requests that nobody was told of fail."""
        for job in [job for job in jobs if job.request in requests]:
            jobs.remove(job)
            self._fail(job)

    def _fail(self, job: Job) -> None:
        under_way = self._under_way[job.id]
        under_way.failed = True
        self._job_over(job.id, under_way)

    def _keep(
        self, request: str, hints: Hints, tenant: bytes, chunks: Sequence[Chunk], starts: Sequence[int]
    ) -> None:
        """Pin chunks as a request asks."""
        if hints.pin is None:
            return
        until = self._clock() + hints.pin.seconds
        for chunk, start in zip(chunks, starts, strict=True):
            if (hints.pin.end is not None and start >= hints.pin.end) or chunk not in self._hierarchy:
                return
            if not self._hierarchy.holds.hold(hints.pin.owner, chunk, until, tenant):
                self._faults.note("pins", PINNED_ALL)
                tracked = self._tracked.get(request)
                if tracked is not None:
                    tracked.hints = with_problem(tracked.hints, PINNED_ALL)
                return

    def _settle(self, done: UnderWay) -> None:
        if not done.is_store:
            self._hierarchy.unpin(done.chunks)
            if done.failed:
                self._hierarchy.lose_copies(done.copies)
        elif done.pages:
            assert self._hierarchy.device is not None
            for chunk, pages in zip(done.chunks, done.pages, strict=True):
                self._hierarchy.device.made(chunk, pages, well=not done.failed)
        elif done.failed:
            for chunk in reversed(done.chunks):
                self._hierarchy.abandon(chunk)
        else:
            self._stored(done)

    def _stored(self, done: UnderWay) -> None:
        for chunk in done.chunks:
            self._hierarchy.commit(chunk)
            self._metrics.count(m.STORED_TOKENS, len(chunk))
            if done.hints.ttl is not None and chunk in self._hierarchy:
                self._hierarchy.holds.expire(chunk, self._clock() + done.hints.ttl)
        self._keep(done.request, done.hints, done.tenant, done.chunks, done.starts)
        self._placement.stored(done.namespace, zip(done.starts, done.chunks, strict=True), after=done.confirmed_by)
        if done.superseded is not None:
            self._hierarchy.discard(done.superseded)

    def _new_job(
        self,
        tracked: Tracked,
        tier_rows: Indices,
        slots: Indices,
        *,
        device: bool = False,
        shifts: Indices | None = None,
        fused: bool = False,
    ) -> Job:
        if len(tier_rows) != len(slots):
            raise ValueError(f"job: {len(tier_rows)} rows for {len(slots)} slots")
        self._jobs += 1
        return Job(self._jobs, tier_rows, slots, tracked.request.request_id, device, shifts, fused)
