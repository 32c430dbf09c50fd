"""Two real engines of one role each over one folder or one Redis: prefill here, use there."""

import pytest

from ragkv.benchmarks.engine import Engine, EngineOptions
from ragkv.benchmarks.internal.redis_server import Server as Redis
from ragkv.benchmarks.internal.redis_server import find_server

UNGATED = {"memory": {"capacity": "64MiB"}, "placement": {"gate": False}}
TRIES = 50


def engine(model, role, ragkv):
    transfer = {"kv_connector": "RagKVConnector", "kv_role": role, "kv_connector_extra_config": UNGATED | ragkv}
    llm = {"kv_transfer_config": transfer}
    return Engine(EngineOptions(model, None, "float32", 2048, llm, one_process=True))


def tokens(seed, length=500):
    return [(seed * 7919 + place * 31) % 250 + 3 for place in range(length)]


def hits(engine, prompt):
    (answer,) = engine.ask([prompt])
    engine.evict()
    return sum(answer.hit_tokens.values()), answer.tokens


@pytest.fixture(params=["disk", "redis"])
def shared(request, tmp_path):
    """Settings of a tier that both have, and what lies in it."""
    if request.param == "disk":
        folder = tmp_path / "kv"
        yield {"disk": {"path": str(folder), "shared": True}}, lambda: {p.name for p in folder.glob("*.kv")}
        return
    if not find_server():
        pytest.skip("no Redis server here")
    import redis

    server = Redis()
    try:
        client = redis.Redis.from_url(server.url)
        yield {"redis": {"url": server.url}}, lambda: set(client.keys("ragkv:*"))
        client.close()
    finally:
        server.close()


def test_a_consumer_uses_what_a_producer_stores_while_both_live(model, shared):
    settings, kept = shared
    first, later = tokens(1), tokens(2)
    with engine(model, "kv_producer", settings) as producer, engine(model, "kv_consumer", settings) as consumer:
        right = hits(producer, first)[1]
        assert hits(producer, first) == (0, right), "a producer loads nothing"
        hit_at_last(consumer, first, right)
        written = kept()
        assert hits(consumer, first) == (499, right), "from its memory now"
        assert hits(consumer, tokens(3))[0] == hits(consumer, tokens(3))[0] == 0, (
            "what it computes it does not keep"
        )
        assert written and kept() == written
        right = hits(producer, later)[1]
        hit_at_last(consumer, later, right)  # stored after the consumer's start
        assert kept() > written
        told = producer.metrics(), consumer.metrics()
    assert [total(each, "ragkv_stored_tokens_total") > 0 for each in told] == [True, False]
    assert [total(each, "ragkv_tier_written_bytes_total") > 0 for each in told] == [True, False]
    assert total(told[1], "ragkv_errors_total") == 0


def hit_at_last(consumer, prompt, right):
    """All of a prompt is hit once its last part is written."""
    seen = next(found for _ in range(TRIES) if (found := hits(consumer, prompt))[0] == len(prompt) - 1)
    assert seen[1] == right


def total(metrics, name):
    return sum(value for key, value in metrics.items() if key.split("{")[0] == name)
