"""A storage tier: a store below memory, the index of what it holds, a byte budget, and two breakers.

All of it runs on one thread, the one that drains the completions; only jobs run elsewhere. Reads have threads of
their own; writes and deletions have one thread, so that they happen in the order in which they were decided.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ragkv.errors import PayloadError, StoreError
from ragkv.kvstore import io_pool
from ragkv.kvstore import metrics as m
from ragkv.kvstore.breaker import Breaker, State
from ragkv.kvstore.budget import Budget, Index
from ragkv.kvstore.io_pool import Lane, Outcome, Wanted, Write
from ragkv.kvstore.metrics import Metrics
from ragkv.kvstore.stores.contract import Room, Store
from ragkv.policies.admission import AdmissionPolicy, Always

NO_KEY = bytes(16)  # a key that no chunk has: what a trial asks for
LASTING = frozenset({"full", "refused", "gone"})  # reasons that do not pass in the next moment
Note = Callable[[str, BaseException | str], None]


class StorageTier:
    """`index`: None where the backend itself decides what it keeps (Redis). `through`: chunks are written as soon
    as they are stored; else when memory evicts them. `queue_bytes`: bound of what waits to be written. `asks`:
    others write too, so what the index does not know may be there all the same, and the backend is asked. `bit`:
    of `Chunk.stored_in`; a quicker tier has a lower one. `may_write`: else nothing is written, nor deleted to make
    room; values that were read are still touched. `name`: of the tier, else the store's. `say`: for a line that an
    operator should read; from any thread."""

    def __init__(
        self,
        store: Store,
        index: Index | None,
        admission: AdmissionPolicy,
        reads: Lane,
        writes: Lane,
        clock: Callable[[], float],
        metrics: Metrics,
        note: Note,
        *,
        through: bool,
        queue_bytes: int,
        asks: bool,
        bit: int = 1,
        name: str | None = None,
        may_write: bool = True,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.name, self.through, self.index = name or store.name, through, index
        self.has_admission = not isinstance(admission, Always)
        self.may_write, self.bit = may_write, bit
        self.answered = 0.0  # when the last question or read that `done` was told of was over, on its own thread
        self._store, self._admission, self._say = store, admission, say
        self._reads, self._writes = reads, writes
        self._metrics, self._note = metrics, note
        self._queue_bytes, self._asks = queue_bytes, asks
        self._queued = 0
        self._pending: dict[bytes, int] = {}
        self._deleting: Counter[bytes] = Counter()
        self._leaving = 0  # bytes of these
        self._budget = None if index is None or not may_write else Budget(index, clock, self._tell)
        self._scanned_once = self._looking = False
        self._yielding = False  # to a backend that has refused a value
        self._told_full = False
        self._scans: list[set[bytes]] = []  # of each under way, the keys that it may find though they are gone
        self._reading, self._writing = Breaker(clock), Breaker(clock)
        self._reported: tuple[int, ...] = ()  # what the gauges were last set from
        self._since_scan = 0

    def start(self) -> None:
        """Find out what is there, on a thread."""
        if self.index is not None:
            before, gone = self.index.keys() - self._pending.keys(), set(self._deleting)
            self._scans.append(gone)
            self._reads.submit(
                lambda: io_pool.scan(self._store), lambda outcome: self._scanned(outcome, before, gone)
            )

    def tick(self) -> None:
        """Try a tier that has rested long enough, and look at the room there is. Call it now and then."""
        if self._reading.due:
            self._reading.begin_trial()
            self._reads.submit(
                lambda: self._store.contains([NO_KEY]), lambda outcome: self._judge(outcome, self._reading)
            )
        if self._budget is not None:
            self._shrink(self._budget.grow)
            if self._scanned_once and not self._looking and self._budget.look():
                self._looking = True
                self._writes.submit(self._store.room, self._looked)
        self.report()

    @property
    def readable(self) -> bool:
        """Whether the tier may be asked and read."""
        return self._reading.state is State.CLOSED

    @property
    def resting(self) -> tuple[str, ...]:
        """Which of "reading" and "writing" rest after errors, or are on trial."""
        sides = {"reading": self._reading, "writing": self._writing}
        return tuple(side for side, breaker in sides.items() if breaker.state is not State.CLOSED)

    @property
    def listed(self) -> bool:
        """Whether nothing is being found out any more about what is there."""
        return not self._scans

    @property
    def queued(self) -> int:
        """Bytes that wait to be written."""
        return self._queued

    @property
    def busy(self) -> bool:
        """Whether half of what may wait to be written does."""
        return 2 * self._queued > self._queue_bytes

    def knows(self, key: bytes) -> bool | None:
        """Whether the tier holds a key; None: it must be asked."""
        return self.known([key])[key]

    def known(self, keys: Sequence[bytes]) -> dict[bytes, bool | None]:
        """As `knows`, of each of `keys`."""
        if not self.readable:
            return dict.fromkeys(keys, False)
        held = set() if self.index is None else self.index.held(keys)
        unsure = None if self._asks else False
        return {key: False if key in self._pending else key in held or unsure for key in keys}

    def keeps(self, key: bytes) -> bool:
        """Whether the tier, which was given a key, holds it still as far as we know."""
        return self.index is None or key in self.index

    def ask(self, keys: Sequence[bytes], done: Callable[[list[bool]], None]) -> None:
        """Ask the backend which keys it holds; none, where it cannot answer."""

        def answered(outcome: Outcome) -> None:
            self.answered = outcome.ended
            self._judge(outcome, self._reading)
            done([False] * len(keys) if outcome.error is not None else outcome.value)

        self._reads.submit(lambda: self._store.contains(keys), answered)

    def read(self, wanted: Sequence[Wanted], done: Callable[[list[Any]], None]) -> None:
        """Read payloads; `done` gets for each what its `accept` made of it, or None."""

        def ended(outcome: Outcome) -> None:
            self.answered = outcome.ended
            self._judge(outcome, self._reading)
            found: list[Any] = [None] * len(wanted)
            if outcome.error is None:
                found, size = outcome.value
                self._metrics.count(m.READ_BYTES, size, tier=self.name)
                self._metrics.observe(m.READ_SECONDS, outcome.seconds, tier=self.name)
            for each, value in zip(wanted, found, strict=True):
                if isinstance(value, PayloadError):
                    self._metrics.count(m.REJECTED_PAYLOADS, tier=self.name, reason=value.reason)
                    if value.reason != io_pool.EXPIRED:
                        self._note(f"{self.name} payload", value)
                lost = outcome.error is None and (value is None or isinstance(value, PayloadError))
                if lost and self.index is not None and each.key not in self._pending:
                    self.index.drop(each.key)
            done([None if isinstance(value, PayloadError) else value for value in found])

        self._reads.submit(lambda: io_pool.read(self._store, [(each.key, each.accept) for each in wanted]), ended)

    def write(self, write: Write, done: Callable[[bool], None]) -> bool:
        """Keep a payload; `done` says whether it was. False, and no `done`: it will not be tried."""
        if not self.may_write or (write.key in self._pending and not write.replaces) or not self._room(write):
            return False
        if self._writing.due:
            self._writing.begin_trial()
        parts = write.make()
        self._pending[write.key] = self._pending.get(write.key, 0) + 1
        self._queued += write.size

        def ended(outcome: Outcome) -> None:
            self._queued -= write.size
            self._pending[write.key] -= 1
            if not self._pending[write.key]:
                del self._pending[write.key]
            self._judge(outcome, self._writing)
            if outcome.error is None:
                self._metrics.count(m.WRITTEN_BYTES, write.size, tier=self.name)
                self._metrics.observe(m.WRITE_SECONDS, outcome.seconds, tier=self.name)
                room, removed = outcome.value
                self._see(room)
                if removed:
                    self._removed(removed)
            elif self.index is not None and write.key not in self._pending:
                self.index.drop(write.key)
            if isinstance(outcome.error, StoreError) and outcome.error.reason == "full":
                self._refused(write.size)
            done(outcome.error is None)

        ask, own = self._asks and not write.replaces, self.index is None
        self._writes.submit(
            lambda: io_pool.put(self._store, write.key, write.size, parts, ask=ask, make_room=own), ended
        )
        self._rescan(write.size)
        return True

    def late(self) -> None:
        """A request gave up waiting for this tier: that counts as a failure, since one that hangs says nothing."""
        self._metrics.count(m.TIER_ERRORS, tier=self.name, reason="deadline")
        self._reading.failed()

    def touch(self, keys: Sequence[bytes]) -> None:
        """Note a use of a chain, root first."""
        if self.index is not None:
            self.index.touch(keys)
        if keys and self.readable and self._writing.state is State.CLOSED:
            self._writes.submit(lambda: self._store.touch(keys), self._done_beside)

    def close(self, seconds: float) -> bool:
        """Finish what waits to be written, within a bound; then let the store go. Whether all was written."""
        ended = self._writes.close(seconds)
        self._writes.abandon()
        self._reads.abandon()
        self._reads.close(0.0)
        try:
            self._store.close()
        except Exception as error:  # of a package that we do not know; the engine ends all the same
            self._note(f"{self.name} tier: close", error)
        return ended

    def check_integrity(self) -> None:
        """With no job under way: raise AssertionError where some write is still counted, or the index is wrong."""
        assert not self._pending and self._queued == 0, "a write that is counted is not under way"
        if self.index is not None:
            self.index.check_integrity()

    def _room(self, write: Write) -> bool:
        """Whether a write may be queued; makes room for it in the index, and orders what that costs."""
        name = self.name
        known = self.index is not None and write.key in self.index
        if known and not write.replaces:
            return False
        if self._writing.state is not State.CLOSED and not self._writing.due:
            self._metrics.count(m.UNWRITTEN_CHUNKS, tier=name, reason=m.RESTING)
            return False
        if self._queued + write.size > self._queue_bytes:
            self._metrics.count(m.UNWRITTEN_CHUNKS, tier=name, reason=m.THROTTLED)
            return False
        if not known and not self._admission.admit(write.key, write.size, write.cost):
            self._metrics.count(m.UNWRITTEN_CHUNKS, tier=name, reason=m.ADMISSION)
            return False
        if self.index is None:
            return True
        before = self.index.used
        if known:
            self.index.drop(write.key)
        without = self.index.used
        victims = self.index.add(write.key, write.size, write.parent, write.cost)
        if victims is None:
            self._metrics.count(m.UNWRITTEN_CHUNKS, tier=name, reason=m.NO_ROOM)
            self._delete([write.key] if known else [], before - without)
        else:
            self._delete(victims, without + write.size - self.index.used)
        return victims is not None

    def _delete(self, keys: list[bytes], size: int) -> None:
        """Order values to be deleted, of `size` bytes together, that the index has given up."""
        if keys and self.may_write:
            self._metrics.count(m.EVICTED_CHUNKS, len(keys), tier=self.name, reason=m.CAPACITY)
            self._deleting.update(keys)
            self._leaving += size
            for gone in self._scans:
                gone.update(keys)

            def done(outcome: Outcome) -> None:
                self._deleting -= Counter(keys)
                self._leaving -= size
                self._done_beside(outcome)

            self._writes.submit(lambda: self._store.delete(keys), done)

    def _tell(self, text: str) -> None:
        self._say(f"{self.name} tier: {text}")

    def _removed(self, values: int) -> None:
        """A backend that keeps its own books was full, and removed values."""
        self._metrics.count(m.EVICTED_CHUNKS, values, tier=self.name, reason=m.CAPACITY)
        if not self._told_full:
            self._told_full = True
            self._tell("full, and evicts nothing by itself: what was not used for long is removed")

    def _looked(self, outcome: Outcome) -> None:
        self._looking = False
        self._done_beside(outcome)
        if outcome.error is None:
            self._see(outcome.value)

    def _see(self, room: Room | None) -> None:
        """What there was at the end of a job of the writing thread."""
        if room is not None:
            self._metrics.gauge(m.FREE_BYTES, room.free, tier=self.name)
        if room is not None and self._budget is not None and self.index is not None and self._scanned_once:
            budget, held = self._budget, self._held(self.index)
            self._shrink(lambda: budget.seen(room, *held))

    def _held(self, index: Index) -> tuple[int, int]:
        """Bytes and values that the backend held at the end of a job of the writing thread. These jobs end in
        order: what is known to be written, and not deleted, was there."""
        values = len(index) - len(self._pending) + len(self._deleting)
        return max(0, index.used - self._queued + self._leaving), max(0, values)

    def _refused(self, size: int) -> None:
        """A value of `size` bytes had no room: make some. What was ordered before that says nothing new."""
        if self._budget is None or self.index is None or self._yielding:
            return
        self._yielding, budget, index = True, self._budget, self.index

        def looked(outcome: Outcome) -> None:
            held = self._held(index)
            self._shrink(lambda: budget.refused(outcome.value, *held, size))
            self._writes.submit(lambda: None, lambda _: setattr(self, "_yielding", False))

        self._writes.submit(self._store.room, looked)

    def _shrink(self, shrink: Callable[[], list[bytes]]) -> None:
        """Delete what had to go for a smaller budget."""
        if self.index is not None:
            before = self.index.used
            self._delete(shrink(), before - self.index.used)

    def _done_beside(self, outcome: Outcome) -> None:
        """A deletion or a touch has ended. That it went well does not say that values can be written."""
        if outcome.error is not None:
            self._judge(outcome, self._writing)

    def _scanned(self, outcome: Outcome, before: set[bytes], gone: set[bytes]) -> None:
        """`before`: keys that were known, and written, when the scan began; others may have deleted them. `gone`:
        keys that have been given up, whose deletion the scan may not have seen."""
        self._scans = [each for each in self._scans if each is not gone]
        self._judge(outcome, self._reading)
        if outcome.error is not None:
            self._reading.trip()  # so that it is scanned again
        elif self.index is not None:
            entries, room = outcome.value
            for key in before - {entry.key for entry in entries} - self._pending.keys():
                self.index.drop(key)
            self._scanned_once = True
            if room is not None and self._budget is not None:
                budget, held = self._budget, sum(entry.size for entry in entries)
                self._shrink(lambda: budget.seen(room, held, len(entries)))
            new = [entry for entry in entries if entry.key not in gone]
            size = self.index.used + sum(entry.size for entry in new if entry.key not in self.index)
            victims = self.index.adopt(new)
            self._delete(victims, size - self.index.used)

    def _rescan(self, written: int) -> None:
        """Where others fill the same folder, look again each time that a sixteenth of the budget was written."""
        self._since_scan += written
        if self._asks and self.index is not None and 16 * self._since_scan > self.index.capacity:
            self._since_scan = 0
            self.start()

    def _judge(self, outcome: Outcome, breaker: Breaker) -> None:
        """Tell a breaker what became of an operation. A tier that has recovered is scanned: who knows what has
        become of it meanwhile."""
        error, trial = outcome.error, breaker.state is State.HALF_OPEN
        if error is None:
            breaker.succeeded()
        else:
            reason = error.reason if isinstance(error, StoreError) else "bug"
            self._metrics.count(m.TIER_ERRORS, tier=self.name, reason=reason)
            self._note(f"{self.name} tier: {reason}", error)
            if reason in LASTING:
                breaker.trip()
            elif trial or reason != "too_large":
                breaker.failed()
        if trial and breaker.state is State.CLOSED:
            self.start()

    def report(self) -> None:
        """Set the tier's gauges, where anything has changed."""
        read, write, index = self._reading.state.value, self._writing.state.value, self.index
        kept = (0, 0, 0) if index is None else (index.used, index.capacity, len(index))
        now = (read, write, self._queued, *kept)
        if now == self._reported:
            return
        self._reported, gauge = now, self._metrics.gauge
        gauge(m.TIER_STATE, read, tier=self.name, side="read")
        gauge(m.TIER_STATE, write, tier=self.name, side="write")
        gauge(m.QUEUED_BYTES, self._queued, tier=self.name)
        if index is not None:
            gauge(m.USED_BYTES, index.used, tier=self.name)
            gauge(m.CAPACITY_BYTES, index.capacity, tier=self.name)
            gauge(m.CHUNKS, len(index), tier=self.name)
