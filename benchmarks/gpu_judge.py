"""What `ragkv bench gpu` expects of its figures, apart from how they are measured."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LEAST_SHARE = 0.85  # of a plain copy's speed
MOST_COLD = 1.02  # times plain vLLM
MOST_WARM = 1.1  # times vLLM's own hit, and the time on the bus
MOST_DELAY = 0.010  # seconds, of others' tokens
MOST_SYNCS = 9  # of a fused step
MOST_FUSED = 0.5  # of a cold prompt's TTFT
NEAR, EQUAL = 0.1, 1e-2  # of log probabilities: right but for rounding, and as good as the same


@dataclass(frozen=True)
class Check:
    """One line of the report. `decisive`: where it fails, the later checks would mean nothing."""

    step: int
    name: str
    ok: bool
    said: str
    decisive: bool = False
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """One answer. `first`: log probabilities of the likeliest first tokens; `failed`: the request ended with an
    error instead."""

    tokens: tuple[int, ...]
    first: Mapping[int, float]
    cached: int = 0
    ttft_s: float = 0.0
    failed: bool = False


def distance(plain: Reply, other: Reply) -> float:
    """How far the log probability of plain's likeliest first token is from the other's; infinite where the other
    does not have it among its likeliest."""
    best = max(plain.first, key=lambda token: plain.first[token])
    return abs(plain.first[best] - other.first.get(best, -math.inf))


def judge_copies(wrong: int, rounds: int) -> Check:
    """Rounds of store, overwrite, load that nobody waited for."""
    said = f"{rounds} rounds of store, overwrite and load without a wait: {wrong} wrong elements"
    return Check(1, "copies", wrong == 0, said, True, {"wrong": wrong, "rounds": rounds})


def judge_bandwidth(kind: str, raw: float, ours: float) -> Check:
    """Bytes a second of plain pinned copies, and of the mover's."""
    share = ours / raw
    said = f"{kind} {ours / 1e9:.1f} GB/s, {share:.2f} of a plain copy's {raw / 1e9:.1f} (an H200 has 45 to 55)"
    return Check(1, f"{kind} speed", share >= LEAST_SHARE, said, False, {"raw": raw, "ours": ours})


def judge_findings(findings: Sequence[Any]) -> Check:
    """What `ragkv doctor` says of this vLLM."""
    bad = [f"{finding.check}: {finding.said}" for finding in findings if finding.status == "fail"]
    ok = not bad and any(finding.check == "layout" and finding.status == "ok" for finding in findings)
    said = "; ".join(bad) or "; ".join(finding.said for finding in findings) or "doctor found nothing"
    return Check(2, "doctor", ok, said, True)


def judge_runner(runner: str, backend: str, asynchronous: bool) -> Check:
    """What a GPU's engine runs by default."""
    ok = runner == "V2" and asynchronous
    said = f"Model Runner {runner}, {'' if asynchronous else 'no '}asynchronous scheduling, backend {backend}"
    return Check(3, "engine", ok, said, False, {"runner": runner, "backend": backend})


def judge_hit(prompt: int, answer: int, hit: int, blocks: int, equal: int, free: bool) -> Check:
    """A prompt asked twice: hit tokens; of so many full blocks, how many came back bit by bit; all blocks free."""
    ok = hit == prompt - 1 and equal == blocks and free
    said = (
        f"{answer} answer tokens: {hit} of {prompt} tokens hit, {equal} of {blocks} blocks bit-equal, "
        f"{'all blocks free after' if free else 'blocks in use after'}"
    )
    return Check(3, f"hit, {answer} tokens", ok, said, True, {"hit": hit, "blocks": blocks, "equal": equal})


