"""`ragkv observe`: a folder with Prometheus and Grafana, and whether a server has every metric they ask for.

The files lie in `ragkv.config`, in `observe/`; what is written differs from them in the targets and the price.
"""

import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from ragkv import config
from ragkv.errors import RagKVError
from ragkv.options import JsonFlag, print_json
from ragkv.scrape import Snapshot, scrape

SHIPPED = Path(config.__file__).parent / "observe"
DASHBOARD, RULES = "dashboard.json", "rules.yml"
TARGETS, GPU_TARGETS = "targets.yml", "gpu_targets.yml"
DEFAULT_TARGET = "localhost:8000"
DEFAULT_PRICE = 1.0
GPU_PREFIX = "DCGM_"  # what only an exporter beside a GPU has
app = typer.Typer(no_args_is_help=True, help="Watch servers with Prometheus and Grafana.")

_TARGET = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")
_METRIC = re.compile(r"(?:ragkv_|vllm:|http_|DCGM_)\w+")  # `ragkv:` begins what our rules record
_PARTS = re.compile(r"_(bucket|sum|count)$")  # of a histogram


@app.command(epilog="Example: ragkv observe up watch --target gpu1:8000 --target gpu2:8000 --price 0.50")
def up(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder; it is made.")],
    target: Annotated[
        list[str] | None, typer.Option(metavar="HOST:PORT", help="A vLLM server; localhost:8000 if none is given.")
    ] = None,
    gpu_target: Annotated[
        list[str] | None, typer.Option(metavar="HOST:PORT", help="An exporter of NVIDIA's DCGM.")
    ] = None,
    price: Annotated[float, typer.Option(help="Of a million prompt tokens; the dashboard can change it.")] = 1.0,
    force: Annotated[bool, typer.Option("--force", help="Replace files that differ.")] = False,
) -> None:
    """Write Prometheus' configuration, alert rules, a Grafana dashboard, and a compose file that runs both."""
    wanted = files(target or [DEFAULT_TARGET], gpu_target or [], price)
    written = write(folder, wanted, force=force)
    where = shlex.quote(str(folder))
    typer.echo(f"{folder}: {len(wanted)} files, {len(written)} of them written. Next:")
    for server in target or [DEFAULT_TARGET]:
        typer.echo(f"  ragkv observe check --url http://{server}")
    typer.echo(f"  docker compose -f {where}/compose.yaml up -d   # http://localhost:3000 and :9090")
    typer.echo(f"or, with a Prometheus of your own:\n  prometheus --config.file={where}/prometheus.yml")


@app.command(epilog="Example: ragkv observe check --url http://localhost:8000")
def check(
    url: Annotated[str, typer.Option(help="A vLLM server with ragkv.")] = "http://localhost:8000",
    as_json: JsonFlag = False,
) -> None:
    """Name the metrics that dashboard and rules ask for and a server lacks; exit status 1 if there are any."""
    asked = needed()
    lacking = missing(scrape(url), asked)
    if as_json:
        print_json({"needed": sorted(asked), "missing": {name: asked[name] for name in lacking}})
    else:
        for name in lacking:
            typer.echo(f"{name}: missing; asked for by {', '.join(asked[name])}")
        typer.echo(f"{url}: {len(asked) - len(lacking)} of {len(asked)} metrics")
    if lacking:
        raise typer.Exit(1)


@dataclass(frozen=True)
class Panel:
    """A panel of the dashboard: its row, its title, and its queries."""

    row: str
    title: str
    queries: tuple[str, ...]


def shipped() -> dict[str, str]:
    """All files of the folder, by their paths in it, as they come with ragkv."""
    found = (file for file in SHIPPED.rglob("*") if file.is_file())
    return {str(file.relative_to(SHIPPED)): file.read_text(encoding="utf-8") for file in found}


