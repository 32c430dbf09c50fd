"""Whose KV it is: the weights that compute it, as far as the scheduler side knows, and what follows from that.

The workers look at all weights at the start, whenever vLLM says that something happened, and when they find that
something differs; the namespace follows from it. Rounds of samples go on all the time. KV goes to lower tiers only
once a round that began after it was computed has found nothing: so what is written down is of the weights that its
namespace says, even if the engine is killed before it notices that they have changed.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from ragkv.connectors.vllm.calls import Calls
from ragkv.connectors.vllm.error_boundary import logger
from ragkv.connectors.vllm.identity import Namespaces
from ragkv.connectors.vllm.messages import Group, Handshake, Question, StepReport, Tables, WeightsLook
from ragkv.connectors.vllm.weights import Rounds, WeightsWatch

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
        self._calls = Calls(self.namespaces.note_adapter, self.namespaces.adapter_failed)
        self._hits: dict[str, int] = {}  # tokens that vLLM had itself, of requests
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
        self.notice(side)
        if not self._watch.settled:
            self._watch.want()
            if getattr(request, "skip_reading_prefix_cache", False):
                self._blocks.note(request.request_id)  # vLLM does not let it wait
        return self._watch.settled

    def serves(self, request: str, computed: int) -> bool:
        """Whether a request may be served and its KV kept: the first `computed` tokens, that vLLM has itself, and
        what will be computed are of weights that are known, as far as can be said before its blocks are known."""
        self._hits[request] = computed
        return self._blocks.hold(request, computed) and not self._watch.blind

    def allocated(self, request: str, tables: Tables, groups: Sequence[Group]) -> bool:
        """vLLM gave a request blocks. Whether those that it found in its cache are of the weights of now."""
        if not self._blocks.outdated:
            return True
        found, given = list[int](), list[int]()
        for group in groups:
            table, cut = tables[group.number], -(-self._hits.get(request, 0) // group.block_tokens)
            found, given = [*found, *table[:cut]], [*given, *table[cut:]]
        return self._blocks.allocated(request, [*found, *given], len(found))

    def scheduled(self, scheduler_output: Any) -> None:
        """Requests have got more blocks in a step."""
        self._blocks.scheduled(scheduler_output)

    def round(self) -> int:
        """The round that will confirm what has been computed until now."""
        return self._rounds.next

    def question(self, tokens: int, side: Side, *, stopping: bool = False) -> Question:
        """What the workers shall look at in this step, before its `tokens` are computed. To be asked before stores
        of this step are ordered. `stopping`: the engine was asked to stop."""
        self.notice(side)
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
        self._blocks.emptied(running=running)

    def suspect(self) -> None:
        """The weights may have been changed already, and vLLM has emptied no cache."""
        self._watch.suspect()
        self._rounds.abandon()

    def bind(self, pool: Any) -> None:
        """vLLM's own blocks."""
        self._blocks.bind(pool)

    def over(self, request: str) -> None:
        """A request ended."""
        self._hits.pop(request, None)
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

    def _hear(self, look: WeightsLook, side: Side) -> None:
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

    def notice(self, side: Side) -> None:
        """Calls since the last time."""
        if self._calls.slept():
            self._watch.doubt()
            side.outdate()  # nobody looks before a request comes
        if self._calls.new():
            self.suspect()
        if self.namespaces.replaced:
            side.outdate()
            self.namespaces.settle_replaced()

    def _outdate(self, side: Side) -> None:
        requests = side.requests
        try:
            side.outdate()
        finally:
            self._blocks.outdate(requests)


class OwnBlocks:
    """vLLM's own prefix cache, when weights have changed and vLLM does not know.

    Requests that run then are old: what they have computed, and all that they compute on it, is of other weights.
    What the cache holds is evicted, but old requests go on to fill blocks; a request that takes one of these is
    old too. When the last of them has ended, these blocks are evicted. Where vLLM does not show its blocks,
    whatever the cache gives is taken for old until vLLM has emptied it.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._old: set[str] = set()
        self._early: set[str] = set()  # requests that nobody else knows
        self._filled: set[int] = set()  # blocks that old requests have, or had
        self._nothing: set[int] = set()  # the block that stands in tables where there is none
        self._outdated = False

    def hold(self, request: str, computed: int) -> bool:
        """Whether the first `computed` tokens that the cache gives a request may be of the weights of now."""
        if not computed or not self._outdated or self._pool is not None:
            return True
        self._old.add(request)
        return False

    def allocated(self, request: str, blocks: Sequence[int], found: int) -> bool:
        """A request was given blocks, the first `found` of them by the cache. Whether these are of the weights of
        now."""
        if not self._outdated or self._pool is None:
            return True
        if request in self._old or not self._filled.isdisjoint(blocks[:found]):
            self._old.add(request)
            self._filled |= {*blocks} - self._nothing
            return False
        self._filled.difference_update(blocks[found:])
        return True

    def scheduled(self, scheduler_output: Any) -> None:
        """Requests were given more blocks."""
        if not self._outdated or self._pool is None:
            return
        cached = scheduler_output.scheduled_cached_reqs
        for request, new in zip(cached.req_ids, cached.new_block_ids, strict=True):
            blocks = {block for table in new or () for block in table} - self._nothing
            if request in self._old:
                self._filled |= blocks
            else:
                self._filled -= blocks

    def note(self, request: str) -> None:
        """A request that runs while nobody knows by which weights."""
        self._early.add(request)

    def bind(self, pool: Any) -> None:
        """The blocks of the engine."""
        self._pool, nothing = pool, getattr(pool, "null_block", None)
        self._nothing = set() if nothing is None else {nothing.block_id}

    @property
    def outdated(self) -> bool:
        """Whether any block may be of other weights."""
        return self._outdated

    def outdate(self, requests: Iterable[str]) -> None:
        """All blocks, and all that these requests will still compute, are of other weights."""
        used = self._used()
        self._old |= {*requests, *self._early}
        self._early.clear()
        self._filled |= used
        self._outdated = True
        if self._pool is not None:
            self._pool.evict_blocks(set(range(len(self._pool.blocks))))
            if not used:
                self._right_again()

    def over(self, request: str) -> None:
        """A request ended. With the last old one all is right."""
        self._early.discard(request)
        if request in self._old:
            self._old.discard(request)
            if not self._old and self._pool is not None:
                self._pool.evict_blocks(self._filled)
                self._right_again()

    def emptied(self, *, running: bool) -> None:
        """vLLM has emptied its cache, unless requests have blocks (it does not say); `running`: some may have."""
        running = running or bool(self._old or self._early) if self._pool is None else bool(self._used())
        if not running:
            self._right_again()

    def _used(self) -> set[int]:
        """Blocks that requests have."""
        blocks = () if self._pool is None else self._pool.blocks
        return {block.block_id for block in blocks if block.ref_cnt > 0 and not block.is_null}

    def _right_again(self) -> None:
        self._old.clear()
        self._filled.clear()
        self._outdated = False
