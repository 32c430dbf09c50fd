"""The client of the serving benchmark: what it sends, what it notes, and in which order sessions take turns."""

import asyncio
import heapq
import json
import socket
import sys
from itertools import count

import pytest

from fake_openai import ANSWER, BREAK, ERROR, HANG, REFUSE, SILENT, FakeOpenAI
from ragkv.benchmarks import serve_client
from ragkv.benchmarks.serve_client import Reply, play, play_with
from ragkv.benchmarks.serve_workload import Session, Shape, Turn
from ragkv.errors import RagKVError


def session(number, turns, arrives=0.0, think=0.0):
    chats = [
        Turn(n, "open" if n == 1 else "follow-up", ({"role": "user", "content": f"{number} asks {n}"},))
        for n in range(1, turns + 1)
    ]
    return Session(number, arrives, (think,) * (turns - 1), tuple(chats))


def said(turn):
    return turn.messages[-1]["content"]


# --- over HTTP, with vLLM's own client ---

SHAPE = Shape(answer_tokens=4, concurrency=2)


def over_http(behave, sessions, timeout=60.0, together=1):
    async def run():
        async with FakeOpenAI(behave, together) as server:
            return server, await play(f"{server.url}/", "m", sessions, SHAPE, 7, timeout=timeout)

    return asyncio.run(run())


def test_every_turn_is_sent_as_it_is_and_noted():
    sessions = [session(3, 2), session(4, 1)]
    server, samples = over_http(lambda _: ANSWER, sessions)
    seen = [(s.round, s.session, s.turn, s.kind) for s in samples]
    assert seen == [(7, 3, 1, "open"), (7, 3, 2, "follow-up"), (7, 4, 1, "open")]
    for sample in samples:
        assert (sample.error, sample.prompt_tokens, sample.output_tokens) == (None, 3, 4)
        assert 0 < sample.ttft_s <= sample.latency_s
        assert sample.tpot_s == pytest.approx((sample.latency_s - sample.ttft_s) / 3)
        assert sample.started_s >= 0
    assert samples[1].started_s >= samples[0].started_s + samples[0].latency_s
    for payload in server.requests:
        assert payload["model"] == "m"
        assert payload["stream"] and payload["stream_options"] == {"include_usage": True}
        assert (payload["temperature"], payload["ignore_eos"], payload["max_completion_tokens"]) == (0, True, 4)
    sent = [payload["messages"] for payload in server.requests]
    expected = [list(turn.messages) for each in sessions for turn in each.turns]
    assert sorted(sent, key=json.dumps) == sorted(expected, key=json.dumps)


@pytest.mark.parametrize(
    "behaviour, error",
    [
        (REFUSE, "Bad Request"),
        (BREAK, "aiohttp.client_exceptions.ClientPayloadError"),
        (SILENT, "the answer ended without its usage"),
        (ERROR, "the answer ended without its usage"),
    ],
)
def test_a_request_that_fails_is_a_sample_and_its_session_goes_on(behaviour, error):
    def behave(payload):
        return behaviour if payload["messages"][-1]["content"] == "0 asks 2" else ANSWER

    server, samples = over_http(behave, [session(0, 3)])
    assert [s.error is None for s in samples] == [True, False, True]
    failed = samples[1]
    assert failed.error.startswith(error) and "\n" not in failed.error
    assert (failed.ttft_s, failed.tpot_s, failed.latency_s, failed.output_tokens) == (None, None, None, 0)
    assert len(server.requests) == 3


def test_the_servers_key_goes_with_every_request(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "for somebody else")
    monkeypatch.setenv("VLLM_API_KEY", "hush")
    server, _ = over_http(lambda payload: ANSWER, [session(0, 2)])
    assert server.keys == ["Bearer hush"] * 2


def test_a_server_that_hangs_ends_as_an_error():
    server, samples = over_http(lambda _: HANG, [session(0, 2)], timeout=0.05)
    assert [s.error for s in samples] == ["no whole answer within 0.05 s"] * 2
    assert len(server.requests) == 2


def test_nobody_listening_is_an_error_of_each_request():
    with socket.socket() as taken:  # bound, and not listened on
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        samples = asyncio.run(play(url, "m", [session(0, 2)], SHAPE, 0))
    assert len(samples) == 2 and all("Cannot connect" in s.error for s in samples)


