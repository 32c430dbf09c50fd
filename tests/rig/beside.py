"""What runs beside an engine of the rig: `function(llm, ...)`, in the engine's own process."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rig import faults

MOST_STEPS = 4000
_names = itertools.count()


@dataclass(frozen=True)
class Ask:
    """A greedy request. `count`: answers to it (sampled then, so cold that it makes no difference to greedy);
    `hints`: ragkv's part of `kv_transfer_params`; `scored`: with the prompt's log probabilities; `adapter`: folder
    and number."""

    prompt: Sequence[int]
    tokens: int = 3
    count: int = 1
    scored: bool = False
    salt: str | None = None
    hints: Mapping[str, Any] | None = None
    adapter: tuple[str, int] | None = None


@dataclass(frozen=True)
class Answer:
    """`texts`: token ids of each answer; `logprobs`: of each of these tokens; `scores`: log probabilities of the
    prompt's tokens from the second on, where asked for; `cached`: prompt tokens that were not computed; `told`:
    ragkv's part of the response's `kv_transfer_params`; `margin`: by how much the best token won, at least."""

    texts: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]
    scores: tuple[float, ...] = ()
    cached: int = 0
    told: Mapping[str, Any] = field(default_factory=dict)
    margin: float = 0.0
    reason: str | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """The first, mostly the only, answer."""
        return self.texts[0]


def ask(llm: Any, asks: Sequence[Ask], fault: faults.Fault | None = None) -> tuple[list[Answer], int]:
    """Answers to requests that run together, and how often `fault` struck meanwhile."""
    with faults.injected(llm, fault) as struck:
        names = [add(llm, each) for each in asks]
        outputs = run(llm)
        if fault is not None:
            settle(llm)
    return [_answer(each, outputs[name]) for each, name in zip(asks, names, strict=True)], struck.times


def abort_after(
    llm: Any, doomed: Sequence[Ask], steps: int, then: Sequence[Ask], fault: faults.Fault | None = None
) -> tuple[list[Answer], int]:
    """Abort requests after some steps, and only then ask others, while the engine is as the abort has left it."""
    with faults.injected(llm, fault) as struck:
        names = [add(llm, each) for each in doomed]
        for _ in range(steps):
            llm.llm_engine.step()
        llm.llm_engine.abort_request(names)
        asked = [add(llm, each) for each in then]
        outputs = run(llm)
    return [_answer(each, outputs[name]) for each, name in zip(then, asked, strict=True)], struck.times


def settle(llm: Any) -> None:
    """Step until no block is in use: until the last stores are done."""
    pool = scheduler(llm).kv_cache_manager.block_pool
    for _ in range(MOST_STEPS):
        if pool.get_num_free_blocks() == pool.num_gpu_blocks - 1:  # but the null block
            return
        llm.llm_engine.step()
    raise AssertionError("vLLM's blocks are never freed")


def rest(llm: Any) -> None:
    """Step, as a server does, while the connector has something to do."""
    for _ in range(MOST_STEPS):
        if not scheduler(llm).connector.has_pending_push_work():
            return
        llm.llm_engine.step()
    raise AssertionError("the connector never rests")


def evict(llm: Any) -> None:
    """Empty vLLM's own prefix cache, which it declines while blocks are in use."""
    settle(llm)
    assert llm.reset_prefix_cache()


def metrics(llm: Any) -> dict[str, float]:
    """Every sample, as `name` or `name{label="value"}`, vLLM's own labels left out."""
    from prometheus_client import REGISTRY

    found: dict[str, float] = {}
    for sample in itertools.chain.from_iterable(family.samples for family in REGISTRY.collect()):
        own = {name: value for name, value in sample.labels.items() if name not in ("model_name", "engine")}
        labels = ",".join(f'{name}="{value}"' for name, value in own.items())
        key = f"{sample.name}{{{labels}}}" if labels else sample.name
        found[key] = found.get(key, 0.0) + sample.value
    return found


def engine_facts(llm: Any) -> dict[str, Any]:
    """Which engine this is: runner, scheduling, attention backend and shape of a layer's cache."""
    core = llm.llm_engine.engine_core.engine_core
    config = core.vllm_config
    worker = core.model_executor.driver_worker.worker
    layers = config.compilation_config.static_forward_context
    layer = next(layer for layer in layers.values() if hasattr(layer, "get_attn_backend"))
    return {
        "runner": type(worker.model_runner).__module__,
        "async": bool(config.scheduler_config.async_scheduling),
        "batch_queue": core.batch_queue is not None,
        "backend": layer.get_attn_backend().get_name(),
    }


def groups(llm: Any) -> int:
    """Groups of layers, each with a table of blocks of its own."""
    return len(scheduler(llm).kv_cache_config.kv_cache_groups)


