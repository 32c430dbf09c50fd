"""Mutation fuzzing of the payload codec: harmed payloads, and any header under a right checksum.

An input must be refused with `PayloadError`, or decode to what it says. Each is given to `decode` and, as the
beginning of a file, to `read_header`.
"""

import random
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import msgpack
import xxhash
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ragkv.benchmarks.report import write_json
from ragkv.errors import PayloadError, RagKVError
from ragkv.kvstore.codec import (
    CHECKSUM_BYTES,
    DTYPES,
    MAGIC,
    PREFIX_BYTES,
    VERSION,
    Header,
    decode,
    encode,
    header_end,
    read_header,
)
from ragkv.kvstore.keys import mark

BATCH = 10_000
MOST_FAILURES = 10
FIELDS = tuple(each.name for each in fields(Header))
NUMBERS = (-(2**63), -1, 0, 1, 2, 15, 16, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)

Mutation = Callable[[random.Random, list[bytes]], bytes]


@dataclass
class Findings:
    """What came out: `refused` by reason, `failures` as a line each."""

    inputs: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    mutations: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    failures: list[str] = field(default_factory=list)


def make_payloads(chance: random.Random) -> list[bytes]:
    """A few small payloads, each of another shape: of tokens, of what planes of windows and states have of a
    chunk, and of chunks of models without layers of full attention, which hold no bytes."""
    made = []
    for shape in ((1,), (3, 2, 5), (2, 2, 4, 1, 8), (1, 1, 1, 1, 1, 1, 1, 64), (9, 1, 0, 2, 1)):
        for dtype in DTYPES:
            header = Header(
                namespace=chance.randbytes(16),
                key=chance.randbytes(16),
                parent=chance.randbytes(16),
                tokens=chance.choice((mark(1), mark(2), *[chance.randbytes(4 * chance.randrange(1, 40))] * 3)),
                position=chance.randrange(2**31),
                open=chance.random() < 0.5,
                shape=shape,
                dtype=dtype,
                created=chance.random() * 2e9,
            )
            made.append(b"".join(encode(header, [chance.randbytes(header.raw_bytes)])))
    return made


def seal(packed: bytes, raw: bytes, version: int = VERSION) -> bytes:
    """A payload around any bytes for a header, with the right checksum."""
    start = struct.pack("<8sHI", MAGIC, version, len(packed)) + packed + raw
    return start + xxhash.xxh3_128_digest(start)


