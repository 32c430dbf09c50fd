"""The error boundary: an exception inside the connector becomes a miss, is counted, and logged once."""

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

from ragkv.errors import RagKVError
from ragkv.kvstore import metrics as m
from ragkv.kvstore.metrics import Metrics

logger = logging.getLogger("vllm.ragkv")  # below vLLM's logger, so that its settings hold

F = TypeVar("F", bound=Callable[..., Any])


class Faults:
    """Counts by kind; the first of a kind and type is logged, what is not an error of ours with its traceback; the
    others are only counted."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._seen: set[tuple[str, str]] = set()

    def note(self, kind: str, cause: BaseException | str) -> None:
        """Count a fault of that kind, and say so once."""
        self._metrics.count(m.ERRORS, kind=kind)
        name = type(cause).__name__  # never the text: requests choose it
        if (kind, name) not in self._seen:
            self._seen.add((kind, name))
            trace = None if isinstance(cause, str | RagKVError) else cause  # ours say it all in a line
            logger.warning("ragkv: %s: %s; treated as a miss, logged once", kind, cause, exc_info=trace)


def guarded(fallback: Callable[..., Any]) -> Callable[[F], F]:
    """Let no exception out of a method of an object that has `faults`: note it, and return what `fallback` gives
    for the same arguments."""

    def wrap(method: F) -> F:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except Exception as error:  # the boundary: a fault of ours must not fail a request
                self.faults.note(method.__name__, error)
                return fallback(self, *args, **kwargs)

        return cast(F, call)

    return wrap


def in_words(error: BaseException) -> str:
    """An error's text in one line; of an error that is not ours, with its type."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, RagKVError) else f"{type(error).__name__}: {text}"


def gives(value: Any) -> Callable[..., Any]:
    """A fallback that always gives `value`."""
    return lambda *_, **__: value
