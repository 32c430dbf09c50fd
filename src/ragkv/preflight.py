"""Settings, read and judged before anything is started: by vLLM's plug-in and by the commands, in one way."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ragkv.config import Loaded, Settings, check_shared_memory, load
from ragkv.kvstore.segment import available_bytes, sweep
from ragkv.kvstore.stores.redis_url import parse_location


def read_settings(
    extra: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None, file: Path | None = None
) -> Loaded:
    """As `ragkv.config.load`, and the Redis URL is looked at too. ConfigError: they cannot be, on any machine."""
    loaded = load(extra, environ, file)
    if loaded.settings.redis.url is not None:
        parse_location(loaded.settings.redis.url)
    return loaded


def check_room(settings: Settings) -> None:
    """ConfigError: shared memory has no room for these settings, also without what dead engines left there."""
    sweep()
    check_shared_memory(settings, available_bytes())
