"""ragkv among other connectors, inside vLLM's MultiConnector.

MultiConnector makes a configuration of its own for each child, anew in every process, from the entries of its
`connectors`. What is set on a child's configuration is lost, so it is set on the whole one, or in the entry.
"""

from collections.abc import Iterator
from typing import Any

from ragkv.connectors.vllm import NAME
from ragkv.errors import ConfigError

MULTI = "MultiConnector"
EXTRA = "kv_connector_extra_config"
ROOM_CHECKED = "_ragkv_room_checked"  # in the extra configuration of our entry, as a mark
TOLD_LATE = "_ragkv_told_late"


def our_entry(kv_transfer_config: Any) -> dict[str, Any] | None:
    """The entry of ragkv among a MultiConnector's children, at any depth. ConfigError: there are two."""
    if kv_transfer_config.kv_connector != MULTI:
        return None
    ours = [each for each in _entries(kv_transfer_config.kv_connector_extra_config) if _is_ours(each)]
    if len(ours) > 1:
        raise ConfigError(f"{MULTI}: connectors names {NAME} {len(ours)} times; allowed: once")
    return ours[0] if ours else None


def note_rivals(kv_transfer_config: Any, base: type, find_class: Any) -> None:
    """Mark our entry where another child has a word of its own for the handshake: MultiConnector passes on only
    the first that is said, to all of them, so ours is told with a step's report instead."""
    from vllm.config import KVTransferConfig

    entry = our_entry(kv_transfer_config)
    if entry is None or TOLD_LATE in entry[EXTRA]:
        return
    others = [each for each in _entries(kv_transfer_config.kv_connector_extra_config) if not _is_ours(each)]
    classes = [find_class(KVTransferConfig(**each)) for each in others if each.get("kv_connector") != MULTI]
    entry[EXTRA][TOLD_LATE] = any(_speaks(each, base) for each in classes)


def told_late(kv_transfer_config: Any) -> bool:
    """Whether the workers' word comes with a step's report, and not with vLLM's handshake at start."""
    extra = kv_transfer_config.kv_connector_extra_config
    return bool(isinstance(extra, dict) and extra.get(TOLD_LATE, False))


def among_others(kv_transfer_config: Any) -> bool:
    """Whether ragkv is a child of a MultiConnector."""
    extra = kv_transfer_config.kv_connector_extra_config
    return isinstance(extra, dict) and TOLD_LATE in extra


def split_marks(extra: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """An extra configuration without our marks, and the marks."""
    marks = {key: value for key, value in (extra or {}).items() if key in (ROOM_CHECKED, TOLD_LATE)}
    return {key: value for key, value in (extra or {}).items() if key not in marks}, marks


def _entries(extra: Any) -> Iterator[dict[str, Any]]:
    entries = extra.get("connectors") if isinstance(extra, dict) else None
    for each in entries if isinstance(entries, list) else ():
        if isinstance(each, dict):
            if not isinstance(each.get(EXTRA), dict):
                each[EXTRA] = {}  # where marks go
            yield each
            if each.get("kv_connector") == MULTI:
                yield from _entries(each[EXTRA])


def _is_ours(entry: dict[str, Any]) -> bool:
    return entry.get("kv_connector") == NAME


def _speaks(connector: Any, base: type) -> bool:
    return getattr(connector, "get_handshake_metadata", None) is not getattr(base, "get_handshake_metadata", None)
