"""An OpenAI server that answers as vLLM does: by chunks, the role first, then the tokens, the usage and [DONE]."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

ANSWER, REFUSE, BREAK, SILENT, ERROR, HANG = "answer", "refuse", "break", "silent", "error", "hang"


class FakeOpenAI:
    """Use as `async with`. `behave`: what to do with a request, by its payload; `requests`: the payloads so far;
    `keys`: what came with them.

    "refuse" answers with status 400, "break" closes the connection after two tokens, "silent" leaves out the
    usage, "error" ends the answer with vLLM's error chunk, "hang" sends nothing more after the headers.
    `together`: requests are answered so many at a time, and wait for one another.
    """

    def __init__(
        self, behave: Callable[[dict[str, Any]], str] = lambda payload: ANSWER, together: int = 1
    ) -> None:
        self.behave = behave
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.in_flight = self.most = 0
        self._over = asyncio.Event()
        self._company = asyncio.Barrier(together)
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._complete)
        self._server = TestServer(app)

    @property
    def url(self) -> str:
        return str(self._server.make_url("")).rstrip("/")

    async def __aenter__(self):
        await self._server.start_server()
        return self

    async def __aexit__(self, *_):
        self._over.set()
        await self._server.close()

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        payload = await request.json()
        self.requests.append(payload)
        self.keys.append(request.headers.get("Authorization"))
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            await self._company.wait()
            return await self._answer(request, payload, self.behave(payload))
        finally:
            self.in_flight -= 1

    async def _answer(self, request: web.Request, payload: dict[str, Any], behaviour: str) -> web.StreamResponse:
        if behaviour == REFUSE:
            return web.json_response({"error": {"message": "no"}}, status=400)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if behaviour == HANG:
            await self._over.wait()
        tokens = payload["max_completion_tokens"]
        deltas = [{"role": "assistant", "content": ""}, *({"content": f" {n}"} for n in range(tokens))]
        for delta in deltas if behaviour in (ANSWER, SILENT) else deltas[:3]:
            await _send(response, {"choices": [{"index": 0, "delta": delta}]})
        if behaviour == BREAK:
            assert request.transport is not None
            request.transport.close()
            return response
        if behaviour == ERROR:
            await _send(response, {"error": {"message": "the engine died", "code": 500}})
        elif behaviour == ANSWER and payload["stream_options"]["include_usage"]:
            prompt = sum(len(message["content"].split()) for message in payload["messages"])
            await _send(response, {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": tokens}})
        await response.write(b"data: [DONE]\n\n")
        return response


async def _send(response: web.StreamResponse, data: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps(data)}\n\n".encode())
