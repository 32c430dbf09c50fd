"""Which reused tokens are worth recomputing: a budget spent where reuse hurts the answer most.

Every selection takes the same runs and the same budget; they differ in what they look at. A look costs a forward
of its own before the choice, so `looks_at` says what the worker has to compute.
"""

import bisect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Flag, auto
from typing import ClassVar

import torch

Run = tuple[int, int]


class Look(Flag):
    """What must be computed before a selection can choose; several may be.

    `EARLY_KEYS`: keys of all context tokens in layer `early_layer`, by a forward up to there, and how far the
    reused ones are from them. `QUESTION`: the question's queries over the reused keys, in all layers.
    """

    NOTHING = 0
    EARLY_KEYS = auto()
    QUESTION = auto()


def early_layer(n_layers: int) -> int:
    """The layer (from 0) of whose keys the early look is: the first whose input has passed attention."""
    return min(1, n_layers - 1)


class Selection(ABC):
    """Chooses tokens. Without state, so one object serves every request, and alike on every rank."""

    name: ClassVar[str]
    looks_at: ClassVar[Look]

    def looking(self, n_layers: int) -> float:
        """What the early look costs for every context token, as a part of that token's prefill."""
        return (early_layer(n_layers) + 0.5) / n_layers if Look.EARLY_KEYS in self.looks_at else 0.0

    @abstractmethod
    def choose(self, runs: Sequence[Run], budget: int, scores: torch.Tensor | None) -> torch.Tensor:
        """The positions to recompute: int64, ascending, exactly min(budget, all) of them.

        `runs`: [start, end) spans of reused tokens in the prompt, ascending and disjoint; each was computed in one
        context, so two that touch stay two. `scores`: float32 [tokens of all runs, in order], higher means rather,
        the product where it looks twice; None for selections that look at nothing. ValueError for runs, budget or
        scores that cannot be.
        """


class FirstTokens(Selection):
    """The first k tokens of every run (LegoLink of EPIC: Hu et al., ICML 2025).

    A run that was computed elsewhere took its first tokens for the beginning of a text: they hold the attention
    that the run could not give to what stands before it now. Looks at no layer, so it costs only the recompute,
    and the engine gets one sequence per run instead of one per scattered token. All runs get the same k; what
    short runs cannot use goes to the others, what is left over to the first ones.
    """

    name = "first_tokens"
    looks_at = Look.NOTHING

    def choose(self, runs: Sequence[Run], budget: int, scores: torch.Tensor | None) -> torch.Tensor:
        lengths = _lengths(runs, budget)
        budget = min(budget, sum(lengths))
        ks = range(max(lengths, default=0) + 1)
        k = bisect.bisect_right(ks, budget, key=lambda k: sum(min(length, k) for length in lengths)) - 1
        left = budget - sum(min(length, k) for length in lengths)
        shares = []
        for length in lengths:
            shares.append(min(length, k + (left > 0)))
            left -= length > k
        return _positions([(start, start + share) for (start, _), share in zip(runs, shares, strict=True)])


class Random(Selection):
    """Tokens by a hash of their position: what a selection must beat. The same on every rank and machine."""

    name = "random"
    looks_at = Look.NOTHING

    def choose(self, runs: Sequence[Run], budget: int, scores: torch.Tensor | None) -> torch.Tensor:
        _lengths(runs, budget)
        positions = _positions(runs)
        return _highest(positions, _scrambled(positions), budget)


class _ByScore(Selection):
    """The groups of adjacent tokens with the highest mean scores, the earlier one where they are equal.

    Groups of `together` tokens, counted from the start of each run. Every contiguous run of chosen tokens becomes
    a sequence of its own in the engine, so fewer and longer ones are faster. The last group is cut to the budget.
    """

    together: ClassVar[int] = 1

    def choose(self, runs: Sequence[Run], budget: int, scores: torch.Tensor | None) -> torch.Tensor:
        lengths = _lengths(runs, budget)
        total = sum(lengths)
        if scores is None or scores.shape != (total,):
            got = None if scores is None else list(scores.shape)
            raise ValueError(f"selection {self.name}: scores of shape {got}, need [{total}], one a reused token")
        step = self.together
        sizes = [min(step, length - start) for length in lengths for start in range(0, length, step)]
        group = torch.repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
        means = torch.zeros(len(sizes)).index_add_(0, group, scores.detach().float().cpu())
        means /= torch.tensor(sizes)
        return _highest(_positions(runs), means[group], budget)


