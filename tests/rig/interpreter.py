"""Triton's interpreter, 20 times quicker. It runs every operation of every program in Python, so few programs on
large tiles suit it best.

The attention kernel is vLLM's own, with other launch parameters, as an autotuner might choose them. Only one
combination runs it; in the others PyTorch computes the same. The kernel that writes new K and V to the cache
takes a program for every token; in its place PyTorch writes the same everywhere.
"""

import functools
import itertools
import os
import types

import torch

KERNEL = "RIG_KERNEL"  # in the environment: attention is interpreted

TILE = 128  # tokens of the cache that a program takes at once
ROWS = 128  # queries of one KV head that a program takes at once, or 16 where all sequences decode


class Launched:
    """A kernel that is launched as `choose(grid, arguments)` says: another grid, and some other arguments."""

    def __init__(self, kernel, choose):
        self._kernel, self._choose = kernel, choose

    def __getitem__(self, grid):
        def launch(**arguments):
            other, changed = self._choose(grid, arguments)
            return self._kernel[other](**arguments | changed)

        return launch


def patch_language_once():
    """Let what the interpreter puts in the place of Triton's built-in functions stay there; else it patches the
    whole language again in every call of a function."""
    import triton.language as tl
    from triton.runtime import interpreter

    everything = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang(everything)
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()


@functools.cache
def launch_few_programs():
    """Few programs for attention, and none for writing to the cache."""
    from vllm.v1.attention.ops import triton_unified_attention as ops

    ops._get_tile_size = lambda *_, **__: TILE
    ops.kernel_unified_attention = Launched(ops.kernel_unified_attention, _wide)
    from vllm.v1.attention.backends import triton_attn

    triton_attn.MIN_LAUNCH_GRID_SIZE_2D = 0  # no splitting of one sequence's cache among programs
    triton_attn.triton_reshape_and_cache_flash = write
    if not os.environ.get(KERNEL):
        triton_attn.unified_attention = attend


def _wide(grid, arguments):
    queries, sequences = arguments["query_ptr"].shape[0], arguments["num_seqs"]
    rows = 16 if queries == sequences else ROWS
    block = rows // arguments["num_queries_per_kv"]
    return (queries // block + sequences, *grid[1:]), {"BLOCK_M": rows, "BLOCK_Q": block}


def write(key, value, key_cache, value_cache, slots, _kv_cache_dtype, k_scale, v_scale):
    """K and V [tokens, heads, dim] to caches [blocks, block_size, heads, dim]; negative slots are padding."""
    kept = (slots >= 0).nonzero().flatten()
    at = slots[kept] // key_cache.shape[1], slots[kept] % key_cache.shape[1]
    for new, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        if new.dtype != cache.dtype:  # fp8, which PyTorch does not index
            cache.view(torch.uint8)[at] = (new[kept] / scale).to(cache.dtype).view(torch.uint8)
        else:
            cache[at] = new[kept]


def attend(*, q, k, v, out, cu_seqlens_q, seqused_k, softmax_scale, block_table, k_descale, v_descale, **others):
    """Attention of queries [tokens, heads, dim] over paged caches [blocks, block_size, kv_heads, dim], as vLLM's
    `unified_attention` does: of each sequence the last tokens ask, each for itself and all before it, or so many
    of them as its window has."""
    back, ahead = others["window_size"]
    assert others["causal"] and ahead == min(back, 0) and not others["softcap"]
    assert all(others.get(name) is None for name in ("alibi_slopes", "sinks", "output_scale", "mm_prefix_range"))
    for number, (begin, end) in enumerate(itertools.pairwise(cu_seqlens_q.tolist())):
        if begin == end:
            continue
        length = int(seqused_k[number])
        blocks = block_table[number, : -(-length // k.shape[1])]
        keys, values = (
            _numbers(cache, blocks)[:length] * scale[number][:, None]
            for cache, scale in ((k, k_descale), (v, v_descale))
        )
        queries = q[begin:end].float().unflatten(1, (keys.shape[1], -1))
        scores = torch.einsum("thgd,shd->hgts", queries, keys) * softmax_scale
        asked = torch.arange(length - (end - begin), length)[:, None]
        unseen = (torch.arange(length) > asked) | ((back >= 0) & (torch.arange(length) < asked - back))
        weights = scores.masked_fill(unseen, float("-inf")).softmax(-1)
        out[begin:end] = torch.einsum("hgts,shd->thgd", weights, values).flatten(1, 2)


def _numbers(cache, blocks):
    """Some blocks of a cache, concatenated; fp8 too, which PyTorch does not index."""
    return cache.view(torch.uint8)[blocks].view(cache.dtype).flatten(0, 1).float()
