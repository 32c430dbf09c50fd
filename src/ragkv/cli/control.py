"""`ragkv control`: switch a running engine's reuse off and on, flush, drain, ask for numbers."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ragkv.errors import RagKVError
from ragkv.fetch import fetch_json
from ragkv.options import JsonFlag, one_of, print_json
from ragkv.shown import printable

ACTIONS = ("off", "on", "flush", "drain", "stats")
EPILOG = """Examples:\n
  ragkv control stats --url http://127.0.0.1:8900 --token-file /etc/ragkv/token\n
  ragkv control drain --url http://127.0.0.1:8900 --token-file /etc/ragkv/token --timeout 120\n
Exit status: 1 when the engine does not answer, or a flush has not ended in time."""
SECONDS = 5.0
POLL_SECONDS = 0.2
LONGEST_TOKEN = 4096


def control(
    action: Annotated[
        str, typer.Argument(metavar="ACTION", help=", ".join(ACTIONS), autocompletion=one_of(ACTIONS))
    ],
    url: Annotated[str, typer.Option(help="Where control.listen is.")],
    token_file: Annotated[
        Path, typer.Option(envvar="RAGKV_CONTROL_TOKEN_FILE", help="The file that control.token_file names.")
    ],
    timeout: Annotated[float, typer.Option(min=0, max=3600, help="Seconds that a flush may take.")] = 60.0,
    as_json: JsonFlag = False,
) -> None:
    """Control a running engine. off: load and store nothing; on: load and store again; flush: write all that is
    queued; drain: store nothing more, and write all that is queued; stats: print the engine's numbers."""
    if action not in ACTIONS:
        raise RagKVError(f"ragkv control: ACTION = {action!r}; allowed: {', '.join(ACTIONS)}")
    with token_file.open("rb") as file:
        token = file.read(LONGEST_TOKEN).decode("ascii").strip()
    numbers = ask(url, token, action)
    end = time.monotonic() + timeout
    while action in ("flush", "drain") and numbers.get("flushing") and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
        numbers = ask(url, token, "stats")
    if as_json:
        print_json(numbers)
    else:
        for name, value in numbers.items():
            typer.echo(f"{printable(name)}: {json.dumps(value)}")
    if action in ("flush", "drain") and numbers.get("flushing"):
        raise RagKVError(
            f"{url}: not all is written after {timeout:g} s; an idle engine begins with its next request"
        )


def ask(url: str, token: str, action: str) -> dict[str, Any]:
    """The engine's numbers after an action. Raises AnswerError."""
    method = "GET" if action == "stats" else "POST"
    return fetch_json(f"{url.rstrip('/')}/{action}", method=method, token=token, timeout=SECONDS)