class Deviation(_ByScore):
    """High-KV-deviation tokens (CacheBlend: Yao et al., EuroSys 2025, section 4.3).

    Scores are `deviation_scores` of the keys of layer 1: those of layer 0 depend on the token alone, so they
    cannot deviate once turned to their position. Tokens that deviate in one layer do in the next ones too, so one
    layer is enough. (The paper narrows the choice down from layer to layer.) On 64-token chunks of filings,
    SmolLM2-135M: values choose better in some texts and worse in others, layer 3 a little better for two more
    layers of work. Neighbours go in pairs: deviation comes in stretches, so this costs little (KL 0.44 of plain
    reuse; one by one 0.42, by fours 0.45) and makes 58 tokens 16 sequences and not 35.
    """

    name = "deviation"
    looks_at = Look.EARLY_KEYS
    together = 2


class Query(_ByScore):
    """The tokens that the question attends to (InfoFlow KV: Teng et al., arXiv 2603.05353; ProphetKV).

    Scores are `query_scores` of the prompt's last tokens over the keys as they are reused, added up over layers.
    Looks at all layers: the question goes through the whole model in any case, and no third of the layers, nor a
    single one, chooses better in more than one kind of text. The mean over heads and tokens is as good as any
    maximum, and ranks can add it up. Tokens are taken one by one: pairs cost a quarter of the gain.
    """

    name = "query"
    looks_at = Look.QUESTION


class QueryDeviation(_ByScore):
    """The tokens that the question attends to and that deviate: the product of the scores of `Query` and
    `Deviation`, at the cost of both looks. What is not read may be wrong, and what is right needs no mending."""

    name = "query_deviation"
    looks_at = Look.EARLY_KEYS | Look.QUESTION


SELECTIONS: dict[str, Selection] = {
    selection.name: selection for selection in (FirstTokens(), Deviation(), Query(), QueryDeviation(), Random())
}


def deviation_scores(new_keys: torch.Tensor, reused_keys: torch.Tensor) -> torch.Tensor:
    """How far reused keys are off: squared distances [tokens], float32, summed over heads.

    Both [tokens, kv_heads, dim] of one layer, any float dtype, turned to the same positions. A plain sum, so that
    the scores of tensor-parallel ranks add up to those of the whole. ValueError if the shapes differ.
    """
    if new_keys.shape != reused_keys.shape:
        raise ValueError(f"new keys {list(new_keys.shape)} and reused {list(reused_keys.shape)}: shapes differ")
    return (new_keys.float() - reused_keys.float()).square().sum((-2, -1))


def query_scores(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """How much attention each key gets in one layer: probabilities [context], float32, added up over query heads
    and averaged over the question's tokens; scores of layers and of tensor-parallel ranks add up.

    `queries` [question tokens, heads, dim] and `keys` [context, kv_heads, dim], any float dtype, grouped as in
    the model; `scale` times their products are the logits. Every query sees all keys: the context is all that
    stands before the question. Give the exact prefix too, where the attention sink is: heads that rest on it
    have no say then. ValueError if the heads do not divide.
    """
    tokens, heads, _ = queries.shape
    context, kv_heads, _ = keys.shape
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads, {kv_heads} heads of keys: need a multiple")
    scores = keys.new_zeros(context, dtype=torch.float32)
    for head, grouped in enumerate(queries.float().chunk(kv_heads, dim=1)):  # a head at a time bounds the memory
        logits = grouped.flatten(0, 1) @ keys[:, head].float().T * scale
        scores += logits.softmax(-1).sum(0)
    return scores / tokens


def _lengths(runs: Sequence[Run], budget: int) -> list[int]:
    """Of runs that can be; ValueError for others."""
    end = 0
    for run in runs:
        if not end <= run[0] < run[1]:
            raise ValueError(f"runs {list(runs)}: need [start, end) spans, ascending, disjoint, none empty")
        end = run[1]
    if budget < 0:
        raise ValueError(f"budget {budget}: need 0 or more tokens")
    return [end - start for start, end in runs]


def _positions(runs: Sequence[Run]) -> torch.Tensor:
    """All positions of runs, int64, in order."""
    return torch.cat([torch.arange(0), *(torch.arange(start, end) for start, end in runs)])


def _highest(positions: torch.Tensor, scores: torch.Tensor, budget: int) -> torch.Tensor:
    """The positions of the `budget` highest scores, ascending. NaN counts as highest: such a token is broken."""
    order = torch.argsort(scores, descending=True, stable=True)
    return positions[order[:budget].sort().values]


def _scrambled(positions: torch.Tensor) -> torch.Tensor:
    """A hash of each position, int64 below 2**32 (the finisher of MurmurHash3, Appleby)."""
    mask = 0xFFFFFFFF
    x = positions + 1
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & mask
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & mask
    return x ^ (x >> 16)
