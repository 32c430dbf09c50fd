"""One trial of `internal fusion` on an engine: store its passages, prefill in full, fuse, compare.

Every request runs by itself, with vLLM's own prefix cache emptied before it. Full prefill is asked under a
`cache_salt` of its own, another namespace, so that it neither finds anything nor leaves its prefix to others.
Timed requests force no tokens; a second request of the same kind measures quality.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ragkv.benchmarks.engine import Engine, EngineOptions
from ragkv.benchmarks.internal.fusion_trials import Trial
from ragkv.connectors.vllm.fusing import QUESTION
from ragkv.kvstore.fusion.selection import SELECTIONS as CHOOSERS
from ragkv.kvstore.fusion.selection import Look

SELECTIONS = ("none", "random", "first_tokens", "deviation", "query", "query_deviation", "full")
ANSWER_TOKENS = 16
FULL, OTHER = "full", "other"
PROCESSOR = "ragkv.benchmarks.internal.fusion_quality:Forced"
# Every plan is carried out as asked, whether or not it pays: the table is to show that.
SETTINGS: Mapping[str, Any] = {"memory": {"capacity": "2GiB"}, "placement": {"gate": False}}
ENVIRONMENT = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # functions that run in the workers
_salts = itertools.count()


@dataclass(frozen=True)
class Reply:
    """What came back for one request. `told`: ragkv's part of the response's `kv_transfer_params`."""

    ttft_s: float
    tokens: tuple[int, ...]
    cached_tokens: int
    told: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Full:
    """Full prefill of a trial, whose record the workers hold: the measure of everything else."""

    ttft_s: float
    answer: tuple[int, ...]
    continuation: tuple[int, ...]


def options(model: Any, **change: Any) -> EngineOptions:
    """An engine that can be measured on. `change`: other fields of EngineOptions."""
    llm = {"logits_processors": [PROCESSOR], **change.pop("llm", {})}
    given: dict[str, Any] = {"ragkv": SETTINGS, "environment": ENVIRONMENT, **change}
    return EngineOptions(model, llm=llm, **given)


def store(engine: Engine, trial: Trial) -> None:
    """Forget everything, then prefill each passage behind what it is to be stored behind."""
    engine.evict(ragkv_too=True)
    for prompt, documents in trial.prefills():
        engine.evict()
        ask(engine, prompt, 1, {"documents": documents})


def prefill(engine: Engine, trial: Trial, continuation: int = 32) -> Full:
    """Full prefill: its time, its greedy answer, and its record over the trial's continuation, or over so many
    tokens of the answer (fewer where that ends)."""
    timed = in_full(engine, trial, max(ANSWER_TOKENS, continuation))
    tokens = tuple(timed.tokens[:continuation] if trial.continuation is None else trial.continuation)
    in_full(engine, trial, len(tokens), {"ragkv_force": list(tokens), "ragkv_key": FULL})
    return Full(timed.ttft_s, timed.tokens[:ANSWER_TOKENS], tokens)


def measure(
    engine: Engine, trial: Trial, selection: str, ratio: float, full: Full, layers: int = 30
) -> dict[str, Any]:
    """One row: quality against `full`, and cost. ValueError: an unknown selection.

    "none" recomputes nothing; "full" is full prefill a second time, the noise of the measurement. `layers` of the
    model are for `work`.
    """
    if selection == "full":
        timed = Reply(full.ttft_s, full.answer, 0)
    else:
        engine.evict()
        timed = ask(engine, trial.prompt, ANSWER_TOKENS, hints(trial, selection, ratio))
    return {
        "selection": selection,
        "ratio": ratio,
        **quality(engine, trial, selection, ratio, full),
        "answer_equal": timed.tokens == full.answer,
        "ttft_s": timed.ttft_s,
        "full_ttft_s": full.ttft_s,
        "work": work(trial, selection, ratio, timed, layers),
        "reused": reused(trial, timed),
    }


def quality(engine: Engine, trial: Trial, selection: str, ratio: float, full: Full) -> dict[str, float]:
    """Quality against `full`, means over its continuation: `kl` in nats, `top1` a share, `delta_nll` in nats."""
    positions = len(full.continuation)
    force = {"ragkv_force": list(full.continuation), "ragkv_key": OTHER}
    if selection == "full":
        in_full(engine, trial, positions, force)
    else:
        engine.evict()
        ask(engine, trial.prompt, positions, hints(trial, selection, ratio), force)
    found = engine.call(compare, FULL, OTHER, list(full.continuation))
    return {name: sum(getattr(found, name)) / positions for name in ("kl", "top1", "delta_nll")}


def hints(trial: Trial, selection: str, ratio: float) -> dict[str, Any]:
    """What a request says to have its documents fused so."""
    if selection not in SELECTIONS or selection == "full":
        raise ValueError(f"selection = {selection!r}; allowed: {', '.join(SELECTIONS[:-1])}")
    nothing = selection == "none"
    return {
        "documents": trial.documents(),
        "fuse": True,
        "selection": "first_tokens" if nothing else selection,
        "recompute_ratio": 0.0 if nothing else ratio,
    }


def work(trial: Trial, selection: str, ratio: float, reply: Reply, layers: int) -> float:
    """Token-layers computed, as a share of full prefill's.

    The engine computes what is not cached. Of the cached tokens, those of moved documents are recomputed by the
    ratio, and all that are neither exact nor moved (gaps); where there is something to choose, the choice takes
    the moved ones and the gaps up to the keys of the last layer that the selection looks at, or the question
    through all. The response says by document what moved; a request that moved nothing reused exactly.
    """
    prompt, documents = len(trial.prompt), reply.told.get("documents", ())
    moved = sum(each.get("reused_tokens", 0) for each in documents if each.get("decision") == "moved")
    computed = float(prompt - reply.cached_tokens)
    if moved:
        exact = _exact_system(trial) + sum(
            each.get("reused_tokens", 0) for each in documents if each.get("decision") == "reused"
        )
        gaps = max(0, reply.cached_tokens - exact - moved)
        computed += gaps + ratio * moved
        by = CHOOSERS.get(selection)
        if by is not None and 0 < ratio < 1:
            computed += (moved + gaps) * by.looking(layers)
        if by is not None and 0 < ratio < 1 and Look.QUESTION in by.looks_at:
            computed += min(QUESTION, len(trial.question))
    return computed / prompt


def _exact_system(trial: Trial) -> int:
    """Tokens of the system prompt, where a passage was stored behind it; else 0."""
    system = list(trial.system)
    return len(system) if any(list(before[: len(system)]) == system for before in trial.behind) else 0


def ask(
    engine: Engine,
    prompt: Sequence[int],
    max_tokens: int,
    hints: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
    salt: str | None = None,
    stop: str | None = None,
) -> Reply:
    """One greedy request with ragkv's hints and more `extra_args`. `stop`: a text that ends the answer."""
    arguments = {"kv_transfer_params": {"ragkv": dict(hints)}, **(extra or {})}
    reply: Reply = engine.call(_ask, list(prompt), max_tokens, arguments, salt, stop)
    return reply


