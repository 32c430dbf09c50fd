"""Traces of requests for the simulator: read from a file, or generated.

Two formats are read, both one JSON object a line: Mooncake's (Qin et al., "Mooncake: Trading More Storage for
Less Computation", FAST 2025; `hash_ids` of blocks of 512 tokens, each of weight one) and ours
(`ragkv.kvstore.trace`; weights in tokens).
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ragkv.benchmarks.workloads import KINDS, generate
from ragkv.errors import ConfigError
from ragkv.kvstore import trace as ours

SEMANTICS = ("prefix", "content")
GENERATED = "generated:"
LONGEST_LINE = 64 << 20
MOONCAKE_LINE = '{"hash_ids": [whole numbers], ...}'
Unit = Literal["blocks", "tokens"]
Line = Sequence[tuple[str | int, int]]


@dataclass(frozen=True)
class Trace:
    """`requests`: blocks as numbers below len(weights), equal where the content is. `unit`: of the weights."""

    name: str
    requests: Sequence[Sequence[int]]
    weights: Sequence[int]
    unit: Unit = "blocks"


@dataclass(frozen=True)
class Blocks:
    """A trace as a policy sees it: keys are numbers below len(weights). `chained`: each but the first of a
    request has the one before it as its parent, the same in all requests."""

    requests: Sequence[Sequence[int]]
    weights: Sequence[int]
    chained: bool
    references: int


def as_blocks(trace: Trace, semantics: str = "prefix") -> Blocks:
    """Prefix: a block is a content behind the same blocks, and its parent is the block before it. Content: a block
    is a content, wherever it stands, without a parent. ConfigError: other semantics."""
    references = sum(map(len, trace.requests))
    if semantics == "content":
        return Blocks(trace.requests, trace.weights, False, references)
    if semantics != "prefix":
        raise ConfigError(f"semantics = {semantics!r}; allowed: {', '.join(SEMANTICS)}")
    numbers: dict[tuple[int | None, int], int] = {}
    weights: list[int] = []
    requests: list[list[int]] = []
    for request in trace.requests:
        parent: int | None = None
        chain: list[int] = []
        for content in request:
            number = numbers.setdefault((parent, content), len(numbers))
            if number == len(weights):
                weights.append(trace.weights[content])
            chain.append(number)
            parent = number
        requests.append(chain)
    return Blocks(requests, weights, True, references)


def load_trace(source: str) -> Trace:
    """A trace from a file, or made by `generated:KIND` or `generated:KIND:SEED`. ConfigError: neither."""
    if not source.startswith(GENERATED):
        return read_trace(Path(source))
    kind, _, seed = source.removeprefix(GENERATED).partition(":")
    if kind not in KINDS or not (seed or "0").isdecimal():
        raise ConfigError(
            f"trace = {source!r}; allowed: a file, or {GENERATED}KIND or {GENERATED}KIND:SEED "
            f"with KIND one of {', '.join(KINDS)} and SEED a whole number"
        )
    return generate_trace(kind, int(seed or 0))


def generate_trace(kind: str, seed: int = 0, **length: int) -> Trace:
    """`ragkv.benchmarks.workloads.generate` as a trace."""
    requests = generate(kind, seed, **length)
    return _number(f"{GENERATED}{kind}:{seed}", ([(block, 1) for block in each] for each in requests), "blocks")


def read_trace(path: Path) -> Trace:
    """A file of either format. A last line that was not written to its end is left out. ConfigError names the
    file, the line, and what is allowed there."""
    unit: Unit | None = None
    requests: list[Line] = []
    weights: dict[str | int, int] = {}
    for number, entry in _entries(path):
        try:
            if unit is None:
                unit = _unit(entry)
            request = ours.parse(entry) if unit == "tokens" else _parse_mooncake(entry)
            for key, weight in request or ():
                if weights.setdefault(key, weight) != weight:
                    raise ValueError(f"{weight} tokens for key {key}; allowed: {weights[key]}, as before")
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from None
        if request is not None:
            requests.append(request)
    if not any(requests):
        raise ConfigError(f"trace = {path}: not one block; allowed: a file with requests")
    return _number(str(path), requests, unit or "blocks")


def _entries(path: Path) -> Iterator[tuple[int, object]]:
    """Number and JSON value of every line."""
    try:
        with path.open("rb") as lines:
            number = 0
            while text := lines.readline(LONGEST_LINE):
                number += 1
                if not text.strip():
                    continue
                try:
                    entry = json.loads(text)
                except (ValueError, RecursionError):
                    if not text.endswith(b"\n") and len(text) < LONGEST_LINE:
                        return
                    raise ConfigError(f"{path}, line {number}: no JSON; allowed: one JSON object a line") from None
                yield number, entry
    except OSError as error:
        raise ConfigError(f"trace = {path}: {error.strerror}; allowed: a file of JSON lines") from None


def _unit(entry: object) -> Unit:
    """What a file's first line says about its format. ValueError: nothing known."""
    if isinstance(entry, dict) and "format" in entry:
        return "tokens"
    if isinstance(entry, dict) and "hash_ids" in entry:
        return "blocks"
    raise ValueError(f"an unknown format; allowed: {json.dumps(ours.HEADER)} or {MOONCAKE_LINE}")


def _parse_mooncake(entry: object) -> Line:
    ids = entry.get("hash_ids") if isinstance(entry, dict) else None
    if not isinstance(ids, list) or not all(type(each) is int for each in ids):
        raise ValueError(f"allowed: {MOONCAKE_LINE}")
    return [(each, 1) for each in ids]


def _number(name: str, requests: Iterable[Line], unit: Unit) -> Trace:
    """Blocks numbered in the order of their first use."""
    numbers: dict[str | int, int] = {}
    weights: list[int] = []
    numbered: list[list[int]] = []
    for request in requests:
        numbered.append([numbers.setdefault(key, len(numbers)) for key, _ in request])
        if len(numbers) > len(weights):
            weights += [0] * (len(numbers) - len(weights))
            for number, (_, weight) in zip(numbered[-1], request, strict=True):
                weights[number] = weight
    return Trace(name, numbered, weights, unit)
