"""Plays sessions against an OpenAI server, and notes how long each request took.

The request itself is vLLM's own benchmark client: the time to first token ends with the first chunk of the answer,
which vLLM sends with its first token.
"""

import asyncio
import functools
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ragkv.benchmarks.serve_workload import Session, Shape, Turn
from ragkv.errors import RagKVError

TIMEOUT = 600.0
KEY_VARIABLE = "VLLM_API_KEY"
KEPT_SECONDS = 2.0  # a connection, idle: less than servers keep theirs (uvicorn: 5), so that none closes under us


@dataclass(frozen=True)
class Reply:
    """What came of a request: seconds since it was sent, and tokens as the server counts them."""

    ttft_s: float | None = None
    latency_s: float | None = None
    output_tokens: int = 0
    prompt_tokens: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class Sample:
    """One request as it went. `turn`: from 1; `started_s`: when it was sent, in seconds since the round began.

    `tpot_s`: seconds a token after the first, None for an answer of one. With `error`, one line, there are no
    times. Waiting for a place among the requests in flight is part of no time.
    """

    round: int
    session: int
    turn: int
    kind: str
    ttft_s: float | None
    tpot_s: float | None
    latency_s: float | None
    prompt_tokens: int | None
    output_tokens: int
    error: str | None
    started_s: float


Ask = Callable[[Turn], Awaitable[Reply]]


async def play(
    url: str,
    model: str,
    sessions: Sequence[Session],
    shape: Shape,
    round_number: int,
    now: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    timeout: float = TIMEOUT,
) -> list[Sample]:
    """Every turn of every session, by session and turn; `url`: the server's, without a path.

    At most `shape.concurrency` requests are in flight, those that are ready first go first. A request that fails,
    or takes more than `timeout` seconds, is a sample with an error, and its session goes on. RagKVError: there is
    no benchmark client. The first call imports vLLM, before the round begins.
    """
    import aiohttp

    request_client()
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=timeout),
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_SECONDS),
    ) as http:

        async def ask(turn: Turn) -> Reply:
            return await request(http, url, model, turn, shape.answer_tokens, timeout)

        return await play_with(ask, sessions, shape.concurrency, round_number, now, sleep)


async def play_with(
    ask: Ask,
    sessions: Sequence[Session],
    concurrency: int,
    round_number: int,
    now: Callable[[], float],
    sleep: Callable[[float], Awaitable[object]],
) -> list[Sample]:
    """`play`, whatever asks."""
    places = asyncio.Semaphore(concurrency)  # first come, first served
    began = now()

    async def run(session: Session) -> list[Sample]:
        samples = []
        for turn, pause in zip(session.turns, (session.arrives, *session.think), strict=True):
            if pause > 0:
                await sleep(pause)
            async with places:
                started = now() - began
                reply = await ask(turn)
            samples.append(_sample(reply, round_number, session.id, turn, started))
        return samples

    played = await asyncio.gather(*map(run, sessions))
    return [sample for samples in played for sample in samples]


def _sample(reply: Reply, round_number: int, session: int, turn: Turn, started: float) -> Sample:
    tpot = None
    if reply.ttft_s is not None and reply.latency_s is not None and reply.output_tokens > 1:
        tpot = (reply.latency_s - reply.ttft_s) / (reply.output_tokens - 1)
    return Sample(
        round=round_number,
        session=session,
        turn=turn.number,
        kind=turn.kind,
        ttft_s=reply.ttft_s,
        tpot_s=tpot,
        latency_s=reply.latency_s,
        prompt_tokens=reply.prompt_tokens,
        output_tokens=reply.output_tokens,
        error=reply.error,
        started_s=started,
    )


@functools.cache
def request_client() -> tuple[Any, Any]:
    """vLLM's description of a request, and the function that sends one. RagKVError where vLLM is missing."""
    try:
        from vllm.benchmarks.lib.endpoint_request_func import (
            RequestFuncInput,
            async_request_openai_chat_completions,
        )
    except ImportError as error:
        raise RagKVError(f"vLLM's benchmark client cannot be imported ({error}); install vLLM") from None
    return RequestFuncInput, async_request_openai_chat_completions


async def request(http: Any, url: str, model: str, turn: Turn, tokens: int, timeout: float) -> Reply:
    """Send one request over an aiohttp session. Whatever goes wrong is a reply with an error."""
    describe, send = request_client()
    described = describe(
        prompt="",
        api_url=f"{url.rstrip('/')}/v1/chat/completions",
        prompt_len=0,
        output_len=tokens,
        model=model,
        ignore_eos=True,
        extra_headers=authorization(),
        # Takes the place of what `prompt` would make; older clients have no field for a chat.
        extra_body={"messages": list(turn.messages), "temperature": 0.0},
    )
    output = await send(described, http)
    if not output.success:
        return Reply(error=_one_line(output.error, timeout))
    if not output.output_tokens:
        return Reply(error="the answer ended without its usage")
    return Reply(output.ttft, output.latency, output.output_tokens, output.prompt_len or None)


def authorization() -> dict[str, str]:
    """The header for servers that want a key: the one of VLLM_API_KEY, where that is set."""
    key = os.environ.get(KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}


def _one_line(text: str, timeout: float) -> str:
    """What went wrong, from the end of a traceback."""
    line = next((line for line in reversed(text.splitlines()) if line.strip()), "no reason given").strip()
    return f"no whole answer within {timeout:g} s" if "TimeoutError" in line else line
