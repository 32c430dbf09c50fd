"""Write docs/configuration.md from the settings model. Run by `make docs`; a test compares."""

import types
import typing
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from ragkv.config import Settings
from ragkv.config.settings import format_size, keys, parse_size

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
SEE = {
    "memory": "[Tiers](tiers.md), [sizing](operations.md#sizing), [policies](policies.md)",
    "device": "[Tiers](tiers.md)",
    "disk": "[Tiers](tiers.md), [policies](policies.md)",
    "redis": "[Redis and Valkey](redis.md)",
    "store": "[A store of your own](tiers.md#a-store-of-your-own)",
    "placement": "[Tuning](tuning.md)",
    "chunks": "[Tuning](tuning.md)",
    "transfer": "[Tuning](tuning.md)",
    "fusion": "[Fusion](fusion.md)",
    "hints": "[Hints](tiers.md#hints)",
    "trace": "[The simulator](simulator.md)",
    "control": "[Roll-out and roll-back](control.md)",
}
HEAD = """# Configuration

<!-- Written by scripts/make_docs.py from config/settings.py: change that, then `make docs`. -->

Settings come from four sources. A later source overrides an earlier one:

1. the defaults below;
2. a YAML file, named by the variable `RAGKV_CONFIG`, or else by `config` in `kv_connector_extra_config`;
3. `kv_connector_extra_config` of vLLM's `--kv-transfer-config`, with the same sections;
4. environment variables: `memory.capacity` is `RAGKV_MEMORY_CAPACITY`.

In YAML every section is a mapping. A key may also be written with its dot. Use one of the two ways for each key:

```yaml
memory:
  capacity: 32GiB
  policy: adaptive
disk.path: /var/cache/ragkv
```

Unknown keys, unknown variables and invalid values prevent the start. One line names each key, its value, where it
was set, and the allowed values. Values that may hold passwords are not shown. To check settings before a start:

    ragkv config check ragkv.yaml
    ragkv config show --config ragkv.yaml

A size is a whole number of bytes, or a number with a unit: `KiB`, `MiB`, `GiB`, `TiB` (powers of 1024), `KB`,
`MB`, `GB`, `TB` (powers of 1000).

Two rules connect keys: `chunks.min_tokens` < `chunks.average_tokens` <= `chunks.max_tokens`, and
`memory.page_tokens` is at most `chunks.max_tokens`.
"""


def page() -> str:
    """The page as Markdown."""
    parts = [HEAD]
    for section, outer in Settings.model_fields.items():
        parts.append(f"## {section}\n\n{(outer.annotation.__doc__ or '').strip()}\n\n{SEE[section]}.\n")
        rows = ["| key, variable | type | default | allowed | |", "|---|---|---|---|---|"]
        rows += [row(key, field) for key, field in keys().items() if key.split(".")[0] == section]
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def row(key: str, field: Any) -> str:
    """One setting's line of its table."""
    kind, allowed = kind_of(key, field)
    default = field.default
    shown = "none" if default is None else f"`{format_size(default) if kind == 'size' else str(default).lower()}`"
    variable = f"RAGKV_{key.replace('.', '_')}".upper()
    return f"| `{key}`<br>`{variable}` | {kind} | {shown} | {allowed} | {field.description} |"


def kind_of(key: str, field: Any) -> tuple[str, str]:
    """What a value is, and which are allowed."""
    kind = field.annotation
    if isinstance(kind, types.UnionType):
        kind = next(each for each in typing.get_args(kind) if each is not type(None))
    if kind is bool:
        return "boolean", "`true`, `false`"
    if typing.get_origin(kind) is typing.Literal:
        return "name", ", ".join(f"`{each}`" for each in typing.get_args(kind))
    if typing.get_origin(kind) is dict:
        return "mapping", text_kind(key)[1]
    if kind is str:
        return text_kind(key)
    size = any(getattr(each, "func", None) is parse_size for each in field.metadata)
    return ("size" if size else "whole number" if kind is int else "number"), limits(field, size)


def text_kind(key: str) -> tuple[str, str]:
    """A text's: what its validator says of a space, which none of them lets through."""
    section, name = key.split(".")
    try:
        Settings.model_validate({section: {name: " "}})
    except ValidationError as error:
        allowed = error.errors()[0]["msg"].partition("allowed: ")[2]
    else:
        return "text", "a URL: [Redis and Valkey](redis.md)" if name == "url" else "the path of a file"
    names = allowed.split(", ")
    if all(each.replace("-", "").replace("_", "").isalnum() for each in names):
        return "name", ", ".join(f"`{each}`" for each in names)
    return "text", allowed


def limits(field: Any, size: bool) -> str:
    """The range of a number, from its constraints."""
    said = []
    for name, words in (("ge", "at least"), ("gt", "above"), ("le", "at most")):
        for each in field.metadata:
            if (value := getattr(each, name, PydanticUndefined)) is not PydanticUndefined:
                said.append(f"{words} {format_size(value) if size and value else value}")
    return ", ".join(said)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
