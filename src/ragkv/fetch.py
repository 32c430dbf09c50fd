"""One HTTP request to a server: its answer is bounded in size and time, and a failure is one line."""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from ragkv.errors import RagKVError

MOST_BYTES = 64 << 20  # of one answer
SHOWN = 300  # characters of a server's complaint


class AnswerError(RagKVError):
    """A server cannot be reached, refuses the request, or answers something else than was asked for."""


def fetch(
    url: str,
    body: Mapping[str, Any] | None = None,
    *,
    method: str | None = None,
    token: str | None = None,
    timeout: float,
) -> bytes:
    """The body of the answer, at most MOST_BYTES. `body` is sent as JSON; `method` is POST with a body and GET
    without one, unless it is given; `token` is a bearer token; `timeout` is in seconds. Raises AnswerError."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    try:
        request = urllib.request.Request(url, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=timeout) as response:
            raw: bytes = response.read(MOST_BYTES + 1)
    except urllib.error.HTTPError as error:
        with error:
            raise AnswerError(f"{url}: {error.code}: {_complaint(error)}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        raise AnswerError(f"{url}: no answer: {text}") from None
    if len(raw) > MOST_BYTES:
        raise AnswerError(f"{url}: the answer has more than {MOST_BYTES} bytes")
    return raw


def fetch_json(url: str, body: Mapping[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """As `fetch`, with the same options, for an answer that is a JSON object."""
    try:
        answer = json.loads(fetch(url, body, **options))
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise AnswerError(f"{url}: the answer is no JSON object")
    return answer


def _complaint(error: urllib.error.HTTPError) -> str:
    """What a server says is wrong, on one line."""
    try:
        text = error.read(MOST_BYTES).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    try:
        text = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = text or error.reason
    return " ".join(str(text).split())[:SHOWN]
