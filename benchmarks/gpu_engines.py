"""Steps 3 to 6 of `ragkv bench gpu`: engines of invented models, asked and disturbed. Judged in `gpu_judge`.

The models have no weights to download: vLLM makes dummy ones, which are scaled so that attention tells tokens
apart.
"""

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ragkv.benchmarks import gpu_workers as workers
from ragkv.benchmarks.engine import Engine, EngineError, EngineOptions
from ragkv.benchmarks.gpu_judge import (
    Check,
    Reply,
    judge_cold,
    judge_delay,
    judge_fault,
    judge_full_fusion,
    judge_fusion,
    judge_hit,
    judge_preemptions,
    judge_runner,
    judge_warm,
)

VOCABULARY = 32_000
DECODING = 16  # answers that run beside a copy
SMALL = {"hidden_size": 1024, "layers": 8, "heads": 8, "kv_heads": 4, "intermediate_size": 2048}
LARGE = {"hidden_size": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "intermediate_size": 14336}
HEAD_DIM = 128
FEW: dict[str, Any] = {  # blocks, so that requests are preempted
    "longest": 4096,
    "num_gpu_blocks_override": 400,
    "max_num_seqs": 32,
    "gpu_memory_utilization": 0.5,
}
KV_BYTES = 2 * LARGE["layers"] * LARGE["kv_heads"] * HEAD_DIM * 2  # of a token of the large model
MEMORY = {"memory": {"capacity": "16GiB"}}
NO_GATE = {**MEMORY, "placement": {"gate": False}}
LENGTHS, TRIES = (2_000, 10_000), 3


