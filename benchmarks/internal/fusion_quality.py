"""How far fused prefill is from full prefill, through the engine's own path.

A custom logits processor of vLLM forces the tokens of a continuation and keeps what the model said at each of
them; `compare`, run in the workers, measures two such records against each other, so that no logits leave them.
A request joins in with `extra_args` {"ragkv_force": [token ids], "ragkv_key": name of its record}.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor, process_dict_updates

FORCE, KEY = "ragkv_force", "ragkv_key"
RECORDS: dict[str, dict[int, torch.Tensor]] = {}  # of this worker: log-probabilities float32 [vocabulary] by step


@dataclass(frozen=True)
class _Job:
    """`given`: the request's output so far, a list that vLLM appends to."""

    key: str
    tokens: Sequence[int]
    given: Sequence[int]


class Forced(LogitsProcessor):  # type: ignore[misc]
    """Keeps log softmax of the raw logits of every step, and leaves only the wanted token.

    The step is the number of tokens given so far, so that a prompt computed in several steps, whose logits vLLM
    throws away but for the last, counts once, and asynchronous scheduling, where those tokens are placeholders,
    does no harm. Other processors of the same request would change the raw logits: use none.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._jobs: dict[int, _Job] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self._jobs, batch_update, _read)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """`logits` float32 [requests, vocabulary], changed in place."""
        for row, job in self._jobs.items():
            step = len(job.given)
            if step < len(job.tokens):
                RECORDS.setdefault(job.key, {})[step] = logits[row].float().log_softmax(-1).cpu()
                logits[row] = float("-inf")
                logits[row, job.tokens[step]] = 0
        return logits


def _read(params: Any, prompt: Sequence[int] | None, given: Sequence[int]) -> _Job | None:
    extra = params.extra_args or {}
    return _Job(extra[KEY], extra[FORCE], given) if FORCE in extra else None


@dataclass(frozen=True)
class Divergence:
    """By position: KL(full || other) in nats, whether the likeliest token is the same, and how much less likely
    the continuation's token became (difference of negative log-likelihoods, nats)."""

    kl: list[float]
    top1: list[bool]
    delta_nll: list[float]


def divergence(full: torch.Tensor, other: torch.Tensor, tokens: Sequence[int]) -> Divergence:
    """Of log-probabilities [positions, vocabulary], float32; `tokens`: the continuation, one a position."""
    wanted = torch.tensor(tokens, dtype=torch.int64)[:, None]
    p, q = full.double(), other.double()
    weight = p.exp()
    terms = torch.where(weight > 0, weight * (p - q), 0.0)
    return Divergence(
        terms.sum(-1).tolist(),
        (full.argmax(-1) == other.argmax(-1)).tolist(),
        (p.gather(1, wanted) - q.gather(1, wanted))[:, 0].tolist(),
    )


def compare(worker: Any, full: str, other: str, tokens: Sequence[int]) -> Divergence | None:
    """Run in a worker: two records over the same continuation. Forgets the second one.

    None where this worker sees no logits. ValueError: a record is incomplete.
    """
    if not RECORDS:
        return None
    found = [_stack(key, len(tokens)) for key in (full, other)]
    if full != other:
        del RECORDS[other]
    return divergence(found[0], found[1], tokens)


def forget(worker: Any) -> None:
    """Run in a worker: drop all records."""
    RECORDS.clear()


def _stack(key: str, positions: int) -> torch.Tensor:
    steps = RECORDS.get(key, {})
    missing = [step for step in range(positions) if step not in steps]
    if missing:
        raise ValueError(f"the record {key!r} has {len(steps)} of {positions} steps; step {missing[0]} is missing")
    return torch.stack([steps[step] for step in range(positions)])
