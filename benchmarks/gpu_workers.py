"""What `ragkv bench gpu` runs beside an engine (`llm` first) and inside its worker (`worker` first)."""

import time
import warnings
from typing import Any

import torch

from ragkv.benchmarks.gpu_judge import Reply

LIKELIEST = 20  # first tokens whose log probabilities are kept
WARM_TOKENS, GAP_TOKENS = 8, 200  # of an answer: before the request arrives, and in all
_seen: dict[str, int] = {}  # in the worker's process: what was broken, or counted


def in_workers(llm: Any, function: Any, *args: Any) -> list[Any]:
    """`function(worker, *args)` in every worker."""
    found: list[Any] = llm.collective_rpc(function, args=args)
    return found


def ask(llm: Any, prompts: list[list[int]], tokens: int, hints: dict[str, Any]) -> list[Reply]:
    """Greedy answers of just so many tokens."""
    from vllm import SamplingParams

    extra = {"kv_transfer_params": {"ragkv": hints}} if hints else None
    sampling = SamplingParams(
        temperature=0,
        max_tokens=tokens,
        min_tokens=tokens,
        ignore_eos=True,
        logprobs=LIKELIEST,
        detokenize=False,
        extra_args=extra,
    )
    inputs: Any = [{"prompt_token_ids": each} for each in prompts]
    return [reply(output) for output in llm.generate(inputs, sampling, use_tqdm=False)]


def reply(output: Any) -> Reply:
    """What is kept of a request's output."""
    answer = output.outputs[0]
    if answer.finish_reason == "error" or not answer.logprobs:
        return Reply(tuple(answer.token_ids), {}, output.num_cached_tokens or 0, failed=True)
    first = {int(token): float(found.logprob) for token, found in answer.logprobs[0].items()}
    return Reply(tuple(answer.token_ids), first, output.num_cached_tokens or 0, output.metrics.first_token_latency)


def longest_gap(llm: Any, prompts: list[list[int]], arriving: list[int] | None) -> float:
    """Seconds between two steps that gave tokens to running answers, at most, from when another request arrives
    (or none does) to their end: what it stores is copied after it has answered."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=GAP_TOKENS, ignore_eos=True, detokenize=False)
    for number, each in enumerate(prompts):
        engine.add_request(f"runs-{number}", {"prompt_token_ids": each}, sampling)
    counts = {f"runs-{number}": 0 for number in range(len(prompts))}
    while min(counts.values()) < WARM_TOKENS:
        _count(engine.step(), counts)
    if arriving is not None:
        one = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        engine.add_request("arrives", {"prompt_token_ids": arriving}, one)
    longest, last = 0.0, time.perf_counter()
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        if _count(outputs, counts):
            longest, last = max(longest, now - last), now
    return longest


def _count(outputs: Any, counts: dict[str, int]) -> bool:
    """Note the tokens of running answers; whether there are new ones."""
    new = False
    for output in outputs:
        name = "-".join(str(output.request_id).split("-")[:2])  # some versions of vLLM append to it
        tokens = len(output.outputs[0].token_ids)
        if name in counts and tokens > counts[name]:
            counts[name], new = tokens, True
    return new


def enliven(worker: Any) -> None:
    """Scale vLLM's dummy weights, which are nearly zero: unit variance from layer to layer."""
    with torch.no_grad():
        for parameter in worker.model_runner.get_model().parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0)
            else:
                parameter.mul_(parameter.shape[-1] ** -0.5 / parameter.float().std())


def describe(worker: Any) -> tuple[str, str, bool]:
    """Model Runner, attention backend, whether scheduling is asynchronous."""
    kind = "V2" if ".worker.gpu." in type(worker.model_runner).__module__ else "V1"
    layer = next(iter(_layers(worker)))
    scheduler = worker.vllm_config.scheduler_config
    return kind, str(layer.get_attn_backend().get_name()), bool(getattr(scheduler, "async_scheduling", False))


def block_hashes(worker: Any) -> set[int]:
    """One number a block that is not empty, over the bits of all layers."""
    total: Any = None
    for number, layer in enumerate(_layers(worker)):
        raw = layer.kv_cache.view(torch.uint8).flatten(1).to(torch.int64)
        generator = torch.Generator().manual_seed(number)
        factors = torch.randint(1, 1 << 62, raw.shape[1:], generator=generator).to(raw.device)
        mixed = (raw * factors).sum(1)
        total = mixed if total is None else total + mixed
    return {each for each in total.tolist() if each}


def block_tokens(worker: Any) -> int:
    """Tokens of a block as `block_hashes` counts them."""
    cache = worker.vllm_config.cache_config
    return int(cache.block_size * cache.num_gpu_blocks // next(iter(_layers(worker))).kv_cache.shape[0])


def wipe(worker: Any) -> None:
    """Zeros into all blocks."""
    for layer in _layers(worker):
        layer.kv_cache.zero_()


def break_next(worker: Any, kind: str) -> None:
    """Let the next load, or the next fusion, raise."""
    cls, name = _place(kind)
    original = getattr(cls, name)
    _seen["broken"] = 0

    def raises(self: Any, *args: Any, **kwargs: Any) -> Any:
        setattr(cls, name, original)
        _seen["broken"] += 1
        raise OSError("injected")

    setattr(cls, name, raises)


def broken(worker: Any) -> int:
    """How often something was made to raise since `break_next`."""
    return _seen.pop("broken", 0)


def watch_fusion(worker: Any) -> None:
    """Count how often the host waits for the device in the next fusion."""
    cls, name = _place("fusion")
    events: Any = torch.cuda.Event
    original, synchronize = getattr(cls, name), events.synchronize

    def counted(event: Any) -> None:
        _seen["events"] += 1
        synchronize(event)

    def fuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        setattr(cls, name, original)
        _seen["events"] = 0
        events.synchronize = counted
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                return original(self, *args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            events.synchronize = synchronize
            _seen["syncs"] = _seen.pop("events") + sum("synchroniz" in str(each.message) for each in caught)

    setattr(cls, name, fuse)


def fusion_syncs(worker: Any) -> int:
    """Of the fusion that was watched; -1: there was none."""
    return _seen.pop("syncs", -1)


def _place(kind: str) -> tuple[Any, str]:
    if kind == "load":
        from ragkv.connectors.vllm.transfer import DirectMover, StagedMover

        return (StagedMover if torch.cuda.is_available() else DirectMover), "load"
    from ragkv.connectors.vllm.fusion_worker import Fuser

    return Fuser, "fuse"


def _layers(worker: Any) -> list[Any]:
    """Attention layers that have a cache."""
    context = worker.vllm_config.compilation_config.static_forward_context
    return [layer for layer in context.values() if isinstance(getattr(layer, "kv_cache", None), torch.Tensor)]
