"""LMCache's YAML read as settings of ragkv. Every key of the file is taken over or named as left.

Keys are those of LMCache 0.5 (`lmcache.v1.config`), of its older releases (`local_device`, `max_cache_size`), and
the flags of its multiprocess server, written with `-` or `_`. docs/lmcache.md says why a key has no counterpart.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from pydantic import TypeAdapter, ValidationError

from ragkv.config import load
from ragkv.config.settings import format_size, keys
from ragkv.config.sources import hide_password, show_value
from ragkv.config.yaml_files import read_yaml
from ragkv.errors import ConfigError
from ragkv.kvstore.stores.redis_url import parse_location
from ragkv.shown import printable

GIB = 2**30  # LMCache says GB and means this
POLICIES = {"LRU": "lru", "LFU": "lfu", "FIFO": "lru", "ARC": "arc"}
SCHEMES = {"redis-sentinel": "redis+sentinel", "redis-cluster": "redis+cluster"}  # others keep their name
SENTINEL_SERVICE = "redismaster"  # LMCache's default name of a Sentinel's master


@dataclass
class Import:
    """`settings` by our dotted keys; `origins`: the key of LMCache's that each was made of; `left`: the keys that
    were not taken over, in the order of the file. No value of a left key is kept, so that none can be shown."""

    settings: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def sections(self) -> dict[str, dict[str, Any]]:
        """The settings as a file has them: by section and name, in the order of the reference."""
        found: dict[str, dict[str, Any]] = {}
        for key in filter(self.settings.__contains__, keys()):
            section, name = key.split(".")
            found.setdefault(section, {})[name] = self.settings[key]
        return found

    def text(self, source: str, *, passwords: bool) -> str:
        """A YAML file of ours, and in comments the keys that each setting came from and those that were left."""
        body = yaml.safe_dump(self.sections(), sort_keys=False, allow_unicode=True, width=1000)
        lines = [f"# From LMCache's {' '.join(source.split())}, by ragkv config import.", *body.splitlines()]
        lines += [f"# {key} comes from {self.origins[key]}" for key in self.settings]
        lines += [f"# not taken over: {key}" for key in self.left]
        return "".join(f"{printable(line if passwords else hide_password(line))}\n" for line in lines)


def read(path: Path) -> Import:
    """What LMCache's file at `path` says. ConfigError: it cannot be read, holds none of LMCache's keys, or a value
    that LMCache or ragkv does not allow."""
    given = _mapping(path)
    data = {_plain(key): value for key, value in reversed(given.items())}  # of two spellings the first counts
    found, taken = Import(), set()
    for name, rule in RULES.items():
        if data.get(name) in (None, "", [], {}):
            continue
        try:
            made = rule(data[name], data)
        except (TypeError, ValueError) as error:
            shown = show_value(name, data[name])
            raise ConfigError(f"ragkv: {name} = {shown}; allowed: {error}") from None
        for key, value in made.items():
            if key not in found.settings:  # of two keys with one meaning the first rule's counts
                found.settings[key], found.origins[key] = value, name
                taken.add(name)
    if not taken:
        raise ConfigError(f"ragkv: {path}: no key in it has a counterpart in ragkv")
    spelled: dict[str, str] = {}
    for key in given:
        name, shown = _plain(key), " ".join(key.split())
        if name == "extra_config":
            found.left.append(f"{shown}: all but what a Redis server needs")
        elif spelled.setdefault(name, key) != key or name not in taken:
            found.left.append(shown)
        elif name in PARTS and "," in str(given[key]):
            found.left.append(f"{shown}: {PARTS[name]}")
    try:
        load(found.sections(), {})
        if "redis.url" in found.settings:
            parse_location(found.settings["redis.url"])
    except ConfigError as error:
        raise ConfigError(str(error).replace("kv_connector_extra_config", str(path))) from None
    return found


def _mapping(path: Path) -> dict[str, Any]:
    try:
        data = read_yaml(path)
    except OSError as error:
        raise ConfigError(f"ragkv: {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"ragkv: {path} is not YAML: {hide_password(' '.join(str(error).split()))}") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"ragkv: {path}; allowed: a YAML file with LMCache's keys, such as chunk_size")
    return data


def _plain(key: str) -> str:
    """The name of a key or flag: `--chunk-size` and `lmcache.mp.chunk_size` are `chunk_size`."""
    return re.sub(r"^lmcache\.(mp\.)?", "", key.strip().lstrip("-").lower()).replace("-", "_")


def _number(value: Any, allowed: str, least: float = 0.0) -> float:
    """ValueError(`allowed`): not a number from `least` on."""
    try:
        number = -1.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not least <= number < 1e15:
        raise ValueError(allowed)
    return number


def _tokens(value: Any) -> int:
    allowed = "a whole number of tokens, above 0"
    number = _number(value, allowed, 1)
    if number != int(number):
        raise ValueError(allowed)
    return int(number)


def _flag(value: Any) -> bool:
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        raise ValueError("true or false") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text")
    return value.strip()


Rule = Callable[[Any, Mapping[str, Any]], dict[str, Any]]  # a value and the whole file -> settings of ours


def _chunks(value: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """LMCache cuts every so many tokens. ragkv cuts where the text allows, at that length at the latest."""
    size = _tokens(value)
    least = min(max(16, size // 8), 32768)
    average = min(max(least + 1, size // 2), 65535)
    longest = min(max(average, size), 65536)
    rest = {} if longest == 256 else {"chunks.min_tokens": least, "chunks.average_tokens": average}
    return {"chunks.max_tokens": longest, **rest}


def _capacity(key: str, value: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    size = int(_number(value, "a number of GB, from 0 on") * GIB)
    return {key: format_size(size)} if size else {}


def _disk(folders: Any) -> dict[str, Any]:
    """A folder inside the first of LMCache's, so that neither program touches the other's files."""
    named = [each.strip().removeprefix("file://") for each in _text(folders).split(",") if each.strip()]
    return {"disk.path": str(Path(named[0]).expanduser().absolute() / "ragkv")} if named else {}


def _local_disk(value: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """Without a size LMCache keeps nothing on disk."""
    size = _capacity("disk.capacity", data.get("max_local_disk_size") or 0, data)
    return _disk(value) if size else {}


def _disk_size(value: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    size = _capacity("disk.capacity", value, data)
    return size if data.get("local_disk") else {}


def _old_size(value: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """`max_cache_size` of older releases; `local_device` says of what: cuda, cpu, or a folder's file://."""
    device = str(data.get("local_device") or "cpu")
    key = {"cuda": "device.capacity", "cpu": "memory.capacity"}.get(device, "disk.capacity")
    return _capacity(key, value, data)


