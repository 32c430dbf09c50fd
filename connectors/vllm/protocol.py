"""What the scheduler side and the worker side tell each other, once a step. Plain data, pickled by vLLM."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

Indices = npt.NDArray[np.int64]
Run = tuple[int, int]  # positions, from and up to
Times = tuple[int, int, int, bool]  # began, ended (ns since 1970), of how many workers, whether one failed
TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Job:
    """Copy the KV of some tokens. `rows[i]`: where token i stands in the memory tier (page * tokens a page +
    offset); `slots[i]`: where in the engine's cache (block * tokens a block + offset); both int64 [n].
    `shifts[i]`: how many positions further on it stands now than when it was computed, for loads of moved tokens.

    `finishes`: the request whose blocks vLLM keeps until this store is done. `device`: the rows are of the device
    tier, not of the memory tier. `timed`: workers shall report when it began and ended.
    """

    id: int
    rows: Indices
    slots: Indices
    finishes: str | None = None
    device: bool = False
    shifts: Indices | None = None
    timed: bool = False


@dataclass(frozen=True, slots=True)
class Fusion:
    """Mend what a request was given from elsewhere, after the loads and before the step's own forward.

    `tokens`: int32, of the prompt, up to the end of the tokens that have a block; `blocks`: int64, the request's.
    The range from `start` to `end` is fused: `runs` of it were loaded, at most `budget` of their tokens are
    computed again, and all others (the gaps) are computed. From `end` on the engine computes. `timed`: the
    number under which workers shall report when it began and ended; 0: they need not.
    """

    tokens: TokenIds
    blocks: Indices
    start: int
    end: int
    runs: tuple[Run, ...]
    budget: int
    selection: str
    work: float = 0.0
    timed: int = 0


@dataclass
class StepOrders(KVConnectorMetadata):
    """Scheduler side to workers: loads before the forward, stores after it.

    `invalid_blocks`: blocks that vLLM was promised and will not get; workers report them as failed loads.
    `tokens`: that the forward computes. `fusions`: between loads and forward.
    """

    loads: list[Job] = field(default_factory=list)
    stores: list[Job] = field(default_factory=list)
    invalid_blocks: set[int] = field(default_factory=set)
    block_tokens: int = 0
    tokens: int = 0
    fusions: list[Fusion] = field(default_factory=list)


@dataclass
class StepReport(KVConnectorWorkerMetadata):
    """Workers to scheduler side: how many workers have done a job, and jobs that failed in any of them.

    `tainted`: a forward ran on blocks whose KV never came. `prefills`, `copies`, `fusions`: (tokens, seconds) of
    forwards, of loads and of fusions (their work), for the gate. `unfused`: fusions that failed. `times`: of what
    was to be timed, by number. `handshakes`: of workers whose handshake could not be told at start.
    """

    done: dict[int, int] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    tainted: bool = False
    prefills: list[tuple[int, float]] = field(default_factory=list)
    copies: list[tuple[int, float]] = field(default_factory=list)
    fusions: list[tuple[float, float]] = field(default_factory=list)
    unfused: int = 0
    times: dict[int, Times] = field(default_factory=dict)
    handshakes: list["Handshake"] = field(default_factory=list)

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
            self.fusions + other.fusions,
            max(self.unfused, other.unfused),
            merge_times(dict(self.times), other.times),
            self.handshakes + other.handshakes,
        )


@dataclass
class Handshake(KVConnectorHandshakeMetadata):
    """A worker to the scheduler side, once at start: why this worker cannot take part, or None, which segment it
    maps (`Segment.identity`), and why it cannot fuse, or None."""

    refusal: str | None
    segment: tuple[str, int, int] | None = None
    no_fusion: str | None = None


def merge_times(into: dict[int, Times], more: Mapping[int, Times]) -> dict[int, Times]:
    """`into`, with other workers' times of the same numbers: from the first that began to the last that ended."""
    for number, (began, ended, workers, failed) in more.items():
        first, last, others, failed_there = into.get(number, (began, ended, 0, False))
        into[number] = min(first, began), max(last, ended), others + workers, failed or failed_there
    return into


def positions_of(runs: Sequence[Run]) -> Indices:
    """All positions of some runs, in their order; int64."""
    return np.concatenate([np.arange(start, end, dtype=np.int64) for start, end in runs])


def slots_of(blocks: npt.ArrayLike, positions: Indices, block_tokens: int) -> Indices:
    """Slots of some positions of a request with these blocks; int64."""
    found: Indices = np.asarray(blocks, dtype=np.int64)[positions // block_tokens]
    return found * block_tokens + positions % block_tokens


def slots_between(blocks: npt.ArrayLike, start: int, end: int, block_tokens: int) -> Indices:
    """Slots of the tokens from `start` to `end`."""
    return slots_of(blocks, np.arange(start, end, dtype=np.int64), block_tokens)
