"""Whose KV it is: the weights that compute it, as far as the scheduler side knows, and what follows from that.

The workers look at all weights at the start, whenever vLLM says that something happened, and when they find that
something differs; the namespace follows from it. Rounds of samples go on all the time. KV goes to lower tiers only
once a round that began after it was computed has found nothing: so what is written down is of the weights that its
namespace says, even if the engine is killed before it notices that they have changed.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from ragkv.connectors.vllm.calls import Calls
from ragkv.connectors.vllm.faults import logger
from ragkv.connectors.vllm.identity import Namespaces
from ragkv.connectors.vllm.protocol import Handshake, Question, StepReport
from ragkv.connectors.vllm.weights import Look, Rounds, WeightsWatch

UNKNOWN = "ragkv: the model's weights cannot be looked at: nothing is shared with other engines or later starts"


class Side(Protocol):
    """What trust needs of a scheduler side."""

    @property
    def unconfirmed(self) -> bool:
        """Whether some KV that is kept, or being stored, waits to be confirmed."""

    @property
    def requests(self) -> set[str]:
        """All that were looked up and have not ended."""

    def confirm(self, number: int) -> None:
        """The round of that number has found nothing."""

    def outdate(self) -> None:
        """Drop all KV that no round has confirmed, and what requests under way still load and store."""


class Trust:
    """The scheduler side's. `engine`: what KV depends on beside the weights, as `engine_identity` says."""

    def __init__(self, engine: bytes) -> None:
        self.namespaces = Namespaces(engine)
        self._watch = WeightsWatch({})
        self._rounds = Rounds(0)
        self._blocks = OwnBlocks()
        self._calls = Calls(self.namespaces.note_adapter)

    def begin(self, hands: Sequence[Handshake], vllm_config: Any, memory_tokens: float = float("inf")) -> None:
        """All workers have told what they have loaded. `memory_tokens`: that memory has room for."""
        self._calls.listen()
        self._watch = WeightsWatch({hand.rank: hand.weights for hand in hands})
        self._rounds = Rounds(len(hands), memory_tokens)
        if self._watch.current is not None:
            self.namespaces.set_weights(self._watch.current.hex())
        elif not self.namespaces.set_weights_of_files(
            vllm_config.model_config, str(getattr(vllm_config.load_config, "load_format", ""))
        ):
            logger.warning(UNKNOWN)
            self.namespaces.renew()

    def ready(self) -> bool:
        """Whether it is known what will compute a request that asks now; else it waits, and the workers look."""
        self._notice_calls()
        if not self._watch.settled:
            self._watch.want()
        return self._watch.settled

    def own_blocks_hold(self, computed: int) -> bool:
        """Whether the first `computed` tokens of a request, that vLLM has itself, are of the weights of now."""
        return not computed or self._blocks.trusted

    def round(self) -> int:
        """The round that will confirm what has been computed until now."""
        return self._rounds.next

    def question(self, tokens: int, side: Side, *, stopping: bool = False) -> Question:
        """What the workers shall look at in this step, before its `tokens` are computed. To be asked before stores
        of this step are ordered. `stopping`: the engine was asked to stop."""
        self._notice_calls()
        look = self._watch.question()
        if not self._watch.settled:
            return Question(look)
        waiting = side.unconfirmed
        return Question(0, self._rounds.question(tokens, waiting=waiting, stopping=stopping), waiting)

    def doubt(self) -> None:
        """vLLM has emptied its caches, and the weights may change now."""
        self._watch.doubt()
        self._rounds.abandon()
        self._blocks.emptied()

    def unasked(self) -> None:
        """What was asked last may never have come to the workers."""
        self._rounds.abandon()
        if not self._watch.settled:
            self._watch.doubt()

    def suspect(self) -> None:
        """The weights may have been changed already, and vLLM has emptied no cache."""
        self._watch.doubt()
        self._watch.want()
        self._rounds.abandon()

    def bind(self, pool: Any) -> None:
        """vLLM's own blocks."""
        self._blocks.bind(pool)

    def over(self, request: str) -> None:
        """A request ended."""
        self._blocks.over(request)

    def hear(self, report: StepReport, side: Side) -> None:
        """What workers have seen."""
        for sample in report.samples:
            same = self._rounds.hear(sample)
            if same:
                side.confirm(sample.number)
            elif same is not None:
                logger.warning(
                    "ragkv: the weights were changed behind vLLM's back: KV of the last steps is dropped"
                )
                self._outdate(side)
                self.suspect()
        for look in report.looks:
            self._hear(look, side)

    def _hear(self, look: Look, side: Side) -> None:
        verdict = self._watch.hear(look)
        if verdict is None or verdict == "same":
            return
        self._outdate(side)
        if verdict == "unknown" or self._watch.current is None:  # what was kept may be of other weights
            self.namespaces.renew()
        else:
            logger.info("ragkv: the weights have changed: what is kept of others is not used")
            self.namespaces.set_weights(self._watch.current.hex())

    def _notice_calls(self) -> None:
        if self._calls.new():
            self.suspect()

    def _outdate(self, side: Side) -> None:
        side.outdate()
        self._blocks.outdate(side.requests)


class OwnBlocks:
    """vLLM's own prefix cache, when weights have changed and vLLM does not know."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._old: set[str] = set()  # requests that began before
        self._outdated = False

    @property
    def trusted(self) -> bool:
        """Whether all that the cache gives is of the weights of now."""
        return not self._outdated

    def bind(self, pool: Any) -> None:
        """The blocks of the engine."""
        self._pool = pool

    def outdate(self, requests: Iterable[str]) -> None:
        """All blocks, and all that these requests will still compute, are of other weights."""
        self._old |= set(requests)
        self._outdated = True
        self._evict()

    def over(self, request: str) -> None:
        """A request ended. With the last old one the cache is emptied again, and right from then on."""
        if request in self._old:
            self._old.discard(request)
            self._evict()

    def emptied(self) -> None:
        """vLLM has emptied its cache; requests that began before may go on."""
        if not self._old:
            self._outdated = False

    def _evict(self) -> None:
        if self._pool is not None:
            self._pool.evict_blocks(set(range(len(self._pool.blocks))))
            self._outdated = bool(self._old)
