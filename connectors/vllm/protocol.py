"""What the scheduler side and the worker side tell each other, once a step. Plain data, pickled by vLLM."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Job:
    """Copy the KV of some tokens. `rows[i]`: where token i stands in the memory tier (page * tokens a page +
    offset); `slots[i]`: where in the engine's cache (block * tokens a block + offset); both int64 [n].

    `finishes`: the request whose blocks vLLM keeps until this store is done. `device`: the rows are of the device
    tier, not of the memory tier.
    """

    id: int
    rows: Indices
    slots: Indices
    finishes: str | None = None
    device: bool = False


@dataclass
class StepOrders(KVConnectorMetadata):
    """Scheduler side to workers: loads before the forward, stores after it.

    `invalid_blocks`: blocks that vLLM was promised and will not get; workers report them as failed loads.
    `tokens`: that the forward computes.
    """

    loads: list[Job] = field(default_factory=list)
    stores: list[Job] = field(default_factory=list)
    invalid_blocks: set[int] = field(default_factory=set)
    block_tokens: int = 0
    tokens: int = 0


@dataclass
class StepReport(KVConnectorWorkerMetadata):
    """Workers to scheduler side: how many workers have done a job, and jobs that failed in any of them.

    `tainted`: a forward ran on blocks whose KV never came. `prefills`, `copies`: (tokens, seconds) of forwards and
    of loads, for the gate.
    """

    done: dict[int, int] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    tainted: bool = False
    prefills: list[tuple[int, float]] = field(default_factory=list)
    copies: list[tuple[int, float]] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "StepReport":
        """The reports of two workers, or of two groups of workers, as one."""
        assert isinstance(other, StepReport)
        done = dict(self.done)
        for job, workers in other.done.items():
            done[job] = done.get(job, 0) + workers
        return StepReport(
            done,
            self.failed | other.failed,
            self.tainted or other.tainted,
            self.prefills + other.prefills,
            self.copies + other.copies,
        )


@dataclass
class Handshake(KVConnectorHandshakeMetadata):
    """A worker to the scheduler side, once at start: why this worker cannot take part, or None, and which
    segment it maps (`Segment.identity`)."""

    refusal: str | None
    segment: tuple[str, int, int] | None = None
