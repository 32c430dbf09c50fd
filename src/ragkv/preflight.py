"""Settings, read and checked before a start: by vLLM's plug-in and by the commands, with the same rules."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ragkv.config import Loaded, Settings, check_shared_memory, load
from ragkv.config.settings import DiskSettings, RedisSettings, StoreSettings, format_size
from ragkv.errors import ConfigError
from ragkv.kvstore.backing import backing
from ragkv.kvstore.segment import available_bytes, sweep
from ragkv.kvstore.stores.installed import GROUP, store_names
from ragkv.kvstore.stores.redis_url import parse_location

SHORTEST_TOKEN, LONGEST_TOKEN = 16, 4096  # characters
STOP_SECONDS = 10  # of vLLM's shutdown timeout beside writing down: for running answers, workers and teardown


def read_settings(
    extra: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None, file: Path | None = None
) -> Loaded:
    """As `ragkv.config.load`, with the Redis URL parsed and the store's name looked up too. Raises ConfigError for
    settings that are invalid on every machine with these packages."""
    loaded = load(extra, environ, file)
    if loaded.settings.redis.url is not None:
        parse_location(loaded.settings.redis.url)
    name = loaded.settings.store.name
    if name is not None and name not in (known := store_names()):
        allowed = ", ".join(known) or f"none, since no installed package has an entry point of the group {GROUP}"
        raise ConfigError(
            f"ragkv: store.name = {name!r} (from {loaded.origins['store.name']}): allowed: {allowed}"
        )
    control = loaded.settings.control
    if control.listen is not None and control.token_file is None:
        raise ConfigError(f"ragkv: control.listen = {control.listen}: allowed: together with control.token_file")
    return loaded


def check_room(settings: Settings) -> None:
    """Raises ConfigError where shared memory has no room for the memory tier, after the segments of dead engines
    are removed, or where the memory limit is too small to back it, so that the engine would be killed."""
    sweep()
    check_shared_memory(settings, available_bytes())
    there, want = backing(), settings.memory.capacity
    if there is not None and want > there.bytes:
        raise ConfigError(
            f"ragkv: memory.capacity = {format_size(want)}: allowed: at most what {there.source} leaves, "
            f"{there.bytes >> 20}MiB; with more the engine would be killed"
        )


def read_token(file: Path) -> str:
    """The token in a file. Raises OSError where it cannot be read, ValueError where it is missing or short."""
    with file.expanduser().open(encoding="ascii") as stream:
        token = stream.read(LONGEST_TOKEN).strip()
    if len(token) < SHORTEST_TOKEN or not token.isprintable() or " " in token:
        raise ValueError(f"{file}: allowed: a token of at least {SHORTEST_TOKEN} printable characters")
    return token


def has_lower_tier(settings: Settings) -> bool:
    """Whether there are tiers below memory."""
    return bool(lower_tiers(settings))


def lower_tiers(settings: Settings) -> list[DiskSettings | RedisSettings | StoreSettings]:
    """The settings of the tiers below memory that are on."""
    disk, redis, store = settings.disk, settings.redis, settings.store
    switches = ((disk, disk.path), (redis, redis.url), (store, store.name))
    return [section for section, switch in switches if switch is not None]


def shutdown_seconds(settings: Settings) -> int:
    """The shutdown timeout of vLLM that leaves `placement.flush` for writing down, in whole seconds."""
    return math.ceil(settings.placement.flush) + STOP_SECONDS
