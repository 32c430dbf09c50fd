"""Where settings come from, weakest first: defaults, a YAML file, `kv_connector_extra_config`, environment.

The file is named by `config` in `kv_connector_extra_config` or by RAGKV_CONFIG, which is stronger.
"""

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ragkv.config.settings import MOST_BYTES, Settings, format_size, keys, parse_size, rough_size
from ragkv.config.yaml_files import read_yaml
from ragkv.errors import ConfigError
from ragkv.shown import printable

PREFIX = "RAGKV_"
FILE_VARIABLE = "RAGKV_CONFIG"
FILE_KEY = "config"
SHOWN = 200  # characters of a faulty value
SHOWN_FAULTS = 20


@dataclass(frozen=True)
class Loaded:
    """Validated settings, and the source of every dotted key that was set."""

    settings: Settings
    origins: Mapping[str, str]

    def rows(self) -> list[tuple[str, str, str]]:
        """(key, value, origin) of every setting, in the order of the model."""
        rows = []
        for key in keys():
            section, name = key.split(".")
            value = getattr(getattr(self.settings, section), name)
            text = format_size(value) if key in _SIZES else str(hide_secrets(value))
            rows.append((key, printable(text), printable(self.origins.get(key, "default"))))
        return rows


def hide_password(text: str) -> str:
    """A text, without what stands in it as a URL's password, or under a name of one."""
    return _NAMED_PASSWORD.sub(r"\1***", _URL_PASSWORD.sub(r"\1***@", text))


def hide_secrets(value: object) -> object:
    """A setting's value to be shown: without passwords, and of options for others only the names."""
    if isinstance(value, dict):
        return dict.fromkeys(value, "***")
    return hide_password(value) if isinstance(value, str) else value


