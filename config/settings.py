"""Every setting of ragkv: one frozen model, in sections. Read at the edges, passed down."""

import json
import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from ragkv.policies import ADMISSIONS, POLICIES, policy_names

UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    UNITS |= {f"{_letter}iB": 1024**_power, f"{_letter}B": 1000**_power}
SELECTION_NAMES = ("deviation", "first_tokens", "query", "query_deviation", "random")
HINT_NAMES = (
    "documents",
    "fuse",
    "order",
    "pin",
    "priority",
    "recompute_ratio",
    "selection",
    "store",
    "ttl",
    "turn",
    "unpin",
)
MOST_BYTES = 2**63 - 1  # what a size may be
_SIZE = re.compile(r"(\d{1,19}(?:\.\d{1,19})?)\s*([A-Za-z]*)")


def parse_size(value: object) -> int:
    """The bytes that an int or a text like "4GiB" or "500 MB" gives. ValueError says what is allowed."""
    allowed = "a whole number of bytes, or a number with KiB, MiB, GiB, TiB, KB, MB, GB or TB"
    if isinstance(value, int) and not isinstance(value, bool) and value <= MOST_BYTES:
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    units = {name.lower(): factor for name, factor in UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise ValueError(f"allowed: {allowed}")
    size = int(Fraction(match[1]) * units[match[2].lower()])
    if size > MOST_BYTES:
        raise ValueError(f"allowed: {allowed}, at most {format_size(MOST_BYTES)}")
    return size


def format_size(size: int) -> str:
    """The shortest exact text for a size: "4GiB", "1000B"."""
    for name in ("TiB", "GiB", "MiB", "KiB"):
        if size and size % UNITS[name] == 0:
            return f"{size // UNITS[name]}{name}"
    return f"{size}B"


def rough_size(size: int) -> str:
    """A size as people write it, rounded down: "3.9GiB"."""
    for name in ("TiB", "GiB", "MiB", "KiB"):
        if size >= UNITS[name]:
            return f"{int(size / UNITS[name] * 10) / 10:g}{name}"
    return f"{size}B"


def parse_options(value: object) -> dict[str, Any]:
    """A mapping of names, or a text that is one in JSON. ValueError says what is allowed."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, Mapping) or not all(isinstance(name, str) and name.isidentifier() for name in value):
        raise ValueError("allowed: a mapping of names to values, or one as JSON")
    return dict(value)


def refuse_other_numbers(value: object) -> object:
    """`true` and 16.0 are no counts here, though pydantic thinks so."""
    if isinstance(value, bool | float):
        raise ValueError("allowed: a whole number")
    return value


Size = Annotated[int, BeforeValidator(parse_size)]
Options = Annotated[dict[str, Any], BeforeValidator(parse_options)]
Count = Annotated[int, BeforeValidator(refuse_other_numbers)]


class Section(BaseModel):
    """A section of the settings: frozen, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def one_of(names: Mapping[str, object], all_names: Callable[[], list[str]] | None = None) -> Any:
    """A validator that lets the names of a registry through; `all_names`: with those that packages bring."""

    def known(name: object) -> object:
        if name in sorted(names):
            return name
        allowed = sorted(names) if all_names is None else all_names()
        if name not in allowed:
            raise ValueError(f"allowed: {', '.join(allowed)}")
        return name

    return BeforeValidator(known)


def refuse_nonsense(value: object) -> object:
    """`true` is no number here, and neither are nan and inf."""
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError("allowed: a number")
    return value


Policy = Annotated[str, one_of(POLICIES, policy_names)]
Admission = Annotated[str, one_of(ADMISSIONS)]
Ratio = Annotated[float, BeforeValidator(refuse_nonsense)]
Seconds = Annotated[float, BeforeValidator(refuse_nonsense)]
Write = Literal["through", "back"]


class MemorySettings(Section):
    """The memory tier."""

    capacity: Size = Field(default=parse_size("4GiB"), ge=2**20, description="shared memory to use")
    page_tokens: Count = Field(default=16, ge=1, le=1024, description="tokens a page")
    policy: Policy = Field(default="lru", description="eviction policy")
    admission: Admission = Field(default="always", description="admission policy")
    priorities: Count = Field(
        default=1, ge=1, le=10, description="number of priority classes that requests may use"
    )


class DeviceSettings(Section):
    """The device tier: chunks that are hit often, in the accelerator's own memory. Off at capacity 0."""

    capacity: Size = Field(default=0, ge=0, description="accelerator memory that each worker uses")
    policy: Policy = Field(default="lru", description="eviction policy")
    after: Count = Field(default=2, ge=1, le=7, description="number of the hit at which a chunk is copied")


class DiskSettings(Section):
    """The disk tier. Off without a path."""

    path: str | None = Field(default=None, min_length=1, description="folder of the tier; engines may share it")
    capacity: Size = Field(default=parse_size("64GiB"), ge=2**20, description="bytes to use in this folder")
    policy: Policy = Field(default="lru", description="eviction policy")
    admission: Admission = Field(default="always", description="admission policy")
    write: Write = Field(default="through", description="write when stored, or when memory evicts")
    fsync: bool = Field(default=False, description="survive a power failure too")
    shared: bool = Field(default=False, description="look for files that other engines write")

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        if path is not None and not path.startswith(("/", "~/")):
            raise ValueError("allowed: an absolute path of a folder")
        return path


class RedisSettings(Section):
    """The Redis tier. Off without a URL."""

    url: str | None = Field(default=None, min_length=1, description="URL of a server, Sentinel or Cluster")
    prefix: str = Field(default="ragkv", description="prefix of every key")
    ttl: Count = Field(
        default=0, ge=0, le=315_360_000, description="seconds after which an unused value expires; 0: never"
    )
    timeout: Seconds = Field(default=1.0, gt=0, le=60, description="seconds for one operation")
    max_value: Size = Field(
        default=parse_size("64MiB"), ge=2**10, le=2**29, description="larger chunks are not written"
    )
    admission: Admission = Field(default="always", description="admission policy")
    write: Write = Field(default="through", description="write when stored, or when memory evicts")

    @field_validator("prefix")
    @classmethod
    def _printable(cls, prefix: str) -> str:
        if re.fullmatch(r"[!-z|~]{1,60}", prefix) is None:  # braces would put a cluster's keys into one slot
            raise ValueError("allowed: 1 to 60 printable ASCII characters but space, { and }")
        return prefix


class StoreSettings(Section):
    """One more tier, below the others, in the store of an installed package. Off without a name."""

    name: str | None = Field(default=None, min_length=1, description="name of an installed store")
    options: Options = Field(default={}, description="arguments of the store")
    capacity: Size = Field(
        default=parse_size("64GiB"), ge=2**20, description="bytes to use; not used if the store evicts by itself"
    )
    policy: Policy = Field(default="lru", description="eviction policy; not used if the store evicts by itself")
    admission: Admission = Field(default="always", description="admission policy")
    write: Write = Field(default="through", description="write when stored, or when memory evicts")

    @field_validator("name")
    @classmethod
    def _one_word(cls, name: str | None) -> str | None:
        if name is not None and re.fullmatch(r"\S+", name) is None:
            raise ValueError("allowed: the name of an entry point of the group ragkv.stores")
        return name


class PlacementSettings(Section):
    """Promotion from lower tiers, and writes to them."""

    deadline: Seconds = Field(
        default=2.0, ge=0, le=60, description="longest time that a request waits for lower tiers, in seconds"
    )
    queue: Size = Field(
        default=parse_size("256MiB"), ge=2**20, description="longest write queue of each lower tier, in bytes"
    )
    gate: bool = Field(default=True, description="decline loads that would take longer than prefill")
    flush: Seconds = Field(
        default=5.0, ge=0, le=600, description="longest time for writing chunks when the engine stops, in seconds"
    )


class FusionSettings(Section):
    """Reuse of documents at other positions, with a part of their tokens recomputed."""

    enabled: bool = Field(
        default=False, description="fuse by default; if false, only requests with the hint `fuse`"
    )
    selection: str = Field(default="query", description="which tokens are recomputed")
    recompute_ratio: Ratio = Field(
        default=0.15, ge=0, le=1, description="share of the moved tokens that is recomputed"
    )
    min_tokens: Count = Field(default=48, ge=1, le=65536, description="shorter passages are not moved")
    keep: bool = Field(default=False, description="leave fused KV in vLLM's own prefix cache")
    documents: Count = Field(
        default=200, ge=0, le=100_000, description="number of document ids with their own metrics"
    )

    @field_validator("selection")
    @classmethod
    def _known(cls, selection: str) -> str:
        if selection not in SELECTION_NAMES:
            raise ValueError(f"allowed: {', '.join(SELECTION_NAMES)}")
        return selection


class HintsSettings(Section):
    """Which hints of requests are used."""

    allow: str = Field(default="all", description="kinds of hints that are used; others are ignored, and counted")

    @field_validator("allow", mode="before")
    @classmethod
    def _known(cls, allow: object) -> str:
        names = [name.strip() for name in allow.split(",")] if isinstance(allow, str) else allow
        if names in (["all"], ["none"]):
            return str(names[0])
        if isinstance(names, list | tuple) and names and all(name in HINT_NAMES for name in names):
            return ", ".join(sorted(set(names)))
        raise ValueError(f"allowed: all, none, or some of {', '.join(HINT_NAMES)}")

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds that count."""
        named = {"all": ", ".join(HINT_NAMES), "none": ""}.get(self.allow, self.allow)
        return frozenset(named.split(", ")) - {""}


class TraceSettings(Section):
    """A trace of the requests, without text, for `ragkv simulate`."""

    file: str | None = Field(default=None, min_length=1, description="file to which the trace is appended")


class ChunkSettings(Section):
    """Lengths of chunks, in tokens."""

    min_tokens: Count = Field(
        default=32, ge=16, le=65536, description="shortest chunk, except the last one of a prompt"
    )
    average_tokens: Count = Field(
        default=128, ge=17, le=65536, description="average length in a text without paragraphs"
    )
    max_tokens: Count = Field(default=256, ge=17, le=65536, description="longest chunk")

    @model_validator(mode="after")
    def _ordered(self) -> "ChunkSettings":
        if not self.min_tokens < self.average_tokens <= self.max_tokens:
            raise ValueError(
                f"{self.min_tokens}/{self.average_tokens}/{self.max_tokens}; "
                "allowed: min_tokens < average_tokens <= max_tokens"
            )
        return self


class TransferSettings(Section):
    """Copies between the memory tier and an accelerator."""

    staging: Size = Field(default=parse_size("64MiB"), ge=2**20, description="accelerator memory for staging")
    step: Size = Field(
        default=0,
        ge=0,
        description="bytes copied in a step in which other requests compute; 0: 32MiB on CPUs, 256MiB on GPUs",
    )


class ControlSettings(Section):
    """Control of a running engine (`ragkv control`). Off without an address and a token."""

    listen: str | None = Field(default=None, description="address of the endpoint; a port alone is on loopback")
    token_file: str | None = Field(default=None, min_length=1, description="file with the token that clients send")

    @field_validator("listen", mode="before")
    @classmethod
    def _address(cls, listen: object) -> object:
        text = str(listen) if type(listen) is int else listen
        found = (
            re.fullmatch(r"(?:(?:[\w.-]+|\[[0-9a-fA-F:]+\]):)?(\d{1,5})", text) if isinstance(text, str) else None
        )
        if listen is not None and (found is None or int(found[1]) > 65535):
            raise ValueError("allowed: a port, or HOST:PORT")
        return text


class Settings(Section):
    """All settings, in sections: `settings.memory.capacity` is the key `memory.capacity`. Frozen.

    Sizes are in bytes, times in seconds. pydantic's ValidationError names what is invalid; `ragkv.config.load`,
    which also reads files and variables, raises ConfigError.
    """

    memory: MemorySettings = MemorySettings()
    device: DeviceSettings = DeviceSettings()
    disk: DiskSettings = DiskSettings()
    redis: RedisSettings = RedisSettings()
    store: StoreSettings = StoreSettings()
    placement: PlacementSettings = PlacementSettings()
    chunks: ChunkSettings = ChunkSettings()
    transfer: TransferSettings = TransferSettings()
    fusion: FusionSettings = FusionSettings()
    hints: HintsSettings = HintsSettings()
    trace: TraceSettings = TraceSettings()
    control: ControlSettings = ControlSettings()

    @model_validator(mode="after")
    def _page_fits_chunk(self) -> "Settings":
        if self.memory.page_tokens > self.chunks.max_tokens:
            raise ValueError(
                f"memory.page_tokens = {self.memory.page_tokens}; allowed: at most chunks.max_tokens = "
                f"{self.chunks.max_tokens}, since a page must not be larger than a chunk"
            )
        return self


def keys() -> dict[str, Any]:
    """The field of every dotted key ("memory.capacity")."""
    return {
        f"{section}.{name}": field
        for section, outer in Settings.model_fields.items()
        for name, field in outer.annotation.model_fields.items()  # type: ignore[union-attr]
    }
