"""Requests that wait for their KV: what was ordered for each, and what becomes of it.

Workers name a request as received once its loads have ended. Where a fusion follows, it is ordered only when the
loads have ended well on every worker, so that all of them fuse in the same step; else the request is given up.
"""

from dataclasses import dataclass, field

from ragkv.connectors.vllm.messages import Fusion, Job, StepOrders


@dataclass(slots=True)
class PendingLoad:
    """What one request waits for."""

    request: str
    blocks: list[int]  # those that vLLM was promised KV in: the request's own
    jobs: set[int]  # that are not over on every worker
    fusion: Fusion | None = None
    after: list[Job] = field(default_factory=list)  # stores that read what it loads
    failed: bool = False  # vLLM is told to compute it
    unwanted: bool = False  # the request has ended, or what it loads is outdated
    outdated: bool = False


class Loads:
    """The loads of an engine that vLLM waits for."""

    def __init__(self) -> None:
        self._loads: dict[str, PendingLoad] = {}
        self._ready: list[PendingLoad] = []  # to be fused, and not ordered yet

    def __len__(self) -> int:
        return len(self._loads)

    def __contains__(self, request: str) -> bool:
        return request in self._loads

    def get(self, request: str) -> PendingLoad | None:
        """What a request waits for, or None."""
        return self._loads.get(request)

    def begin(self, load: PendingLoad) -> None:
        """A request waits from now on."""
        self._loads[load.request] = load

    def job_over(self, request: str, job: int, orders: StepOrders, *, failed: bool) -> None:
        """A job has ended on every worker. With the last, a fusion is due, or the request is given up."""
        load = self._loads.get(request)
        if load is None or job not in load.jobs:
            return
        load.jobs.remove(job)
        load.failed |= failed
        if load.jobs or load.fusion is None:
            return
        if load.failed or load.unwanted:
            self._give_up(load, orders)
        else:
            self._ready.append(load)

    def fusions(self, *, busy: bool) -> list[Fusion]:
        """The fusions of the next step: where others compute, one."""
        due, self._ready = (self._ready[:1], self._ready[1:]) if busy else (self._ready, [])
        return [load.fusion for load in due if load.fusion is not None]

    def unfused(self, request: str) -> None:
        """A worker could not fuse."""
        if (load := self._loads.get(request)) is not None:
            load.failed = True

    def cancel(self, request: str, orders: StepOrders) -> None:
        """What a request waits for shall end soon. It is received all the same."""
        load = self._loads.get(request)
        if load is None:
            return
        load.unwanted = True
        if load.jobs:
            orders.cancelled.add(request)
        if load in self._ready:
            self._ready.remove(load)
            self._give_up(load, orders)

    def outdate(self, orders: StepOrders) -> None:
        """Nothing that is being loaded may be used."""
        for request, load in self._loads.items():
            load.outdated = True
            self.cancel(request, orders)

    def received(self, request: str, orders: StepOrders) -> PendingLoad | None:
        """Every worker has named a request as received: what it waited for, `failed` or not. None: it must wait
        on, until workers have named it again; or it never waited."""
        load = self._loads.get(request)
        if load is not None and load.outdated and not load.failed:
            self._give_up(load, orders)
            return None
        return self._loads.pop(request, None)

    def _give_up(self, load: PendingLoad, orders: StepOrders) -> None:
        load.failed = True
        orders.given_up[load.request] = load.blocks
