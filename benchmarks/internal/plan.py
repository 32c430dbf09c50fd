"""Time to plan a long prompt against a large catalogue: cut, hash, look up, compare tokens. No engine."""

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ragkv.benchmarks.report import median_seconds, write_json
from ragkv.kvstore.chunking import HOLDS, Chunker, TokenChain, TokenStructure, rolling_hash
from ragkv.kvstore.keys import Tokens, as_tokens, chain_key, namespace
from ragkv.kvstore.memory_tier import MemoryTier
from ragkv.kvstore.metrics import Metrics
from ragkv.policies import make_policy

VOCABULARY, BREAK = 49_152, 5
PAGE_TOKENS, REPEATS, LEAST_PARAGRAPH, MOST_PARAGRAPH = 16, 30, 20, 160


def make_tokens(generator: np.random.Generator, size: int) -> Tokens:
    """Random text: paragraphs of 20 to 160 tokens, each with its blank line."""
    tokens = generator.integers(100, VOCABULARY, size).astype("<i4")
    lengths = generator.integers(LEAST_PARAGRAPH, MOST_PARAGRAPH, size // LEAST_PARAGRAPH + 1)
    ends = np.cumsum(lengths)
    tokens[ends[ends < size]] = BREAK
    return tokens


def resident_bytes() -> int:
    """This process's resident memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def fill(
    store: MemoryTier, new_chain: Callable[[Tokens], TokenChain], space: bytes, chunks: int, size: int
) -> int:
    """Store documents of `size` tokens until there are `chunks` chunks; the bytes of all their tokens."""
    generator = np.random.default_rng(1)
    token_bytes = 0
    with Progress(transient=True) as bar:
        task = bar.add_task("filling the catalogue", total=chunks)
        while len(store) < chunks:
            chain = new_chain(make_tokens(generator, size))
            for chunk in store.reserve(space, chain, chain.ends[-1]):
                store.commit(chunk)
                token_bytes += len(chunk.tokens)
            bar.update(task, completed=len(store))
    return token_bytes


def run(tokens: int, chunks: int, json_file: Path | None) -> dict[str, Any]:
    """Measure, print a table, write the report."""
    console = Console()
    structure = np.zeros(VOCABULARY, dtype=np.uint8)
    structure[BREAK] = HOLDS
    chunker = Chunker(32, 128, 256, TokenStructure(structure))
    space = namespace({"model": "bench"})

    def new_chain(ids: Tokens) -> TokenChain:
        chain = TokenChain(space, chunker)
        chain.extend(ids)
        return chain

    prompt = make_tokens(np.random.default_rng(0), tokens)
    ids = prompt.tolist()
    pages = chunks * (256 // PAGE_TOKENS) + tokens
    store = MemoryTier(pages, make_policy("lru"), PAGE_TOKENS, 1, Metrics())
    known = new_chain(prompt)
    before = resident_bytes()
    for chunk in store.reserve(space, known, tokens):
        store.commit(chunk)
    token_bytes = fill(store, new_chain, space, chunks, tokens)
    used = resident_bytes() - before - token_bytes

    def plan(ids: list[int]) -> int:
        return store.match(space, new_chain(as_tokens(ids)), len(ids) - 1).length

    stranger = make_tokens(np.random.default_rng(2), tokens).tolist()
    if plan(ids) != tokens - 1 or plan(stranger) != 0:
        raise ValueError("the plan is wrong: the known prompt must hit as a whole, the stranger not at all")
    raw = [prompt[a:b].tobytes() for a, b in zip([0, *known.ends], known.ends, strict=False)]
    report: dict[str, Any] = {
        "tokens": tokens,
        "chunks": len(store),
        "plan_hit_s": median_seconds(lambda: plan(ids), REPEATS),
        "plan_miss_s": median_seconds(lambda: plan(stranger), REPEATS),
        "chunking_tokens_per_s": tokens / median_seconds(lambda: chunker.cut(prompt), REPEATS),
        "rolling_hash_tokens_per_s": tokens / median_seconds(lambda: rolling_hash(prompt), REPEATS),
        "key_hash_bytes_per_s": sum(map(len, raw))
        / median_seconds(lambda: [chain_key(space, each) for each in raw], REPEATS),
        "catalogue_bytes_per_chunk": used / len(store),
    }
    console.print(_table(report))
    write_json(json_file, report)
    return report


def _table(report: dict[str, Any]) -> Table:
    table = Table(
        "", "", title=f"{report['tokens']:,} tokens against {report['chunks']:,} chunks, medians of {REPEATS}"
    )
    table.add_row("plan, all known", f"{report['plan_hit_s'] * 1000:.2f} ms")
    table.add_row("plan, nothing known", f"{report['plan_miss_s'] * 1000:.2f} ms")
    table.add_row("chunking", f"{report['chunking_tokens_per_s'] / 1e6:.0f} M tokens/s")
    table.add_row("rolling hash alone", f"{report['rolling_hash_tokens_per_s'] / 1e6:.0f} M tokens/s")
    table.add_row("chain keys alone", f"{report['key_hash_bytes_per_s'] / 1e6:.0f} MB/s")
    table.add_row(
        "catalogue and tier, beside the tokens", f"{report['catalogue_bytes_per_chunk']:.0f} bytes a chunk"
    )
    return table
