"""What the scheduler side and the worker side tell each other, once a step. Plain data, pickled by vLLM."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

Indices = npt.NDArray[np.int64]
Tables = Sequence[list[int]]  # a request's blocks, by number of group; 0 where vLLM keeps none
DEVICE_MOVER = -1
Run = tuple[int, int]  # positions, from and up to
Times = tuple[int, int, int, bool]  # began, ended (ns since 1970), of how many workers, whether one failed
TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Job:
    """Copy the KV of some tokens of one request. `rows[i]`: where token i stands in the memory tier (page * tokens
    a page + offset); `slots[i]`: where in the engine's cache (block * tokens a block + offset); both int64 [n].
    `shifts[i]`: how many positions further on it stands now than when it was computed, for loads of moved tokens.

    `device`: the rows are of the device tier, not of the memory tier. `fused`: a fusion follows the request's
    loads, so their end is not the end of its waiting. `timed`: workers shall report when it began and ended.
    `group`: whose layers' blocks the slots are of. `at_once`: it is ordered whole in this step, and later forwards
    wait for it: they may write its blocks.
    """

    id: int
    rows: Indices
    slots: Indices
    request: str = ""
    device: bool = False
    shifts: Indices | None = None
    fused: bool = False
    timed: bool = False
    group: int = 0
    at_once: bool = False

    @property
    def mover(self) -> int:
        """Which mover carries it out: of its group, or of the device tier."""
        return DEVICE_MOVER if self.device else self.group


@dataclass(frozen=True, slots=True)
class Group:
    """One of vLLM's groups of layers, which have a block table of their own: its `number`, the plane that their KV
    belongs to, and tokens a block."""

    number: int
    plane: int
    block_tokens: int


@dataclass(frozen=True, slots=True)
class Fusion:
    """Mend what was loaded for a request from elsewhere, while the request still waits.

    `tokens`: int32, the prompt's first `end`; `blocks`: int64, the request's. The range from `start` to `end` is
    fused: `runs` of it were loaded, at most `budget` of their tokens are computed again, and all others (the gaps)
    are computed. `question`: int32, the prompt's last tokens, which a selection may look at from position `asked`
    on; there is room for all of them before `end`. `timed`: the number under which workers shall report when it
    began and ended; 0: they need not.
    """

    request: str
    tokens: TokenIds
    blocks: Indices
    start: int
    end: int
    runs: tuple[Run, ...]
    budget: int
    selection: str
    question: TokenIds
    asked: int
    work: float = 0.0
    timed: int = 0


class Question(NamedTuple):
    """What workers shall see of their weights. `look`: the number under which they look at all of them; 0: not.
    `sample`: the number of the round of samples that begins; 0: none does. `at_once`: KV waits for a round, which
    is done in one step. `give_up`: a round under way is over, and nothing of the weights is touched any more."""

    look: int = 0
    sample: int = 0
    at_once: bool = False
    give_up: bool = False


NOTHING_ASKED = Question()


@dataclass(frozen=True, slots=True)
class WeightsLook:
    """A worker's answer to a look. `number`: of the question; `fingerprint`: None where its model cannot be looked
    at."""

    number: int
    rank: int
    fingerprint: bytes | None


@dataclass(frozen=True, slots=True)
class WeightsSample:
    """A worker's answer to a round of samples. `number`: of the round; `same`: whether nothing differs from the
    last look."""

    number: int
    rank: int
    same: bool


@dataclass
class StepOrders(KVConnectorMetadata):
    """Scheduler side to workers, once a step. A load's request waits until every worker has named it as received;
    each names it exactly once: when its last load has ended, or its fusion, or as one of `given_up`.

    `fusions`: of requests whose loads have ended well on every worker. `given_up`: requests that will get nothing
    (more), with the blocks that vLLM must compute itself. `cancelled`: requests whose loads shall end as failed.
    `finishing`: requests that ended, whose blocks vLLM keeps until their stores are done. `preempted`: requests
    whose blocks are given to others in this step. `tokens`: that the forward computes, `work`: what they cost, in
    tokens at the beginning of a prompt; `alone`: the only request in it, or None. `asked`: what workers
    shall look at before the forward.
    """

    loads: list[Job] = field(default_factory=list)
    stores: list[Job] = field(default_factory=list)
    fusions: list[Fusion] = field(default_factory=list)
    given_up: dict[str, list[int]] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)
    finishing: set[str] = field(default_factory=set)
    preempted: set[str] = field(default_factory=set)
    block_tokens: int = 0
    tokens: int = 0
    work: float = 0.0
    alone: str | None = None
    asked: Question = NOTHING_ASKED

    @property
    def pending(self) -> bool:
        """Whether there is anything that workers must be told soon, forward or not."""
        return bool(self.loads or self.stores or self.fusions or self.given_up or self.cancelled or self.finishing)


@dataclass
class StepReport(KVConnectorWorkerMetadata):
    """Workers to scheduler side: how many workers have done a job, and jobs that failed in any of them.

    `prefills`, `copies`, `fusions`: (work, seconds) of forwards, (tokens, seconds) of loads (of a group of layers,
    the group's share of each token), (work, seconds) of fusions, for the gate. `unfused`: requests whose fusion
    failed. `times`: of what was to be timed, by number. `handshakes`: of workers whose handshake could not be told
    at start. `looks`: at the weights. `samples`: of the weights, of rounds that are over.
    """

    done: dict[int, int] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    prefills: list[tuple[float, float]] = field(default_factory=list)
    copies: list[tuple[float, float]] = field(default_factory=list)
    fusions: list[tuple[float, float]] = field(default_factory=list)
    unfused: set[str] = field(default_factory=set)
    times: dict[int, Times] = field(default_factory=dict)
    handshakes: list["Handshake"] = field(default_factory=list)
    looks: list[WeightsLook] = field(default_factory=list)
    samples: list[WeightsSample] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "StepReport":
        """The reports of two workers, or of two groups of workers, as one."""
        assert isinstance(other, StepReport)
        done = dict(self.done)
        for job, workers in other.done.items():
            done[job] = done.get(job, 0) + workers
        return StepReport(
            done,
            self.failed | other.failed,
            self.prefills + other.prefills,
            self.copies + other.copies,
            self.fusions + other.fusions,
            self.unfused | other.unfused,
            merge_times(dict(self.times), other.times),
            self.handshakes + other.handshakes,
            self.looks + other.looks,
            self.samples + other.samples,
        )


@dataclass
class Handshake(KVConnectorHandshakeMetadata):
    """A worker to the scheduler side, once at start: why this worker cannot take part, or None, which segment it
    maps (`Segment.identity`), and why it cannot fuse, or None; its tensor-parallel rank, and a fingerprint of the
    weights that it has loaded, None where they cannot be looked at."""

    refusal: str | None
    segment: tuple[str, int, int] | None = None
    no_fusion: str | None = None
    rank: int = 0
    weights: bytes | None = None


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
