"""Fusion on the scheduler side: what of a prompt can be had from elsewhere, whether it pays, and the orders.

Fused KV is approximate. It never reaches the store, nor does what is computed behind it; and unless `fusion.keep`
is set, the engine's own prefix cache keeps it under names that no other request asks for.
"""

import os
from typing import Any

import numpy as np

from ragkv.config.settings import FusionSettings
from ragkv.connectors.vllm.error_boundary import logger
from ragkv.connectors.vllm.hints import Hints
from ragkv.connectors.vllm.messages import Fusion
from ragkv.connectors.vllm.request_state import RequestState
from ragkv.kvstore import metrics as m
from ragkv.kvstore.cache import PINNED_ALL, KVCache
from ragkv.kvstore.fusion.plan import DECLINED, UNSUPPORTED, Cover, Declined, Plan, decisions, make_plan, runs_of
from ragkv.kvstore.fusion.selection import SELECTIONS
from ragkv.kvstore.metrics import Metrics
from ragkv.kvstore.ordering import Ordered
from ragkv.kvstore.prompt import Result

QUESTION = 32  # last tokens of a prompt, which are never moved, and what a selection takes for the question
MOST_FAILURES = 3
MOST_KEPT = 1_000_000  # hashes of fused blocks that are remembered; beyond, no more are left in vLLM's cache


