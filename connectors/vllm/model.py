"""The engine's model, which vLLM does not show to connectors: each worker is noted before it makes its caches, and
with them the connector.
"""

import functools
import weakref
from typing import Any

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
        _workers.add(self.worker)
        return initialize(self, *args, **kwargs)

    setattr(noted, WATCHED, True)
    WorkerWrapperBase.initialize_from_config = noted


def find_model(vllm_config: Any) -> Any:
    """The model of the worker with that configuration, or that a copy of it was made of, as MultiConnector does
    for its children; None where it is not known."""
    for worker in list(_workers):
        if worker.vllm_config.compilation_config is vllm_config.compilation_config:
            return worker.model_runner.get_model()
    return None