def test_there_are_as_many_requests_in_flight_as_asked():
    server, samples = over_http(lambda _: ANSWER, [session(n, 3) for n in range(6)], together=SHAPE.concurrency)
    assert [s.error for s in samples] == [None] * 18 and server.most == SHAPE.concurrency


def test_without_vllm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.benchmarks.lib.endpoint_request_func", None)
    serve_client.request_client.cache_clear()
    with pytest.raises(RagKVError, match="install vLLM"):
        asyncio.run(play("http://127.0.0.1:1", "m", [], SHAPE, 0))


def test_what_vllm_leaves_empty_is_unknown():
    class Output:
        success, error = True, ""
        ttft, latency, output_tokens, prompt_len = 1.0, 1.0, 1, 0

    async def send(described, http):
        return Output

    async def reply():
        return await serve_client.request(None, "http://x", "m", session(0, 1).turns[0], 1, 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve_client, "request_client", lambda: (lambda **given: given, send))
        assert asyncio.run(reply()) == Reply(1.0, 1.0, 1, None)
        Output.success = False
        assert asyncio.run(reply()) == Reply(error="no reason given")


# --- the order, on a clock of its own ---


class Clock:
    """Time that passes only when nobody has anything to do."""

    def __init__(self):
        self.time = 0.0
        self._order = count()
        self._waiting = []

    def now(self):
        return self.time

    async def sleep(self, seconds):
        alarm = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (self.time + seconds, next(self._order), alarm))
        await alarm

    async def run(self, work):
        task = asyncio.ensure_future(work)
        while not task.done():
            for _ in range(50):  # all that is ready now
                await asyncio.sleep(0)
            if self._waiting:
                self.time, _, alarm = heapq.heappop(self._waiting)
                alarm.set_result(None)
        return task.result()


class Log:
    """Answers that take a second each, and what was in flight."""

    def __init__(self, clock, seconds=1.0):
        self.clock, self.seconds = clock, seconds
        self.started, self.in_flight, self.most = [], 0, 0

    async def ask(self, turn):
        self.started.append((self.clock.now(), said(turn)))
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        await self.clock.sleep(self.seconds)
        self.in_flight -= 1
        return Reply(self.seconds / 2, self.seconds, 6, 10)


def on_a_clock(sessions, concurrency, start=0.0):
    clock = Clock()
    clock.time = start
    log = Log(clock)
    return log, asyncio.run(clock.run(play_with(log.ask, sessions, concurrency, 0, clock.now, clock.sleep)))


def test_sessions_take_turns_first_come_first_served():
    log, samples = on_a_clock([session(n, 2) for n in range(3)], 1)
    assert [said for _, said in log.started] == [f"{n} asks {turn}" for turn in (1, 2) for n in range(3)]
    assert [time for time, _ in log.started] == [0, 1, 2, 3, 4, 5]
    assert log.most == 1
    # Waiting for the others is part of no time.
    assert [(s.session, s.turn, s.started_s) for s in samples] == [
        (n, m, n + 3 * m - 3) for n in range(3) for m in (1, 2)
    ]
    assert {(s.ttft_s, s.latency_s, s.tpot_s) for s in samples} == {(0.5, 1, 0.1)}


@pytest.mark.parametrize("concurrency", [2, 3, 50])
def test_no_place_stays_empty(concurrency):
    log, samples = on_a_clock([session(n, 4) for n in range(6)], concurrency)
    assert log.most == min(concurrency, 6) and len(samples) == 24
    assert log.clock.time == 24 / min(concurrency, 6)


@pytest.mark.parametrize("start", [0, 100])
def test_a_turn_is_ready_when_its_session_has_come_and_thought(start):
    log, samples = on_a_clock([session(0, 2, think=4), session(1, 2, arrives=2, think=0.5)], 1, start)
    started = [(time - start, said) for time, said in log.started]
    assert started == [(0, "0 asks 1"), (2, "1 asks 1"), (3.5, "1 asks 2"), (5, "0 asks 2")]
    assert [s.started_s for s in samples] == [0, 5, 2, 3.5], "the clock of a round begins with it"


def test_an_answer_of_one_token_has_no_time_per_token():
    async def ask(turn):
        return Reply(0.5, 0.5, 1, 10)

    clock = Clock()
    (sample,) = asyncio.run(clock.run(play_with(ask, [session(0, 1)], 1, 0, clock.now, clock.sleep)))
    assert sample.tpot_s is None and sample.latency_s == 0.5
