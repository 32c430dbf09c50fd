"""Engines that only load, and engines that only store, over tiers that they share."""

from types import SimpleNamespace

import pytest

from hand_lanes import Lower, redis
from ragkv.config import Settings
from ragkv.connectors.vllm.lifecycle import Duties, duties_of
from toy_engine import Engine, closing, text

PROMPT, OTHER = text(1, 100), text(2, 100)
CONSUMER, PRODUCER = {"stores": False}, {"loads": False}
FUSION = Settings.model_validate({"fusion": {"enabled": True, "min_tokens": 16}}).fusion


@pytest.mark.parametrize(
    ("role", "duties"),
    [
        ("kv_both", Duties(stores=True, loads=True)),
        ("kv_producer", Duties(stores=True, loads=False)),
        ("kv_consumer", Duties(stores=False, loads=True)),
        (None, Duties(stores=True, loads=True)),
    ],
)
def test_vllms_words(role, duties):
    assert duties_of(SimpleNamespace(kv_role=role)) == duties


@pytest.fixture(
    params=[{"asks": True}, {"asks": True, "through": False}, None], ids=["disk", "disk back", "redis"]
)
def tiers(request):
    """Two tiers over the same values: a producer's, and a consumer's, which may not write."""
    make = Lower if request.param else redis
    options = request.param or {}
    first = make(**options)
    return first, make(**options, values=first.values, may_write=False)


def test_a_consumer_hits_what_a_producer_stored_and_writes_nothing(tiers):
    """Both alive at once; and what was brought up into memory is hit there the next time."""
    with closing(Engine(lowers=[tiers[0]], duties=PRODUCER)) as producer:
        assert producer.run(PROMPT) == 0 and producer.run(PROMPT) == 0, "a producer computes everything"
        assert producer.loaded == 0
        assert producer.side.close(5.0)
    kept = tiers[0].stored()
    assert kept
    with closing(Engine(lowers=[tiers[1]], duties=CONSUMER)) as consumer:
        assert consumer.run(PROMPT) == 99
        assert consumer.run(OTHER) == 0 and consumer.run(OTHER) == 0, "what it computes itself is not kept"
        assert consumer.run(PROMPT, text(3, 40)) == 99
        assert consumer.run(PROMPT + text(3, 40) + text(4, 9)) == 100, "an answer is not kept"
        assert consumer.side.close(5.0), "nothing waits to be written"
    assert tiers[1].stored() == kept


def test_a_consumer_in_little_memory_evicts_and_writes_nothing(tiers):
    texts = [text(seed, 60) for seed in range(10, 20)]
    with closing(Engine(lowers=[tiers[0]], duties=PRODUCER)) as producer:
        for each in texts:
            producer.run(each)
        producer.side.close(5.0)
    kept = tiers[0].stored()
    with closing(Engine(pages=16, lowers=[tiers[1]], duties=CONSUMER)) as consumer:
        hits = [consumer.run(each) for _ in range(2) for each in texts]
        assert hits == [59] * 20
    assert tiers[1].stored() == kept


@pytest.mark.parametrize("consumer", [True, False])
def test_a_consumer_with_another_tier_between_copies_nothing_into_it(consumer):
    far, texts = redis(), [text(seed, 60) for seed in range(5, 9)]
    with closing(Engine(lowers=[far], duties=PRODUCER)) as producer:
        for each in texts:
            producer.run(each)
    near = Lower(may_write=not consumer)
    below = redis(values=far.values, may_write=not consumer)
    with closing(Engine(pages=16, lowers=[near, below], duties=CONSUMER if consumer else {})) as engine:
        assert [engine.run(each) for each in texts] == [59] * 4
    assert bool(near.stored()) is not consumer, "an engine that stores does copy"


def test_a_consumer_with_a_smaller_budget_deletes_nothing():
    disk = Lower()
    with closing(Engine(lowers=[disk], duties=PRODUCER)) as producer:
        for seed in range(5):
            producer.run(text(seed, 100))
    kept = disk.stored()
    with closing(
        Engine(lowers=[Lower(capacity=1000, asks=True, may_write=False, values=disk.values)], duties=CONSUMER)
    ):
        assert disk.stored() == kept
    with closing(Engine(lowers=[Lower(capacity=1000, values=disk.values)])):
        assert disk.stored() != kept, "an engine that stores keeps to its budget"


def test_a_producer_fuses_nothing_and_a_consumer_does():
    """Fused KV is never stored; being loaded, it is a consumer's to use."""
    parts = [text(seed, 60) for seed in (1, 2)]
    disk = Lower()
    with closing(Engine(lowers=[disk], fusion=FUSION, duties=PRODUCER)) as producer:
        for each in parts:
            producer.run(each + text(9, 5))
        assert producer.run(parts[1] + parts[0]) == 0
    kept = disk.stored()
    reader = Lower(asks=True, may_write=False, values=disk.values)
    with closing(Engine(lowers=[reader], fusion=FUSION, duties=CONSUMER)) as consumer:
        assert consumer.run(parts[1] + parts[0] + text(8, 5)) > 60
    assert disk.stored() == kept


def test_a_consumer_holds_no_blocks_for_stores():
    with closing(Engine(duties=CONSUMER)) as engine:
        request = engine.request(PROMPT)
        engine.step()
        engine.finish(request)
        assert not engine.held
