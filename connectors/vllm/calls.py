"""Calls that users send to an engine, and of which vLLM does not tell connectors: to all its workers
(`collective_rpc`), by which weights are reloaded, updated or edited in place; and to load an adapter."""

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

WATCHED = "_ragkv_watched"
_listeners: "weakref.WeakSet[Calls]" = weakref.WeakSet()


class Calls:
    """What one engine's connector hears. `adapter`: called before an adapter is loaded; it must not raise."""

    def __init__(self, adapter: Callable[[Any], object]) -> None:
        self._adapter, self._called = adapter, False

    def listen(self) -> None:
        """Hear from now on. In the process of vLLM's scheduler, where an engine is being made."""
        _listeners.add(self)
        engine = getattr(sys.modules.get("vllm.v1.engine.core"), "EngineCore", None)
        if engine is not None:
            _watch(engine, "collective_rpc", Calls._note, before=False)
            _watch(engine, "add_lora", Calls._note_adapter, before=True)

    def new(self) -> bool:
        """Whether workers were called since the last time."""
        called, self._called = self._called, False
        return called

    def _note(self, _request: Any = None) -> None:
        self._called = True

    def _note_adapter(self, request: Any = None) -> None:
        self._adapter(request)


def _watch(engine: Any, name: str, note: Callable[..., None], *, before: bool) -> None:
    """Let all listeners of this process hear of a method's calls. (Of two engines in a process, each hears of the
    other's too.) Safe to call twice."""
    call = getattr(engine, name, None)
    if call is None or getattr(call, WATCHED, False):
        return

    @functools.wraps(call)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        told = [*args, *kwargs.values()][:1]
        if before:
            for listener in list(_listeners):
                note(listener, *told)
        try:
            return call(self, *args, **kwargs)
        finally:
            if not before:
                for listener in list(_listeners):
                    note(listener, *told)

    setattr(watched, WATCHED, True)
    setattr(engine, name, watched)
