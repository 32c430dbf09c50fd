"""Every setting of ragkv: one frozen model, in sections. Read at the edges, passed down."""

import re
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from ragkv.policies import POLICIES

UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    UNITS |= {f"{_letter}iB": 1024**_power, f"{_letter}B": 1000**_power}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_size(value: object) -> int:
    """Bytes from an int or a text like "4GiB" or "500 MB". ValueError says what is allowed."""
    allowed = "a whole number of bytes, or a number with KiB, MiB, GiB, TiB, KB, MB, GB or TB"
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    units = {name.lower(): factor for name, factor in UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise ValueError(f"allowed: {allowed}")
    return int(Fraction(match[1]) * units[match[2].lower()])


def format_size(size: int) -> str:
    """The shortest exact text for a size: "4GiB", "1000B"."""
    for name in ("TiB", "GiB", "MiB", "KiB"):
        if size and size % UNITS[name] == 0:
            return f"{size // UNITS[name]}{name}"
    return f"{size}B"


def refuse_other_numbers(value: object) -> object:
    """`true` and 16.0 are no counts here, though pydantic thinks so."""
    if isinstance(value, bool | float):
        raise ValueError("allowed: a whole number")
    return value


Size = Annotated[int, BeforeValidator(parse_size)]
Count = Annotated[int, BeforeValidator(refuse_other_numbers)]


class Section(BaseModel):
    """Frozen, and no key but those it names."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class MemorySettings(Section):
    """The memory tier."""

    capacity: Size = Field(default=parse_size("4GiB"), ge=2**20, description="shared memory to use")
    page_tokens: Count = Field(default=16, ge=1, le=1024, description="tokens a page")
    policy: str = Field(default="lru", description="eviction policy")

    @field_validator("policy", mode="before")
    @classmethod
    def _known_policy(cls, name: object) -> object:
        if name not in sorted(POLICIES):
            raise ValueError(f"allowed: {', '.join(sorted(POLICIES))}")
        return name


class ChunkSettings(Section):
    """Where chunks end, in tokens."""

    min_tokens: Count = Field(default=32, ge=16, le=65536, description="no chunk is shorter, but a prompt's last")
    average_tokens: Count = Field(default=128, ge=17, le=65536, description="aim where a text has no paragraphs")
    max_tokens: Count = Field(default=256, ge=17, le=65536, description="no chunk is longer")

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

    staging: Size = Field(default=parse_size("64MiB"), ge=2**20, description="device memory for staging")


class Settings(Section):
    """All of it."""

    memory: MemorySettings = MemorySettings()
    chunks: ChunkSettings = ChunkSettings()
    transfer: TransferSettings = TransferSettings()

    @model_validator(mode="after")
    def _page_fits_chunk(self) -> "Settings":
        if self.memory.page_tokens > self.chunks.max_tokens:
            raise ValueError(
                f"memory.page_tokens = {self.memory.page_tokens}; allowed: at most chunks.max_tokens = "
                f"{self.chunks.max_tokens}, since a page must not be larger than a chunk"
            )
        return self


def keys() -> dict[str, Any]:
    """Every dotted key ("memory.capacity") with its field."""
    return {
        f"{section}.{name}": field
        for section, outer in Settings.model_fields.items()
        for name, field in outer.annotation.model_fields.items()  # type: ignore[union-attr]
    }
