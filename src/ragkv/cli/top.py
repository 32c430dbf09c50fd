"""`ragkv top`: a live view of a server."""

import contextlib
import json
import os
import select
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from ragkv.cli.top_figures import Frame, make_frame
from ragkv.cli.top_view import render, trouble
from ragkv.fetch import AnswerError
from ragkv.options import JsonFlag
from ragkv.scrape import Snapshot, scrape

EPILOG = """Examples:\n
  ragkv top --url http://localhost:8000\n
  ragkv top --url http://localhost:8000 --once --json\n
q or Ctrl-C ends. Exit status: 1 when the server has no ragkv, or with --once does not answer."""
WINDOW = 60.0


def top(
    url: Annotated[str, typer.Option(help="The server.")] = "http://localhost:8000",
    interval: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds between two looks.")] = 2.0,
    window: Annotated[float, typer.Option(min=0.1, max=86400, help="Seconds that rates are taken over.")] = WINDOW,
    once: Annotated[
        bool, typer.Option("--once", help="Print the figures since the server's start, and end.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Hit rates, tiers, turns of conversations and the busiest documents of a server, live."""
    watch = Watch(url, window)
    console = Console()
    with contextlib.suppress(KeyboardInterrupt):
        if once and as_json:
            typer.echo(json.dumps(asdict(watch.look())))
        elif once:
            console.print(render(watch.look(), console.width))
        elif as_json:
            _follow(watch, interval)
        else:
            _show(watch, interval, console)


class Watch:
    """Looks at a server again and again; rates are over the last `window` seconds of what it saw."""

    def __init__(self, url: str, window: float) -> None:
        self.url, self._window = url, window
        self._seen: deque[Snapshot] = deque()

    def look(self) -> Frame:
        """The figures now. AnswerError: no answer; then rates begin anew. RagKVError: a server without ragkv."""
        try:
            seen = scrape(self.url)
        except AnswerError:
            self._seen.clear()
            raise
        while len(self._seen) > 1 and seen.taken - self._seen[1].taken >= self._window:
            self._seen.popleft()
        frame = make_frame(self.url, seen, self._seen[0] if self._seen else None)
        self._seen.append(seen)
        return frame


def _follow(watch: Watch, interval: float) -> None:
    """A line of JSON for each look; one that failed says so in `error`."""
    while True:
        try:
            found = asdict(watch.look())
        except AnswerError as error:
            found = {"url": watch.url, "error": str(error)}
        typer.echo(json.dumps(found))
        sys.stdout.flush()
        time.sleep(interval)


def _show(watch: Watch, interval: float, console: Console) -> None:
    with _keys() as pressed, Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while True:
            try:
                live.update(render(watch.look(), console.width), refresh=True)
            except AnswerError as error:
                live.update(trouble(watch.url, str(error)), refresh=True)
            if pressed.within(interval):
                return


class Keys:
    """What is typed, where somebody can type."""

    def __init__(self, terminal: bool) -> None:
        self._terminal = terminal

    def within(self, seconds: float) -> bool:
        """Wait so long, or until q is typed; whether it was."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if not self._terminal:
                time.sleep(left)
            elif select.select([sys.stdin], [], [], left)[0]:
                typed = os.read(sys.stdin.fileno(), 64)  # all that waits: what Python buffers, select does not see
                if not typed or b"q" in typed.lower():
                    return True
        return False


@contextlib.contextmanager
def _keys() -> Iterator[Keys]:
    """Keys one by one, without Enter; the terminal is as it was afterwards."""
    if sys.stdin is None or not sys.stdin.isatty():
        yield Keys(False)
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield Keys(True)
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
