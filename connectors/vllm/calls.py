"""Calls that users send to an engine, and of which vLLM does not tell connectors: to all its workers
(`collective_rpc`), by which weights are reloaded, updated or edited in place; and to load an adapter."""

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

WATCHED = "_ragkv_watched"
SLEEP = ("sleep", "discard")  # calls after which the weights may have no memory
_listeners: "weakref.WeakSet[Calls]" = weakref.WeakSet()


class Calls:
    """What one engine's connector hears. `adapter`: called before an adapter is loaded; `failed`: called when that
    was not to be. They must not raise."""

    def __init__(self, adapter: Callable[[Any], object], failed: Callable[[], object] = lambda: None) -> None:
        self._adapter, self._failed = adapter, failed
        self._called = self._slept = False

    def listen(self) -> None:
        """Hear from now on. In the process of vLLM's scheduler, where an engine is being made."""
        _listeners.add(self)
        engine = getattr(sys.modules.get("vllm.v1.engine.core"), "EngineCore", None)
        if engine is not None:
            _watch(engine, "collective_rpc", after=Calls._note)
            _watch(engine, "add_lora", before=Calls._note_adapter, failed=Calls._note_failed)

    def new(self) -> bool:
        """Whether workers were called since the last time."""
        called, self._called = self._called, False
        return called

    def slept(self) -> bool:
        """Whether workers were put to sleep by a call since the last time: their weights may have no memory."""
        slept, self._slept = self._slept, False
        return slept

    def _note(self, method: Any = None) -> None:
        if getattr(method, "__name__", method) in SLEEP:
            self._slept = True
        self._called = True

    def _note_adapter(self, request: Any = None) -> None:
        self._adapter(request)

    def _note_failed(self, _request: Any = None) -> None:
        self._failed()


def _ignore(_listener: Calls, _told: Any = None) -> None:
    pass


def _watch(
    engine: Any,
    name: str,
    before: Callable[..., None] = _ignore,
    after: Callable[..., None] = _ignore,
    failed: Callable[..., None] = _ignore,
) -> None:
    """Let all listeners of this process hear of a method's calls. (Of two engines in a process, each hears of the
    other's too.) Safe to call twice."""
    call = getattr(engine, name, None)
    if call is None or getattr(call, WATCHED, False):
        return

    @functools.wraps(call)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        told = [*args, *kwargs.values()][:1]

        def tell(note: Callable[..., None]) -> None:
            for listener in list(_listeners):
                note(listener, *told)

        tell(before)
        try:
            return call(self, *args, **kwargs)
        except BaseException:
            tell(failed)
            raise
        finally:
            tell(after)

    setattr(watched, WATCHED, True)
    setattr(engine, name, watched)
