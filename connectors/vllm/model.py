"""The engine's model, which vLLM does not show to connectors: each worker is noted before it makes its caches, and
with them the connector.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any

from ragkv.connectors.vllm.fingerprint import watch_packing

WATCHED = "_ragkv_watched"
_workers: "weakref.WeakSet[Any]" = weakref.WeakSet()


def watch_workers() -> None:
    """From now on know the workers of this process, and what their models pack away. Safe to call twice."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    _before(WorkerWrapperBase, "init_device", lambda wrapper: watch_packing())
    _before(WorkerWrapperBase, "initialize_from_config", lambda wrapper: _workers.add(wrapper.worker))


def _before(owner: type, name: str, note: Callable[[Any], object]) -> None:
    """Let `note` see the object before a method of vLLM's is called. Where it raises (a worker of another kind, or
    a vLLM that packs in another way) the model is not known."""
    method = getattr(owner, name)
    if getattr(method, WATCHED, False):
        return

    @functools.wraps(method)
    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        with contextlib.suppress(Exception):
            note(self)
        return method(self, *args, **kwargs)

    setattr(noted, WATCHED, True)
    setattr(owner, name, noted)


def find_model(vllm_config: Any) -> Any:
    """The model of the worker with that configuration, or that a copy of it was made of, as MultiConnector does
    for its children; None where it is not known."""
    runner = _find_runner(vllm_config)
    return None if runner is None else runner.get_model()


def find_drafter(vllm_config: Any) -> Any:
    """As `find_model`, for the model that drafts tokens."""
    runner = _find_runner(vllm_config)
    return None if runner is None else runner.get_draft_model()


def _find_runner(vllm_config: Any) -> Any:
    for worker in list(_workers):
        if worker.vllm_config.compilation_config is vllm_config.compilation_config:
            return worker.model_runner
    return None
