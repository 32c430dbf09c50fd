"""Chains of passages that are likely to be retrieved together, from a log of past retrievals.

Each retrieval is sorted by how often its passages were retrieved in all, the most frequent first; so retrievals
that share passages share beginnings, which a prefix tree counts: the FP-tree (Han, Pei, Yin: "Mining frequent
patterns without candidate generation", SIGMOD 2000, section 2). Its most used beginnings are prefilled.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ragkv.errors import RagKVError

LONGEST_LINE = 1 << 20  # bytes
MOST_RETRIEVALS = 1_000_000
LONGEST = 64  # passages of a chain: as many as are ordered
FEWEST = 2  # retrievals that begin with a chain


def likely_chains(retrievals: Sequence[Sequence[str]], most: int) -> list[tuple[str, ...]]:
    """At most `most` chains of two or more ids, the most used first; none is the beginning of another."""
    frequency = Counter(name for each in retrievals for name in set(each))
    used: Counter[tuple[str, ...]] = Counter()
    for each in retrievals:
        names = sorted(set(each), key=lambda name: (-frequency[name], name))[:LONGEST]
        used.update(tuple(names[:size]) for size in range(2, len(names) + 1))
    chains: dict[tuple[str, ...], None] = {}
    for chain, times in used.most_common():
        if times < FEWEST or (len(chains) == most and chain[:-1] not in chains):
            break
        chains.pop(chain[:-1], None)  # no shorter one is rarer, so it came before
        chains[chain] = None
    return list(chains)


def read_retrievals(file: Path) -> list[list[str]]:
    """Retrievals, one a line: a JSON list of passages' ids. RagKVError: a line is none, or there are too many.
    OSError: the file cannot be read."""
    found: list[list[str]] = []
    with file.open("rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(LONGEST_LINE), b""), 1):
            try:
                ids = json.loads(line)
            except (ValueError, RecursionError):
                ids = None
            if not isinstance(ids, list) or not all(isinstance(each, str) for each in ids):
                raise RagKVError(f"line {number}: {line[:40]!r}; allowed: a JSON list of passages' ids")
            found.append(ids)
            if len(found) > MOST_RETRIEVALS:
                raise RagKVError(f"it has more than {MOST_RETRIEVALS:,} lines; allowed: fewer")
    return found
