"""Redis URLs: where servers are and how to reach them.

    redis://[[user]:password@]host[:6379][/db]             rediss:// for TLS
    unix://[[user]:password@]/path[?db=0]
    redis+sentinel://[[user]:password@]host[:26379],host.../service[/db]    rediss+sentinel://
    redis+cluster://[[user]:password@]host[:6379],host...                   rediss+cluster://

Options of TLS follow as `?ssl_ca_certs=/file&...`, as redis-py names them. What Sentinels themselves ask for is
`sentinel_username`, `sentinel_password`. User, password and path are percent-decoded.
"""

import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote

from ragkv.errors import ConfigError

SCHEMES = ("redis", "rediss", "unix", *(f"redis{s}+{kind}" for s in ("", "s") for kind in ("sentinel", "cluster")))
PORTS = {"single": 6379, "sentinel": 26379, "cluster": 6379}
_HOST = re.compile(r"(\[(?P<six>[0-9A-Fa-f:.%\w]+)\]|(?P<name>[A-Za-z0-9._-]{1,253}))(:(?P<port>[0-9]{1,5}))?")


class Address(NamedTuple):
    """Where a server listens: a host (a name or an IP address) and a port, or a socket's path and 0."""

    host: str
    port: int


@dataclass(frozen=True)
class Location:
    """`kind`: single, sentinel or cluster; `transport`: tcp, tls or unix. `options` and `sentinel_options` are
    redis-py's for a connection. `text`: the URL as it may be shown, without secrets; these are in `secrets`."""

    kind: str
    transport: str
    addresses: tuple[Address, ...]
    service: str
    text: str
    options: Mapping[str, Any] = field(repr=False)
    sentinel_options: Mapping[str, Any] = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)


def parse_location(url: str) -> Location:
    """ConfigError naming what is wrong and what is allowed, and never a password."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in SCHEMES:
        allowed = ", ".join(f"{each}://" for each in SCHEMES)
        raise _fault(f"{scheme}://..." if separator else "...", f"it must begin with one of {allowed}")
    rest, _, query = rest.partition("?")
    if "@" in query:  # what stands before it may be a password: show nothing
        raise _fault(f"{scheme}://...", "in user and password ? is written %3F, and after ? @ is written %40")
    credentials, _, rest = rest.rpartition("@")
    text = f"{scheme}://{rest}"
    options = _credentials(credentials, text)
    base, _, suffix = scheme.partition("+")
    kind = suffix or "single"
    hosts, path = ("", rest) if base == "unix" else _split(rest)
    service = ""
    addresses: tuple[Address, ...] = (Address(unquote(path), 0),)
    if base != "unix":
        service, path = _service(path, text) if kind == "sentinel" else ("", path)
        addresses = _addresses(hosts, PORTS[kind], kind != "single", text)
        options["db"] = _database(path, text)
    elif not path.startswith("/"):
        raise _fault(text, "unix:// takes an absolute path: unix:///run/redis.sock")
    extra, sentinel = _query(query, base, kind, text)
    options |= extra
    if options.get("ssl_cert_reqs") == "none":  # a name that nobody vouches for; older redis-py would refuse
        options["ssl_check_hostname"] = False
    if kind == "cluster" and options.pop("db", 0):
        raise _fault(text, "a cluster has only database 0")
    if kind == "cluster" and "ssl_min_version" in options:  # redis-py would drop it silently
        raise _fault(text, "ssl_min_version is not supported for a cluster; it is TLS 1.2 at least")
    tls = {name: value for name, value in options.items() if name.startswith("ssl_")}
    secrets = [each.get(name) for each in (options, sentinel) for name in ("password", "ssl_password")]
    return Location(
        kind,
        {"redis": "tcp", "rediss": "tls", "unix": "unix"}[base],
        addresses,
        service,
        text,
        options,
        sentinel | tls,
        tuple(filter(None, [*secrets, *(unquote(credentials), credentials)])),
    )


def _fault(text: str, allowed: str) -> ConfigError:
    return ConfigError(f"ragkv: redis.url = {text!r}: {allowed}")


def _split(rest: str) -> tuple[str, str]:
    hosts, _, path = rest.partition("/")
    return hosts, path


def _credentials(text: str, shown: str) -> dict[str, Any]:
    if not text:
        return {}
    user, separator, password = text.partition(":")
    if not separator or not password:
        raise _fault(shown, "before @ stands user:password, or :password")
    found = {"username": unquote(user), "password": unquote(password)}
    return {name: value for name, value in found.items() if value}


def _addresses(hosts: str, port: int, several: bool, text: str) -> tuple[Address, ...]:
    names = hosts.split(",")
    if len(names) > 1 and not several:
        raise _fault(text, "one host only, but with +sentinel or +cluster")
    found = []
    for name in names:
        match = _HOST.fullmatch(name)
        number = int(match["port"] or port) if match else 0
        if match is None or not 0 < number < 65536:
            raise _fault(text, f"{name!r} is not host or host:port, with a port from 1 to 65535")
        found.append(Address(match["six"] or match["name"], number))
    return tuple(found)


def _service(path: str, text: str) -> tuple[str, str]:
    service, _, path = path.partition("/")
    if not service:
        raise _fault(text, "after the Sentinels' hosts stands /service, the name of the master that they watch")
    return unquote(service), path


def _database(path: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{0,5}", path):
        raise _fault(text, f"{path!r} is not a database number, from 0 on")
    return int(path or 0)


def _file(value: str) -> str:
    if not Path(value).is_file():
        raise ValueError("an existing file")
    return value


def _folder(value: str) -> str:
    if not Path(value).is_dir():
        raise ValueError("an existing folder")
    return value


def _choice(**choices: Any) -> Callable[[str], Any]:
    def convert(value: str) -> Any:
        if value.lower() not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return choices[value.lower()]

    return convert


def _number(value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", value):
        raise ValueError("a database number, from 0 on")
    return int(value)


_TLS_OPTIONS: dict[str, Callable[[str], Any]] = {
    "ssl_ca_certs": _file,
    "ssl_ca_path": _folder,
    "ssl_certfile": _file,
    "ssl_keyfile": _file,
    "ssl_password": str,
    "ssl_cert_reqs": _choice(none="none", optional="optional", required="required"),
    "ssl_check_hostname": _choice(true=True, false=False, yes=True, no=False),
    "ssl_min_version": _choice(**{"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}),
}


def _query(query: str, base: str, kind: str, text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options for the servers, and those for the Sentinels."""
    known: dict[str, Callable[[str], Any]] = dict(_TLS_OPTIONS) if base == "rediss" else {}
    known |= {"db": _number} if base == "unix" else {}
    known |= {"sentinel_username": str, "sentinel_password": str} if kind == "sentinel" else {}
    options = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in known:
            raise _fault(text, f"it takes no option {name!r}, only {', '.join(known) or 'none'}")
        try:
            options[name] = known[name](value)
        except ValueError as error:
            shown = "..." if "password" in name else value
            raise _fault(text, f"{name} = {shown!r} is not {error}") from None
    sentinel = {name: options.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    return options, {name: value for name, value in sentinel.items() if value}