def scheduler(llm: Any) -> Any:
    """vLLM's scheduler."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def add(llm: Any, asked: Ask) -> str:
    """Give a request to the engine; its name."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind

    greedy = {"temperature": 0.0} if asked.count == 1 else {"temperature": 0.01, "seed": 1, "n": asked.count}
    parameters = SamplingParams(
        max_tokens=asked.tokens,
        logprobs=2,
        prompt_logprobs=0 if asked.scored else None,
        detokenize=False,
        ignore_eos=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={"kv_transfer_params": {"ragkv": dict(asked.hints)}} if asked.hints is not None else None,
        **greedy,
    )
    prompt = TokensPrompt(prompt_token_ids=list(asked.prompt))
    if asked.salt is not None:
        prompt["cache_salt"] = asked.salt
    name = f"asked-{next(_names)}"
    adapter = None
    if asked.adapter is not None:
        folder, number = asked.adapter
        adapter = LoRARequest(f"adapter {number}", number, folder)
    llm.llm_engine.add_request(name, prompt, parameters, lora_request=adapter)
    return name


def run(llm: Any) -> dict[str, Any]:
    """Step until all requests have ended; what came out, by request."""
    outputs = {}
    for _ in range(MOST_STEPS):
        if not llm.llm_engine.has_unfinished_requests():
            return outputs
        outputs |= {output.request_id: output for output in llm.llm_engine.step() if output.finished}
    raise AssertionError(f"the engine does not come to an end in {MOST_STEPS} steps")


def _answer(asked: Ask, output: Any) -> Answer:
    made = sorted(output.outputs, key=lambda each: each.index)
    scores = [next(iter(each.values())).logprob for each in (output.prompt_logprobs or [])[1:]]
    ranked = [sorted((found.logprob for found in place.values()), reverse=True) for place in made[0].logprobs]
    chosen = [
        tuple(place[token].logprob for token, place in zip(each.token_ids, each.logprobs, strict=True))
        for each in made
    ]
    return Answer(
        tuple(tuple(each.token_ids) for each in made),
        tuple(chosen),
        tuple(scores),
        output.num_cached_tokens or 0,
        (output.kv_transfer_params or {}).get("ragkv") or {},
        min((best[0] - best[1] for best in ranked), default=0.0),
        made[0].finish_reason,
    )


def watch_fusion(llm: Any, asks: Sequence[Ask]) -> tuple[list[Answer], list[dict[str, Any]]]:
    """Answers, and of each fusion meanwhile: the `runs` that were moved, and the positions `computed` last."""
    from ragkv.connectors.vllm.forward import EngineForward
    from ragkv.connectors.vllm.fusion_worker import Fuser

    seen: list[dict[str, Any]] = []
    fuse, compute = Fuser.fuse, EngineForward.compute

    def fused(self: Any, fusion: Any) -> int:
        seen.append({"runs": [tuple(run) for run in fusion.runs], "computed": []})
        return fuse(self, fusion)

    def computed(self: Any, tokens: Any, positions: Any, blocks: Any) -> None:
        seen[-1]["computed"] = positions.tolist()
        compute(self, tokens, positions, blocks)

    Fuser.fuse, EngineForward.compute = fused, computed
    try:
        answers, _ = ask(llm, asks)
    finally:
        Fuser.fuse, EngineForward.compute = fuse, compute
    return answers, seen


def farthest_attention(_llm: Any, window: tuple[int, int] = (-1, -1)) -> float:
    """The largest difference between vLLM's attention kernel and what the rig has in its place: prefill, decoding,
    and the end of a prompt, in blocks in any order. `window`: as vLLM counts it, without the token itself."""
    import torch
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    from rig.interpreter import attend

    asking, lengths = [20, 1, 7, 1], [20, 33, 40, 1]
    k, v = torch.randn(2, 12, 16, 2, 32)
    one = torch.ones(len(asking), 2)
    given = {
        "q": torch.randn(sum(asking), 4, 32),
        "k": k,
        "v": v,
        "cu_seqlens_q": torch.tensor([0, *itertools.accumulate(asking)], dtype=torch.int32),
        "seqused_k": torch.tensor(lengths, dtype=torch.int32),
        "max_seqlen_q": max(asking),
        "max_seqlen_k": max(lengths),
        "softmax_scale": 32**-0.5,
        "causal": True,
        "window_size": window,
        "block_table": torch.randperm(12, dtype=torch.int32).view(4, 3),
        "softcap": 0,
        "q_descale": None,
        "k_descale": one,
        "v_descale": one,
    }
    found = []
    for function in (unified_attention, attend):
        out = torch.zeros(sum(asking), 4, 32)
        function(out=out, **given)
        found.append(out)
    return float((found[0] - found[1]).abs().max()) if found[0].abs().min() > 0 else float("inf")


def same_writes(_llm: Any) -> bool:
    """Whether vLLM's kernel and what the rig has in its place write the same bytes."""
    import torch
    from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash

    from rig.interpreter import write

    key, value = torch.randn(2, 6, 2, 32)
    slots, scale = torch.tensor([3, 17, -1, 40, 0]), torch.tensor(1.0)
    seen = []
    for function in (triton_reshape_and_cache_flash, write):
        cache = torch.zeros(3, 2, 16, 64)
        halves = cache.transpose(1, 2).split(32, dim=-1)
        function(key, value, *halves, slots, "auto", scale, scale)
        seen.append(cache)
    return bool(torch.equal(*seen) and seen[0].any())