def flip(chance: random.Random, payloads: list[bytes]) -> bytes:
    value = bytearray(chance.choice(payloads))
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        bit = chance.randrange(8 * len(value))
        value[bit // 8] ^= 1 << bit % 8
    return bytes(value)


def cut(chance: random.Random, payloads: list[bytes]) -> bytes:
    value = chance.choice(payloads)
    start = chance.choice((0, 0, 0, chance.randrange(len(value))))
    return value[start : chance.randrange(len(value) + 1)]


def extend(chance: random.Random, payloads: list[bytes]) -> bytes:
    value = chance.choice(payloads)
    at = chance.choice((len(value), chance.randrange(len(value))))
    return value[:at] + chance.randbytes(chance.randrange(1, 40)) + value[at:]


def splice(chance: random.Random, payloads: list[bytes]) -> bytes:
    one, two = chance.choice(payloads), chance.choice(payloads)
    borders = (PREFIX_BYTES, header_end(one), len(one) - CHECKSUM_BYTES, chance.randrange(len(one)))
    at = chance.choice(borders)
    return one[:at] + two[chance.choice((at, header_end(two), chance.randrange(len(two)))) :]


def overwrite(chance: random.Random, payloads: list[bytes]) -> bytes:
    value = bytearray(chance.choice(payloads))
    at = chance.randrange(len(value))
    size = chance.choice((1, 2, 4, 8))
    value[at : at + size] = (chance.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(
        size, chance.choice(("big", "little"))
    )
    return bytes(value)


def noise(chance: random.Random, payloads: list[bytes]) -> bytes:
    return chance.choice((b"", MAGIC, chance.choice(payloads)[:PREFIX_BYTES])) + chance.randbytes(
        chance.randrange(200)
    )


def sealed_flips(chance: random.Random, payloads: list[bytes]) -> bytes:
    """The header harmed, and the checksum made anew."""
    packed, raw = _parts(chance.choice(payloads))
    harmed = bytearray(packed)
    for _ in range(chance.choice((1, 1, 2, 4))):
        harmed[chance.randrange(len(harmed))] = chance.randrange(256)
    end = chance.choice((len(harmed), len(harmed), chance.randrange(len(harmed))))
    return seal(bytes(harmed[:end]), raw)


def sealed_fields(chance: random.Random, payloads: list[bytes]) -> bytes:
    """Fields of other values or types, missing, or too many, under a right checksum."""
    packed, raw = _parts(chance.choice(payloads))
    said = msgpack.unpackb(packed)
    for _ in range(chance.choice((1, 1, 2))):
        name = chance.choice(FIELDS)
        what = chance.random()
        if what < 0.7:
            said[name] = _anything(chance)
        elif what < 0.85:
            said.pop(name, None)
        else:
            said[chance.choice(("more", "", name.upper()))] = _anything(chance)
    return seal(msgpack.packb(said), raw, chance.choice((VERSION, VERSION, VERSION, chance.randrange(2**16))))


def sealed_noise(chance: random.Random, payloads: list[bytes]) -> bytes:
    return seal(chance.randbytes(chance.randrange(120)), chance.randbytes(chance.randrange(40)))


MUTATIONS: tuple[Mutation, ...] = (
    flip,
    cut,
    extend,
    splice,
    overwrite,
    noise,
    sealed_flips,
    sealed_fields,
    sealed_noise,
)


def try_one(value: bytes, findings: Findings) -> str | None:
    """Decode one input; what is wrong with what came of it, or None."""
    started = time.perf_counter()
    try:
        read = read_header(value)
    except PayloadError:
        read = None
    try:
        header, raw = decode(value)
    except PayloadError as error:
        findings.refused[error.reason] += 1
        return None
    finally:
        findings.slowest_s = max(findings.slowest_s, time.perf_counter() - started)
    packed, expected = _parts(value)
    said = msgpack.unpackb(packed)
    if {name: getattr(header, name) for name in FIELDS} != said | {"shape": tuple(said["shape"])}:
        return "the header is not what it says"
    if raw != expected or xxhash.xxh3_128_digest(value[:-CHECKSUM_BYTES]) != value[-CHECKSUM_BYTES:]:
        return "the bytes are not what it holds"
    if read != (header, len(value)):
        return "read_header says otherwise"
    findings.accepted += 1
    return None


def fuzz(inputs: int, seed: int, progress: Callable[[int], object] = lambda done: None) -> Findings:
    """Try so many inputs, the same ones for the same seed; ends after ten failures."""
    chance = random.Random(seed)
    payloads = make_payloads(chance)
    findings = Findings()
    while findings.inputs < inputs and len(findings.failures) < MOST_FAILURES:
        mutate = chance.choice(MUTATIONS)
        value = mutate(chance, payloads)
        findings.inputs += 1
        findings.mutations[mutate.__name__] += 1
        try:
            wrong = try_one(value, findings)
        except Exception as error:  # the very thing that is looked for
            wrong = repr(error)
        if wrong:
            findings.failures.append(f"{mutate.__name__}: {wrong}: {value.hex()}")
        if findings.inputs % BATCH == 0:
            progress(findings.inputs)
    return findings


def run(inputs: int, seed: int, json_file: Path | None) -> dict[str, Any]:
    """Fuzz, print a table, write the report. RagKVError: a failure, after the report is written."""
    console = Console()
    started = time.perf_counter()
    with Progress(transient=True, console=console) as bar:
        task = bar.add_task("fuzzing", total=inputs)
        findings = fuzz(inputs, seed, lambda done: bar.update(task, completed=done))
    seconds = time.perf_counter() - started
    report: dict[str, Any] = {
        "inputs": findings.inputs,
        "seed": seed,
        "seconds": seconds,
        "slowest_s": findings.slowest_s,
        "accepted": findings.accepted,
        "refused": dict(findings.refused.most_common()),
        "mutations": dict(findings.mutations.most_common()),
        "failures": findings.failures,
    }
    table = Table("outcome", "inputs", title=f"{findings.inputs:,} inputs in {seconds:.0f} s")
    for reason, count in findings.refused.most_common():
        table.add_row(f"refused: {reason}", f"{count:,}")
    table.add_row("accepted, and right", f"{findings.accepted:,}")
    table.add_row("failures", f"{len(findings.failures):,}")
    console.print(table)
    console.print(f"The slowest took {findings.slowest_s * 1000:.1f} ms.")
    write_json(json_file, report)
    if findings.failures:
        raise RagKVError(f"fuzz: {len(findings.failures)} failures, the first: {findings.failures[0]}")
    return report


def _parts(value: bytes) -> tuple[bytes, bytes]:
    """Header and tensor bytes, by the length alone."""
    end = header_end(value)
    return value[PREFIX_BYTES:end], value[end:-CHECKSUM_BYTES]


def _anything(chance: random.Random) -> object:
    makers: tuple[Callable[[], object], ...] = (
        lambda: None,
        lambda: chance.choice(NUMBERS),
        lambda: chance.random() < 0.5,
        lambda: chance.choice((0.0, -1.0, 1.5e9, float("nan"), float("inf"))),
        lambda: chance.randbytes(chance.choice((0, 3, 4, 15, 16, 17, 64))),
        lambda: chance.choice((*DTYPES, "", "bfloat17")),
        lambda: [chance.choice(NUMBERS) for _ in range(chance.randrange(10))],
        lambda: {"a": chance.choice(NUMBERS)},
        lambda: msgpack.Timestamp(chance.randrange(2**31)),
        lambda: msgpack.ExtType(chance.randrange(127), b"xx"),
    )
    return chance.choice(makers)()
