"""Run-time control: a small HTTP server in the scheduler's process, off by default, and on loopback.

vLLM's own endpoints reach a connector only by `/reset_prefix_cache`, which is for development servers; so this one
is ragkv's. Its thread touches nothing of the engine: it sets flags, which the scheduler side heeds at its next
lookup or step, and reads plain numbers. Every request needs the bearer token of `control.token_file`.
"""

import hmac
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from ragkv.config import Settings
from ragkv.connectors.vllm.error_boundary import logger
from ragkv.kvstore.cache import KVCache
from ragkv.preflight import read_token

SECONDS = 5.0  # that a client may keep the server waiting
FLUSH_SECONDS = 60.0  # after which a flush is given up
LOOPBACK = "127.0.0.1"
ACTIONS = ("off", "on", "flush", "drain")


class Control:
    """What an operator wants of an engine, and what is done about it. The server's thread calls `act` and `told`,
    the scheduler side's all else. A flush looks at all of memory, a bounded part of it a step."""

    def __init__(self, cache: KVCache, clock: Callable[[], float] = time.monotonic) -> None:
        self.loads = self.stores = True  # whether anything may be loaded, and stored
        self.flush_began = False  # and has not ended: the engine must go on stepping
        self._cache, self._clock = cache, clock
        self._asked = self._answered = 0  # flushes, by number: one is wanted while they differ
        self._number, self._until = 0, 0.0  # of the flush that began
        self._server: HTTPServer | None = None

    @property
    def flushing(self) -> bool:
        """Whether a flush is wanted that has not ended."""
        return self._asked != self._answered

    def act(self, action: str) -> None:
        """Want one of ACTIONS."""
        if action in ("on", "off"):
            self.loads = self.stores = action == "on"
        if action == "drain":
            self.stores = False
        if action in ("flush", "drain"):
            self._asked += 1

    def heed(self, *, storing: bool) -> None:
        """Begin a flush that is wanted, once nothing is `storing`, and go on with it."""
        if not self.flushing or (storing and not self.flush_began):
            return
        if not self.flush_began:
            self._number, self._until = self._asked, self._clock() + FLUSH_SECONDS
            self.flush_began = True
        if self._cache.flush() or self._clock() > self._until:
            self._cache.end_flush()
            self.flush_began, self._answered = False, self._number

    def told(self) -> dict[str, Any]:
        """What `stats` answers: plain figures, each by itself right."""
        tiers = {
            tier.name: {"queued_bytes": tier.queued, "resting": list(tier.resting)}
            | ({} if tier.index is None else {"values": len(tier.index), "bytes": tier.index.used})
            for tier in self._cache.tiers
        }
        wanted = {"loads": self.loads, "stores": self.stores, "flushing": self.flushing}
        return {**wanted, "chunks": len(self._cache), "tiers": tiers}

    def serve(self, listen: str, token: str) -> None:
        """Answer on a thread, until `close`. OSError: the address cannot be had."""
        host, _, port = listen.rpartition(":")
        self._server = _Server((host.strip("[]") or LOOPBACK, int(port)), Handler)
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


def open_control(settings: Settings, cache: KVCache) -> Control | None:
    """Control as the settings say; None where it is off, or cannot be had, which one line says."""
    listen, file = settings.control.listen, settings.control.token_file
    if listen is None or file is None:
        return None
    control = Control(cache)
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


class Handler(BaseHTTPRequestHandler):
    """One request of the operator's."""

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