def model(folder: Path, shape: Mapping[str, int]) -> Path:
    """A folder with nothing but a Llama's configuration."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape["hidden_size"],
        "intermediate_size": shape["intermediate_size"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "num_hidden_layers": shape["layers"],
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def prompt(number: int, tokens: int) -> list[int]:
    """Token ids that no other number's prompt begins with."""
    step = 2 * number + 3
    return [10 + (number * 7919 + at * step + at * at // 7) % (VOCABULARY - 10) for at in range(tokens)]


@contextlib.contextmanager
def engine(
    shape: Mapping[str, int], ragkv: Mapping[str, Any] | None, longest: int = 24_576, **llm: Any
) -> Iterator[Engine]:
    """An engine of that shape, with vLLM's defaults; with ragkv, or plain. `longest`: tokens of a request."""
    with tempfile.TemporaryDirectory(prefix="ragkv-bench-gpu-") as folder:
        options = EngineOptions(
            model(Path(folder), shape),
            ragkv,
            max_model_len=longest,
            llm={"load_format": "dummy", "skip_tokenizer_init": True, "enforce_eager": False, **llm},
            environment={"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"},
        )
        with Engine(options) as started:
            started.call(workers.in_workers, workers.enliven)
            yield started


def ask(
    asked: Engine, prompts: Sequence[Sequence[int]], tokens: int = 1, hints: Mapping[str, Any] | None = None
) -> list[Reply]:
    """Greedy answers of so many tokens to prompts of one batch."""
    found: list[Reply] = asked.call(workers.ask, [list(each) for each in prompts], tokens, dict(hints or {}))
    return found


def in_worker(asked: Engine, function: Any, *args: Any) -> Any:
    """`function(worker, *args)` in the only worker."""
    return asked.call(workers.in_workers, function, *args)[0]


def is_free(asked: Engine) -> bool:
    """Whether vLLM empties its prefix cache, which it does only when all blocks are free."""
    try:
        asked.evict()
    except EngineError:
        return False
    return True


def steps_3_and_4() -> Iterator[Check]:
    """Hits, preemptions and faults, on the small model."""
    many = [prompt(number, 400) for number in range(100, 160)]
    known, other = prompt(1, 1500), prompt(2, 1500)
    documents = prompt(3, 1200), prompt(4, 1200)
    with engine(SMALL, None, **FEW) as plain:
        wanted = ask(plain, many, 64)
        plain.evict()
        whole = ask(plain, [other])[0]
        swapped = ask(plain, [swap(documents)])[0]
    with engine(SMALL, NO_GATE, **FEW) as ours:
        yield judge_runner(*in_worker(ours, workers.describe))
        for tokens, asked in ((32, known), (1, prompt(5, 1500))):
            yield check_hit(ours, asked, tokens)
        before = ours.metrics()
        replies = ask(ours, many, 64)
        after = ours.metrics()
        preempted = int(_total(after, "vllm:num_preemptions") - _total(before, "vllm:num_preemptions"))
        errors = int(_total(after, "ragkv_errors"))
        ok = is_free(ours)
        yield judge_preemptions(wanted, replies, preempted, errors + (not ok))
        yield check_fault(ours, "load", [other], whole, {})
        yield check_fault(
            ours, "fusion", [[*documents[0], *documents[1]], swap(documents)], swapped, {"fuse": True}
        )


def swap(documents: tuple[list[int], list[int]]) -> list[int]:
    """The second before the first."""
    return [*documents[1], *documents[0], *prompt(6, 32)]


def check_hit(ours: Engine, asked: list[int], tokens: int) -> Check:
    """A prompt twice: what came back, bit by bit."""
    ask(ours, [asked], tokens)
    before = in_worker(ours, workers.block_hashes)
    ours.evict()
    in_worker(ours, workers.wipe)
    hit = ask(ours, [asked], tokens)[0].cached
    after = in_worker(ours, workers.block_hashes)
    full = (len(asked) - 1) // in_worker(ours, workers.block_tokens)
    return judge_hit(len(asked), tokens, hit, full, min(full, len(before & after)), is_free(ours))


def check_fault(
    ours: Engine, kind: str, prompts: Sequence[Sequence[int]], plain: Reply, hints: Mapping[str, Any]
) -> Check:
    """Ask, empty vLLM's cache, and ask the last prompt again, with the load or the fusion failing once."""
    ask(ours, prompts[:1])
    ours.evict()
    in_worker(ours, workers.break_next, kind)
    reply = ask(ours, prompts[-1:], 1, hints)[0]
    check = judge_fault(kind, plain, reply, in_worker(ours, workers.broken))
    ours.evict()
    return check


def steps_5_and_6(bus: float) -> Iterator[Check]:
    """Times on the model of 8B. `bus`: bytes a second of a plain copy."""
    pairs = [(prompt(40 + n, 4096), prompt(50 + n, 4096)) for n in range(2)]
    cold: dict[int, list[float]] = {}
    own: dict[int, list[float]] = {}
    with engine(LARGE, None) as plain:
        _warm_up(plain)
        for tokens in LENGTHS:
            prompts = [prompt(tokens + n, tokens) for n in range(TRIES)]
            cold[tokens] = [ask(plain, [each])[0].ttft_s for each in prompts]
            own[tokens] = [ask(plain, [each])[0].ttft_s for each in prompts]
        alone = [_gap(plain, None, n) for n in range(TRIES)]
        beside_prefill = [_gap(plain, prompt(70 + n, 10_000), n) for n in range(TRIES)]
        whole = [ask(plain, [swap(pair)])[0] for pair in pairs]
    with engine(LARGE, MEMORY) as ours:
        _warm_up(ours)
        for tokens in LENGTHS:
            yield from _times(ours, tokens, cold[tokens], own[tokens], bus)
        stores = [_gap(ours, prompt(70 + n, 10_000), n) for n in range(TRIES)]
        yield judge_delay("store", beside_prefill, stores)
        loads = []
        for number in range(TRIES):
            ours.evict()
            loads.append(_gap(ours, prompt(70 + number, 10_000), number))
        yield judge_delay("load", alone, loads)
        yield from step_6(ours, pairs, whole)


def step_6(ours: Engine, pairs: Sequence[tuple[list[int], list[int]]], whole: Sequence[Reply]) -> Iterator[Check]:
    """Two documents that change places; each share of recomputing with documents of its own."""
    for pair, plain, ratio in zip(pairs, whole, (1.0, 0.15), strict=True):
        ask(ours, [[*pair[0], *pair[1]]])
        ours.evict()
        in_worker(ours, workers.watch_fusion)
        fused = ask(ours, [swap(pair)], 1, {"fuse": True, "recompute_ratio": ratio})[0]
        syncs = in_worker(ours, workers.fusion_syncs)
        yield judge_full_fusion(plain, fused) if ratio == 1.0 else judge_fusion(plain, fused, syncs)


def _times(ours: Engine, tokens: int, cold: list[float], own: list[float], bus: float) -> Iterator[Check]:
    prompts = [prompt(tokens + n, tokens) for n in range(TRIES)]
    yield judge_cold(tokens, cold, [ask(ours, [each])[0].ttft_s for each in prompts])
    ours.evict()
    warm = [ask(ours, [each])[0] for each in prompts]
    seconds, hits = [each.ttft_s for each in warm], [each.cached for each in warm]
    yield judge_warm(tokens, own, seconds, KV_BYTES * tokens / bus, hits)
    ours.evict()


def _warm_up(asked: Engine) -> None:
    """The first forward of its size, and the first hit, are slower."""
    for _ in range(2):
        ask(asked, [prompt(9, 10_000)])
        asked.evict()


def _gap(asked: Engine, arriving: list[int] | None, number: int) -> float:
    """The longest gap between tokens of running answers, while another request arrives, or none does."""
    prompts = [prompt(1000 + DECODING * number + n, 64) for n in range(DECODING)]
    found: float = asked.call(workers.longest_gap, prompts, arriving)
    deadline = time.monotonic() + 10
    while not is_free(asked) and time.monotonic() < deadline:
        pass
    return found


def _total(metrics: Mapping[str, float], name: str) -> float:
    """A counter, over all its labels."""
    return sum(value for key, value in metrics.items() if key.partition("{")[0] in (name, f"{name}_total"))