class Fusing:
    """One engine's head for fusion. `refusal`: why this engine cannot fuse, or None; `layers`: of the model."""

    def __init__(
        self,
        settings: FusionSettings,
        cache: KVCache,
        block_tokens: int,
        layers: int,
        metrics: Metrics,
    ) -> None:
        self._settings, self._cache, self._block_tokens = settings, cache, block_tokens
        self._layers, self._metrics = layers, metrics
        self.refusal: str | None = None
        self._failures = 0
        self._said: set[str] = set()
        self._kept: set[Any] = set()  # hashes of fused blocks in vLLM's own cache

    def wanted(self, hints: Hints) -> bool:
        """Whether a request is to be fused, where that can be done."""
        return self._settings.enabled if hints.fuse is None else hints.fuse

    def inherit(self, state: RequestState, computed: int) -> None:
        """Note where vLLM's own hit of `computed` tokens is of blocks that were fused."""
        blocks = state.request.block_hashes[: computed // self._block_tokens] if self._kept else ()
        for number, name in enumerate(blocks):
            if name in self._kept:
                state.taint(number * self._block_tokens)
                return

    def lookup(self, state: RequestState, exact: int, *, idle: bool = False) -> int | None:
        """Up to which token the prompt can be had, of which the first `exact` are exact; None: ask again. `idle`:
        the engine has nothing else to do. (A hit in vLLM's own cache may be of blocks that are only being computed
        in this step: fusions are of a later one.)"""
        fusion, limit = state.fusion, max(exact, state.request.num_tokens - QUESTION)
        if not self._possible(state, exact):
            fusion.plan = fusion.passages = None
            return exact
        found = self._cache.lookup_content(state.prompt, exact, limit, idle=idle)
        if found.result is Result.PENDING:
            return None
        if fusion.passages is not state.prompt.passages:
            fusion.plan = fusion.passages = None  # should the next one fail
            fusion.plan = self._plan(state, exact, limit)
            fusion.passages = state.prompt.passages
        return self.end(state) if fusion.plan is not None else exact

    def end(self, state: RequestState) -> int:
        """Up to which token a fusion computes what it does not move: some tokens behind the last moved one, where
        the question is put while it is looked at, so that they have blocks; never the prompt's last."""
        assert state.fusion.plan is not None
        return min(state.fusion.plan.end + QUESTION, int(state.request.num_tokens) - 1)

    def failed(self, times: int) -> None:
        """Workers could not fuse. An engine that cannot is not asked for ever."""
        self._failures += times
        if self._failures >= MOST_FAILURES:
            self.refusal = self.refusal or f"it failed {self._failures} times"

    def order(self, state: RequestState, blocks: list[int], timed: int = 0) -> Fusion:
        """The order to fuse what a plan loads. From now on only the plan's exact prefix of the request is exact.
        `timed`: as of `Fusion`."""
        plan, end = state.fusion.plan, self.end(state)
        assert plan is not None
        state.taint(plan.exact)
        gap = end - plan.exact - plan.moved
        state.fusion.mended, state.fusion.moved = gap + plan.budget, plan.moved - plan.budget
        tokens = state.prompt.chain.tokens
        self._metrics.count(m.FUSED_TOKENS, plan.moved - plan.budget, kind="reused")
        self._metrics.count(m.FUSED_TOKENS, plan.budget, kind="recomputed")
        self._metrics.count(m.FUSED_TOKENS, gap, kind="gap")
        return Fusion(
            state.request.request_id,
            tokens[:end],
            np.asarray(blocks, dtype=np.int64),
            plan.exact,
            end,
            tuple(runs_of(plan.pieces)),
            plan.budget,
            state.hints.selection or self._settings.selection,
            tokens[plan.end - end :],  # as if right behind the documents
            plan.end,
            plan.work,
            timed,
        )

    def tell(self, state: RequestState, computed: int) -> dict[str, Any] | None:
        """What a response tells of its request, of which `computed` tokens had KV; None where it gave no hints and
        was not to be fused."""
        found, exact, outcome = state.fusion.outcome or ((), 0, None)
        documents = [(each.id, each.start, each.end) for each in state.hints.documents]
        if not documents and isinstance(outcome, Declined) and outcome.kind == UNSUPPORTED:
            documents = [("", exact, state.request.num_tokens)]
        made = decisions(documents, exact, found, outcome) if outcome is not None else []
        for each in made:
            logger.debug("ragkv: fusion of %s: %s", state.request.request_id, each)
            self._metrics.count(m.FUSION_DECISIONS, decision=each.kind)
        if not (state.hints.given or self.wanted(state.hints)):
            return None
        hit = sum(state.sources.values()) - state.fusion.mended
        prompt, moved = state.request.num_prompt_tokens, state.fusion.moved
        had = min(state.computed, prompt)
        own = state.exact_upto(had)  # the rest of vLLM's own hit was fused
        kept = min(own + hit - moved, prompt)
        fused = min(moved + had - own, prompt - kept)
        told = {
            "hit_tokens": hit,
            "exact_tokens": kept,
            "fused_tokens": fused,
            "computed_tokens": prompt - kept - fused,
            "stored_tokens": self._cache.stored_tokens(state.prompt, min(prompt, computed)),
            "documents": [each.as_dict() for each in made],
        }
        if state.search is not None and state.search.result is not None:
            told["order"] = told_order(state.search.result, self._metrics)
        problems = [*state.hints.problems, *([PINNED_ALL] if state.prompt.pins_refused else ())]
        if problems:
            told["problems"] = problems
        return {"ragkv": told}

    def _possible(self, state: RequestState, exact: int) -> bool:
        request, why = state.request, self.refusal
        if not self.wanted(state.hints) or getattr(request, "skip_reading_prefix_cache", False):
            return False
        names = request.block_hashes
        if request.lora_request is not None:
            why = "a LoRA adapter"
        elif request.mm_features:
            why = "images or other media"
        elif names and len(names) != request.num_tokens // self._block_tokens:
            why = "vLLM hashes blocks of another size than it keeps"
        if why is not None:
            self._refuse(state, exact, why)
            return False
        if self._cache.expiring:
            return False  # of what is found some may have to go
        if state.prompt.declined:
            return False  # even what is exact is quicker to compute than to load
        # Else no whole block has a name that could tell those that follow it from exact ones.
        return bool(request.num_tokens // self._block_tokens > exact // self._block_tokens)

    def _refuse(self, state: RequestState, exact: int, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            logger.warning("ragkv: no fusion, exact reuse only: %s", why)
        state.fusion.outcome = (), exact, Declined(UNSUPPORTED, why)

    def _plan(self, state: RequestState, exact: int, limit: int) -> Plan | None:
        hints, settings, found = state.hints, self._settings, state.prompt.passages
        ratio = settings.recompute_ratio if hints.recompute_ratio is None else hints.recompute_ratio
        look = SELECTIONS[hints.selection or settings.selection]
        scoring = look.looking(self._layers) if 0 < ratio < 1 else 0.0
        outcome = make_plan(found, exact, limit, ratio, settings.min_tokens, scoring, self._cache.gate)
        if isinstance(outcome, Plan) and 2 * outcome.moved < limit - exact:
            few = f"only {outcome.moved} of {limit - exact} tokens are held; computed in full, all can be stored"
            outcome = Declined(DECLINED, few, outcome.short)
        state.fusion.outcome = found, exact, outcome
        if isinstance(outcome, Declined):
            return None
        self._rename(state.request, exact)
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


def told_order(found: Ordered, metrics: Metrics) -> dict[str, Any]:
    """What a response tells of the order that was found for passages; and counts it."""
    for kind, tokens in (("all", found.all), ("given", found.given), ("ordered", found.tokens)):
        metrics.count(m.ORDERED_TOKENS, tokens, kind=kind)
    return {
        "passages": list(found.order),
        "tokens": found.all,
        "given_tokens": found.given,
        "ordered_tokens": found.tokens,
    }


def saved(start: int, end: int, computed: int, exact: int, moved: Cover) -> int:
    """Tokens of a document, from `start` to `end`, that need not be computed: of those between `computed` and
    `exact`, and of what a plan moves."""
    return max(0, min(end, exact) - max(start, computed)) + moved.tokens(start, end)
