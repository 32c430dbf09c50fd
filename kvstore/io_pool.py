"""The I/O pool: the only threads, the jobs that storage tiers give them, and the queue through which they answer.

A job runs on a lane's thread and touches no state of a tier; what is to be done with its result runs in
`Completions.drain`, on the thread that calls it. So whoever submits jobs needs no lock.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from ragkv.errors import PayloadError, StoreError
from ragkv.kvstore.stores.contract import Buffer, Entry, Room, Store

EXPIRED = "expired"  # a payload that was good
ANSWER_SECONDS = 0.002  # that a lookup blocks for a tier's answer: less than a step lost
IDLE_SECONDS = 0.005  # that a lookup of an idle engine blocks, and leaves its time to the reads
ROOM = 8  # values for which room is made at once, so that not each is sent twice
Done = Callable[["Outcome"], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job: its value, or the exception it raised; the seconds it ran, and when it ended (of
    `time.monotonic`)."""

    value: Any
    error: Exception | None
    seconds: float
    ended: float = field(default_factory=time.monotonic, compare=False)


class Completions:
    """Outcomes of all lanes, on their way to one thread."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Done, Outcome]] = SimpleQueue()

    def post(self, done: Done, outcome: Outcome) -> None:
        """From any thread."""
        self._queue.put((done, outcome))

    def drain(self, seconds: float = 0.0) -> bool:
        """Run `done` for every outcome that is there; wait at most `seconds` for the first. Whether any was."""
        any_came = False
        while True:
            try:
                wait = seconds if not any_came else 0.0
                done, outcome = self._queue.get(timeout=wait) if wait > 0 else self._queue.get_nowait()
            except Empty:
                return any_came
            any_came = True
            done(outcome)


class Lane:
    """`threads` threads that take jobs in order of submission; one thread keeps that order to the end. They are
    daemons, so that an operation that hangs never keeps a process alive."""

    def __init__(self, name: str, threads: int, completions: Completions) -> None:
        self.name = name
        self._threads_wanted = threads
        self._completions = completions
        self._jobs: SimpleQueue[tuple[Callable[[], Any], Done] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def submit(self, job: Callable[[], Any], done: Done) -> None:
        """Run `job` on a thread, and hand its outcome to `done`. After `close`: nothing happens. Where no thread
        can be had, the outcome is a StoreError, and the next job tries again."""
        if self._closed:
            return
        if not self._threads and (error := self._start()) is not None:
            self._completions.post(done, Outcome(None, error, 0.0))
            return
        self._jobs.put((job, done))

    def close(self, seconds: float) -> bool:
        """Take no more jobs; wait at most `seconds` for those submitted. Whether all of them have ended."""
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def abandon(self) -> None:
        """Drop the jobs that have not begun."""
        while True:
            try:
                self._jobs.get_nowait()
            except Empty:
                break
        for _ in self._threads:
            self._jobs.put(None)

    def _start(self) -> StoreError | None:
        """Fewer threads than wanted will do, but one."""
        for number in range(self._threads_wanted):
            thread = threading.Thread(target=self._run, name=f"ragkv-{self.name}-{number}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the process, or its control group, has as many as it may
                return None if self._threads else StoreError("io", f"{self.name}: no thread: {error}")
            self._threads.append(thread)
        return None

    def _run(self) -> None:
        while (next_job := self._jobs.get()) is not None:
            job, done = next_job
            self._completions.post(done, run(job))


def run(job: Callable[[], Any]) -> Outcome:
    """Run a job here and now."""
    started = time.perf_counter()
    try:
        value, error = job(), None
    except Exception as raised:  # it belongs to whoever submitted the job
        value, error = None, raised
    return Outcome(value, error, time.perf_counter() - started)


@dataclass(frozen=True, slots=True)
class Write:
    """A payload to be kept. `make` is called once the tier has taken it, and gives what makes the parts on the
    writing thread. `size`, `cost`: for the budget. `replaces`: in the place of what is there under that key."""

    key: bytes
    parent: bytes | None
    size: int
    cost: float
    make: Callable[[], Callable[[], Sequence[Buffer]]]
    replaces: bool = False


@dataclass(frozen=True, slots=True)
class Wanted:
    """A payload to be read: `accept` makes of it what the caller needs, on a reading thread, or raises
    PayloadError: then the store shall never give it again."""

    key: bytes
    accept: Callable[[Buffer], Any]


def scan(store: Store) -> tuple[list[Entry], Room | None]:
    """What is there, and what could be there still."""
    return list(store.scan()), store.room()


def read(store: Store, wanted: Sequence[tuple[bytes, Callable[[Buffer], Any]]]) -> tuple[list[Any], int]:
    """For each key what its function made of the payload, None, or the PayloadError; and the bytes read."""
    found: list[Any] = []
    size = 0
    for (key, accept), value in zip(wanted, store.get_many([key for key, _ in wanted]), strict=True):
        if value is None:
            found.append(None)
            continue
        size += len(value)
        try:
            found.append(accept(value))
        except PayloadError as error:
            found.append(error)
            with contextlib.suppress(StoreError):  # it does not concern the others; the index forgets it anyway
                if error.reason == EXPIRED:
                    store.delete([key])
                else:
                    store.reject(key, error.reason)
    return found, size


def put(
    store: Store, key: bytes, size: int, parts: Callable[[], Sequence[Buffer]], *, ask: bool, make_room: bool
) -> tuple[Room | None, int]:
    """Write a value; the room there is then, if anybody knows, and how many values were removed for it. `ask`:
    where it is there already, touch it. `make_room`: a store that is full shall remove what it has."""
    removed = 0
    if ask and store.contains([key])[0]:
        store.touch([key])  # another engine was quicker; equal keys are equal bytes
        return store.room(), removed
    made = parts()
    try:
        store.put(key, made)
    except StoreError as error:
        if error.reason == "full" and make_room:
            with contextlib.suppress(StoreError):  # then it is as full as it was
                removed = store.make_room(key, ROOM * size)
        if not removed:
            raise
        store.put(key, made)
    return store.room(), removed
