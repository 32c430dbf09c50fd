"""What the engine tests share: prompts, and functions that run beside an engine or inside its workers."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import torch

from ragkv.benchmarks.engine import descendants
from ragkv.benchmarks.tenk import generate_filing, load_filings
from ragkv.connectors.vllm.forward import EngineForward
from ragkv.connectors.vllm.fusion_worker import Fuser
from ragkv.connectors.vllm.tiles import RAW
from ragkv.connectors.vllm.transfer import DirectMover

ROOT = Path(__file__).resolve().parents[1]
REAL_FILINGS = ROOT.parent / "shared" / "data" / "filings"
BLOCK = 128
QUESTIONS = ("\n\nWhat were net sales?", "\n\nWho runs the company?", "\n\nName one risk.")


def filing_tokens(tokenizer, seed, words=3000):
    """A generated filing as token ids; every third one real, where the real ones lie beside the checkout."""
    if seed % 3 == 2 and REAL_FILINGS.is_dir():
        filings = load_filings(REAL_FILINGS)
        text = filings[seed % len(filings)].text[20_000:60_000]
    else:
        text = generate_filing(seed, words).text
    return tokenizer.encode(text, add_special_tokens=False)


def layers(model):
    return json.loads((model / "config.json").read_text())["num_hidden_layers"]


def token_bytes(model):
    """Of one token's K and V in float32, in all layers."""
    config = json.loads((model / "config.json").read_text())
    return 2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]


def room(model, tokens):
    """Bytes of a tier that holds so many tokens."""
    return tokens * token_bytes(model)


def segments():
    """Names of ragkv's segments in shared memory."""
    return {path.name for path in Path("/dev/shm").glob("ragkv-*")}


def mapped_segments(*pids):
    """Inodes of the segments that some processes map, by name or after the name is gone."""
    found = set()
    for pid in pids:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if "/dev/shm/ragkv-" in line:
                found.add(line.split()[4])
    return found


def anonymous_bytes(pid):
    """Resident memory of a process and its descendants that no file or shared memory backs."""
    total = 0
    for each in (pid, *descendants(pid)):
        for line in Path(f"/proc/{each}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                total += int(line.split()[1]) * 1024
    return total


def wait_until_gone(pids, seconds=60):
    """Until none of the processes runs (a zombie does not)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        alive = [pid for pid in pids if _runs(pid)]
        if not alive:
            return
        os.sched_yield()
    raise AssertionError(f"still running: {alive}")


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# --- run beside the engine: function(llm, ...) ---


def in_workers(llm, function, *args):
    return llm.collective_rpc(function, args=args)


def abort_after(llm, prompt, steps, max_tokens):
    """Start a request, let it run for some steps, and abort it; the number of tokens it had given."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    engine.add_request(
        "doomed", {"prompt_token_ids": prompt}, SamplingParams(temperature=0, max_tokens=max_tokens)
    )
    given = 0
    for _ in range(steps):
        given += sum(len(output.outputs[0].token_ids) for output in engine.step())
    engine.abort_request(["doomed"])
    while engine.has_unfinished_requests():
        engine.step()
    return given