def _old_device(value: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    return {} if value in ("cuda", "cpu") else _disk(value)


def _redis(value: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    scheme, _, rest = _text(value).partition("://")
    if scheme in ("redis", "rediss", "unix", "redis-cluster"):
        return {"redis.url": f"{SCHEMES.get(scheme, scheme)}://{rest}"}
    if scheme == "redis-sentinel":
        return {"redis.url": f"{SCHEMES[scheme]}://{rest.rstrip('/')}/{SENTINEL_SERVICE}"}
    if scheme in ("resp", "valkey"):
        return {"redis.url": _redis_with_login(scheme, rest, _extra(data))}
    return {}


def _extra(data: Mapping[str, Any]) -> Mapping[str, Any]:
    found = data.get("extra_config") or {}
    if not isinstance(found, dict):
        raise ValueError("with it, extra_config holds a mapping")
    return found


def _ttl(value: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    extra = _extra(data)
    if not extra.get("valkey_enable_ttl") or not _flag(extra["valkey_enable_ttl"]):
        return {}
    return {"redis.ttl": int(_number(extra.get("valkey_ttl_sec"), "with valkey_ttl_sec of 1 and more", 1))}


def _redis_with_login(scheme: str, rest: str, extra: Mapping[str, Any]) -> str:
    """The URL of a server whose login and kind stand in `extra_config`."""
    prefix = "valkey_" if scheme == "valkey" else ""
    user, password = (extra.get(f"{prefix}{name}") or "" for name in ("username", "password"))
    login = f"{quote(str(user), safe='')}:{quote(str(password), safe='')}@" if password and "@" not in rest else ""
    if scheme == "resp":
        return f"redis://{login}{rest}"
    base = "rediss" if extra.get("tls_enable") and _flag(extra["tls_enable"]) else "redis"
    if extra.get("valkey_mode") == "cluster":
        return f"{base}+cluster://{login}{rest}"
    return f"{base}://{login}{rest}/{extra.get('valkey_database') or 0}"


def _policy(value: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    policy = POLICIES.get(_text(value).upper())
    where = ["memory.policy", *(["disk.policy"] if _local_disk(data.get("local_disk") or "", data) else [])]
    return dict.fromkeys(where, policy) if policy else {}


def _ratio(value: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """Of ratios by layer the first."""
    ratios = value if isinstance(value, list) else str(value).strip("[] ").split(",")
    return {"fusion.recompute_ratio": _number(ratios[0], "numbers from 0 to 1")}


RULES: dict[str, Rule] = {
    "chunk_size": _chunks,
    "max_local_cpu_size": partial(_capacity, "memory.capacity"),
    "l1_size_gb": partial(_capacity, "memory.capacity"),
    "local_disk": _local_disk,
    "max_local_disk_size": _disk_size,
    "local_device": _old_device,
    "max_cache_size": _old_size,
    "max_local_cache_size": _old_size,
    "remote_url": _redis,
    "extra_config": _ttl,
    "cache_policy": _policy,
    "eviction_policy": _policy,
    "enable_blending": lambda value, data: {"fusion.enabled": _flag(value)},
    "engine_type": lambda value, data: {"fusion.enabled": True} if value == "blend" else {},
    "blend_recompute_ratios": _ratio,
    "blend_recompute_ratio": _ratio,
    "blend_min_tokens": lambda value, data: {"fusion.min_tokens": _tokens(value)},
    "blocking_timeout_secs": lambda value, data: {
        "placement.deadline": min(_number(value, "a number of seconds, from 0 on"), 60.0)
    },
}
PARTS = {"local_disk": "all folders but the first", "blend_recompute_ratios": "all ratios but the first"}
