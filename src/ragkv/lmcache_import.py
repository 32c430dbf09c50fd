"""LMCache's YAML read as ours. Every key of the file ends in one of two lists: what was taken over, and into what;
and what was not, and why.

Keys are those of LMCache 0.5 (`lmcache.v1.config`), of its older releases (`local_device`, `max_cache_size`), and
the flags of its multiprocess server, written with `-` or `_`.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from ragkv.config import load
from ragkv.config.settings import format_size, keys
from ragkv.config.sources import hide_password, show_value
from ragkv.config.yaml_files import read_yaml
from ragkv.errors import ConfigError
from ragkv.kvstore.stores.redis_url import parse_location
from ragkv.lmcache_keys import EXTRA, UNKNOWN, reason
from ragkv.shown import printable

GIB = 2**30  # LMCache says GB and means this
POLICIES = {"LRU": "lru", "LFU": "lfu", "FIFO": "lru", "ARC": "arc"}
FLAGS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
SERVICE = "redismaster"  # LMCache's name for a Sentinel's master, where REDIS_SERVICE_NAME is not set


@dataclass(frozen=True, slots=True)
class Taken:
    """A setting of ours, and the keys and values that it was made of."""

    value: Any
    origin: str


@dataclass(frozen=True, slots=True)
class Left:
    """A key that was not taken over, its value as it may be shown, and why."""

    key: str
    value: str
    reason: str


@dataclass
class Import:
    """`taken` by our dotted keys; `left` in the order of the file. Every key of the file is in one of them."""

    taken: dict[str, Taken] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)

    def settings(self) -> dict[str, dict[str, Any]]:
        """What was taken, by section and name."""
        found: dict[str, dict[str, Any]] = {}
        for key in sorted(self.taken, key=list(keys()).index):
            section, name = key.split(".")
            found.setdefault(section, {})[name] = self.taken[key].value
        return found

    def text(self, source: str, *, passwords: bool) -> str:
        """A YAML file of ours, with a comment where each value came from, and the keys that were left."""
        lines = [f"# From LMCache's {_one_line(source)}, by ragkv config import."]
        for section, values in self.settings().items():
            lines.append(f"{section}:")
            for name, value in values.items():
                shown = value if passwords or not isinstance(value, str) else hide_password(value)
                lines.append(f"  {name}: {_scalar(shown)}  # {self.taken[f'{section}.{name}'].origin}")
        if self.left:
            lines += ["", "# Not taken over:"]
            lines += [f"#   {each.key}: {each.value}: {each.reason}" for each in self.left]
        return "".join(f"{printable(line)}\n" for line in lines)


def read(path: Path) -> Import:
    """What LMCache's file at `path` says. ConfigError: it cannot be read, is not LMCache's, or a value in it, or
    what comes of it, is none that can be."""
    data = _mapping(path)
    reader = _Reader(data)
    for name, rule in RULES.items():
        if reader.data.get(name) not in (None, ""):
            rule(reader, name)
    found = reader.finish()
    if not found.taken and all(each.reason == UNKNOWN for each in found.left):
        raise ConfigError(f"ragkv: {path}: no key of LMCache's is in it")
    try:
        load(found.settings(), {})
    except ConfigError as error:
        raise ConfigError(str(error).replace("kv_connector_extra_config", str(path))) from None
    return found


_SECRET = re.compile(r"pass|secret|token|key|auth|credential|connection_string")
_SECRET_NUMBER = re.compile(r"pass|secret|credential")  # tokens are counted too
_PLAIN = re.compile(r"(?!(true|false|yes|no|on|off|null)$)(\d+[KMGT]?i?B|[A-Za-z/][\w/.:@*+,=?&%-]*[\w/])")
GIGABYTES = "a number of GB, from 0 on"


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


class _Reader:
    """The file's values by LMCache's plain names, and what becomes of each."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._keys: dict[str, str] = {}
        self.data: dict[str, Any] = {}
        for key, value in given.items():
            if key == "extra_config" and isinstance(value, dict):
                for name, each in value.items():
                    self._keys[f"{EXTRA}{name}"], self.data[f"{EXTRA}{name}"] = f"{EXTRA}{name}", each
            else:
                name = key if _plain(key) in self.data else _plain(key)
                self._keys[name], self.data[name] = key, value
        self._used: set[str] = set()
        self._reasons: dict[str, str] = {}
        self._found = Import()

    def take(self, key: str, value: Any, name: str, note: str = "") -> None:
        """`name` of LMCache's becomes our `key`, unless another did before."""
        if key in self._found.taken:
            self.leave(name, f"{key} is already set, by {self._found.taken[key].origin}")
            return
        self._used.add(name)
        origin = f"{self._keys[name]}: {_shown(name, self.data[name])}"
        self._found.taken[key] = Taken(value, f"{origin}; {note}" if note else origin)

    def leave(self, name: str, why: str) -> None:
        """`name` is not taken over."""
        self._reasons[name] = why

    def drop(self, name: str, value: Any, why: str) -> None:
        """A part of what was taken of `name` is not."""
        self._found.left.append(Left(self._keys[name], _shown(name, value), why))

    def fault(self, name: str, allowed: str) -> ConfigError:
        shown = show_value(name, self.data[name])
        return ConfigError(f"ragkv: {self._keys[name]} = {shown}; allowed: {allowed}")

    def number(
        self, name: str, allowed: str, *, least: float = 0.0, whole: bool = False, default: float | None = None
    ) -> float:
        value: Any = self.data.get(name, default)
        try:
            found = -1.0 if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            found = -1.0
        if not least <= found < 1e15 or (whole and found != int(found)):
            raise self.fault(name, allowed)
        return found

    def flag(self, name: str) -> bool:
        found = FLAGS.get(str(self.data[name]).strip().lower())
        if found is None:
            raise self.fault(name, "true or false")
        return found

    def string(self, name: str) -> str:
        if not isinstance(self.data[name], str):
            raise self.fault(name, "a text")
        return str(self.data[name]).strip()

    def taken(self, key: str) -> bool:
        """Whether a setting of ours is made already."""
        return key in self._found.taken

    def use(self, name: str) -> Any:
        """A value that another one takes with it."""
        self._used.add(name)
        return self.data.get(name)

    def finish(self) -> Import:
        """With the keys that no rule took."""
        for name, value in self.data.items():
            if name not in self._used:
                why = self._reasons.get(name) or reason(name)
                if value is None or value in ("", [], {}):
                    why = "not set"
                elif value is False and why != UNKNOWN:
                    why = f"off there; {why}"
                self._found.left.append(Left(_one_line(self._keys[name]), _shown(name, value), why))
        return self._found


