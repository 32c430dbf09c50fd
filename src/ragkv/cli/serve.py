"""`ragkv serve`: vLLM's server with ragkv's connector, its settings checked first."""

import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import typer
import yaml

from ragkv.config import Settings
from ragkv.config.sources import FILE_VARIABLE
from ragkv.config.yaml_files import read_yaml
from ragkv.errors import RagKVError
from ragkv.options import ConfigOption, settings_file
from ragkv.preflight import check_room, has_lower_tier, read_settings, shutdown_seconds

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}
EPILOG = """Examples:\n
  ragkv serve Qwen/Qwen3-8B\n
  ragkv serve Qwen/Qwen3-8B --config ragkv.yaml --port 8001 --max-model-len 32768\n
  ragkv serve Qwen/Qwen3-8B --config ragkv.yaml --dry-run\n
  ragkv serve Qwen/Qwen3-8B --config ragkv.yaml -- --config vllm.yaml\n
Exit status: 1 when the settings cannot be, 2 for wrong usage, else vLLM's own."""
OURS = {
    "--kv-transfer-config": "ragkv serve makes it from its own settings (--config, RAGKV_…)",
    "--kv-offloading-size": "it would put vLLM's offloading in ragkv's place",
}
SHUTDOWN_OPTION = "--shutdown-timeout"
DETAILS_OPTION = "--enable-prompt-tokens-details"
ENGINE_OPTIONS = "engine/arg_utils.py"  # names options as "--an-option"
SERVER_OPTIONS = (
    "entrypoints/launchers/cli_args.py",
    "entrypoints/openai/cli_args.py",
)  # an_option; new and old vLLM
SHORTEST = len("--kv-")  # a shorter abbreviation is ambiguous, and vLLM refuses it
PLUGINS = "VLLM_PLUGINS"
PLUGIN = "ragkv"


@dataclass(frozen=True)
class Launch:
    """What is to be run: `command`, with `environment` as the whole environment."""

    command: tuple[str, ...]
    environment: Mapping[str, str]

    def shown(self) -> str:
        """The command as a shell takes it, from an environment like this process's own."""
        dropped = [name for name in os.environ if name not in self.environment]
        return shlex.join(
            [*(["env", *(part for name in dropped for part in ("-u", name))] if dropped else []), *self.command]
        )


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's name or folder, as vLLM takes it.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[VLLM_ARGUMENTS]", help="What vLLM's server takes.")
    ] = None,
    config: ConfigOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command and run nothing.")] = False,
) -> None:
    """Serve MODEL by vLLM with ragkv. Options that are not ragkv's go to vLLM; after -- all of them do."""
    launch = prepare(model, arguments or [], config, os.environ)
    if dry_run:
        typer.echo(launch.shown())
        return
    start(launch)


def prepare(model: str, arguments: Sequence[str], file: Path | None, environ: Mapping[str, str]) -> Launch:
    """What to run for MODEL. RagKVError: the settings cannot be, here, or contradict the arguments.

    Settings reach vLLM as the file's absolute path: every process of an engine finds it, in whatever folder it
    runs, and passwords stay out of the list of processes. The file of `file` is stronger than RAGKV_CONFIG, and
    so that variable goes; the other RAGKV_ variables stay, and are stronger than the file.
    """
    if model.startswith("-"):
        raise RagKVError(f"ragkv serve: MODEL = {model!r}; allowed: the model first, then vLLM's options")
    for argument, (option, why) in itertools.product(arguments, OURS.items()):
        if _names(argument, option):
            raise RagKVError(f"ragkv serve: {argument.partition('=')[0]} = …; allowed: not here, since {why}")
    named = settings_file(file, environ)
    settings = _check(named, environ)
    transfer: dict[str, object] = {"kv_connector": "RagKVConnector", "kv_role": "kv_both"}
    if named is not None:
        transfer["kv_connector_extra_config"] = {"config": str(named.expanduser().absolute())}
    ours = ("--kv-transfer-config", json.dumps(transfer), *_options(settings, arguments))
    command = (*_server(model), *ours, *arguments)
    return Launch(command, {name: value for name, value in environ.items() if name != FILE_VARIABLE})


def start(launch: Launch) -> NoReturn:
    """Become the server, so that signals are its own, and its exit status ours."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(launch.command[0], launch.command, dict(launch.environment))


def _check(file: Path | None, environ: Mapping[str, str]) -> Settings:
    settings = read_settings(environ=environ, file=file).settings
    check_room(settings)
    plugins = environ.get(PLUGINS)
    if plugins is not None and PLUGIN not in plugins.split(","):
        raise RagKVError(f"ragkv serve: {PLUGINS} = {plugins!r}; allowed: a list with {PLUGIN!r} in it, or unset")
    if importlib.util.find_spec("vllm") is None:
        raise RagKVError(
            "ragkv serve: vLLM is not installed in this environment; allowed: one with it, such as by "
            "pip install 'ragkv[vllm]'"
        )
    return settings


def _options(settings: Settings, arguments: Sequence[str]) -> Iterator[str]:
    """vLLM's options that ragkv wants set, except those that the user sets, either way, or this vLLM lacks.

    Without a shutdown timeout, SIGTERM kills the engine before it has written what is queued for a lower tier.
    """
    wanted: dict[str, tuple[str, ...]] = {DETAILS_OPTION: ()}
    if has_lower_tier(settings) and settings.placement.flush > 0:
        wanted[SHUTDOWN_OPTION] = (str(shutdown_seconds(settings)),)
    in_files = set().union(*(_keys(file) for file in _vllm_files(arguments)))
    for option, values in wanted.items():
        name = option.removeprefix("--")
        given = any(_names(argument, option) for argument in arguments)
        if not given and not in_files & {name, f"no-{name}"} and _vllm_knows(option):
            yield from (option, *values)


def _names(argument: str, option: str) -> bool:
    """Whether an argument is a long option of vLLM: vLLM takes it also with underscores, abbreviated, negated, and
    with dots for the parts of a JSON value."""
    name = argument.partition("=")[0].partition(".")[0].replace("_", "-").replace("--no-", "--", 1)
    return len(name) > SHORTEST and option.startswith(name)


def _vllm_knows(option: str) -> bool:
    """Whether the installed vLLM has an option, from its source: to import it takes seconds."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return False
    field = option.removeprefix("--").replace("-", "_")
    for source, text in ((ENGINE_OPTIONS, f'"{option}"'), *((source, field) for source in SERVER_OPTIONS)):
        with contextlib.suppress(OSError):
            if text in (Path(spec.origin).parent / source).read_text("utf-8"):
                return True
    return False


def _vllm_files(arguments: Sequence[str]) -> list[str]:
    """vLLM's own files of options (--config FILE, --config=FILE), which the command line would overrule."""
    split = [after for name, after in itertools.pairwise(arguments) if name == "--config"]
    return split + [name.partition("=")[2] for name in arguments if name.startswith("--config=")]


def _keys(file: str) -> set[str]:
    """The options that a file of vLLM's sets; none where it cannot be read, which vLLM will say."""
    try:
        found = read_yaml(Path(file))
    except (OSError, ValueError, yaml.YAMLError):
        return set()
    return {str(key).replace("_", "-") for key in found} if isinstance(found, dict) else set()


def _server(model: str) -> tuple[str, ...]:
    """`vllm serve`, or where that does not start (it asks for a distribution named vllm) the server's module."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model
    return sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model
