"""`ragkv top`: what it makes of metrics, how that looks, and how it goes on and ends."""

import dataclasses
import io
import json
import os
import sys

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from rich.console import Console

from metrics_server import serving_metrics
from ragkv import cli
from ragkv.cli import top
from ragkv.cli.top import Keys, Watch
from ragkv.cli.top_figures import make_frame
from ragkv.cli.top_view import render
from ragkv.fetch import AnswerError
from ragkv.kvstore import metrics as m
from ragkv.scrape import parse, scrape

URL = "http://localhost:8000"
LABELS = {"model_name": "smol", "engine": "0"}
THEIRS = {
    "vllm:request_success_total": (Counter, ("finished_reason",)),
    "vllm:prompt_tokens_total": (Counter, ()),
    "vllm:generation_tokens_total": (Counter, ()),
    "vllm:prefix_cache_hits_total": (Counter, ()),
    "vllm:num_requests_running": (Gauge, ()),
    "vllm:num_requests_waiting": (Gauge, ()),
    "vllm:kv_cache_usage_perc": (Gauge, ()),
    "vllm:time_to_first_token_seconds": (Histogram, ()),
}
OURS = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}


class FakeMetrics:
    """Metrics as vLLM exports them; `add(name, value, **labels)`, and their `text`."""

    def __init__(self, ragkv=True):
        self._registry, self._made = CollectorRegistry(), {}
        kinds = dict(THEIRS)
        if ragkv:
            kinds |= {each.name: (OURS[each.kind], each.labels) for each in m.METRICS.values()}
        for name, (kind, labels) in kinds.items():
            more = {"buckets": (0.1, 1.0, 10.0)} if kind is Histogram else {}
            self._made[name] = kind(name, "text", [*LABELS, *labels], registry=self._registry, **more)

    def add(self, name, value, engine="0", **labels):
        series = self._made[name].labels(**LABELS | {"engine": engine}, **labels)
        (series.observe if isinstance(self._made[name], Histogram) else series.inc)(value)
        return self

    @property
    def text(self):
        return generate_latest(self._registry).decode()

    def at(self, seconds):
        return parse(self.text, seconds)


def busy():
    fake = FakeMetrics()
    fake.add("vllm:request_success_total", 8, finished_reason="stop")
    fake.add("vllm:request_success_total", 2, engine="1", finished_reason="length")
    fake.add("vllm:prompt_tokens_total", 10_000).add("vllm:generation_tokens_total", 500)
    fake.add("vllm:prefix_cache_hits_total", 1_000).add("vllm:kv_cache_usage_perc", 0.45)
    fake.add("vllm:num_requests_running", 2).add("vllm:num_requests_waiting", 3)
    for seconds in (0.05, 0.05, 0.5, 0.5):
        fake.add("vllm:time_to_first_token_seconds", seconds)
    fake.add(m.HIT_TOKENS, 4_000, tier="memory").add(m.HIT_TOKENS, 2_000, tier="disk")
    for tier, used in (("memory", 3 << 20), ("disk", 1 << 30)):
        fake.add(m.USED_BYTES, used, tier=tier).add(m.CAPACITY_BYTES, 4 << 20, tier=tier)
        fake.add(m.CHUNKS, 1234, tier=tier)
    fake.add(m.EVICTED_CHUNKS, 20, tier="memory", reason="capacity")
    fake.add(m.EVICTED_CHUNKS, 99, tier="memory", reason="reset")
    fake.add(m.TIER_STATE, 0, tier="disk", side="read").add(m.TIER_STATE, 2, tier="disk", side="write")
    fake.add(m.TIER_STATE, 1, tier="redis", side="read").add(m.TIER_STATE, 1, tier="redis", side="write")
    fake.add(m.TIER_ERRORS, 3, tier="disk", reason="full").add(m.QUEUED_BYTES, 5 << 20, tier="disk")
    for turn, count, prompt, reused in (("1", 4, 4_000, 40), ("2", 3, 3_000, 2_970), ("5+", 0, 0, 0)):
        fake.add(m.TURN_REQUESTS, count, turn=turn).add(m.TURN_PROMPT_TOKENS, prompt, turn=turn)
        fake.add(m.TURN_REUSED_TOKENS, reused, turn=turn)
    for name, hits, saved in (("[red]10-K[/]", 5, 700), ("quarterly report of a company with a long name", 9, 90)):
        fake.add(m.DOCUMENT_HITS, hits, document=name).add(m.DOCUMENT_SAVED_TOKENS, saved, document=name)
    fake.add(m.GATE_DECISIONS, 7, tier="disk", decision="load").add(m.WAITS, 6, result="loaded")
    fake.add(m.FUSED_TOKENS, 500, kind="reused").add(m.FUSED_TOKENS, 70, kind="gap").add(
        m.ERRORS, 2, kind="lookup"
    )
    return fake


