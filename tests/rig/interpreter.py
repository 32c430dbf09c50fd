"""Triton's interpreter, ten times quicker. It runs every operation of every program in Python, so few programs on
large tiles suit it best; and it patches Triton's language once, instead of in every call of a function.

Only launch parameters change (as an autotuner would choose them): kernels and what they compute stay vLLM's own.
"""

import functools
import types

TILE = 128  # tokens of the cache that a program takes at once
ROWS = 128  # queries of one KV head that a program takes at once
SEGMENTS = 2  # that the cache is split into where one sequence decodes


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
    """What the interpreter puts in the place of Triton's built-in functions stays there."""
    import triton.language as tl
    from triton.runtime import interpreter

    everything = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang(everything)
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()


@functools.cache
def launch_few_programs():
    """Larger tiles for the attention kernel, and fewer segments of a decoding sequence's cache."""
    from vllm.v1.attention.ops import triton_unified_attention as ops

    ops._get_tile_size = lambda *_, **__: TILE
    ops.kernel_unified_attention = Launched(ops.kernel_unified_attention, _wide)
    from vllm.v1.attention.backends import triton_attn

    triton_attn.NUM_PAR_SOFTMAX_SEGMENTS = SEGMENTS
    triton_attn.MIN_LAUNCH_GRID_SIZE_2D = 4


def _wide(grid, arguments):
    """Many queries a program where there are any, few where all sequences decode."""
    if arguments["IS_3D"]:
        return grid, {}
    queries, sequences = arguments["query_ptr"].shape[0], arguments["num_seqs"]
    rows = 16 if queries == sequences else ROWS
    block = rows // arguments["num_queries_per_kv"]
    return (queries // block + sequences, *grid[1:]), {"BLOCK_M": rows, "BLOCK_Q": block}