def cache_folder() -> Path:
    """Where ragkv keeps what can be made again: in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "ragkv"


def show_value(name: str, value: object) -> str:
    """A faulty value as errors show it, without passwords."""
    if "pass" in name.lower() or name.lower().endswith("options"):  # which other packages know
        return "***"
    try:
        text = repr(hide_password(value)) if isinstance(value, str) else hide_password(repr(value))
    except (ValueError, RecursionError):  # a number of thousands of digits, or very deep
        text = f"<{type(value).__name__}>"
    return printable(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")


def _named_value(name: str, value: object) -> str:
    """How an error shows a name that is no setting, with its value. Of a mapping only the name: it may be the
    options of a store under a misspelt name, and hold passwords."""
    return name if _holds_mapping(value) else f"{name} = {show_value(name, value)}"


def _holds_mapping(value: object) -> bool:
    """Whether a value is a mapping, a list that may hold one, or a text that begins like either in JSON."""
    if isinstance(value, list | tuple):
        return any(isinstance(each, Mapping | list | tuple) for each in value)
    return isinstance(value, Mapping) or (isinstance(value, str) and value.lstrip().startswith(("{", "[")))


_URL_PASSWORD = re.compile(r"(://(?:[^:\s]*:)?).*@", re.DOTALL)  # up to the last @: a password may hold others
_NAMED_PASSWORD = re.compile(r"""(pass\w*['"]?\s*[:=]\s*)(?:'[^']*'|"[^"]*")?[^&\s]*""", re.IGNORECASE)
_SIZES = {
    key for key, field in keys().items() if any(getattr(m, "func", None) is parse_size for m in field.metadata)
}


def load(
    extra: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> Loaded:
    """Settings from all sources. ConfigError: one text with every invalid key, its value, and what is allowed.

    `extra`: vLLM's `kv_connector_extra_config`. `environ`: the variables (default: those of the process). `file`:
    a YAML file, instead of the one that `extra` or a variable names.
    """
    environ = os.environ if environ is None else environ
    extra = dict(extra or {})
    named = extra.pop(FILE_KEY, None)
    path = file or environ.get(FILE_VARIABLE) or named
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if path is not None:
        layers.append((str(path), read_file(path)))
    layers.append(("kv_connector_extra_config", extra))
    variables, faults = _from_environment(environ)
    layers.append(("environment", variables))

    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in layers:
        for section, values in _nested(layer, origin, faults).items():
            if not isinstance(values, Mapping):
                merged[section], origins[str(section)] = values, origin
                continue
            into = merged.setdefault(section, {})
            if not isinstance(into, dict):
                continue  # a weaker source put no mapping there: that fault is told below
            for name, value in values.items():
                into[name] = value
                origins[f"{section}.{name}"] = _variable(section, name) if origin == "environment" else origin
    try:
        settings = Settings.model_validate(merged)
    except ValidationError as error:
        found = error.errors()
        faults += [_explain(each, origins) for each in found[:SHOWN_FAULTS]]
        faults += [f"and {len(found) - SHOWN_FAULTS} more"] if len(found) > SHOWN_FAULTS else []
    if faults:
        raise ConfigError("ragkv: " + "; ".join(faults))
    return Loaded(settings, origins)


def read_file(path: object) -> Mapping[str, Any]:
    """The mapping in a YAML file. ConfigError: not readable, not YAML, or not a mapping of sections."""
    if not isinstance(path, str | Path):
        raise ConfigError(f"ragkv: {_named_value(FILE_KEY, path)}; allowed: the path of a YAML file")
    try:
        data = read_yaml(Path(path))
    except OSError as error:
        raise ConfigError(f"ragkv: configuration file {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # not UTF-8, too large, or a date that is none
        raise ConfigError(
            f"ragkv: configuration file {path} is not YAML: {hide_password(' '.join(str(error).split()))}"
        ) from None
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(
            f"ragkv: configuration file {path}: allowed: sections {', '.join(Settings.model_fields)}"
        )
    return data


def _nested(layer: Mapping[str, Any], origin: str, faults: list[str]) -> dict[str, Any]:
    """A source with its dotted keys (`disk.path: ...`) put into their sections. A key given in both ways is a
    fault; one that names no setting stays where it is, and is told as unknown."""
    nested = {key: dict(value) if isinstance(value, Mapping) else value for key, value in layer.items()}
    for key in [key for key in nested if key in keys()]:
        value = nested.pop(key)
        section, name = key.split(".")
        into = nested.setdefault(section, {})
        if not isinstance(into, dict):
            continue  # no mapping: that fault is told of the section
        if name in into:
            faults.append(f"{key} (from {origin}): given twice; allowed: either {key} or {name} under {section}")
        into.setdefault(name, value)
    return nested


def _meant(key: str, known: Iterable[str]) -> str:
    """ "did you mean ...? ", where something that is known looks alike; else nothing."""
    known = list(known)
    lower = {each.lower(): each for each in known}
    found = [each for each in known if each.lower().rpartition(".")[2] == key.lower()]
    close = difflib.get_close_matches(key.lower(), lower, n=1, cutoff=0.7)
    found = found or [lower[each] for each in close]
    return f"did you mean {' or '.join(found)}? " if found else ""


def _from_environment(environ: Mapping[str, str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """RAGKV_SECTION_NAME variables, and what is wrong with those that name no setting."""
    known = {_variable(*key.split(".")): key.split(".") for key in keys()}
    found: dict[str, dict[str, str]] = {}
    faults: list[str] = []
    for variable, value in sorted(environ.items()):
        if not variable.startswith(PREFIX) or variable == FILE_VARIABLE:
            continue
        if variable not in known:
            allowed = [FILE_VARIABLE, *known]
            shown, meant = _named_value(variable, value), _meant(variable, allowed)
            faults.append(f"environment variable {shown} names no setting; {meant}allowed: {', '.join(allowed)}")
            continue
        section, name = known[variable]
        found.setdefault(section, {})[name] = value
    return found, faults


def _variable(section: str, name: str) -> str:
    return f"{PREFIX}{section}_{name}".upper()


def _explain(error: Any, origins: Mapping[str, str]) -> str:
    key = printable(".".join(str(part)[:SHOWN] for part in error["loc"]))
    text = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        section = key.partition(".")[0]
        allowed = [each for each in keys() if each.startswith(f"{section}.")] or list(keys())
        meant = _meant(key, allowed if section in Settings.model_fields else [*Settings.model_fields, *allowed])
        text = f"unknown key; {meant}allowed: {', '.join(allowed)}"
    elif key in _SIZES and (limits := _limits(error)):
        text = f"allowed: {limits}"
    elif not text.startswith("allowed") and "allowed:" not in text:
        text = f"allowed: {text.removeprefix('Input should be ')}"
        if error["type"] == "model_type":
            text = f"allowed: a mapping with {', '.join(k for k in keys() if k.startswith(key + '.'))}"
    if not key:
        return text
    sources = dict.fromkeys(o for k, o in origins.items() if k == key or k.startswith(f"{key}."))
    origin = f" (from {', '.join(sources)})" if sources else ""
    given = error["input"]
    if key not in keys():
        return f"{_named_value(key, given)}{origin}: {text}"
    whole = key in _SIZES and type(given) is int and 0 < given <= MOST_BYTES and given % 1024 == 0
    return f"{key} = {format_size(given) if whole else show_value(key, given)}{origin}: {text}"


def _limits(error: Any) -> str:
    """The bound that a size is beyond, as people write sizes; nothing where that is not what is wrong."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    found = [
        f"{words[name]} {format_size(value) if value else 0}"
        for name, value in error.get("ctx", {}).items()
        if name in words
    ]
    return " and ".join(found)


def check_shared_memory(settings: Settings, free: int) -> None:
    """ConfigError where the memory tier is larger than the `free` bytes that shared memory has."""
    if settings.memory.capacity > free:
        raise ConfigError(
            f"ragkv: memory.capacity = {format_size(settings.memory.capacity)}: allowed: at most what shared "
            f"memory has free, {rough_size(free)} (containers: more with --ipc=host or --shm-size)"
        )