def in_full(
    engine: Engine,
    trial: Trial,
    max_tokens: int,
    extra: Mapping[str, Any] | None = None,
    stop: str | None = None,
) -> Reply:
    """Full prefill, in a namespace of its own."""
    engine.evict()
    salt = f"full prefill {next(_salts)}"
    return ask(engine, trial.prompt, max_tokens, {"documents": trial.documents()}, extra, salt, stop)


def reused(trial: Trial, reply: Reply) -> float:
    """Share of the passages' tokens that came from the cache."""
    passages = sum(map(len, trial.passages))
    return max(0, reply.cached_tokens - len(trial.system)) / passages


# --- run beside the engine: function(llm, ...) ---


def _ask(
    llm: Any, prompt: list[int], max_tokens: int, arguments: dict[str, Any], salt: str | None, stop: str | None
) -> Reply:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    parameters = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos="ragkv_force" in arguments, stop=stop
    )
    parameters.extra_args = arguments
    tokens = TokensPrompt(prompt_token_ids=prompt)
    if salt is not None:
        tokens["cache_salt"] = salt
    output = llm.generate([tokens], parameters, use_tqdm=False)[0]
    told = (output.kv_transfer_params or {}).get("ragkv") or {}
    return Reply(
        output.metrics.first_token_latency,
        tuple(output.outputs[0].token_ids),
        output.num_cached_tokens or 0,
        told,
    )


def compare(llm: Any, full: str, other: str, tokens: list[int]) -> Any:
    from ragkv.benchmarks.internal import fusion_quality

    found = llm.collective_rpc(fusion_quality.compare, args=(full, other, tokens))
    return next(each for each in found if each is not None)
