"""Streams and events, as far as copies need them.

A stream carries out what is submitted to it, in that order. Two streams run side by side, in no order at all but
where one waits for an event of the other. `CudaStreams` are those of an accelerator, `DirectStreams` carry out
everything at once, on a CPU. Tests have a third kind, which runs late and in any order that these rules allow.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

ALIGNMENT = 64  # bytes: where each array of a `Packed` begins


class Event(Protocol):
    """A point in a stream."""

    def query(self) -> bool:
        """True once the stream has come to this point. Never waits."""

    def synchronize(self) -> None:
        """Let the host wait until the stream has come to this point."""

    def since(self, start: "Event") -> float:
        """Seconds that the stream took from an earlier event of it to this one; both are over."""


class Stream(Protocol):
    """Work in order."""

    def submit(self, work: Callable[[], None]) -> None:
        """Carry out `work` after all that was submitted before. It may run now or later; what it needs on the
        device it allocates itself."""

    def record(self) -> Event:
        """The point behind all that was submitted so far."""

    def wait(self, event: Event) -> None:
        """What is submitted from now on begins after `event`. The host does not wait."""

    def synchronize(self) -> None:
        """Let the host wait for all that was submitted so far."""


class Streams(Protocol):
    """`compute`: where the engine's forwards run; `load`, `store`: where copies run beside them."""

    @property
    def compute(self) -> Stream: ...
    @property
    def load(self) -> Stream: ...
    @property
    def store(self) -> Stream: ...


class DirectEvent:
    """A point that has been reached."""

    def __init__(self) -> None:
        self._at = time.monotonic()

    def query(self) -> bool:
        """Always true."""
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def since(self, start: Event) -> float:
        """By the clock."""
        assert isinstance(start, DirectEvent)
        return self._at - start._at


class DirectStream:
    """Carries out work when it is submitted."""

    def submit(self, work: Callable[[], None]) -> None:
        """Do it now."""
        work()

    def record(self) -> Event:
        """All work is done."""
        return DirectEvent()

    def wait(self, event: Event) -> None:
        """All events are over."""

    def synchronize(self) -> None:
        """All work is done."""


class DirectStreams:
    """For a CPU."""

    def __init__(self) -> None:
        self.compute = self.load = self.store = DirectStream()


class CudaEvent:
    """An event of CUDA's, recorded in a stream when it is made."""

    def __init__(self, stream: Any) -> None:
        self.event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.event.record(stream)

    def query(self) -> bool:
        """Raises what the device has to report."""
        return bool(self.event.query())

    def synchronize(self) -> None:
        """Raises what the device has to report."""
        self.event.synchronize()

    def since(self, start: Event) -> float:
        """By the device's clock."""
        assert isinstance(start, CudaEvent)
        return float(start.event.elapsed_time(self.event)) / 1000


class CudaStream:
    """A stream of CUDA's; without one, whichever is current when something is asked of it."""

    def __init__(self, device: torch.device, stream: Any = None) -> None:
        self._device, self._stream = device, stream

    def submit(self, work: Callable[[], None]) -> None:
        """Launch its kernels and copies into this stream."""
        with torch.cuda.stream(self._current()):
            work()

    def record(self) -> Event:
        """An event of CUDA's."""
        return CudaEvent(self._current())

    def wait(self, event: Event) -> None:
        """`event` must be CUDA's."""
        assert isinstance(event, CudaEvent)
        self._current().wait_event(event.event)

    def synchronize(self) -> None:
        """Raises what the device has to report."""
        self._current().synchronize()

    def _current(self) -> Any:
        return self._stream if self._stream is not None else torch.cuda.current_stream(self._device)


class CudaStreams:
    """vLLM's own stream, and two beside it. Their priority is CUDA's lowest, so they never go before a forward."""

    def __init__(self, device: torch.device) -> None:
        self.compute = CudaStream(device)
        self.load = CudaStream(device, torch.cuda.Stream(device, priority=0))  # type: ignore[no-untyped-call]
        self.store = CudaStream(device, torch.cuda.Stream(device, priority=0))  # type: ignore[no-untyped-call]


def make_streams(device: torch.device) -> Streams:
    """The streams of a device."""
    return CudaStreams(device) if device.type == "cuda" else DirectStreams()


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
