"""`ragkv store`: look into a disk store's folder, check it, and remove values."""

import itertools
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from ragkv.config.settings import rough_size
from ragkv.kvstore.stores.inventory import Inventory, Value
from ragkv.options import JsonFlag, print_json
from ragkv.shown import printable

app = typer.Typer(no_args_is_help=True, help="Look into the folder of the disk tier.")

FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The folder; engines may be using it.")]
NamespaceOption = Annotated[str, typer.Option(help="Only namespaces that begin with these hexadecimal digits.")]
SHORT = 8  # hexadecimal digits of a namespace in a list; a key has twice as many
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@app.command("ls", epilog="Example: ragkv store ls /var/cache/ragkv --limit 10")
def list_values(
    folder: FolderArgument,
    limit: Annotated[int, typer.Option(min=0, help="Rows to show; 0: all.")] = 50,
    namespace: NamespaceOption = "",
    as_json: JsonFlag = False,
) -> None:
    """List values, the last used first, with the first digits of their keys."""
    values = _selected(Inventory(folder), namespace)
    listed = itertools.islice(values, limit or None)
    if as_json:
        print_json([_fields(value) for value in listed])
        return
    table = Table("key", "tokens", "size", "last used", "namespace")
    for value in listed:
        tokens, space = f"bad: {printable(str(value.fault))}", ""
        if value.header:
            header, space = value.header, value.header.namespace.hex()[:SHORT]
            tokens = f"window of {header.shape[0]}" if header.plane else str(header.token_count)
        row = (value.key.hex()[: 2 * SHORT], Text(tokens), rough_size(value.size), _date(value.used), space)
        table.add_row(*row)
    Console().print(table)
    if limit and next(values, None):
        Console().print("There are more; --limit 0 shows all.")


@app.command(epilog="Example: ragkv store show /var/cache/ragkv 3f2a")
def show(
    folder: FolderArgument,
    key: Annotated[str, typer.Argument(help="The first hexadecimal digits of a key, as many as it takes.")],
    as_json: JsonFlag = False,
) -> None:
    """Show the fields of a value's header, without its token ids."""
    inventory = Inventory(folder)
    value = inventory.value(inventory.resolve(key))
    if value is None or value.header is None:
        raise ValueError(f"KEY = {key!r}; {'gone meanwhile' if value is None else f'bad: {value.fault}'}")
    fields = _fields(value)
    if as_json:
        print_json(fields)
        return
    fields |= {name: _date(getattr(value.header, name)) for name in ("created", "expires")}
    fields |= {"used": _date(value.used), "shape": " x ".join(map(str, value.header.shape))}
    fields["open"] = "yes" if value.header.open else "no"
    fields |= {
        name: rough_size(size) for name, size in (("size", value.size), ("kv_bytes", value.header.raw_bytes))
    }
    _print_fields({name: field for name, field in fields.items() if name != "fault"})


@app.command(epilog="Example: ragkv store verify /var/cache/ragkv --quarantine")
def verify(
    folder: FolderArgument,
    quarantine: Annotated[bool, typer.Option("--quarantine", help="Move bad values into a folder aside.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Read and check every byte; exit status 1 where a value is bad."""
    inventory, console = Inventory(folder), Console()
    checked = read_bytes = 0
    bad: list[Value] = []
    for value in track(inventory.values(whole=True), "checking", disable=not console.is_terminal, transient=True):
        checked += 1
        read_bytes += value.size
        if value.fault:
            bad.append(value)
    for value in bad:
        if quarantine:
            inventory.quarantine(value.key, value.fault or "")
        if not as_json:
            console.print(Text(printable(f"{value.key.hex()}: {value.fault}")))
    if as_json:
        faults = {value.key.hex(): value.fault for value in bad}
        print_json({"values": checked, "bytes": read_bytes, "bad": faults, "moved": quarantine})
    else:
        moved = ", moved into quarantine" if quarantine and bad else ""
        console.print(f"{checked} values, {rough_size(read_bytes)}: {len(bad)} bad{moved}")
    if bad:
        raise typer.Exit(1)


@app.command(epilog="Example: ragkv store rm /var/cache/ragkv --older-than 7d --yes")
def rm(
    folder: FolderArgument,
    keys: Annotated[list[str] | None, typer.Argument(help="Keys, by their first hexadecimal digits.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all values, quarantine too.")] = False,
    namespace: NamespaceOption = "",
    older_than: Annotated[str, typer.Option(help="Not used for so long: 30s, 15m, 12h, 7d.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove values; a running engine sees misses from then on."""
    inventory = Inventory(folder)
    if sum((bool(keys), everything, bool(namespace or older_than))) != 1:
        raise ValueError("ragkv store rm: give either KEYs, or --all, or --namespace and --older-than")
    if keys:
        found = (inventory.value(key) for key in {inventory.resolve(key) for key in keys})
        values = [value for value in found if value is not None]
    else:
        before = time.time() - _age(older_than) if older_than else float("inf")
        values = [value for value in _selected(inventory, namespace) if value.used < before]
    bad = inventory.quarantined() if everything else 0
    if (values or bad) and not yes:
        size = rough_size(sum(value.size for value in values))
        more = f", and {bad} in quarantine" if bad else ""
        typer.confirm(f"Remove {len(values)} values, {size}{more}, from {folder}?", abort=True)
    removed = sum(inventory.remove(value.key) for value in values)
    removed += inventory.quarantined(remove=True) if bad else 0
    typer.echo(f"{removed} values removed")


@app.command(epilog="Example: ragkv store stats /var/cache/ragkv --json")
def stats(folder: FolderArgument, as_json: JsonFlag = False) -> None:
    """Sums over the folder."""
    totals = asdict(Inventory(folder).totals())
    if as_json:
        print_json(totals)
        return
    shown = {name: f"{figure:,}" for name, figure in totals.items()}
    _print_fields(
        shown
        | {name: _date(totals[name]) for name in ("oldest", "newest")}
        | {name: rough_size(totals[name]) for name in ("bytes", "window_bytes")}
    )


def _fields(value: Value) -> dict[str, object]:
    """A value as JSON has it: sizes in bytes, times in seconds since the epoch (0: never)."""
    fields: dict[str, object] = {
        "key": value.key.hex(),
        "size": value.size,
        "used": value.used,
        "fault": value.fault,
    }
    header = value.header
    if header is not None:
        fields |= {
            "tokens": header.token_count,
            "plane": header.plane,
            "namespace": header.namespace.hex(),
            "parent": header.parent.hex(),
            "position": header.position,
            "open": header.open,
            "shape": list(header.shape),
            "dtype": header.dtype,
            "created": header.created,
            "expires": header.expires,
            "kv_bytes": header.raw_bytes,
        }
    return fields


def _print_fields(fields: Mapping[str, object]) -> None:
    table = Table("field", "value")
    for name, value in fields.items():
        table.add_row(name, str(value))
    Console().print(table)


def _selected(inventory: Inventory, namespace: str) -> Iterator[Value]:
    """Values of the namespaces asked for; without one, all values, also those whose header cannot be read."""
    if re.fullmatch(r"[0-9a-f]{0,32}", namespace) is None:
        raise ValueError(f"--namespace = {namespace!r}; allowed: up to 32 hexadecimal digits")
    for value in inventory.values():
        if not namespace or (value.header and value.header.namespace.hex().startswith(namespace)):
            yield value


def _age(text: str) -> float:
    """Seconds. ValueError says what is allowed."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if match is None:
        raise ValueError(f"--older-than = {text!r}; allowed: a number with s, m, h or d, such as 7d")
    return float(match[1]) * SECONDS[match[2]]


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else "-"