def _chunks(reader: _Reader, name: str) -> None:
    """LMCache cuts every so many tokens; ours are cut where the text allows, and none is longer than that."""
    size = int(reader.number(name, "a whole number of tokens, above 0", least=1, whole=True))
    least = min(max(16, size // 8), 32768)
    average = min(max(least + 1, size // 2), 65535)
    longest = min(max(average, size), 65536)
    reader.take("chunks.max_tokens", longest, name, "a chunk ends at a paragraph where it can")
    if longest != 256:  # with 256 these are the defaults
        for key, value in (("chunks.min_tokens", least), ("chunks.average_tokens", average)):
            reader.take(key, value, name, "in the proportion of the defaults")


def _size(key: str, note: str) -> Callable[[_Reader, str], None]:
    def rule(reader: _Reader, name: str) -> None:
        size = int(reader.number(name, GIGABYTES) * GIB)
        if size == 0:
            reader.leave(name, f"{key} keeps its default")
        elif key == "disk.capacity" and not reader.taken("disk.path"):
            reader.leave(name, "no folder is named for it")
        else:
            reader.take(key, format_size(size), name, note)

    return rule


def _folder(reader: _Reader, name: str) -> None:
    """The first of LMCache's folders; a folder inside it, so that neither sees the other's files."""
    folders = [each.strip().removeprefix("file://") for each in reader.string(name).split(",") if each.strip()]
    if not folders:
        return
    if name == "local_disk" and not reader.number("max_local_disk_size", GIGABYTES, default=0.0):
        reader.leave(name, "without max_local_disk_size LMCache keeps nothing on disk")
        return
    first = Path(folders[0]).expanduser()
    note = "" if first.is_absolute() else "; seen from where this was imported"
    reader.take("disk.path", str(first.absolute() / "ragkv"), name, f"a folder of its own in it{note}")
    if len(folders) > 1:
        reader.drop(name, ", ".join(folders[1:]), "one folder serves all workers; RAID or LVM can join disks")


def _old_device(reader: _Reader, name: str) -> None:
    """`local_device` of older releases: where `max_cache_size` GB are kept."""
    if reader.data[name] == "cuda":
        reader.leave(name, "memory is always a tier; max_cache_size becomes device.capacity, for hot chunks")
    elif reader.data[name] == "cpu":
        reader.leave(name, "memory is always a tier; memory.capacity says how large")
    else:
        _folder(reader, name)


def _old_size(reader: _Reader, name: str) -> None:
    device = reader.data.get("local_device")
    kept = {"cuda": "device.capacity", "cpu": "memory.capacity", None: "memory.capacity"}.get(
        device, "disk.capacity"
    )
    _size(kept, f"of local_device: {_shown('local_device', device)}")(reader, name)


def _remote(reader: _Reader, name: str) -> None:
    scheme, _, rest = reader.string(name).partition("://")
    note = ""
    if scheme in ("redis", "rediss", "unix"):
        url = f"{scheme}://{rest}"
    elif scheme == "redis-sentinel":
        url = f"redis+sentinel://{rest.rstrip('/')}/{SERVICE}"
        note = f"the master's name is {SERVICE} unless LMCache was told another by REDIS_SERVICE_NAME"
    elif scheme == "redis-cluster":
        url = f"redis+cluster://{rest}"
    elif scheme in ("resp", "valkey"):
        url = _plain_server(reader, scheme, rest)
    else:
        reader.leave(name, "stores are memory, disk (disk.path, disk.shared) and Redis (redis.url)")
        return
    try:
        parse_location(url)
    except ConfigError as error:
        reader.leave(name, str(error).removeprefix("ragkv: "))
        return
    reader.take("redis.url", url, name, note)


def _plain_server(reader: _Reader, scheme: str, rest: str) -> str:
    """A URL of a server whose login and kind stand in `extra_config`."""
    prefix = f"{EXTRA}valkey_" if scheme == "valkey" else EXTRA
    login, base, database = "", "redis", ""
    if reader.data.get(f"{prefix}password") and "@" not in rest:
        names = (quote(str(reader.use(f"{prefix}{name}") or ""), safe="") for name in ("username", "password"))
        login = f"{':'.join(names)}@"
    if scheme == "valkey":
        cluster = reader.use(f"{prefix}mode") == "cluster"
        base += "s" if FLAGS.get(str(reader.use(f"{EXTRA}tls_enable")).lower()) else ""
        base += "+cluster" if cluster else ""
        if reader.data.get(f"{prefix}database") is not None and not cluster:
            database = f"/{reader.use(f'{prefix}database')}"
    return f"{base}://{login}{rest}{database}"


def _ttl(reader: _Reader, name: str) -> None:
    if FLAGS.get(str(reader.use(f"{EXTRA}valkey_enable_ttl")).lower()):
        seconds = reader.number(name, "a whole number of seconds, above 0", least=1, whole=True)
        reader.take("redis.ttl", int(seconds), name, "counted from the last use")


def _policy(reader: _Reader, name: str) -> None:
    policy = POLICIES.get(reader.string(name).upper())
    if policy is not None:
        reader.take("memory.policy", policy, name)
        if name == "cache_policy" and reader.taken("disk.path"):
            reader.take("disk.policy", policy, name)


def _blending(reader: _Reader, name: str) -> None:
    reader.take("fusion.enabled", reader.flag(name), name)


def _engine_type(reader: _Reader, name: str) -> None:
    if reader.data[name] == "blend":
        reader.take("fusion.enabled", True, name)
    else:
        reader.leave(name, "exact reuse is what ragkv always does")


def _ratio(reader: _Reader, name: str) -> None:
    value = reader.data[name]
    ratios = value if isinstance(value, list) else str(value).strip("[] ").split(",")
    try:
        ratio = float(ratios[0])
    except (IndexError, TypeError, ValueError):
        raise reader.fault(name, "numbers from 0 to 1") from None
    reader.take("fusion.recompute_ratio", ratio, name)
    if len(ratios) > 1:
        reader.drop(name, ratios[1:], "one ratio holds for all layers")


def _least(reader: _Reader, name: str) -> None:
    least = reader.number(name, "a whole number of tokens, above 0", least=1, whole=True)
    reader.take("fusion.min_tokens", int(least), name)


def _serde(reader: _Reader, name: str) -> None:
    plain = str(reader.data[name]).lower() in ("naive", "torch", "safetensor", "fast", "none")
    reader.leave(name, "KV is stored as it is" + ("" if plain else ": exact, and not compressed"))


def _wait(reader: _Reader, name: str) -> None:
    seconds = reader.number(name, "a number of seconds, from 0 on")
    note = "at most 60" if seconds > 60 else "a request waits so long for lower tiers"
    reader.take("placement.deadline", min(seconds, 60.0), name, note)


# In this order: of two keys that mean the same, the first that the file has.
RULES: dict[str, Callable[[_Reader, str], None]] = {
    "chunk_size": _chunks,
    "max_local_cpu_size": _size("memory.capacity", "LMCache reserves it for every worker, ragkv once for all"),
    "l1_size_gb": _size("memory.capacity", ""),
    "local_disk": _folder,
    "max_local_disk_size": _size("disk.capacity", "LMCache takes it for every worker, ragkv once for all"),
    "local_device": _old_device,
    "max_cache_size": _old_size,
    "max_local_cache_size": _old_size,
    "remote_url": _remote,
    f"{EXTRA}valkey_ttl_sec": _ttl,
    "remote_serde": _serde,
    "cache_policy": _policy,
    "eviction_policy": _policy,
    "enable_blending": _blending,
    "engine_type": _engine_type,
    "blend_recompute_ratios": _ratio,
    "blend_recompute_ratio": _ratio,
    "blend_min_tokens": _least,
    "blocking_timeout_secs": _wait,
}


def _plain(key: str) -> str:
    """A key or flag by LMCache's plain name: `--chunk-size`, `lmcache.mp.host`."""
    return re.sub(r"^lmcache\.(mp\.)?", "", key.strip().lstrip("-").lower()).replace("-", "_")


def _one_line(text: str) -> str:
    return hide_password(" ".join(text.split()))


def _shown(name: str, value: Any) -> str:
    """A value as lists and comments show it, on one line and without secrets."""
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(each, dict) for each in value)):
        return "…"
    if isinstance(value, str):
        shown = "***" if _SECRET.search(name) else _one_line(value)
        return shown if len(shown) <= 120 else f"{shown[:117]}..."
    if isinstance(value, list):
        return json.dumps([_one_line(each) if isinstance(each, str) else each for each in value], default=str)
    if not isinstance(value, bool) and value is not None and _SECRET_NUMBER.search(name):
        return "***"
    return json.dumps(value, default=str)


def _scalar(value: Any) -> str:
    """A value as YAML: plain where it is a size, a name, a path or a URL of plain letters."""
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return value
    return json.dumps(value, ensure_ascii=False)
