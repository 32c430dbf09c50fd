"""Jobs: what workers were ordered to copy, who waits for it, and what becomes of it."""

from collections import Counter
from collections.abc import Callable, Collection, Container, Sequence
from dataclasses import dataclass

from ragkv.connectors.vllm.error_boundary import Faults
from ragkv.connectors.vllm.fusing import Fusing
from ragkv.connectors.vllm.listener import Listener
from ragkv.connectors.vllm.loading import Loads, PendingLoad
from ragkv.connectors.vllm.messages import Group, Job, Question, StepOrders, StepReport, Tables, slots_of
from ragkv.connectors.vllm.request_state import RequestState
from ragkv.kvstore import metrics as m
from ragkv.kvstore.cache import KVCache
from ragkv.kvstore.metrics import Metrics
from ragkv.kvstore.prompt import Load, Store


@dataclass(slots=True)
class InFlight:
    """A job that workers have been given."""

    request: str
    work: Load | Store
    copies: int  # that are not done yet: of each group on each worker
    jobs: list[int]  # one a group
    failed: bool = False

    @property
    def is_store(self) -> bool:
        """Whether it reads the engine's blocks."""
        return isinstance(self.work, Store)


class Jobs:
    """Orders in the making, and jobs in flight. `groups`: of the engine's layers, those of plane 0 first;
    `workers`: that must do each job; `confirmed_by`: the number that will confirm what has been computed until now
    (`KVCache.confirm`). `listener` is told what is done for requests."""

    def __init__(
        self,
        cache: KVCache,
        groups: Sequence[Group],
        workers: int,
        metrics: Metrics,
        faults: Faults,
        fusing: Fusing | None = None,
        confirmed_by: Callable[[], int] = lambda: 0,
        listener: Listener | None = None,
    ) -> None:
        self._cache, self._groups, self._workers = cache, tuple(groups), workers
        self._block_tokens = groups[0].block_tokens
        self._has_windows = any(group.plane for group in groups)
        self._metrics, self._faults = metrics, faults
        self.fusing, self._confirmed_by = fusing, confirmed_by
        self._listener = listener or Listener()
        self._states: dict[str, RequestState | None] = {}
        self._in_flight: dict[int, InFlight] = {}
        self._loads = Loads()
        self._storing: Counter[str] = Counter()  # stores in flight, by request
        self._ending: set[str] = set()  # ended requests whose blocks vLLM keeps until their stores are done
        self._orders = StepOrders(block_tokens=self._block_tokens)
        self._jobs = 0

    @property
    def has_pending_work(self) -> bool:
        """Whether workers have something to do, or to tell, that no request waits for."""
        return bool(self._storing) or self._orders.pending

    @property
    def has_pending_frees(self) -> bool:
        """Whether stores in flight keep blocks of requests that have ended."""
        return bool(self._ending)

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight, and no request waits."""
        return not (self._in_flight or self._loads or self.has_pending_work or self.has_pending_frees)

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
            self._listener.reported(report.times)
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
        self.invalidate_in_flight()
        for job, workers in report.done.items() if report is not None else ():
            self._done(job, workers, failed=True)
        self._ending.difference_update(sent)
        for request in received:
            self._loads.received(request, self._orders)
        return {request for request in received if request in self._loads}

    def invalidate_in_flight(self) -> None:
        """The state of requests may be wrong: keep nothing of what is being stored."""
        for job in self._in_flight.values():
            job.failed |= job.is_store
        self._forget_requests()

    def forget(self, request: str) -> None:
        """A request ended, and what was due then failed: vLLM frees its blocks now, so that nothing that is still
        being stored of them is kept. Must not fail itself."""
        if (state := self._states.pop(request, None)) is not None:
            self._cache.release(state.prompt)
        self._orders.finishing.discard(request)  # vLLM does not wait for it
        self._ending.discard(request)
        self._take_back(self._orders.stores, {request})
        for job in self._in_flight.values():
            job.failed |= job.is_store and job.request == request
        self._loads.cancel(request, self._orders)

    def reset(self) -> None:
        """Forget all KV. What requests under way still compute is not stored (their prefix may be outdated), and
        what is being loaded for them is not used."""
        self._cache.reset()
        self._forget_requests()
        self._loads.outdate(self._orders)

    @property
    def groups(self) -> Sequence[Group]:
        """The engine's groups of layers, those of plane 0 first."""
        return self._groups

    def ask(self, asked: Question) -> None:
        """What workers shall look at in this step goes with its orders, whatever becomes of the others."""
        self._orders.asked = asked

    def taint(self, request: str) -> None:
        """Nothing that a request computes is exact: it began on KV of other weights."""
        state = self._states.get(request)
        if state is not None:
            state.taint(0)

    @property
    def memory_tokens(self) -> int:
        """Tokens that memory has room for."""
        return self._cache.capacity

    @property
    def unconfirmed(self) -> bool:
        """Whether some KV that is kept, or being stored, waits to be confirmed."""
        return self._cache.unconfirmed > 0 or bool(self._storing)

    def confirm(self, number: int) -> None:
        """As `KVCache.confirm`."""
        self._cache.confirm(number)

    def outdate(self) -> None:
        """Drop all KV that is not confirmed, and what requests under way still load and store."""
        self._cache.invalidate()
        self.invalidate_in_flight()
        self._loads.outdate(self._orders)

    @property
    def requests(self) -> set[str]:
        """All that were looked up and have not ended."""
        return set(self._states)

    def _forget_requests(self) -> None:
        for state in self._states.values():
            if state is not None:
                self._cache.release(state.prompt)
        self._states = dict.fromkeys(self._states)

    def _note(self, report: StepReport) -> None:
        for work, seconds in report.prefills:
            self._cache.gate.prefill.note(work, seconds)
        for tokens, seconds in report.copies:
            self._cache.gate.copy.note(tokens, seconds)
        for work, seconds in report.fusions:
            self._cache.gate.fuse.note(work, seconds)
        for request in report.unfused:
            self._loads.unfused(request)
        if report.unfused and self.fusing is not None:
            self.fusing.failed(len(report.unfused))
        for job, workers in report.done.items():
            self._done(job, workers, failed=job in report.failed)

    def _done(self, number: int, workers: int, *, failed: bool) -> None:
        """So many workers have done a job; with the last it is over."""
        if (job := self._in_flight.get(number)) is not None:
            job.copies -= workers
            job.failed |= failed
            if job.copies <= 0:
                self._work_over(job)

    def _work_over(self, job: InFlight) -> None:
        for number in job.jobs:
            del self._in_flight[number]
        if job.is_store:
            self._storing[job.request] -= 1
            if not self._storing[job.request]:
                del self._storing[job.request]
        try:
            self._complete(job.work, ok=not job.failed)
        except Exception as error:  # one job's trouble must not lose the others
            self._faults.note("settle", error)
        if not job.is_store:
            self._loads.job_over(job.request, job.jobs[0], self._orders, failed=job.failed)

    def _complete(self, work: Load | Store, *, ok: bool) -> None:
        if isinstance(work, Store):
            self._cache.complete_store(work, ok=ok)
        else:
            self._cache.complete_load(work, ok=ok)

    def _received(self, request: str) -> None:
        """A request has what it waited for, or will compute it."""
        load, state = self._loads.received(request, self._orders), self._states.get(request)
        if load is None:
            return
        if load.failed or load.unwanted or state is None:
            self._drop(load)
            if state is not None:
                state.refused = True
                state.unload()
            return
        self._orders.stores += load.after
        fused = load.fusion.end - load.fusion.start if load.fusion is not None else 0  # in memory's; counted apart
        for tier, tokens in state.sources.items():
            self._metrics.count(m.HIT_TOKENS, tokens - (fused if tier == m.MEMORY else 0), tier=tier)

    def _new_jobs(
        self, state: RequestState, work: Load | Store, tables: Tables, *, fused: bool = False
    ) -> list[Job]:
        """Jobs that copy between a paged tier and a request's blocks, one for each group of the work's plane. From
        now on they are in flight. Work on a plane without layers is over at once."""
        shifts = work.shifts if isinstance(work, Load) else None
        at_once, jobs = isinstance(work, Store) and work.plane > 0, list[Job]()
        for group in self._groups:
            if group.plane == work.plane:
                slots = slots_of(tables[group.number], work.positions, group.block_tokens)
                if self._has_windows and len(slots) and slots.min() < group.block_tokens:
                    raise ValueError("tokens are to be copied that vLLM keeps no block for")
                self._jobs += 1
                request, timed = state.request.request_id, self._listener.times and not jobs
                more = work.device, shifts, fused, timed, group.number, at_once
                jobs.append(Job(self._jobs, work.rows, slots, request, *more))
        if not jobs:
            self._complete(work, ok=True)
            return jobs
        numbers = [job.id for job in jobs]
        in_flight = InFlight(jobs[0].request, work, self._workers * len(jobs), numbers)
        self._in_flight |= dict.fromkeys(numbers, in_flight)
        if in_flight.is_store:
            self._storing[in_flight.request] += 1
        self._listener.ordered(state, jobs[0], work)
        return jobs

    def _take_back(self, jobs: list[Job], requests: Container[str]) -> None:
        """Jobs of some requests that no worker was told of fail."""
        for job in [job for job in jobs if job.request in requests]:
            jobs.remove(job)
            self._fail(job)

    def _drop(self, load: PendingLoad) -> None:
        """Withdraw the stores and the fusion that were to follow a load that is not used."""
        for job in load.after:
            self._fail(job)
        if load.fusion is not None:
            self._listener.withdrawn(load.fusion.timed)

    def _fail(self, job: Job) -> None:
        self._listener.withdrawn(job.id)
        if (in_flight := self._in_flight.get(job.id)) is not None:  # else of work that has failed already
            in_flight.failed = True
            self._work_over(in_flight)
