"""The commands `ragkv observe …`: a folder with Prometheus and Grafana, and whether a server suits it."""

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Watch servers with Prometheus and Grafana.")


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
    from ragkv import observe

    wanted = observe.files(target or [observe.DEFAULT_TARGET], gpu_target or [], price)
    written = observe.write(folder, wanted, force=force)
    where = shlex.quote(str(folder))
    typer.echo(f"{folder}: {len(wanted)} files, {len(written)} of them written. Next:")
    for server in target or [observe.DEFAULT_TARGET]:
        typer.echo(f"  ragkv observe check --url http://{server}")
    typer.echo(f"  docker compose -f {where}/compose.yaml up -d   # http://localhost:3000 and :9090")
    typer.echo(f"or, with a Prometheus of your own:\n  prometheus --config.file={where}/prometheus.yml")


@app.command(epilog="Example: ragkv observe check --url http://localhost:8000")
def check(
    url: Annotated[str, typer.Option(help="A vLLM server with ragkv.")] = "http://localhost:8000",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Name the metrics that dashboard and rules ask for and a server lacks; exit status 1 if there are any."""
    from ragkv import observe
    from ragkv.scrape import scrape

    needed = observe.needed()
    missing = observe.missing(scrape(url), needed)
    if as_json:
        typer.echo(json.dumps({"needed": sorted(needed), "missing": {name: needed[name] for name in missing}}))
    else:
        for name in missing:
            typer.echo(f"{name}: missing; asked for by {', '.join(needed[name])}")
        typer.echo(f"{url}: {len(needed) - len(missing)} of {len(needed)} metrics")
    if missing:
        raise typer.Exit(1)
