"""How long the device took for something: by the clock on a CPU, by events in the stream on CUDA."""

import time
from collections.abc import Callable
from typing import Any

import torch


class Timing:
    """Seconds, once they are known."""

    def __init__(self, read: Callable[[], float | None]) -> None:
        self._read = read

    def seconds(self) -> float | None:
        """None: not over yet. Never waits."""
        return self._read()


class Stopwatch:
    """Times what the compute stream does between `start` and `stop`, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self) -> Any:
        """The beginning, to be given to `stop`."""
        return time.perf_counter() if self._device.type != "cuda" else self._event()

    def stop(self, beginning: Any) -> Timing:
        """What has passed since `beginning`."""
        if self._device.type != "cuda":
            passed = time.perf_counter() - beginning
            return Timing(lambda: passed)
        end = self._event()
        return Timing(lambda: beginning.elapsed_time(end) / 1000 if end.query() else None)

    def _event(self) -> Any:
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event
