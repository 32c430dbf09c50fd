"""The engine's model, which vLLM does not show to connectors: each worker is noted before it makes its caches, and
with them the connector.
"""

import contextlib
import functools
import weakref
from typing import Any

from ragkv.connectors.vllm.fingerprint import watch_packing

WATCHED = "_ragkv_watched"
_workers: "weakref.WeakSet[Any]" = weakref.WeakSet()


def watch_workers() -> None:
    """From now on know the workers of this process. Safe to call twice."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    initialize = WorkerWrapperBase.initialize_from_config
    if getattr(initialize, WATCHED, False):
        return

    @functools.wraps(initialize)
    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        with contextlib.suppress(Exception):  # a worker of a kind that cannot be noted: its model is not known
            _workers.add(self.worker)
        return initialize(self, *args, **kwargs)

    setattr(noted, WATCHED, True)
    WorkerWrapperBase.initialize_from_config = noted
    _watch_loading(WorkerWrapperBase)


def _watch_loading(wrapper: Any) -> None:
    """Before a worker loads its model, see to it that what is packed away can be known later."""
    prepare = wrapper.init_device

    @functools.wraps(prepare)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        with contextlib.suppress(Exception):  # not vLLM's CPU build, or another: then the model cannot be known
            watch_packing()
        return prepare(self, *args, **kwargs)

    wrapper.init_device = watched


def find_model(vllm_config: Any) -> Any:
    """The model of the worker with that configuration, or that a copy of it was made of, as MultiConnector does
    for its children; None where it is not known."""
    for worker in list(_workers):
        if worker.vllm_config.compilation_config is vllm_config.compilation_config:
            return worker.model_runner.get_model()
    return None