def ask_with_params(llm, prompt, max_tokens, params):
    """One greedy answer with `kv_transfer_params`."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, extra_args={"kv_transfer_params": params})
    output = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)[0]
    return tuple(output.outputs[0].token_ids), output.num_cached_tokens


# --- run inside a worker: function(worker, ...) ---


def cpu_kv(cache, slots):
    """K and V of some slots, read by hand: on the CPU's `vec` kernels K stands transposed in each block's
    first half of a head, V row-major in the second."""
    blocks, heads, tokens, double = cache.shape
    dim = double // 2
    flat = cache.reshape(blocks, heads, tokens * double)
    keys = flat[..., : dim * tokens].reshape(blocks, heads, dim, tokens).permute(0, 3, 1, 2)
    values = flat[..., dim * tokens :].reshape(blocks, heads, tokens, dim).permute(0, 2, 1, 3)
    at = slots // tokens, slots % tokens
    return keys[at].clone(), values[at].clone()


def watch_copies(worker):
    """From now on compare every copy, layer by layer and bit by bit, with what the tier and the cache hold."""
    caches = worker.model_runner.kv_caches
    log = worker.ragkv_log = {"load": [], "store": [], "layers": len(caches), "isa": None}

    def watch(kind, move):
        def moved(mover, rows, slots):
            ticket, tier = move(mover, rows, slots), mover.tier
            raw = tier.rows.view(RAW[tier.geometry.itemsize])
            pages = raw.view(-1, len(caches), 2, tier.page_tokens, tier.geometry.heads, tier.geometry.head_dim)
            page, offset = rows // tier.page_tokens, rows % tier.page_tokens
            equal = 0
            for layer, cache in enumerate(caches):
                for half, seen in enumerate(cpu_kv(cache, slots)):
                    stored = pages[page, layer, half, offset]
                    equal += torch.equal(seen.view(stored.dtype), stored)
            log[kind].append((len(rows), equal, bool(pages[page].any())))
            return ticket

        return moved

    worker.ragkv_moves = DirectMover.load, DirectMover.store
    DirectMover.load, DirectMover.store = watch("load", DirectMover.load), watch("store", DirectMover.store)


def copies_seen(worker):
    """What `watch_copies` has seen; ends the watch."""
    DirectMover.load, DirectMover.store = worker.ragkv_moves
    return worker.ragkv_log


def break_copies(worker, kind, times):
    """Let the next `times` loads or stores fail."""
    left, move = [times], getattr(DirectMover, kind)

    def broken(*_):
        left[0] -= 1
        if not left[0]:
            setattr(DirectMover, kind, move)
        raise OSError("injected")

    setattr(DirectMover, kind, broken)


# --- fusion, inside a worker ---


def watch_fusion(worker):
    """Keep what the next fusion leaves in the caches."""
    fuse, compute = Fuser.fuse, EngineForward.compute
    computed = []

    def compute_noted(forward, tokens, positions, blocks):
        computed[:] = positions.tolist()
        compute(forward, tokens, positions, blocks)

    def fused(fuser, fusion):
        Fuser.fuse, EngineForward.compute = fuse, compute_noted
        count = fuser.fuse(fusion)
        EngineForward.compute = compute
        moved = {position for start, end in fusion.runs for position in range(start, end)}
        again = [position for position in computed if position in moved]
        assert len(again) == count
        positions = torch.arange(fusion.start, fusion.end)
        slots = torch.from_numpy(fusion.blocks)[positions // BLOCK] * BLOCK + positions % BLOCK
        kv = [cpu_kv(cache, slots) for cache in worker.model_runner.kv_caches]
        keys, values = (torch.stack(side) for side in zip(*kv, strict=True))
        worker.ragkv_fused = keys, values, again, fusion
        return count

    Fuser.fuse = fused


def fused_kv(worker, path):
    """Write down keys and values [layers, tokens, heads, dim], the moved positions that were computed again, and
    the range."""
    keys, values, chosen, fusion = worker.ragkv_fused
    torch.save((keys, values, chosen, fusion.start, fusion.end), path)


def chosen_tokens(worker):
    """Which moved tokens the watched fusion has computed again."""
    return worker.ragkv_fused[2]


def break_fusion(worker):
    """Let the next fusion fail, half done."""
    fuse = Fuser.fuse

    def broken(fuser, fusion):
        Fuser.fuse, end = fuse, fusion.start + 7
        fuser.fuse(replace(fusion, end=end, runs=((end - 1, end),), budget=1))  # computes all of these
        raise OSError("injected")

    Fuser.fuse = broken


def set_turning(worker, on):
    """Whether moved keys are rotated."""
    if on:
        DirectMover.load = worker.ragkv_load
    else:
        load = worker.ragkv_load = DirectMover.load
        DirectMover.load = lambda mover, rows, slots, shifts=None: load(mover, rows, slots)


# --- run in a worker ---


def scale_weights(worker, factor, after):
    """Scale every parameter, as a training step changes all: now, or behind vLLM's back after so many steps."""
    model = worker.model_runner.get_model()

    @torch.no_grad()
    def change():
        for parameter in model.parameters():
            if parameter.numel():
                parameter.mul_(factor)

    if not after:
        return change()
    left = [after]
    execute = worker.execute_model

    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            worker.execute_model = execute
            change()
        return execute(*args, **kwargs)

    worker.execute_model = counted
    return None
