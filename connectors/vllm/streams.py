"""Streams and events, as far as copies need them.

A stream carries out what is submitted to it, in that order. Two streams run side by side; the only order between
them is that of an event of one for which the other waits. `Stream` and `Event` are a CPU's, where work is done
when it is submitted; `CudaStream` and `CudaEvent` are an accelerator's. Tests have a third kind, which runs late
and in any order that these rules allow.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

ALIGNMENT = 64  # bytes: where each array of a `Packed` begins


class Event:
    """A point in a stream. On a CPU the stream has reached it when it is made."""

    def __init__(self) -> None:
        self._at = time.monotonic()

    def query(self) -> bool:
        """True once the stream has reached this point. Never waits; raises what the device has to report."""
        return True

    def synchronize(self) -> None:
        """Let the host wait until the stream has reached this point; raises what the device has to report."""

    def since(self, start: "Event") -> float:
        """Seconds that the stream took from an earlier event of it to this one; both have been reached."""
        return self._at - start._at


class CudaEvent(Event):
    """An event of CUDA's, recorded in a stream when it is made."""

    def __init__(self, stream: Any) -> None:
        self.event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.event.record(stream)

    def query(self) -> bool:
        return bool(self.event.query())

    def synchronize(self) -> None:
        self.event.synchronize()

    def since(self, start: Event) -> float:
        assert isinstance(start, CudaEvent)
        return float(start.event.elapsed_time(self.event)) / 1000


class Stream:
    """Work in order. On a CPU it is done when it is submitted."""

    def submit(self, work: Callable[[], None]) -> None:
        """Carry out `work` after all that was submitted before. It may run now or later; what it needs on the
        device it allocates itself."""
        work()

    def record(self) -> Event:
        """The point after all that was submitted so far."""
        return Event()

    def wait(self, event: Event) -> None:
        """What is submitted from now on begins after `event`, which must be of the same device. The host does not
        wait."""

    def synchronize(self) -> None:
        """Let the host wait for all that was submitted so far; raises what the device has to report."""


class CudaStream(Stream):
    """A stream of CUDA's; without one, whichever is current when something is asked of it."""

    def __init__(self, device: torch.device, stream: Any = None) -> None:
        self._device, self._stream = device, stream

    def submit(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._current()):
            work()

    def record(self) -> Event:
        return CudaEvent(self._current())

    def wait(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self._current().wait_event(event.event)

    def synchronize(self) -> None:
        self._current().synchronize()

    def _current(self) -> Any:
        return self._stream if self._stream is not None else torch.cuda.current_stream(self._device)


@dataclass(frozen=True, slots=True)
class Streams:
    """`compute`: where the engine's forwards run; `load`, `store`: where copies run beside them."""

    compute: Stream
    load: Stream
    store: Stream


def compute_stream(device: torch.device) -> Stream:
    """Where the engine's forwards run: vLLM's own stream."""
    return CudaStream(device) if device.type == "cuda" else Stream()


def make_streams(device: torch.device) -> Streams:
    """The streams of a device. Those for copies have CUDA's lowest priority, so they never go before a forward."""
    if device.type != "cuda":
        return Streams(Stream(), Stream(), Stream())
    made = [torch.cuda.Stream(device, priority=0) for _ in range(2)]  # type: ignore[no-untyped-call]
    load, store = (CudaStream(device, each) for each in made)
    return Streams(compute_stream(device), load, store)


class Ticket:
    """Says when a copy has ended: what a stream was given up to the event `end`, and from the event `start` on.
    `kept`: what the copy reads, kept until then."""

    def __init__(self, end: Event, start: Event | None = None, kept: Sequence[object] = ()) -> None:
        self._end, self._start, self._kept = end, start, kept

    def query(self) -> bool:
        """True once the copy has ended. Never waits; raises what the device has to report."""
        if not self._end.query():
            return False
        self._kept = ()
        return True

    def seconds(self) -> float | None:
        """How long the device took, without what came before it in its stream; None: it has not ended, or that is
        not known."""
        return self._end.since(self._start) if self._start is not None and self.query() else None


class Packed:
    """Small arrays on their way to a device: copied into one buffer (pinned, for CUDA) when this is made, and sent
    by one copy that nobody waits for. Keep it until that copy is over."""

    def __init__(self, arrays: Sequence[np.ndarray[Any, Any]], device: torch.device) -> None:
        self._device, self._shapes = device, [array.shape for array in arrays]
        self._kinds = [torch.from_numpy(array[:0].reshape(-1)).dtype for array in arrays]
        sizes = [array.nbytes for array in arrays]
        starts = np.cumsum([0, *(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]).tolist()
        self._spans = [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]
        self._buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
        host = self._buffer.numpy()
        for span, array in zip(self._spans, arrays, strict=True):
            host[span] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def on_device(self) -> list[torch.Tensor]:
        """The arrays, sent by the current stream."""
        sent = self._buffer.to(self._device, non_blocking=True)
        described = zip(self._spans, self._kinds, self._shapes, strict=True)
        return [sent[span].view(kind).reshape(shape) for span, kind, shape in described]
