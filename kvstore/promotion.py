"""Promotion: chunks from the lower tiers into memory, while a request waits.

A fetch asks which tiers hold what (one question a tier, where the tier must be asked), lets the gate decide,
reserves room, and reads. It is over when all has come or its deadline has passed; what comes later is there for
the next request. Fetches that lack the same chunk wait for the same read. What is asked for and read of a prompt
is in `ragkv.kvstore.prefix_lookup`, and of contents in `ragkv.kvstore.content_lookup`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ragkv.kvstore import metrics as m
from ragkv.kvstore.codec import ChunkCodec, Header
from ragkv.kvstore.gate import Gate
from ragkv.kvstore.io_pool import Completions, Wanted
from ragkv.kvstore.memory_tier import MemoryTier
from ragkv.kvstore.metrics import Metrics
from ragkv.kvstore.planes import Window
from ragkv.kvstore.prefix_tree import Chunk
from ragkv.kvstore.prompt import Fetch
from ragkv.kvstore.storage_tier import StorageTier

BATCH_BYTES = 8 << 20  # read by one job: enough to be quick, and small enough for several threads to share


@dataclass(frozen=True, slots=True)
class Read:
    """A reserved chunk, the tier that has it, and what to read. `beside`: to be read in the same job, after all
    that the job wants; no fetch waits for it."""

    chunk: Chunk
    tier: StorageTier
    wanted: Wanted
    beside: Wanted | None = None


class Promotion:
    """`tiers`: from the quickest to the slowest. `deadline`: seconds that a request may wait."""

    def __init__(
        self,
        memory: MemoryTier,
        codec: ChunkCodec,
        tiers: Sequence[StorageTier],
        gate: Gate,
        completions: Completions,
        metrics: Metrics,
        clock: Callable[[], float],
        deadline: float,
    ) -> None:
        self._memory, self._codec, self._tiers, self.gate = memory, codec, tuple(tiers), gate
        self._completions, self._metrics, self._clock, self._deadline = completions, metrics, clock, deadline
        self._token_bytes = codec.pages.token_bytes
        self.loading: dict[Chunk, list[Fetch]] = {}  # chunks that are being read, and who waits for them

    @property
    def readable(self) -> bool:
        """Whether any tier may be asked and read."""
        return any(tier.readable for tier in self._tiers)

    def begin(
        self,
        namespace: bytes,
        keys: Sequence[bytes],
        load: Callable[[Fetch], None],
        complete: Callable[[Fetch], bool] = lambda fetch: False,
        *,
        probes: bool,
        coming: bool,
    ) -> Fetch | None:
        """Find out which tiers hold which keys; then `load` orders reads, and `complete` is called when they have
        ended, and says whether it went on (`ask_again`). None where no tier has any, unless some chunk is `coming`
        that is waited for."""
        now = self._clock()
        fetch = Fetch(
            namespace=namespace,
            began=now,
            since=now,
            deadline=now + self._deadline,
            load=load,
            complete=complete,
            probes=probes,
        )
        self._find(fetch, keys)
        if not coming and not fetch.holders and fetch.asking == 1:
            return None
        self._answered(fetch)
        return fetch

    def ask_again(self, fetch: Fetch, keys: Sequence[bytes]) -> None:
        """In `complete`: find out which tiers hold more keys; then `load` and `complete` are called once more."""
        fetch.asking += 1
        fetch.loading += 1
        self._find(fetch, keys)
        self._answered(fetch)

    def waits(self, fetch: Fetch, answer_seconds: float = 0.0, load_seconds: float = 0.0) -> bool:
        """Whether a request should go on waiting. Blocks for at most `answer_seconds` while tiers have not said
        what they hold (mostly nothing, and an answer now saves the engine a step), and for at most `load_seconds`
        while they load (for an engine that has nothing else to do but ask again)."""
        begun = self._clock()
        while not fetch.over:
            seconds = max(load_seconds, answer_seconds if fetch.asking else 0.0)
            left = min(begun + seconds, fetch.deadline) - self._clock()
            if left <= 0 or not self._completions.drain(left):
                break
        if not fetch.over and self._clock() >= fetch.deadline:
            reads = {
                first.sources[chunk] for chunk, (first, *more) in self.loading.items() if fetch in (first, *more)
            }
            for tier in self._tiers:
                if tier in fetch.waiting_for or tier.name in reads:
                    tier.late()
            self._end(fetch, "deadline")
        return not fetch.over

    def let_go(self, fetch: Fetch) -> None:
        """The request has what it wants of it, or wants nothing any more: what has come may be evicted."""
        kept, fetch.kept, fetch.gone = fetch.kept, [], True
        self._memory.unpin(kept)

    def probes(self, tokens: int, lacking: int, start: int = 0) -> bool | None:
        """Whether bringing up `tokens` tokens from a position on, of which `lacking` must be read, is a probe: it
        would not pay even from the quickest tier, and is tried all the same. None: it is declined."""
        quickest = next(tier.name for tier in self._tiers if tier.readable)
        sizes = {quickest: lacking * self._token_bytes}
        pays = self.gate.pays(tokens, sizes, start)
        if self.gate.allows(tokens, quickest, sizes, start):
            return not pays
        self._metrics.count(m.GATE_DECISIONS, tier=quickest, decision="decline")
        return None

    def worth(self, fetch: Fetch, gain: int, tokens: dict[str, int], start: int = 0) -> bool:
        """Whether `gain` tokens from a position on are worth reading so many tokens of each tier; noted."""
        slowest = [tier.name for tier in self._tiers if tier.name in tokens][-1]
        sizes = {name: count * self._token_bytes for name, count in tokens.items()}
        if gain > 0 and self.gate.small(gain):
            decision = "small"
        elif gain > 0 and (fetch.probes or self.gate.allows(gain, slowest, sizes, start)):
            for name, size in sizes.items():
                fetch.sizes[name] = fetch.sizes.get(name, 0) + size
            decision = "load"
        else:
            decision, fetch.result = "decline", "declined"
        self._metrics.count(m.GATE_DECISIONS, tier=slowest, decision=decision)
        return decision == "load"

    def join(self, fetch: Fetch, chunk: Chunk) -> None:
        """Wait for a read that is under way."""
        self.loading[chunk].append(fetch)
        fetch.loading += 1

    def read(self, fetch: Fetch, reads: Sequence[Read]) -> None:
        """Order reads, in batches of one tier and some `BATCH_BYTES`."""
        batch, size = list[Read](), 0
        for each in reads:
            if batch and (each.tier is not batch[-1].tier or size >= BATCH_BYTES):
                self._read_batch(batch)
                batch, size = [], 0
            batch.append(each)
            size += self._codec.pages.size(each.chunk)
            self.loading[each.chunk] = [fetch]
            fetch.loading += 1
            fetch.sources[each.chunk] = each.tier.name
        if batch:
            self._read_batch(batch)

    def read_beside(
        self, fetch: Fetch, tier: StorageTier, wanted: Sequence[Wanted], done: Callable[[list[Any]], None]
    ) -> None:
        """Order small values to be read that no chunk waits for; `done` is called before the fetch may end."""

        def ended(found: list[Any]) -> None:
            fetch.waiting_for.remove(tier)
            done(found)
            self._loaded(fetch)

        fetch.loading += 1
        fetch.waiting_for.append(tier)
        tier.read(wanted, ended)

    def spend(self, fetch: Fetch) -> None:
        """The last of what was ordered is answered: count the time until it was, without the time that the answer
        lay here, since this thread is woken once a step of the engine, whatever that computes."""
        answered = max((tier.answered for tier in self._tiers), default=0.0)
        if answered > fetch.since:
            fetch.spent += answered - fetch.since
        fetch.since = self._clock()

    def _find(self, fetch: Fetch, keys: Sequence[bytes]) -> None:
        for tier in self._tiers:
            known = tier.known(keys)
            _note_holder(fetch, tier, known)
            if unsure := [key for key, answer in known.items() if answer is None]:
                self._ask(fetch, tier, unsure)

    def _ask(self, fetch: Fetch, tier: StorageTier, keys: list[bytes]) -> None:
        def done(answers: list[bool]) -> None:
            fetch.waiting_for.remove(tier)
            _note_holder(fetch, tier, dict(zip(keys, answers, strict=True)))
            self._answered(fetch)

        fetch.asking += 1
        fetch.waiting_for.append(tier)
        tier.ask(keys, done)

    def _answered(self, fetch: Fetch) -> None:
        """One answer is in. With the last: load what is there, unless the request has given up."""
        fetch.asking -= 1
        if fetch.asking:
            return
        self.spend(fetch)
        if not fetch.over:
            fetch.load(fetch)
        self._loaded(fetch)

    def _read_batch(self, batch: list[Read]) -> None:
        tier = batch[0].tier

        def done(found: list[Any]) -> None:
            headers = {read.chunk: header for read, header in zip(batch, found, strict=False)}
            came = {chunk: header for chunk, header in headers.items() if header is not None}
            waiting = {chunk: self.loading.pop(chunk) for chunk in headers}
            self.arrived(tier, came, waiting)
            for chunk, fetches in waiting.items():
                if chunk not in came:
                    self._memory.abandon(chunk)
                for fetch in fetches:
                    fetch.result = "loaded" if chunk in came else fetch.result
                    self._loaded(fetch)

        beside = [read.beside for read in batch if read.beside is not None]
        tier.read([read.wanted for read in batch] + beside, done)

    def arrived(self, tier: StorageTier, came: dict[Chunk, Header], waiting: dict[Chunk, list[Fetch]]) -> None:
        """Chunks have come; each stays at least until those that wait for it have used it."""
        for chunk in came:
            chunk.stored_in |= tier.bit
            if isinstance(chunk, Window):
                self._memory.shorten(chunk, came[chunk].position)
        users = [(fetch, chunk) for chunk in came for fetch in waiting[chunk] if not (fetch.over or fetch.gone)]
        for fetch, chunk in users:
            fetch.kept.append(chunk)
        self._memory.pin([chunk for _, chunk in users])
        self._memory.commit(*came)
        for chunk, header in came.items():
            if header.expires and chunk in self._memory:
                self._memory.pins.expire(chunk, self._clock() + header.expires - self._codec.wall())
        tokens = sum(chunk.end - chunk.position for chunk in came if not chunk.plane)
        self._metrics.count(m.PROMOTED_TOKENS, tokens, tier=tier.name)

    def _loaded(self, fetch: Fetch) -> None:
        """One read has ended, well or not. With the last, the fetch is over."""
        fetch.loading -= 1
        if fetch.loading:
            return
        self.spend(fetch)
        if fetch.complete(fetch):
            return
        if fetch.result == "loaded" and len(fetch.sizes) == 1:  # else it is not clear whose time it was
            ((name, size),) = fetch.sizes.items()
            self.gate.tier(name).note(size, fetch.spent)
        if not fetch.over:
            self._end(fetch, fetch.result)

    def _end(self, fetch: Fetch, result: str) -> None:
        fetch.over = True
        self._metrics.count(m.WAITS, result=result)
        self._metrics.observe(m.WAIT_SECONDS, max(0.0, self._clock() - fetch.began))


def _note_holder(fetch: Fetch, tier: StorageTier, answers: dict[bytes, bool | None]) -> None:
    """A tier has answered: keep for each key the quickest that has it."""
    for key, answer in answers.items():
        if answer and (key not in fetch.holders or tier.bit < fetch.holders[key].bit):
            fetch.holders[key] = tier
