"""The command `ragkv control`: switch a running engine's reuse off and on, flush, drain, ask for numbers."""

import json
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any

import typer

from ragkv import completion
from ragkv.errors import RagKVError
from ragkv.shown import printable

ACTIONS = ("off", "on", "flush", "drain", "stats")
EPILOG = """Examples:\n
  ragkv control stats --url http://127.0.0.1:8900 --token-file /etc/ragkv/token\n
  ragkv control drain --url http://127.0.0.1:8900 --token-file /etc/ragkv/token --timeout 120\n
Exit status: 1 when the engine does not answer, or a flush has not ended in time."""
SECONDS = 5.0
POLL_SECONDS = 0.2
MOST_BYTES = 1 << 20  # of an answer
LONGEST_TOKEN = 4096


def control(
    action: Annotated[
        str, typer.Argument(metavar="ACTION", help=", ".join(ACTIONS), autocompletion=completion.one_of(ACTIONS))
    ],
    url: Annotated[str, typer.Option(help="Where control.listen is.")],
    token_file: Annotated[
        Path, typer.Option(envvar="RAGKV_CONTROL_TOKEN_FILE", help="The file that control.token_file names.")
    ],
    timeout: Annotated[float, typer.Option(min=0, max=3600, help="Seconds that a flush may take.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Control a running engine. off: nothing is loaded or stored; on; flush: all that waits is written; drain:
    nothing more is stored, and all is written; stats."""
    if action not in ACTIONS:
        raise RagKVError(f"ragkv control: ACTION = {action!r}; allowed: {', '.join(ACTIONS)}")
    with token_file.open("rb") as file:
        token = file.read(LONGEST_TOKEN).decode("ascii").strip()
    told = ask(url, token, action)
    end = time.monotonic() + timeout
    while action in ("flush", "drain") and told.get("flushing") and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
        told = ask(url, token, "stats")
    if as_json:
        typer.echo(json.dumps(told, indent=2))
    else:
        for name, value in told.items():
            typer.echo(f"{printable(name)}: {json.dumps(value)}")
    if action in ("flush", "drain") and told.get("flushing"):
        raise RagKVError(
            f"{url}: not all is written after {timeout:g} s; an idle engine begins with its next request"
        )


def ask(url: str, token: str, action: str) -> dict[str, Any]:
    """The engine's answer. RagKVError: there is none, or it refuses."""
    where = f"{url.rstrip('/')}/{action}"
    method = "GET" if action == "stats" else "POST"
    try:
        request = urllib.request.Request(where, method=method, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            told = json.loads(response.read(MOST_BYTES))
    except urllib.error.HTTPError as error:
        with error:
            raise RagKVError(f"{where}: {error.code}: {error.read(1000).decode(errors='replace')}") from None
    except (OSError, HTTPException, ValueError, RecursionError) as error:
        raise RagKVError(f"{where}: {getattr(error, 'reason', error)}") from None
    if not isinstance(told, dict):
        raise RagKVError(f"{where}: the answer is no JSON object")
    return told
