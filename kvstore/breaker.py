"""A circuit breaker: a tier that fails rests, and is tried again after a while (Nygard, "Release It!", ch. 5)."""

from collections.abc import Callable
from enum import Enum


class State(Enum):
    """`CLOSED`: in use. `OPEN`: at rest. `HALF_OPEN`: one trial is under way. The values go into the metrics."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Breaker:
    """Opens after `failures` failures in a row, for `first` seconds; after each trial that fails for twice as
    long, up to `longest`. `clock` gives seconds that never run backwards."""

    def __init__(
        self, clock: Callable[[], float], failures: int = 3, first: float = 0.5, longest: float = 30.0
    ) -> None:
        self.state = State.CLOSED
        self._clock, self._limit, self._first, self._longest = clock, failures, first, longest
        self._failures = 0
        self._rest = first
        self._until = 0.0

    def succeeded(self) -> None:
        """An operation went well. While open this is the word of one that began before, and counts for nothing."""
        if self.state is not State.OPEN:
            self.state = State.CLOSED
            self._failures, self._rest = 0, self._first

    def failed(self) -> None:
        """An operation failed."""
        if self.state is State.OPEN:
            return
        self._failures += 1
        if self.state is State.HALF_OPEN:
            self._rest = min(2 * self._rest, self._longest)
            self._open()
        elif self._failures >= self._limit:
            self._open()

    def trip(self) -> None:
        """Open at once: the failure is of a kind that does not pass by itself in the next moment."""
        self._failures = self._limit
        self.failed()

    @property
    def due(self) -> bool:
        """Whether the rest is over and nobody tries yet."""
        return self.state is State.OPEN and self._clock() >= self._until

    def begin_trial(self) -> None:
        """One operation is made to see; the caller owes `succeeded` or `failed`."""
        self.state = State.HALF_OPEN

    def _open(self) -> None:
        self.state = State.OPEN
        self._until = self._clock() + self._rest
