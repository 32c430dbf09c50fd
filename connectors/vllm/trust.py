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
        self._blind = False

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

    @property
    def settled(self) -> bool:
        """Whether it is known what computes."""
        return self._watch.settled and not self._watch.blind

    def ready(self, request: Any, side: Side) -> bool:
        """Whether it is known what will compute a request that asks now; else it waits, and the workers look."""
        self._notice(side)
        if not self._watch.settled:
            self._watch.want()
            if getattr(request, "skip_reading_prefix_cache", False):
                self._blocks.note(request.request_id)  # vLLM does not let it wait
        return self._watch.settled

    def serves(self, request: str, computed: int) -> bool:
        """Whether a request may be served and its KV kept: the first `computed` tokens, that vLLM has itself, and
        what will be computed are of weights that are known."""
        return self._blocks.hold(request, computed) and not self._watch.blind

    def round(self) -> int:
        """The round that will confirm what has been computed until now."""
        return self._rounds.next

    def question(self, tokens: int, side: Side, *, stopping: bool = False) -> Question:
        """What the workers shall look at in this step, before its `tokens` are computed. To be asked before stores
        of this step are ordered. `stopping`: the engine was asked to stop."""
        self._notice(side)
        look = self._watch.question()
        if self._watch.blind and not self._blind:
            self._lose_sight(side)
        if not self.settled:
            return Question(look, give_up=True)
        waiting = side.unconfirmed
        return Question(0, self._rounds.question(tokens, waiting=waiting, stopping=stopping), waiting)

    def doubt(self, *, running: bool) -> None:
        """vLLM has emptied its caches, unless requests were `running`, and the weights may change now."""
        self._watch.doubt()
        self._rounds.abandon()
        if not running:
            self._blocks.emptied()

    def unasked(self) -> None:
        """What was asked last may never have come to the workers."""
        self._rounds.abandon()
        self._watch.ask_again()

    def suspect(self) -> None:
        """The weights may have been changed already, and vLLM has emptied no cache."""
        self._watch.suspect()
        self._rounds.abandon()

    def bind(self, pool: Any) -> None:
        """vLLM's own blocks."""
        self._blocks.bind(pool)

    def over(self, request: str) -> None:
        """A request ended."""
        self._blocks.over(request)

    def hear(self, report: StepReport, side: Side) -> None:
        """What workers have seen. (What is known at last comes before what follows from it, which may fail.)"""
        for look in report.looks:
            self._hear(look, side)
        for sample in report.samples:
            same = self._rounds.hear(sample)
            if same:
                side.confirm(sample.number)
            elif same is not None:
                self.suspect()
                logger.warning(
                    "ragkv: the weights were changed behind vLLM's back: KV of the last steps is dropped"
                )
                self._outdate(side)

    def _hear(self, look: Look, side: Side) -> None:
        verdict = self._watch.hear(look)
        if verdict == "unknown":
            self._lose_sight(side)
        elif verdict is not None:
            self._blind = False
        if verdict == "changed":
            assert self._watch.current is not None
            self.namespaces.set_weights(self._watch.current.hex())
            logger.info("ragkv: the weights have changed: what is kept of others is not used")
            self._outdate(side)

    def _lose_sight(self, side: Side) -> None:
        """Nobody knows the weights: what was kept may be of others."""
        self._blind = self._watch.blind
        self.namespaces.renew()
        if self._blind:
            logger.warning(
                "ragkv: the weights could not be looked at: nothing is reused until they can, which is tried again"
            )
        self._outdate(side)

    def _notice(self, side: Side) -> None:
        if self._calls.new():
            self.suspect()
        if self.namespaces.take_replaced():
            side.outdate()

    def _outdate(self, side: Side) -> None:
        side.outdate()
        self._blocks.outdate(side.requests)


class OwnBlocks:
    """vLLM's own prefix cache, when weights have changed and vLLM does not know."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._old: set[str] = set()  # requests that began before, or on blocks of such
        self._early: set[str] = set()  # requests that nobody else knows
        self._outdated = False

    def hold(self, request: str, computed: int) -> bool:
        """Whether the first `computed` tokens that the cache gives a request are of the weights of now; else what
        it computes on them is not, either."""
        if not computed or not self._outdated:
            return True
        self._old.add(request)
        return False

    def note(self, request: str) -> None:
        """A request that runs while nobody knows by which weights."""
        self._early.add(request)

    def bind(self, pool: Any) -> None:
        """The blocks of the engine."""
        self._pool = pool

    def outdate(self, requests: Iterable[str]) -> None:
        """All blocks, and all that these requests will still compute, are of other weights."""
        self._old |= {*requests, *self._early}
        self._early.clear()
        self._outdated = True
        self._evict()

    def over(self, request: str) -> None:
        """A request ended. With the last old one the cache is emptied again, and right from then on."""
        self._early.discard(request)
        if request in self._old:
            self._old.discard(request)
            if not self._old:
                self._evict()

    def emptied(self) -> None:
        """vLLM has emptied its cache, and no request runs."""
        self._old.clear()
        self._outdated = False

    def _evict(self) -> None:
        if self._pool is not None:
            self._pool.evict_blocks(set(range(len(self._pool.blocks))))
            self._outdated = bool(self._old)
