"""Fusion on the scheduler side: what of a prompt can be had from elsewhere, whether it pays, and the orders.

Fused KV is approximate. It never reaches the store, nor does what is computed behind it; and unless `fusion.keep`
is set, the engine's own prefix cache keeps it under names that no other request asks for.
"""

import os
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from ragkv.config.settings import FusionSettings
from ragkv.connectors.vllm.error_boundary import logger
from ragkv.connectors.vllm.hints import Hints
from ragkv.connectors.vllm.messages import Fusion, Indices, positions_of, slots_of
from ragkv.connectors.vllm.tracking import ANSWER_SECONDS, IDLE_SECONDS, Tracked
from ragkv.kvstore import metrics as m
from ragkv.kvstore.catalogue import Chunk, rows
from ragkv.kvstore.fusion.matching import find_moved
from ragkv.kvstore.fusion.plan import DECLINED, UNSUPPORTED, Cover, Declined, Plan, decisions, make_plan, runs_of
from ragkv.kvstore.fusion.selection import SELECTIONS
from ragkv.kvstore.keys import TOKEN_BYTES
from ragkv.kvstore.metrics import Metrics
from ragkv.kvstore.placement import Placement

QUESTION = 32  # last tokens of a prompt, which are never moved, and what a selection takes for the question
MOST_FAILURES = 3
MOST_KEPT = 1_000_000  # hashes of fused blocks that are remembered; beyond, no more are left in vLLM's cache


