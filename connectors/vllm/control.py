"""Run-time control: a small HTTP server in the scheduler's process, off by default, and on loopback.

vLLM's own endpoints reach a connector only by `/reset_prefix_cache`, which is for development servers; so this one
is ragkv's. Its thread touches nothing of the engine: it sets flags, which the scheduler side heeds at its next
lookup or step, and reads plain numbers. Every request needs the bearer token of `control.token_file`.
"""

import hmac
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from ragkv.config import Settings
from ragkv.connectors.vllm.error_boundary import logger
from ragkv.preflight import read_token

SECONDS = 5.0  # that a client may keep the server waiting
LOOPBACK = "127.0.0.1"
ACTIONS = ("off", "on", "flush", "drain")


class Control:
    """What an operator wants of an engine. The server's thread sets it, the scheduler side heeds it.

    `loads`, `stores`: whether anything may be loaded, and stored. `asked`, `answered`: flushes, by number: one is
    under way while they differ.
    """

    def __init__(self) -> None:
        self.loads = self.stores = True
        self.asked = self.answered = 0
        self.numbers: Callable[[], dict[str, Any]] = dict  # the scheduler side's, read by the server's thread
        self._server: HTTPServer | None = None

    @property
    def flushing(self) -> bool:
        """Whether a flush is wanted that has not ended."""
        return self.asked != self.answered

    def act(self, action: str) -> None:
        """Want one of ACTIONS."""
        if action in ("on", "off"):
            self.loads = self.stores = action == "on"
        if action == "drain":
            self.stores = False
        if action in ("flush", "drain"):
            self.asked += 1

    def told(self) -> dict[str, Any]:
        """What `stats` answers."""
        return {"loads": self.loads, "stores": self.stores, "flushing": self.flushing, **self.numbers()}

    def serve(self, listen: str, token: str) -> None:
        """Answer on a thread, until `close`. OSError: the address cannot be had."""
        host, _, port = listen.rpartition(":")
        self._server = _Server((host.strip("[]") or LOOPBACK, int(port)), _Handler)
        self._server.control, self._server.token = self, token
        threading.Thread(target=self._server.serve_forever, name="ragkv-control", daemon=True).start()

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._server is not None
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Answer no more."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


def open_control(settings: Settings) -> Control | None:
    """Control as the settings say; None where it is off, or cannot be had, which one line says."""
    listen, file = settings.control.listen, settings.control.token_file
    if listen is None or file is None:
        return None
    control = Control()
    try:
        control.serve(listen, read_token(Path(file)))
    except (OSError, ValueError, OverflowError, RuntimeError) as error:
        logger.warning("ragkv: control.listen = %s: %s; the engine runs without control", listen, error)
        return None
    logger.info("ragkv: control at %s, port %d", listen, control.port)
    return control


class _Server(HTTPServer):
    control: Control
    token: str

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or was too slow: not worth a line."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = SECONDS

    def do_GET(self) -> None:
        self._answer(self.path == "/stats", None)

    def do_POST(self) -> None:
        action = self.path.removeprefix("/")
        self._answer(action in ACTIONS, action)

    def _answer(self, known: bool, action: str | None) -> None:
        given = self.headers.get("Authorization", "").encode("utf-8", "replace")
        if not hmac.compare_digest(given, f"Bearer {self.server.token}".encode()):
            self._send(401, {"error": "allowed: the bearer token of control.token_file"})
        elif not known:
            self._send(404, {"error": f"allowed: GET /stats; POST /{', /'.join(ACTIONS)}"})
        else:
            if action is not None:
                self.server.control.act(action)
                logger.info("ragkv: control: %s", action)
            self._send(200, self.server.control.told())

    def _send(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Not every request is worth a line."""
