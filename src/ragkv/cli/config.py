"""`ragkv config`: look at settings, and take LMCache's over."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ragkv.checks import examine_settings
from ragkv.cli import lmcache
from ragkv.cli.doctor import show as show_findings
from ragkv.config import load
from ragkv.config.sources import FILE_VARIABLE, PREFIX, hide_password, hide_secrets
from ragkv.errors import RagKVError
from ragkv.options import ConfigOption, JsonFlag, print_json, settings_file
from ragkv.shown import printable

app = typer.Typer(no_args_is_help=True, help="Look at settings, or take LMCache's over.")


@app.command()
def check(
    file: Annotated[Path | None, typer.Argument(help="A YAML file of settings; or --config.")] = None,
    config: ConfigOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Say whether settings hold, on this machine; exit status 1 where they do not.

    Example: ragkv config check ragkv.yaml
    """
    named = settings_file(_one_file(file, config))
    findings = examine_settings(named, os.environ)
    failed = [each for each in findings if each.status == "fail"]
    if as_json:
        print_json(
            {
                "file": named and str(named),
                "good": not failed,
                "error": "; ".join(f"{each.check}: {each.said}" for each in failed) or None,
                "variables": sorted({name for name in os.environ if name.startswith(PREFIX)} - {FILE_VARIABLE}),
                "findings": [asdict(each) for each in findings],
            }
        )
    else:
        show_findings(findings)
    if failed:
        raise typer.Exit(1)


@app.command()
def show(
    config: ConfigOption = None,
    file: Annotated[Path | None, typer.Option(hidden=True, help="The older name of --config.")] = None,
    extra: Annotated[str, typer.Option(help="kv_connector_extra_config, as JSON.")] = "{}",
    as_json: JsonFlag = False,
) -> None:
    """Every setting's value, and where it came from. In JSON sizes are bytes.

    Example: ragkv config show --extra '{"memory": {"capacity": "32GiB"}}'
    """
    loaded = load(_mapping(extra), file=_one_file(file, config))
    if as_json:
        values = loaded.settings.model_dump()
        shown = {}
        for key, _, origin in loaded.rows():
            section, name = key.split(".")
            shown[key] = {"value": hide_secrets(values[section][name]), "from": origin}
        print_json(shown)
        return
    table = Table("setting", "value", "from")
    for row in loaded.rows():
        table.add_row(*map(Text, row))
    Console().print(table)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="LMCache's YAML file.")],
    output: Annotated[Path | None, typer.Option(help="Write the settings to this new file.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Take settings over from LMCache's YAML; on stderr, the keys that were not taken over.

    Passwords in URLs are kept in the file that --output names (mode 0600), and shown nowhere.

    Example: ragkv config import lmcache.yaml --output ragkv.yaml
    """
    found = lmcache.read(file)
    if output is not None:
        _write(output, found.text(file.name, passwords=True))
    if as_json:
        settings = {
            key: {"value": hide_secrets(value), "from": found.origins[key]}
            for key, value in found.settings.items()
        }
        print_json({"settings": settings, "left": found.left, "output": output and str(output)})
        return
    shown = found.text(file.name, passwords=False)
    if output is None:
        typer.echo(shown, nl=False)
        if shown != found.text(file.name, passwords=True):
            typer.echo("redis.url is shown without its password; --output FILE keeps it", err=True)
    else:
        typer.echo(printable(f"{output}: {len(found.settings)} settings; next: ragkv config check {output}"))
    for key in found.left:
        typer.echo(printable(f"not taken over: {key}"), err=True)


def _one_file(file: Path | None, config: Path | None) -> Path | None:
    if file is not None and config is not None:
        raise RagKVError(f"ragkv: --config = {config} beside {file}; allowed: one file of settings")
    return file or config


def _write(path: Path, text: str) -> None:
    """A new file that only its owner may read."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise RagKVError(f"ragkv: --output = {path}; allowed: a file that is not there yet") from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)


def _mapping(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise RagKVError(f"ragkv: --extra = {hide_password(text)!r}; allowed: a JSON object")
    return value