def test_since_the_start():
    frame = make_frame(URL, busy().at(5.0), None)
    assert frame.since_start and frame.seconds is None and frame.requests_per_s is None
    assert frame.model == "smol" and (frame.running, frame.waiting, frame.kv_usage) == (2, 3, 0.45)
    assert frame.sources == {
        "engine": 1_000, "device": 0, "memory": 4_000, "disk": 2_000, "redis": 0, "store": 0, "fused": 500,
        "computed": 2_500
    }  # fmt: skip
    assert (frame.hit_rate, frame.ragkv_rate) == (0.75, 0.65)
    assert frame.ttft_s == {"p50": pytest.approx(0.1), "p95": pytest.approx(0.91)}
    assert list(frame.tiers) == ["memory", "disk", "redis"]
    memory, disk, redis = frame.tiers.values()
    assert (memory.used_bytes, memory.capacity_bytes, memory.chunks, memory.read) == (3 << 20, 4 << 20, 1234, None)
    assert (disk.read, disk.write, disk.errors) == ("in use", "at rest", {"full": 3})
    assert (redis.read, redis.capacity_bytes) == ("on trial", 0)
    assert {turn: dataclasses.astuple(each) for turn, each in frame.turns.items()} == {
        "1": (4, 4_000, 40),
        "2": (3, 3_000, 2_970),
    }
    assert [dataclasses.astuple(each) for each in frame.documents.values()] == [(9, 90), (5, 700)]
    assert (frame.gate, frame.waits, frame.errors) == ({"load": 7}, {"loaded": 6}, {"lookup": 2})
    assert frame.fusion == {"gap": 70, "reused": 500}


def test_between_two_looks():
    fake = busy()
    earlier = fake.at(5.0)
    fake.add("vllm:request_success_total", 1, engine="1", finished_reason="length")
    fake.add("vllm:prompt_tokens_total", 1_000).add("vllm:time_to_first_token_seconds", 5.0)
    fake.add(m.HIT_TOKENS, 900, tier="memory").add(m.EVICTED_CHUNKS, 6, tier="memory", reason="capacity")
    frame = make_frame(URL, fake.at(9.0), earlier)
    assert not frame.since_start and frame.seconds == 4.0
    assert (frame.requests_per_s, frame.prompt_tokens_per_s, frame.ragkv_rate) == (0.25, 250.0, 0.9)
    assert 1.0 < frame.ttft_s["p50"] < 10.0
    assert frame.tiers["memory"].evicted_per_s == 1.5 and frame.tiers["memory"].chunks == 1234
    assert frame.turns["1"].requests == 4 and frame.running == 2


def test_counts_that_do_not_fit_the_ones_before():
    frame = make_frame(URL, FakeMetrics().add("vllm:prompt_tokens_total", 100).at(9.0), busy().at(5.0))
    assert frame.sources["computed"] == 100 and frame.requests_per_s == 0.0
    fake = busy()
    earlier = fake.at(5.0)
    frame = make_frame(URL, fake.add(m.HIT_TOKENS, 900, tier="memory").at(9.0), earlier)
    assert (frame.sources["computed"], frame.hit_rate) == (0, 1.0), "hits that are counted before their prompts"


def test_an_idle_server():
    frame = make_frame(URL, FakeMetrics().at(1.0), None)
    assert frame.hit_rate is None and frame.ttft_s == {"p50": None, "p95": None} and not frame.tiers
    assert "No tiers yet" in shown(frame, 80)


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ((10, 20, 20, 20), 0.5, 0.1),
        ((0, 10, 10, 10), 0.5, 0.55),
        ((0, 0, 0, 7), 0.5, 10.0),
        ((4, 4, 4, 8), 1.0, 10.0),
        ((0, 0, 0, 0), 0.5, None),
    ],
)
def test_quantiles(counts, share, expected):
    text = "".join(f'h_bucket{{le="{le}"}} {n}\n' for le, n in zip((0.1, 1.0, 10.0, "+Inf"), counts, strict=True))
    assert parse(text, 0.0).quantile("h", share) == (None if expected is None else pytest.approx(expected))