class Fusing:
    """One engine's head for fusion. `refusal`: why this engine cannot fuse, or None; `layers`: of the model."""

    def __init__(
        self,
        settings: FusionSettings,
        placement: Placement,
        block_tokens: int,
        layers: int,
        metrics: Metrics,
    ) -> None:
        self._settings, self._placement, self._block_tokens = settings, placement, block_tokens
        self._layers, self._metrics = layers, metrics
        self.refusal: str | None = None
        self._failures = 0
        self._said: set[str] = set()
        self._kept: set[Any] = set()  # hashes of fused blocks in vLLM's own cache

    def wanted(self, hints: Hints) -> bool:
        """Whether a request is to be fused, where that can be done."""
        return self._settings.enabled if hints.fuse is None else hints.fuse

    def inherit(self, tracked: Tracked, computed: int) -> None:
        """Note where vLLM's own hit of `computed` tokens is of blocks that were fused."""
        blocks = tracked.request.block_hashes[: computed // self._block_tokens] if self._kept else ()
        for number, name in enumerate(blocks):
            if name in self._kept:
                tracked.taint(number * self._block_tokens)
                return

    def lookup(self, tracked: Tracked, exact: int, *, idle: bool = False) -> int | None:
        """Up to which token the prompt can be had, of which the first `exact` are exact; None: ask again. `idle`:
        the engine has nothing else to do. (A hit in vLLM's own cache may be of blocks that are only being computed
        in this step: fusions are of a later one.)"""
        if not self._possible(tracked, exact):
            tracked.plan = tracked.planned = None
            return exact
        if self._waits(tracked, exact, idle=idle):
            return None
        seen = (tracked.request.num_tokens, exact)
        if tracked.planned != seen or not self._stands(tracked.plan):
            tracked.plan = tracked.planned = None  # should the next one fail
            tracked.plan = self._plan(tracked, exact)
            tracked.planned = seen
        return self.end(tracked) if tracked.plan is not None else exact

    def end(self, tracked: Tracked) -> int:
        """Up to which token a fusion computes what it does not move: some tokens behind the last moved one, where
        the question is put while it is looked at, so that they have blocks; never the prompt's last."""
        assert tracked.plan is not None
        return min(tracked.plan.end + QUESTION, int(tracked.request.num_tokens) - 1)

    def failed(self, times: int) -> None:
        """Workers could not fuse. An engine that cannot is not asked for ever."""
        self._failures += times
        if self._failures >= MOST_FAILURES:
            self.refusal = self.refusal or f"it failed {self._failures} times"

    def moves(self, tracked: Tracked, blocks: list[int]) -> tuple[list[Chunk], Indices, Indices, Indices]:
        """What is to be loaded for a plan: the chunks; of every token its row in memory, its slot, its shift."""
        assert tracked.plan is not None
        pieces = tracked.plan.pieces
        chunks = list(dict.fromkeys(each.chunk for each in pieces))
        begin = dict(zip(chunks, accumulate(map(len, chunks), initial=0), strict=False))  # its rows, among all
        firsts = [begin[each.chunk] + each.first for each in pieces]
        which = positions_of([(at, at + len(each)) for at, each in zip(firsts, pieces, strict=True)])
        positions = positions_of([(each.start, each.end) for each in pieces])
        shifts = np.repeat(
            np.array([each.shift for each in pieces], dtype=np.int64), [len(each) for each in pieces]
        )
        slots = slots_of(blocks, positions, self._block_tokens)
        return chunks, rows(chunks, self._placement.hierarchy.page_tokens)[which], slots, shifts

    def order(self, tracked: Tracked, blocks: list[int]) -> Fusion:
        """The order to mend what a plan loads. From now on the request is not exact behind its exact part."""
        plan, end = tracked.plan, self.end(tracked)
        assert plan is not None
        tracked.taint(plan.exact)
        gap = end - plan.exact - plan.moved
        tracked.mended = gap + plan.budget
        tokens = tracked.chain.tokens
        self._metrics.count(m.FUSED_TOKENS, plan.moved - plan.budget, kind="reused")
        self._metrics.count(m.FUSED_TOKENS, plan.budget, kind="recomputed")
        self._metrics.count(m.FUSED_TOKENS, gap, kind="gap")
        return Fusion(
            tracked.request.request_id,
            tokens[:end],
            np.asarray(blocks, dtype=np.int64),
            plan.exact,
            end,
            tuple(runs_of(plan.pieces)),
            plan.budget,
            tracked.hints.selection or self._settings.selection,
            tokens[plan.end - end :],  # as if right behind the documents
            plan.end,
            plan.work,
        )

    def tell(self, tracked: Tracked, computed: int) -> dict[str, Any] | None:
        """What a response tells of its request, of which `computed` tokens had KV; None where it gave no hints and
        was not to be fused."""
        found, exact, outcome = tracked.outcome or ((), 0, None)
        documents = [(each.id, each.start, each.end) for each in tracked.hints.documents]
        if not documents and isinstance(outcome, Declined) and outcome.kind == UNSUPPORTED:
            documents = [("", exact, tracked.request.num_tokens)]
        made = decisions(documents, exact, found, outcome) if outcome is not None else []
        for each in made:
            logger.debug("ragkv: fusion of %s: %s", tracked.request.request_id, each)
            self._metrics.count(m.FUSION_DECISIONS, decision=each.kind)
        if not (tracked.hints.given or self.wanted(tracked.hints)):
            return None
        told = {
            "hit_tokens": sum(tracked.sources.values()) - tracked.mended,
            "stored_tokens": self._stored(tracked, min(tracked.request.num_prompt_tokens, computed)),
            "documents": [each.as_dict() for each in made],
        }
        if tracked.hints.problems:
            told["problems"] = list(tracked.hints.problems)
        return {"ragkv": told}

    def _stored(self, tracked: Tracked, upto: int) -> int:
        """First tokens of a request, at most `upto`, that are known to be stored: memory holds them now. What is
        still being written, or was refused, does not count."""
        hierarchy = self._placement.hierarchy
        return hierarchy.match(tracked.namespace, tracked.chain, upto).length

    def _possible(self, tracked: Tracked, exact: int) -> bool:
        request, why = tracked.request, self.refusal
        if not self.wanted(tracked.hints) or getattr(request, "skip_reading_prefix_cache", False):
            return False
        names = request.block_hashes
        if request.lora_request is not None:
            why = "a LoRA adapter"
        elif request.mm_features:
            why = "images or other media"
        elif names and len(names) != request.num_tokens // self._block_tokens:
            why = "vLLM hashes blocks of another size than it keeps"
        if why is not None:
            self._refuse(tracked, exact, why)
            return False
        if self._placement.hierarchy.holds.late:
            return False  # of what is found some may have to go
        if tracked.declined:
            return False  # even what is exact is quicker to compute than to load
        # Else no whole block has a name that could tell those that follow it from exact ones.
        return bool(request.num_tokens // self._block_tokens > exact // self._block_tokens)

    def _refuse(self, tracked: Tracked, exact: int, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            logger.warning("ragkv: no fusion, exact reuse only: %s", why)
        tracked.outcome = (), exact, Declined(UNSUPPORTED, why)

    def _stands(self, plan: Plan | None) -> bool:
        """Whether what was planned, if anything, is still there."""
        return plan is None or all(piece.chunk in self._placement.hierarchy for piece in plan.pieces)

    def _waits(self, tracked: Tracked, exact: int, *, idle: bool) -> bool:
        """Whether more is on its way from lower tiers; it is asked for once."""
        self._placement.index_contents()
        answer = 0.0
        if not tracked.gathered:
            tracked.gathered, answer = True, ANSWER_SECONDS
            tracked.gather = self._gather(tracked, exact)
        if tracked.gather is None:
            return False
        return self._placement.waits(tracked.gather, answer, IDLE_SECONDS if idle else 0.0)

    def _gather(self, tracked: Tracked, exact: int) -> Any:
        """Bring up what memory lacks of the rest and lower tiers have, wherever it was computed; None: nothing."""
        chain = tracked.chain
        raw, spans = chain.tokens.tobytes(), pairwise([0, *chain.ends])
        parts = [raw[TOKEN_BYTES * start : TOKEN_BYTES * end] for start, end in spans if start >= exact]
        return self._placement.gather(tracked.namespace, parts)

    def _plan(self, tracked: Tracked, exact: int) -> Plan | None:
        hints, settings, hierarchy = tracked.hints, self._settings, self._placement.hierarchy
        assert hierarchy.contents is not None
        limit, shared = max(exact, tracked.request.num_tokens - QUESTION), tracked.match.chunks
        found = find_moved(hierarchy.contents, tracked.namespace, tracked.chain, exact, limit, shared)
        ratio = settings.recompute_ratio if hints.recompute_ratio is None else hints.recompute_ratio
        look = SELECTIONS[hints.selection or settings.selection]
        scoring = look.looking(self._layers) if 0 < ratio < 1 else 0.0
        outcome = make_plan(found, exact, limit, ratio, settings.min_tokens, scoring, self._placement.gate)
        if isinstance(outcome, Plan) and 2 * outcome.moved < limit - exact:
            few = f"only {outcome.moved} of {limit - exact} tokens are held; computed in full, all can be stored"
            outcome = Declined(DECLINED, few, outcome.short)
        tracked.outcome = found, exact, outcome
        if isinstance(outcome, Declined):
            return None
        self._rename(tracked.request, exact)
        return outcome

    def _rename(self, request: Any, exact: int) -> None:
        """See to it that fused blocks, and all behind them, are no other request's: vLLM gives a block's hash to
        the cache when it is allocated, and makes the next hash from the last."""
        first = exact // self._block_tokens
        names = request.block_hashes
        if self._settings.keep and len(self._kept) + len(names) <= MOST_KEPT:
            self._kept.update(names[first:])
            return
        for number in range(first, len(names)):
            names[number] = type(names[number])(os.urandom(len(names[number])))


def saved(start: int, end: int, computed: int, exact: int, moved: Cover) -> int:
    """Tokens of a document, from `start` to `end`, that need not be computed: of those between `computed` and
    `exact`, and of what a plan moves."""
    return max(0, min(end, exact) - max(start, computed)) + moved.tokens(start, end)
