"""What `ragkv top` shows of a server: the figures between two scrapes of its metrics."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from ragkv.errors import RagKVError
from ragkv.kvstore import metrics as m
from ragkv.scrape import Snapshot

OWN, FUSED, COMPUTED = "engine", "fused", "computed"
TIERS = (m.DEVICE, m.MEMORY, m.DISK, m.REDIS, m.STORE)
STATES = {0: "in use", 1: "on trial", 2: "at rest"}
TTFT = "vllm:time_to_first_token_seconds"
START = "process_start_time_seconds"


class NotRagKV(RagKVError):
    """A server whose metrics do not name ragkv."""


@dataclass(frozen=True)
class Turn:
    """Requests that were this turn of a conversation, and the reused tokens of their prompts."""

    requests: int
    prompt_tokens: int
    reused_tokens: int


@dataclass(frozen=True)
class TierFigures:
    """One tier. `evicted_per_s`: evictions for lack of room. `read`, `write`: breakers, of lower tiers only."""

    used_bytes: float
    capacity_bytes: float
    chunks: int
    evicted_per_s: float | None
    queued_bytes: float
    read: str | None
    write: str | None
    errors: Mapping[str, float]


@dataclass(frozen=True)
class Document:
    """A hinted document since the server's start."""

    hits: int
    saved_tokens: int


@dataclass(frozen=True)
class Frame:
    """All figures of one view; also the JSON object of `ragkv top --json`."""

    url: str
    model: str
    since_start: bool  # rates, times, sources, gate, waits and fusion cover the server's whole life
    seconds: float | None  # that they cover; None: the server does not tell when it started
    requests_per_s: float | None
    prompt_tokens_per_s: float | None
    generated_tokens_per_s: float | None
    running: int
    waiting: int
    kv_usage: float
    ttft_s: Mapping[str, float | None]
    sources: Mapping[str, int]  # prompt tokens by the origin of their KV; "engine": vLLM's own prefix cache
    hit_rate: float | None  # share of all prompt tokens; None without any
    ragkv_rate: float | None
    turns: Mapping[str, Turn]  # since the server's start, as are documents and errors
    tiers: Mapping[str, TierFigures]
    gate: Mapping[str, float]
    waits: Mapping[str, float]
    fusion: Mapping[str, float]
    documents: Mapping[str, Document]  # the most hit first
    errors: Mapping[str, float]


def make_frame(url: str, seen: Snapshot, earlier: Snapshot | None) -> Frame:
    """The figures between two snapshots, or since the server's start. Raises NotRagKV."""
    if not seen.knows(m.LOOKUPS.removesuffix("_total")):
        raise NotRagKV(f"{url} is a server without ragkv (it has no {m.LOOKUPS}); start it with `ragkv serve`")
    new = seen if earlier is None else seen.since(earlier)
    seconds = _age(seen) if earlier is None else new.taken
    sources = _sources(new)
    prompt = sum(sources.values())
    ours = sum(sources[source] for source in (*TIERS, FUSED))
    return Frame(
        url=url,
        model=", ".join(seen.by("vllm:kv_cache_usage_perc", "model_name")),
        since_start=earlier is None,
        seconds=seconds,
        requests_per_s=_rate(new.total("vllm:request_success_total"), seconds),
        prompt_tokens_per_s=_rate(prompt, seconds),
        generated_tokens_per_s=_rate(new.total("vllm:generation_tokens_total"), seconds),
        running=int(seen.total("vllm:num_requests_running")),
        waiting=int(seen.total("vllm:num_requests_waiting")),
        kv_usage=seen.most("vllm:kv_cache_usage_perc") or 0.0,
        ttft_s={"p50": new.quantile(TTFT, 0.5), "p95": new.quantile(TTFT, 0.95)},
        sources=sources,
        hit_rate=(prompt - sources[COMPUTED]) / prompt if prompt else None,
        ragkv_rate=ours / prompt if prompt else None,
        turns=_turns(seen),
        tiers={tier: _tier(tier, seen, new, seconds) for tier in TIERS if _present(tier, seen)},
        gate=new.by(m.GATE_DECISIONS, "decision"),
        waits=new.by(m.WAITS, "result"),
        fusion=new.by(m.FUSED_TOKENS, "kind"),
        documents=_documents(seen),
        errors=_nonzero(seen.by(m.ERRORS, "kind")),
    )


def _sources(new: Snapshot) -> dict[str, int]:
    """Prompt tokens by source. ragkv counts a hit when it gives it, vLLM a prompt at its first token: in a short
    time the hits may exceed the prompt tokens, and then no token counts as computed."""
    sources = {OWN: int(new.total("vllm:prefix_cache_hits_total"))}
    sources |= {tier: int(new.total(m.HIT_TOKENS, tier=tier)) for tier in TIERS}
    sources[FUSED] = int(new.total(m.FUSED_TOKENS, kind="reused"))
    sources[COMPUTED] = max(0, int(new.total("vllm:prompt_tokens_total")) - sum(sources.values()))
    return sources


def _turns(seen: Snapshot) -> dict[str, Turn]:
    prompts, reused = seen.by(m.TURN_PROMPT_TOKENS, "turn"), seen.by(m.TURN_REUSED_TOKENS, "turn")
    return {
        turn: Turn(int(count), int(prompts.get(turn, 0)), int(reused.get(turn, 0)))
        for turn, count in _nonzero(seen.by(m.TURN_REQUESTS, "turn")).items()
    }


def _present(tier: str, seen: Snapshot) -> bool:
    """Whether a server has a tier. One without a budget of its own (Redis) is known by its breakers."""
    return any(seen.most(name, tier=tier) is not None for name in (m.CAPACITY_BYTES, m.TIER_STATE))


def _tier(tier: str, seen: Snapshot, new: Snapshot, seconds: float | None) -> TierFigures:
    worst = {side: seen.most(m.TIER_STATE, tier=tier, side=side) for side in ("read", "write")}
    states = {side: None if state is None else STATES.get(int(state), "?") for side, state in worst.items()}
    return TierFigures(
        used_bytes=seen.total(m.USED_BYTES, tier=tier),
        capacity_bytes=seen.total(m.CAPACITY_BYTES, tier=tier),
        chunks=int(seen.total(m.CHUNKS, tier=tier)),
        evicted_per_s=_rate(new.total(m.EVICTED_CHUNKS, tier=tier, reason=m.CAPACITY), seconds),
        queued_bytes=seen.total(m.QUEUED_BYTES, tier=tier),
        errors=_nonzero(seen.by(m.TIER_ERRORS, "reason", tier=tier)),
        **states,
    )


def _documents(seen: Snapshot) -> dict[str, Document]:
    saved, hits = seen.by(m.DOCUMENT_SAVED_TOKENS, "document"), seen.by(m.DOCUMENT_HITS, "document")
    order = sorted(saved | hits, key=lambda name: (-hits.get(name, 0), -saved.get(name, 0), name))
    return {name: Document(int(hits.get(name, 0)), int(saved.get(name, 0))) for name in order}


def _nonzero(counts: Mapping[str, float]) -> dict[str, float]:
    return {name: count for name, count in counts.items() if count}


def _age(seen: Snapshot) -> float | None:
    started = seen.most(START)
    return None if started is None else max(0.0, time.time() - started)


def _rate(count: float, seconds: float | None) -> float | None:
    return count / seconds if seconds else None
