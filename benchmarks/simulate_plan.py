"""What `ragkv simulate` is asked for, read and checked before the first replay."""

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from ragkv.benchmarks.compared import COMPARED
from ragkv.benchmarks.traces import Blocks, Trace, as_blocks, load_trace
from ragkv.config.settings import parse_size
from ragkv.errors import ConfigError
from ragkv.policies import ADMISSIONS

CLAIRVOYANT = "clairvoyant"
SIZES = "1%,5%,10%,20%"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(%|[A-Za-z]*)")


@dataclass(frozen=True)
class Size:
    """A capacity in units of a trace's weights, and the text that it was given as."""

    text: str
    units: int


@dataclass(frozen=True)
class Level:
    """One tier of `--tiers`. `policy` None: each of `--policy` in turn."""

    name: str
    size: Size
    policy: str | None


@dataclass(frozen=True)
class Plan:
    """What is to be replayed, checked."""

    trace: Trace
    blocks: Blocks
    semantics: str
    policies: Sequence[str]
    admissions: Sequence[str]
    sizes: Sequence[Size]
    tiers: Sequence[Level]
    tiers_text: str


def read_size(field: str, text: str, total: int, unit: str, unit_bytes: int | None) -> Size:
    """A share of `total` ("5%"), a number of units ("1000"), or bytes ("4GiB") where a unit has bytes.
    ConfigError: anything else, or less than one unit."""
    match = _SIZE.fullmatch(text)
    units = 0
    if match is not None and match[2] == "%":
        share = Fraction(match[1]) / 100
        units = int(share * total) if share <= 1 else 0
    elif match is not None and match[2] and unit_bytes:
        with contextlib.suppress(ValueError):
            units = parse_size(text) // unit_bytes
    elif match is not None and not match[2] and match[1].isdecimal():
        units = int(match[1])
    if units < 1:
        raise ConfigError(
            f"{field} = {text!r}; allowed: up to 100%, a number of {unit} (100% is {total}), "
            f"or with --block-bytes a size as in 4GiB; at least one of the {unit}"
        )
    return Size(text, units)


def read_bytes(field: str, text: str) -> int:
    """A size above 0. ConfigError: anything else."""
    try:
        size = parse_size(text)
    except ValueError:
        size = 0
    if size < 1:
        raise ConfigError(f"{field} = {text!r}; allowed: at least one byte, as in 64KiB")
    return size


def read_names(field: str, text: str, known: Sequence[str]) -> list[str]:
    """Names separated by commas, each once. ConfigError: none, or one that is not known."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise ConfigError(f"{field} = {name!r}; allowed: {', '.join(known)}")
    return names


def read_tiers(text: str, read: Callable[[str, str], Size]) -> list[Level]:
    """Texts like memory=1%,disk=10%:lru, from the first tier down. ConfigError: other texts."""
    levels: list[Level] = []
    for part in text.split(","):
        name, equals, rest = part.strip().partition("=")
        size, colon, policy = rest.partition(":")
        if not (name and equals) or name in {level.name for level in levels}:
            raise ConfigError(
                f"--tiers = {part.strip()!r}; allowed: NAME=SIZE or NAME=SIZE:POLICY, names differ, "
                "as in memory=1%,disk=10%:lru"
            )
        chosen = read_names(f"--tiers {name}", policy, sorted(COMPARED))[0] if colon else None
        levels.append(Level(name, read(f"--tiers {name}", size), chosen))
    return levels


def make_plan(
    source: str,
    policies: str | None,
    sizes: str | None,
    admissions: str,
    semantics: str,
    tiers: str | None,
    block_bytes: str | None,
) -> Plan:
    """Check everything before the first replay. ConfigError names what cannot be."""
    if tiers is not None and sizes is not None:
        raise ConfigError("--sizes and --tiers: allowed: one of them, since tiers have their sizes")
    known = sorted(COMPARED)
    names = known if policies is None else read_names("--policy", policies, [*known, CLAIRVOYANT])
    admission_names = read_names("--admission", admissions, sorted(ADMISSIONS))
    unit_bytes = None if block_bytes is None else read_bytes("--block-bytes", block_bytes)
    trace = load_trace(source)
    blocks = as_blocks(trace, semantics)
    total = sum(blocks.weights)

    def read(field: str, text: str) -> Size:
        return read_size(field, text.strip(), total, trace.unit, unit_bytes)

    return Plan(
        trace,
        blocks,
        semantics,
        [name for name in names if name != CLAIRVOYANT],
        admission_names,
        []
        if tiers is not None
        else [read("--sizes", text) for text in dict.fromkeys((sizes or SIZES).split(","))],
        read_tiers(tiers, read) if tiers is not None else [],
        tiers or "",
    )
