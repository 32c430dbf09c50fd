"""An engine's duties and its end: what its role lets it do; what a stop would lose, told at the start; and the
moment at which to write that down."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ragkv.config import Settings
from ragkv.connectors.vllm.error_boundary import logger
from ragkv.preflight import has_lower_tier, lower_tiers, shutdown_seconds

KILL_MARGIN = 4.0  # seconds before vLLM kills its engine at which writing down should be over
SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Duties:
    """`stores`: keep what the engine computes, in memory and in lower tiers. `loads`: use what is kept."""

    stores: bool = True
    loads: bool = True


def duties_of(kv_transfer_config: Any) -> Duties:
    """What `kv_role` lets an engine do: a `kv_consumer` only loads, a `kv_producer` only stores, `kv_both` does
    both. Bringing values up from a lower tier into memory is part of loading."""
    role = getattr(kv_transfer_config, "kv_role", None)
    return Duties(stores=role != "kv_consumer", loads=role != "kv_producer")


def lost_at_stop(vllm_config: Any, settings: Settings) -> str | None:
    """What a SIGTERM would lose with this configuration, and how to avoid it; None where nothing is lost.

    With a shutdown timeout of 0, vLLM's default, the server kills its engine at once, before the connector can
    write anything. Versions of vLLM without that setting are not judged.
    """
    timeout, flush = getattr(vllm_config, "shutdown_timeout", None), settings.placement.flush
    if timeout is None or flush <= 0 or timeout >= flush or not has_lower_tier(settings):
        return None
    if not duties_of(getattr(vllm_config, "kv_transfer_config", None)).stores:
        return None
    back = any(tier.write == "back" for tier in lower_tiers(settings))
    lost = "all that only memory holds" if back else "what still waits to be written"
    when = "at once" if timeout == 0 else f"after {timeout} s, sooner than placement.flush = {flush:g} s"
    return (
        f"vLLM's shutdown timeout is {timeout}: after SIGTERM it kills the engine {when}, and {lost} is lost; "
        f"to have it written, start vLLM with --shutdown-timeout {shutdown_seconds(settings)} (`ragkv serve` does)"
    )


def watch_stop(vllm_config: Any, settings: Settings) -> "StopNotice":
    """Warn of what a stop would lose, and listen for one. In the process of vLLM's scheduler, at its start."""
    lost = lost_at_stop(vllm_config, settings)
    if lost is not None:
        logger.warning("ragkv: %s", lost)
    seconds = getattr(vllm_config, "shutdown_timeout", None) or 0
    notice = StopNotice(seconds, settings.placement.flush)
    if seconds and has_lower_tier(settings):
        notice.listen()
    return notice


class StopNotice:
    """Notes that this process was asked to stop, and says when writing down must begin.

    vLLM lets running answers end within its shutdown timeout and then kills the engine, without a word to the
    connector. `seconds`: that timeout; `flush`: what writing down may take of it.
    """

    def __init__(self, seconds: float, flush: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._wait, self._clock = max(0.0, seconds - flush - KILL_MARGIN), clock
        self._when: float | None = None

    def listen(self) -> None:
        """From now on note the signals, before whoever handles them now. Without effect where only Python does
        (an engine inside a program, which may go on after Ctrl-C), and outside of a process's main thread."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler) and handler is not signal.default_int_handler:
                with contextlib.suppress(ValueError, OSError):  # not in every interpreter, nor for every signal
                    signal.signal(number, self._noting(handler))

    def note(self) -> None:
        """The process was asked to stop."""
        if self._when is None:
            self._when = self._clock()

    @property
    def asked(self) -> bool:
        """Whether the process was asked to stop."""
        return self._when is not None

    def due(self) -> bool:
        """Whether writing down can wait no longer."""
        return self._when is not None and self._clock() >= self._when + self._wait

    def _noting(self, handler: Callable[..., Any]) -> Callable[..., Any]:
        def noted(number: int, frame: Any) -> Any:
            self.note()
            return handler(number, frame)

        return noted
