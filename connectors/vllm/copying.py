"""Copies on a worker: jobs are queued and copied in slices, a bounded number of bytes a step while others compute.

A slice is ordered and not waited for; its ticket says when it is over. A job is over when all its slices are. A
failed job is over when none of its slices runs any more: only then may its pages and blocks be given to others.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from ragkv.connectors.vllm.error_boundary import Faults
from ragkv.connectors.vllm.messages import Job, StepOrders
from ragkv.connectors.vllm.streams import Ticket
from ragkv.connectors.vllm.transfer import Mover, job_slices
from ragkv.errors import RagKVError


@dataclass(eq=False, slots=True)
class Running:
    """A job that was ordered. `began`: ns since 1970; `seconds`: that its ended slices took, if known."""

    job: Job
    is_load: bool
    began: int
    left: deque[slice]
    tickets: list[Ticket] = field(default_factory=list)
    seconds: float = 0.0
    failed: bool = False


class Copier:
    """`movers`: of the memory tier, by group of layers, and of the device tier (`DEVICE_MOVER`), if there are any.
    `page_tokens`: by group; `token_bytes`: of a token's KV on this worker; `step_bytes`: most that a step copies
    for requests that others wait beside."""

    def __init__(
        self,
        movers: Mapping[int, Mover],
        page_tokens: Mapping[int, int],
        token_bytes: int,
        step_bytes: int,
        faults: Faults,
    ) -> None:
        self._movers, self._page_tokens, self._faults = dict(movers), page_tokens, faults
        self._written: set[int] = set()  # pages of the device tier, since it is there
        self._step_tokens = max(1, step_bytes // token_bytes)
        self._queues: dict[bool, deque[Running]] = {True: deque(), False: deque()}  # loads, stores
        self._ordered: list[Running] = []

    def add(self, jobs: Iterable[Job], *, is_load: bool) -> None:
        """Queue jobs."""
        for job in jobs:
            mover = self._movers.get(job.mover)
            most = self._step_tokens if mover is None else min(self._step_tokens, mover.most_tokens)
            left = deque(job_slices(job.rows, self._page_tokens[job.group], most))
            self._queues[is_load].append(Running(job, is_load, time.time_ns(), left))

    def stores_left(self, request: str) -> bool:
        """Whether a store of that request is not over."""
        return any(each.job.request == request and not each.is_load for each in self._all())

    def cancel(self, request: str) -> None:
        """The loads of a request that are not over end as failed, as soon as nothing of them runs."""
        for each in self._all():
            if each.is_load and each.job.request == request:
                each.failed = True
                each.left.clear()

    def flush(self, requests: set[str]) -> None:
        """Order the rest of some requests' stores at once, so that later forwards write their blocks after it."""
        self._order_now(lambda job: job.request in requests)
        for mover in self._movers.values():
            mover.fence_stores()

    def carry_out(self, orders: StepOrders) -> None:
        """Order the slices of this step: loads first, and at least one slice of a store."""
        for number in self._order_now(lambda job: job.at_once):
            if number in self._movers:
                self._movers[number].fence_stores()
        budget = self._step_tokens
        for is_load in (True, False):
            queue, first = self._queues[is_load], not is_load
            while queue and (first or budget > 0 or not self._shared(queue[0], orders)):
                first = False
                if queue[0].left:
                    budget -= self._order(queue[0], whole=not self._shared(queue[0], orders))
                if not queue[0].left:
                    self._ordered.append(queue.popleft())

    def _order_now(self, due: Callable[[Job], bool]) -> set[int]:
        """Order the whole rest of some stores; the movers that carry them out."""
        found = [each for each in self._queues[False] if due(each.job)]
        for each in found:
            self._queues[False].remove(each)
            if each.left:
                self._order(each, whole=True)
            self._ordered.append(each)
        return {each.job.mover for each in found}

    def collect(self) -> list[Running]:
        """The jobs that are over since the last call."""
        over: list[Running] = []
        still: list[Running] = []
        for each in self._ordered:
            (over if self._is_over(each) else still).append(each)
        self._ordered = still
        return over

    def equip(self, movers: Mapping[int, Mover]) -> None:
        """Copy by these movers from now on; without any, orders fail. Waits for all that was ordered."""
        for mover in self._movers.values():
            mover.close()
        self._movers = dict(movers)
        self._written.clear()

    @property
    def equipped(self) -> bool:
        """Whether there are movers."""
        return bool(self._movers)

    def _all(self) -> Iterable[Running]:
        yield from self._ordered
        for queue in self._queues.values():
            yield from queue

    @staticmethod
    def _shared(each: Running, orders: StepOrders) -> bool:
        """Whether tokens of other requests are computed in this step."""
        return bool(orders.tokens) and (each.is_load or each.job.request != orders.alone)

    def _order(self, each: Running, *, whole: bool) -> int:
        """Order the next slice of a job, or the `whole` rest at once; returns its tokens. If that raises, the job
        has failed."""
        part, job = each.left.popleft(), each.job
        if whole and each.left:
            part = slice(part.start, each.left[-1].stop)
            each.left.clear()
        mover = self._movers.get(job.mover)
        try:
            if mover is None:
                raise RagKVError("orders without a tier to carry them out")
            pages = np.unique(job.rows[part] // self._page_tokens[job.group]).tolist() if job.device else []
            if each.is_load and not self._written.issuperset(pages):
                raise RagKVError("the device tier was emptied since this was copied there")
            rows, slots = torch.from_numpy(job.rows[part]), torch.from_numpy(job.slots[part])
            move: Callable[..., Ticket] = mover.load if each.is_load else mover.store
            if job.shifts is None:
                each.tickets.append(move(rows, slots))
            else:
                each.tickets.append(move(rows, slots, torch.from_numpy(job.shifts[part])))
            self._written.update(pages)
        except Exception as error:  # whatever it is: this job failed, and is reported so
            self._faults.note("load" if each.is_load else "store", error)
            self._fail(each, mover)
        return int(part.stop - part.start)

    def _fail(self, each: Running, mover: Mover | None) -> None:
        each.failed = True
        each.left.clear()
        each.tickets = [] if mover is None else [mover.ordered("load" if each.is_load else "store")]

    def _is_over(self, each: Running) -> bool:
        try:
            while each.tickets and each.tickets[0].query():
                each.seconds += each.tickets.pop(0).seconds() or 0.0
        except Exception as error:  # the device reports what went wrong since the copy was ordered
            self._faults.note("copy", error)
            each.failed, each.tickets = True, []
        return not each.tickets
