"""`ragkv config`: look at settings, and take them over from LMCache."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ragkv.errors import RagKVError

if TYPE_CHECKING:
    from ragkv.checks import Finding

app = typer.Typer(no_args_is_help=True, help="Look at settings, or take LMCache's over.")

ConfigOption = Annotated[Path | None, typer.Option(help="A YAML file of settings; else RAGKV_CONFIG's.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


@app.command()
def check(
    file: Annotated[Path | None, typer.Argument(help="A YAML file of settings; or --config.")] = None,
    config: ConfigOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Say whether settings hold, on this machine; exit status 1 where they do not.

    Example: ragkv config check ragkv.yaml
    """
    from ragkv.config.sources import FILE_VARIABLE, PREFIX
    from ragkv.shown import printable

    named = _one_file(file, config) or (Path(os.environ[FILE_VARIABLE]) if os.environ.get(FILE_VARIABLE) else None)
    variables = sorted(name for name in os.environ if name.startswith(PREFIX) and name != FILE_VARIABLE)
    try:
        findings = _look(named)
    except RagKVError as error:
        if not as_json:
            raise
        _print_json({"file": named and str(named), "good": False, "error": str(error), "variables": variables})
        raise typer.Exit(1) from None
    failed = [each for each in findings if each.status == "fail"]
    if as_json:
        error_text = "; ".join(f"{each.check}: {each.said}" for each in failed) or None
        told = [asdict(each) for each in findings]
        shown = {"file": named and str(named), "good": not failed, "error": error_text, "variables": variables}
        _print_json({**shown, "findings": told})
    else:
        if variables:
            typer.echo(printable(f"variables, stronger than a file: {', '.join(variables)}"))
        for each in findings:
            if each.status != "ok":
                typer.echo(printable(f"{each.check}: {each.said}; {each.todo}"), err=each.status == "fail")
        warned = ", with warnings" if any(each.status == "warn" for each in findings) else ""
        place = printable(str(named or "defaults and variables"))
        typer.echo(f"{place}: {'does not hold here' if failed else f'good{warned}'}")
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
    from ragkv.config import load

    loaded = load(_mapping(extra), file=_one_file(file, config))
    if as_json:
        values = loaded.settings.model_dump()
        origins = {key: origin for key, _, origin in loaded.rows()}
        _print_json(
            {key: {"value": values[key.split(".")[0]][key.split(".")[1]], "from": origins[key]} for key in origins}
        )
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
    from ragkv.lmcache_import import read
    from ragkv.shown import printable

    found = read(file)
    if output is not None:
        _write(output, found.text(file.name, passwords=True))
    if as_json:
        settings = {key: {"value": value, "from": found.origins[key]} for key, value in found.settings.items()}
        _print_json({"settings": settings, "left": found.left, "output": output and str(output)})
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


def _look(file: Path | None) -> "list[Finding]":
    """What this machine has for the settings. ConfigError: they cannot be, or their memory is not to be had."""
    from ragkv.checks import check_disk, check_files, check_memory, check_policies, check_redis
    from ragkv.preflight import check_room, read_settings

    settings = read_settings(environ=os.environ, file=file).settings
    check_room(settings)
    others = [*check_redis(settings), *check_files(settings), *check_policies(settings)]
    return [check_memory(settings), *check_disk(settings, 0), *others]


def _write(path: Path, text: str) -> None:
    """A new file that only its owner may read."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise RagKVError(f"ragkv: --output = {path}; allowed: a file that is not there yet") from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)


def _mapping(text: str) -> dict[str, object]:
    from ragkv.config.sources import hide_password

    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise RagKVError(f"ragkv: --extra = {hide_password(text)!r}; allowed: a JSON object")
    return value


def _print_json(value: dict[str, Any]) -> None:
    """JSON on stdout, with no password in it."""
    from ragkv.config.sources import hide_password

    typer.echo(json.dumps(_hidden(value, hide_password), indent=2))


def _hidden(value: Any, hide: Any) -> Any:
    if isinstance(value, dict):
        return {key: _hidden(each, hide) for key, each in value.items()}
    if isinstance(value, list):
        return [_hidden(each, hide) for each in value]
    return hide(value) if isinstance(value, str) else value