def shown(frame, width):
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(render(frame, width))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_how_it_looks(width):
    text = shown(make_frame(URL, busy().at(5.0), None), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width and text.count("…") == 1  # the long name
    words = ("since its start", "hits 75.0%", "by ragkv 65.0%", "running 2", "KV 45%", "p50 100 ms", "at rest",
             "[red]10-K[/]", "99.0%", "gate: load 7", "disk: errors since its start: full 3", "lookup 2",
             "disk: 5MiB wait", "on trial")  # fmt: skip
    assert [word for word in words if word not in text] == []
    together = any("turn of a conversation" in line and "busiest documents" in line for line in lines)
    assert together == (width == 120)


# --- scraping ---


def test_scraping():
    with serving_metrics(busy().text) as server:
        seen = scrape(f"{server.url}/")
        assert seen.total(m.HIT_TOKENS) == 6_000 and seen.by(m.HIT_TOKENS, "tier", engine="1") == {}
        assert scrape(f"{server.url}/metrics").values == seen.values
        server.status = 500
        with pytest.raises(AnswerError, match=": 500: "):
            scrape(server.url)
        server.text, server.status = "{broken", 200
        with pytest.raises(AnswerError, match="not metrics"):
            scrape(server.url)
    with pytest.raises(AnswerError, match="no answer: Connection refused"):
        scrape(server.url)


def test_a_watch_keeps_a_window_and_begins_anew_after_silence(monkeypatch):
    fake, clock = busy(), iter((10.0, 11.0, 12.0, 13.0, None, 20.0))

    def look(url):
        taken = next(clock)
        if taken is None:
            raise AnswerError("gone")
        return fake.at(taken)

    monkeypatch.setattr("ragkv.cli.top.scrape", look)
    watch = Watch(URL, 2.0)
    assert [watch.look().seconds for _ in range(4)] == [None, 1.0, 2.0, 2.0]
    with pytest.raises(AnswerError):
        watch.look()
    assert watch.look().since_start


# --- the command ---


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["ragkv", "top", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run


def test_once(run):
    with serving_metrics(busy().text) as server:
        status, out, _ = run("--url", server.url, "--once", "--json")
        assert status == 0 and json.loads(out)["tiers"]["disk"]["write"] == "at rest"
        status, out, _ = run("--url", server.url, "--once")
        assert status == 0 and "busiest documents" in out
        server.text = FakeMetrics(ragkv=False).text
        status, _, err = run("--url", server.url)
        assert status == 1 and "without ragkv" in err and len(err.strip().splitlines()) == 1
    status, _, err = run("--url", server.url, "--once")
    assert status == 1 and "no answer" in err


@pytest.mark.parametrize("more", [(), ("--json",), ("--once",)])
def test_what_is_no_address_is_not_tried_again(run, monkeypatch, more):
    for owner, name in ((top.time, "sleep"), (Keys, "within")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("tried again"))
    status, _, err = run("--url", "localhost:8000", *more)
    assert status == 1 and "such as http://localhost:8000" in err


def test_following_goes_on_while_a_server_is_down(run, monkeypatch):
    steps = iter((None, None))

    def rest(seconds):
        if next(steps, KeyboardInterrupt) is KeyboardInterrupt:
            raise KeyboardInterrupt
        server.end()

    monkeypatch.setattr(top.time, "sleep", rest)
    with serving_metrics(busy().text) as server:
        status, out, _ = run("--url", server.url, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and lines[0]["model"] == "smol" and len(lines) == 3
    assert all("no answer" in line["error"] for line in lines[1:])


def test_the_live_view_tries_a_silent_server_again_until_q(run, monkeypatch):
    master, slave = os.openpty()
    with open(slave) as terminal, serving_metrics(busy().text) as server:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdin", terminal)
        looks = []

        def within(self, seconds):
            looks.append(seconds)
            if len(looks) == 1:
                server.end()
            if len(looks) == 3:
                os.write(master, b"xq")
            return typed(self, 60.0) if len(looks) == 3 else False

        typed = Keys.within
        monkeypatch.setattr(Keys, "within", within)
        status, out, _ = run("--url", server.url, "--interval", "3")
    os.close(master)
    assert status == 0 and looks == [3.0, 3.0, 3.0]
    assert "Trying again; q ends." in out
