"""What every way up from the lower tiers into memory has in common: questions, reads, deadlines, and who waits.

A lift asks (one question a tier, where the tier must be asked), reads, and is over when all has come or its
deadline has passed. What comes later is there for the next request. Lifts that lack the same chunk wait for the
same read.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ragkv.kvstore import metrics as m
from ragkv.kvstore.catalogue import Chunk
from ragkv.kvstore.codec import Header
from ragkv.kvstore.gate import Gate
from ragkv.kvstore.hierarchy import Hierarchy
from ragkv.kvstore.metrics import Metrics
from ragkv.kvstore.payloads import Payloads
from ragkv.kvstore.tier import StoreTier
from ragkv.kvstore.tier_jobs import Wanted

BATCH_BYTES = 8 << 20  # read by one job: enough to be quick, and small enough for several threads to share


@dataclass(eq=False, slots=True, kw_only=True)
class Lift:
    """What is being brought up for a request. `answers`: by tier, which keys it holds. `sources`: the tier that
    each chunk came from. `waiting_for`: a tier for each question and each small read that is not answered yet.
    `over`: the request need not wait any more; `kept`: chunks that have come, and are pinned until it has used
    them; `gone`: it will not. `probes`: it does not pay, but somebody has to try. `spent`: seconds that
    tiers needed up to `since`, when they were last given something to do."""

    namespace: bytes
    began: float
    deadline: float
    answers: dict[str, dict[bytes, bool]] = field(default_factory=dict)
    asking: int = 1
    loading: int = 1
    sizes: dict[str, int] = field(default_factory=dict)
    sources: dict[Chunk, str] = field(default_factory=dict)
    waiting_for: list[StoreTier] = field(default_factory=list)
    over: bool = False
    kept: list[Chunk] = field(default_factory=list)
    gone: bool = False
    probes: bool = False
    since: float = 0.0
    spent: float = 0.0
    result: str = "missed"


L = TypeVar("L", bound=Lift)


@dataclass(frozen=True, slots=True)
class Read:
    """A reserved chunk, the tier that has it, and what to read. `beside`: to be read in the same job, after all
    that the job wants; nobody waits for what becomes of it."""

    chunk: Chunk
    tier: StoreTier
    wanted: Wanted
    beside: Wanted | None = None


class Lifts(ABC, Generic[L]):
    """`tiers`: from the quickest to the slowest. `deadline`: seconds that a request may wait."""

    def __init__(
        self,
        hierarchy: Hierarchy,
        payloads: Payloads,
        tiers: Sequence[StoreTier],
        gate: Gate,
        metrics: Metrics,
        clock: Callable[[], float],
        deadline: float,
    ) -> None:
        self._hierarchy, self._payloads, self._tiers = hierarchy, payloads, tuple(tiers)
        self._gate, self._metrics, self._clock, self._deadline = gate, metrics, clock, deadline
        self._loading: dict[Chunk, list[L]] = {}

    def waits(self, lift: L) -> bool:
        """Whether a request should go on waiting."""
        if not lift.over and self._clock() >= lift.deadline:
            reads = {
                first.sources[chunk] for chunk, (first, *more) in self._loading.items() if lift in (first, *more)
            }
            for tier in self._tiers:
                if tier in lift.waiting_for or tier.name in reads:
                    tier.late()
            self._end(lift, "deadline")
        return not lift.over

    def let_go(self, lift: L) -> None:
        """The request has what it wants of it, or wants nothing any more."""
        kept, lift.kept, lift.gone = lift.kept, [], True
        self._hierarchy.unpin(kept)

    @abstractmethod
    def _load(self, lift: L) -> None:
        """All answers are in: order the reads."""

    def _complete(self, lift: L) -> None:
        """All reads have ended: put in place what could not be until now."""
        return

    def _declines(self, lift: L, tokens: int, size: int, start: int = 0) -> bool:
        """Whether bringing up `tokens` tokens from a position on, `size` bytes, would not pay even from the
        quickest tier."""
        quickest = next(tier.name for tier in self._tiers if tier.readable)
        lift.probes = not self._gate.pays(tokens, {quickest: size}, start)
        if self._gate.allows(tokens, quickest, {quickest: size}, start):
            return False
        self._metrics.count(m.GATE_DECISIONS, tier=quickest, decision="decline")
        return True

    def _ask(self, lift: L, keys: list[bytes]) -> None:
        """Find out which tiers hold which keys."""
        for tier in self._tiers:
            known = {key: tier.knows(key) for key in keys}
            lift.answers[tier.name] = {key: bool(answer) for key, answer in known.items()}
            if unsure := [key for key, answer in known.items() if answer is None]:
                self._ask_tier(lift, tier, unsure)

    def _ask_tier(self, lift: L, tier: StoreTier, keys: list[bytes]) -> None:
        def done(answers: list[bool]) -> None:
            lift.waiting_for.remove(tier)
            lift.answers[tier.name].update(zip(keys, answers, strict=True))
            self._answered(lift)

        lift.asking += 1
        lift.waiting_for.append(tier)
        tier.ask(keys, done)

    def _answered(self, lift: L) -> None:
        """One answer is in. With the last: load what is there, unless the request has given up."""
        lift.asking -= 1
        if lift.asking:
            return
        self._spend(lift)
        if not lift.over:
            self._load(lift)
        self._loaded(lift)

    def _found(self, lift: L) -> bool:
        """Whether any answer says so far that something is there, or one is still to come."""
        return lift.asking > 1 or any(any(answers.values()) for answers in lift.answers.values())

    def _holder(self, lift: L, key: bytes) -> StoreTier | None:
        return next((tier for tier in self._tiers if lift.answers[tier.name].get(key)), None)

    def _worth(self, lift: L, gain: int, sizes: dict[str, int], start: int = 0) -> bool:
        """Whether `gain` tokens from a position on are worth reading so many bytes of each tier; noted."""
        slowest = [tier.name for tier in self._tiers if tier.name in sizes][-1]
        if gain > 0 and self._gate.small(gain):
            self._metrics.count(m.GATE_DECISIONS, tier=slowest, decision="small")
            return False
        allowed = gain > 0 and (lift.probes or self._gate.allows(gain, slowest, sizes, start))
        self._metrics.count(m.GATE_DECISIONS, tier=slowest, decision="load" if allowed else "decline")
        if allowed:
            lift.sizes |= sizes
        else:
            lift.result = "declined"
        return allowed

    def _join(self, lift: L, chunk: Chunk) -> None:
        """Wait for a read that is under way."""
        self._loading[chunk].append(lift)
        lift.loading += 1

    def _read(self, lift: L, reads: Sequence[Read], batch_bytes: int) -> None:
        """Order reads, in batches of one tier and some `batch_bytes`."""
        batch: list[Read] = []
        size = 0
        for read in reads:
            if batch and (read.tier is not batch[-1].tier or size >= batch_bytes):
                self._read_batch(batch)
                batch, size = [], 0
            batch.append(read)
            size += self._payloads.pages.size(read.chunk)
            self._loading[read.chunk] = [lift]
            lift.loading += 1
            lift.sources[read.chunk] = read.tier.name
        if batch:
            self._read_batch(batch)

    def _read_batch(self, batch: list[Read]) -> None:
        tier = batch[0].tier

        def done(found: list[Any]) -> None:
            for read, header in zip(batch, found, strict=False):
                if header is None:
                    self._hierarchy.abandon(read.chunk)
                else:
                    self._arrived(read.chunk, tier, header, self._loading[read.chunk])
                for lift in self._loading.pop(read.chunk):
                    lift.result = lift.result if header is None else "loaded"
                    self._loaded(lift)

        beside = [read.beside for read in batch if read.beside is not None]
        tier.read([read.wanted for read in batch] + beside, done)

    def _arrived(self, chunk: Chunk, tier: StoreTier, header: Header, lifts: Sequence[L]) -> None:
        """A chunk has come; it stays at least until those who wait for it have used it."""
        chunk.below |= tier.bit
        for lift in lifts:
            if not lift.over and not lift.gone and chunk in self._hierarchy:
                self._hierarchy.pin([chunk])
                lift.kept.append(chunk)
        self._hierarchy.commit(chunk)
        if header.expires and chunk in self._hierarchy:
            left = header.expires - self._payloads.wall()
            self._hierarchy.holds.expire(chunk, self._clock() + left)
        self._metrics.count(m.PROMOTED_TOKENS, len(chunk), tier=tier.name)

    def _loaded(self, lift: L) -> None:
        """One read has ended, well or not. With the last, the lift is over."""
        lift.loading -= 1
        if lift.loading:
            return
        self._spend(lift)
        self._complete(lift)
        if lift.result == "loaded" and len(lift.sizes) == 1:  # else it is not clear whose time it was
            ((name, size),) = lift.sizes.items()
            self._gate.tier(name).note(size, lift.spent)
        if not lift.over:
            self._end(lift, lift.result)

    def _spend(self, lift: L) -> None:
        """The last of what was ordered is answered: count the time until it was, without the time that the answer
        lay here, since this thread is woken once a step of the engine, whatever that computes."""
        answered = max((tier.answered for tier in self._tiers), default=0.0)
        if answered > lift.since:
            lift.spent += answered - lift.since
        lift.since = self._clock()

    def _end(self, lift: L, result: str) -> None:
        lift.over = True
        self._metrics.count(m.WAITS, result=result)
        self._metrics.observe(m.WAIT_SECONDS, max(0.0, self._clock() - lift.began))
