"""An engine's life: metrics, memory, shared memory, tensor parallelism."""

import os
import signal
from pathlib import Path

from engine_tools import (
    anonymous_bytes,
    chosen_tokens,
    in_workers,
    mapped_segments,
    room,
    segments,
    token_bytes,
    wait_until_gone,
    watch_fusion,
)
from ragkv.benchmarks.engine import Engine, EngineOptions, descendants
from ragkv.benchmarks.internal.fusion_measure import ENVIRONMENT, ask

SHM = Path("/dev/shm")
TRANSFER = {"kv_connector": "RagKVConnector", "kv_role": "kv_both"}


def test_metrics_tell_what_happened(ragkv, model, filings):
    def reading():
        return ragkv.metrics()

    prompt = filings[0][:500]
    before = reading()
    ragkv.ask([prompt])
    ragkv.evict()
    ragkv.ask([prompt])
    after = reading()

    def grown(name):
        return after[name] - before.get(name, 0)

    assert grown("ragkv_lookup_tokens_total") == 1000
    assert grown('ragkv_lookups_total{result="hit"}') == grown('ragkv_lookups_total{result="miss"}') == 1
    assert grown('ragkv_hit_tokens_total{tier="memory"}') == 499
    assert grown("ragkv_stored_tokens_total") == 500
    assert grown("ragkv_load_seconds_count") == 1 and grown("ragkv_load_seconds_sum") > 0
    assert grown("ragkv_store_seconds_count") >= 1
    assert ragkv.dtype() == "float32"
    assert after['ragkv_used_bytes{tier="memory"}'] >= 500 * token_bytes(model)
    assert after['ragkv_used_pages{tier="memory"}'] >= 500 / 16


def test_memory_is_flat_over_many_short_requests(small, filings):
    """Half of 2,000 are new, with a full tier, and half hit. Prompts are of one length, since oneDNN keeps
    memory for every new number of tokens in a step, in plain vLLM too."""
    fresh = [[1000 + n, *filings[0][:20]] for n in range(1000)]
    known = [[40_000 + n % 12, *filings[0][:20]] for n in range(1000)]

    def ask(prompts):
        small.ask(prompts)
        small.evict()

    ask(fresh[:200])
    ask(known[:200])
    settled, before = anonymous_bytes(small.pid), small.metrics()
    for prompts in (fresh[200:], known[200:]):
        for start in range(0, len(prompts), 200):
            ask(prompts[start : start + 200])
    after = small.metrics()
    assert anonymous_bytes(small.pid) - settled < 16 * 2**20
    for name, least in (
        ('ragkv_evicted_chunks_total{tier="memory",reason="capacity"}', 700),
        ('ragkv_lookups_total{result="hit"}', 500),
    ):
        assert after[name] - before[name] > least


def test_two_workers_share_one_segment_and_a_kill_leaves_what_lies_on_disk(
    shared_ragkv, plain, model, tmp_path_factory, filings
):
    """Tensor parallel 2."""
    folder = tmp_path_factory.mktemp("tier") / "disk"
    prompts = [filings[n][: 400 + 50 * n] for n in range(4)]
    moved = [*filings[4][:60], *prompts[1], *prompts[2], *filings[5][:50]]
    plain.evict()
    *wanted, by_itself = [answer.tokens for answer in plain.ask([*prompts, moved], 12)]
    two = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    parallel = EngineOptions(
        model,
        {
            "memory": {"capacity": room(model, 32_000)},
            "device": {"capacity": room(model, 4000), "after": 1},
            "disk": {"path": str(folder)},
            "placement": {"gate": False},
        },
        "float32",
        2048,
        llm=two,
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1", **ENVIRONMENT},
    )
    others, vllms_own = segments(), set(SHM.glob("vllm_dist_*"))
    with Engine(parallel) as engine:
        assert [answer.tokens for answer in engine.ask(prompts, 12)] == wanted
        everyone = [engine.pid, *descendants(engine.pid)]
        maps = [mapped_segments(pid) for pid in everyone]
        assert len(set().union(*maps)) == 1 and sum(map(bool, maps)) == 3, "both workers and the scheduler"
        engine.evict()
        warm = engine.ask(prompts, 12)
        assert [answer.tokens for answer in warm] == wanted
        assert [answer.cached_tokens for answer in warm] == [len(prompt) - 1 for prompt in prompts]
        engine.evict()
        hot = engine.ask(prompts, 12)
        assert [answer.tokens for answer in hot] == wanted and hot[0].hit_tokens["device"] > 0
        for selection in ("deviation", "query"):
            engine.evict()
            engine.call(in_workers, watch_fusion)
            fused = {"fuse": True, "selection": selection, "recompute_ratio": 0.3}
            assert ask(engine, moved, 1, fused).cached_tokens > 900
            first, second = engine.call(in_workers, chosen_tokens)
            assert first == second and len(first) > 250, "both ranks choose the same tokens"
        engine.evict()
        assert ask(engine, moved, 12, {"fuse": True, "recompute_ratio": 1.0}).tokens == by_itself
        for pid in everyone:
            os.kill(pid, signal.SIGKILL)
        wait_until_gone(everyone)
    for left in set(SHM.glob("vllm_dist_*")) - vllms_own:
        left.unlink()  # what the kill left of vLLM's own
    assert segments() == others
    assert mapped_segments(shared_ragkv.pid), "the other engine keeps its memory"
    assert len(shared_ragkv.ask([filings[0][:300]], 4)) == 1
    with Engine(parallel) as again:
        answers = again.ask(prompts, 12)
    assert [answer.tokens for answer in answers] == wanted
    assert answers[0].hit_tokens["disk"] > 0.97 * sum(map(len, prompts))
