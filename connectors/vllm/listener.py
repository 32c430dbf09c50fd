"""The events of requests on the scheduler side. Tracing listens to them; the default listener ignores them."""

from collections.abc import Mapping
from typing import Any

from ragkv.connectors.vllm.messages import Fusion, Job, Times
from ragkv.connectors.vllm.request_state import RequestState
from ragkv.kvstore.prompt import Load, Store


class Listener:
    """Hears the events, in the order in which they happen, and changes nothing. An implementer overrides what it
    wants to hear, must not raise, and must not keep the engine waiting."""

    times = False  # whether workers shall report when they began and ended each job and fusion

    def asked(self, request: Any) -> None:
        """vLLM asks what can be loaded for a request, perhaps again."""

    def answered(self, request: Any, tokens: int | None) -> None:
        """The answer: how many tokens; None: vLLM must ask again."""

    def ordered(self, state: RequestState, job: Job, work: Load | Store) -> None:
        """Workers will be told to do a job."""

    def fused(self, state: RequestState, fusion: Fusion) -> None:
        """Workers will be told to fuse, once the request's loads have ended well."""

    def allocated(self, state: RequestState, external: int) -> None:
        """vLLM took up a request that it had asked about, with `external` tokens to load, which are ordered."""

    def withdrawn(self, number: int) -> None:
        """Workers will report nothing more of the job, or the fusion (`Fusion.timed`), of this number."""

    def reported(self, times: Mapping[int, Times]) -> None:
        """When some workers began and ended, by the number of a job, or `Fusion.timed`."""

    def finished(self, request: Any) -> None:
        """A request ended. Workers may still report its jobs."""

    def closed(self) -> None:
        """The engine ends, and all that must survive is written down."""