def files(
    targets: Sequence[str] = (DEFAULT_TARGET,), gpu_targets: Sequence[str] = (), price: float = DEFAULT_PRICE
) -> dict[str, str]:
    """The same for these servers and DCGM exporters (HOST:PORT each) and this price of a million prompt tokens.
    RagKVError: a target or the price cannot be."""
    if not 0 <= price < math.inf:
        raise RagKVError(f"ragkv: --price = {price}; allowed: a number from 0 on")
    found = shipped()
    return {
        **found,
        TARGETS: _target_list("--target", targets),
        GPU_TARGETS: _target_list("--gpu-target", gpu_targets),
        DASHBOARD: _priced(found[DASHBOARD], price),
    }


def write(folder: Path, wanted: Mapping[str, str], *, force: bool = False) -> list[Path]:
    """Write files into a folder, which is made; returns the paths of new and changed files. Raises RagKVError, and
    writes nothing, where files exist with another content and `force` is not set."""
    new = {name: text for name, text in wanted.items() if _read(folder / name) != text}
    differing = [name for name in sorted(new) if (folder / name).exists()]
    if differing and not force:
        raise RagKVError(f"ragkv: {folder}: {', '.join(differing)}: there, and different; --force replaces them")
    for name, text in new.items():
        path = folder / name
        made = [each for each in (path.parent, *path.parent.parents) if not each.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        for each in made:  # a folder that was there keeps its mode
            each.chmod(0o755)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o644)  # containers read it under another user
    return [folder / name for name in sorted(new)]


def panels(model: Mapping[str, Any]) -> list[Panel]:
    """Of a dashboard in Grafana's JSON model, closed rows too."""
    found = []
    row = ""
    for each in model["panels"]:
        row = each["title"] if each["type"] == "row" else row
        for panel in each["panels"] if each["type"] == "row" else [each]:
            found.append(Panel(row, panel["title"], tuple(target["expr"] for target in panel["targets"])))
    return found


def needed() -> dict[str, list[str]]:
    """The metrics that dashboard and rules ask of a server, each with the panels and rules that ask for it. Those
    of GPU exporters are left out."""
    wanted = shipped()
    asking = [
        (f"panel {panel.row} / {panel.title}", query)
        for panel in panels(json.loads(wanted[DASHBOARD]))
        for query in panel.queries
    ]
    for group in yaml.safe_load(wanted[RULES])["groups"]:
        for rule in group["rules"]:
            kind = "alert" if "alert" in rule else "record"
            asking.append((f"{kind} {rule[kind]}", rule["expr"]))
    found: dict[str, list[str]] = {}
    for who, expression in asking:
        for name in metrics_in(expression):
            if not name.startswith(GPU_PREFIX) and who not in found.setdefault(name, []):
                found[name].append(who)
    return found


def metrics_in(text: str) -> set[str]:
    """The metrics that a query, or any text, names. Parts of a histogram count as the histogram."""
    return {_PARTS.sub("", name) for name in _METRIC.findall(text)}


def missing(snapshot: Snapshot, names: Iterable[str]) -> list[str]:
    """Which of `names` a server lacks; what it declares is there, with or without values."""
    return sorted(
        name for name in names if not snapshot.knows(name) and not snapshot.knows(name.removesuffix("_total"))
    )


def _priced(dashboard: str, price: float) -> str:
    """The dashboard with another default of its variable `price`, written like the file that ships."""
    model = json.loads(dashboard)
    (variable,) = (each for each in model["templating"]["list"] if each["name"] == "price")
    value = {"text": f"{price:g}", "value": f"{price:g}"}
    variable.update(query=value["value"], current=value, options=[value])
    return json.dumps(model, indent=2, ensure_ascii=False) + "\n"


def _target_list(option: str, targets: Sequence[str]) -> str:
    for target in targets:
        match = _TARGET.fullmatch(target)
        if match is None or not 0 < int(match[2]) < 65536:
            raise RagKVError(f"ragkv: {option} = {target!r}; allowed: HOST:PORT")
    return f"- targets: {json.dumps(list(targets))}\n" if targets else "[]\n"


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