def judge_preemptions(plain: Sequence[Reply], ours: Sequence[Reply], preempted: int, errors: int) -> Check:
    """Prompts in few blocks. Nothing is proven where nothing was preempted."""
    far = sum(distance(a, b) > NEAR for a, b in zip(plain, ours, strict=True))
    short = sum(len(a.tokens) != len(b.tokens) for a, b in zip(plain, ours, strict=True))
    ok = not far and not short and not errors and preempted > 0
    said = (
        f"{len(ours)} prompts, {preempted} preemptions: {far} answers far off, {short} too short, {errors} errors"
    )
    return Check(3, "preemptions", ok, said, True, {"preempted": preempted, "far": far, "errors": errors})


def judge_fault(kind: str, plain: Reply, other: Reply, injected: int) -> Check:
    """A load or a fusion that was made to fail: plain's answer, or none. Nothing is proven if none failed."""
    far = math.inf if other.failed else distance(plain, other)
    right = other.failed or far <= NEAR
    said = "the request failed" if other.failed else f"the answer is {far:.3g} from plain's"
    said = f"a {kind} that fails: {said}" if injected else f"no {kind} failed, so nothing was tried"
    return Check(4, f"failed {kind}", right and injected > 0, said, False, {"injected": injected})


def judge_cold(tokens: int, plain: Sequence[float], ours: Sequence[float]) -> Check:
    """TTFT of unknown prompts."""
    ratio = statistics.median(ours) / statistics.median(plain)
    said = f"cold, {tokens} tokens: {statistics.median(ours) * 1e3:.1f} ms, {ratio:.3f} x plain vLLM"
    return Check(5, f"cold {tokens}", ratio <= MOST_COLD, said, False, {"plain": [*plain], "ours": [*ours]})


def judge_warm(
    tokens: int, own: Sequence[float], ours: Sequence[float], on_bus: float, hits: Sequence[int]
) -> Check:
    """TTFT of known prompts, against vLLM's own hit; `on_bus`: seconds of a plain copy of their KV."""
    most = MOST_WARM * statistics.median(own) + on_bus
    median = statistics.median(ours)
    ok = median <= most and min(hits) == tokens - 1
    said = f"warm, {tokens} tokens: {median * 1e3:.1f} ms, at most {most * 1e3:.1f}; {min(hits)} tokens hit"
    return Check(5, f"warm {tokens}", ok, said, False, {"own": [*own], "ours": [*ours], "on_bus": on_bus})


def judge_delay(kind: str, without: Sequence[float], beside: Sequence[float]) -> Check:
    """The longest gaps between the tokens of running answers, without a copy and beside it; a run each."""
    before, after = statistics.median(without), statistics.median(beside)
    said = f"16 answers beside a {kind}: longest gap {after * 1e3:.1f} ms, without it {before * 1e3:.1f}"
    figures = {"without": [*without], "beside": [*beside]}
    return Check(5, f"gap beside a {kind}", after <= before + MOST_DELAY, said, False, figures)


def judge_full_fusion(plain: Reply, fused: Reply) -> Check:
    """Everything computed again must be full prefill."""
    far, reused = distance(plain, fused), fused.cached
    said = f"fused at 1.0: the answer is {far:.3g} from full prefill's, {reused} tokens loaded"
    return Check(6, "fusion at 1.0", far <= EQUAL and reused > 0, said, False, {"distance": far, "reused": reused})


def judge_fusion(plain: Reply, fused: Reply, syncs: int) -> Check:
    """TTFT of two documents that changed places, and how often the host waited for the device."""
    ratio = fused.ttft_s / plain.ttft_s
    ok = ratio < MOST_FUSED and 0 <= syncs <= MOST_SYNCS and fused.cached > 0
    waits = "it was never fused" if syncs < 0 else f"{syncs} waits for the device"
    said = f"fused at 0.15: {fused.ttft_s * 1e3:.0f} ms, {ratio:.2f} of full prefill; {waits}"
    return Check(6, "fusion at 0.15", ok, said, False, {"ratio": ratio, "syncs": syncs, "reused": fused.cached})
