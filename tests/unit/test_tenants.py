"""What one request asks for is nobody else's trouble: tenants, hints that are forbidden, and nothing kept."""

import pytest

from hand_lanes import Lower, redis
from ragkv.config.settings import FusionSettings
from ragkv.connectors.vllm.request_state import Recorder
from ragkv.kvstore import metrics as m
from toy_engine import Engine, closing, text

PROMPT = text(1, 100)
SALTS = ["", "one", "two", None]
PIN = {"pin": {"owner": "desk", "seconds": 60}}


def asked(salt=None, **hints):
    return {"kv_transfer_params": {"ragkv": hints}, "cache_salt": salt}


def pinned(engine):
    return engine.memory.pins.pages


def told(engine, prompt, **hints):
    """What the answer to a request tells that is over with its first token."""
    request = engine.request(prompt, **asked(**hints))
    while request.num_tokens == len(prompt):
        engine.step(deliver=False)
        if request.num_tokens == len(prompt):
            engine.deliver()
            engine.work()
    engine.finish(request)
    engine.deliver()
    engine.settle()
    return request.answer["ragkv"]


@pytest.mark.parametrize("salt", SALTS)
@pytest.mark.parametrize("other", SALTS)
def test_an_owner_is_its_tenants_own(salt, other):
    with closing(Engine(pages=200)) as engine:
        engine.run(PROMPT, **asked(salt, **PIN))
        before = pinned(engine)
        engine.run(text(2, 20), **asked(other, unpin={"owner": "desk"}))
        assert before and pinned(engine) == (0 if salt == other else before)


def test_one_tenant_leaves_others_their_share():
    with closing(Engine(pages=200)) as engine:
        for seed in range(9):
            engine.run(text(seed, 100), **asked("greedy", pin={"owner": f"desk {seed}", "seconds": 600}))
        assert 0 < pinned(engine) <= 50
        for seed in range(9):
            engine.run(text(seed, 100), **asked("other", **PIN))
        assert 50 < pinned(engine) <= 100
        assert engine.metrics.get(m.ERRORS, "pins") > 0
        engine.pass_time(601)


@pytest.mark.parametrize("engine", [{"own_cache": True}, {"duties": {"loads": False}}], ids=["own", "producer"])
def test_what_is_stored_already_is_pinned_too(engine):
    """Where vLLM has the prompt itself, and where ragkv loads nothing."""
    with closing(Engine(pages=200, **engine)) as engine:
        engine.run(PROMPT)
        engine.run(PROMPT, **asked(**PIN))
        assert pinned(engine) > 0 and not engine.metrics.get(m.ERRORS, "pins")


def test_a_pin_that_is_refused_is_told():
    with closing(Engine(pages=200, fusion=FusionSettings())) as engine:
        for seed in range(2):
            for _ in range(2):
                answer = told(engine, text(seed, 100), pin={"owner": f"desk {seed}", "seconds": 600})
        (problem,) = answer["problems"]
        assert problem.startswith("ragkv.pin: a tenant's owners, or all, have pinned all")


def test_what_a_tenant_asks_for_survives_another_of_the_same_names():
    with closing(Engine(pages=200)) as engine:
        engine.run(PROMPT, **asked("one", **PIN))
        engine.run(PROMPT, **asked("two", pin={"owner": "desk", "seconds": 1}))
        engine.pass_time(2)
        engine.run(text(3, 20), **asked("two", unpin={"owner": "desk"}))
        for seed in range(10, 20):
            engine.run(text(seed, 100))
        assert engine.run(PROMPT, cache_salt="one") == 99
        assert engine.run(PROMPT, cache_salt="two") == 0


@pytest.mark.parametrize("below", [list, lambda: [Lower()]], ids=["memory", "disk"])
def test_a_time_to_live_does_not_end_what_others_keep(below):
    """Who comes second finds all that there is, and would store none of it again."""
    with closing(Engine(pages=200, lowers=below())) as engine:
        engine.run(PROMPT, **asked(ttl=5))
        assert engine.run(PROMPT) == 99
        engine.run(PROMPT, **asked(ttl=7))
        engine.pass_time(20)
        assert engine.run(PROMPT) == 99
        assert engine.restart(50.0) and engine.run(PROMPT) == (99 if engine.lowers else 0)


def test_what_is_longer_and_has_to_go_does_not_stand_for_what_is_shorter():
    with closing(Engine(pages=200)) as engine:
        engine.run(PROMPT, **asked(ttl=5))
        engine.run(PROMPT[:90])
        engine.pass_time(6)
        assert engine.run(PROMPT) == 90, "the ten that only the first had are gone"


# --- nothing is kept ---


BELOW = {
    "none": list,
    "disk": lambda: [Lower()],
    "back": lambda: [Lower(through=False)],
    "redis": lambda: [redis()],
}


@pytest.mark.parametrize("below", BELOW.values(), ids=BELOW)
def test_of_a_secret_nothing_is_kept_in_any_tier(below):
    recorded = []
    duties = {"recorder": Recorder(lambda namespace, chain: recorded.append(len(chain.tokens)), lambda: None)}
    with closing(Engine(lowers=below(), duties=duties)) as engine:
        secret, answer = text(5, 60), text(6, 80)
        engine.run(secret, answer, **asked(store=False, **PIN, ttl=100))
        assert len(engine.memory) == 0 and pinned(engine) == 0 and not recorded
        assert all(not list(lower.values.scan()) for lower in engine.lowers)
        assert engine.run(secret + answer) == 0 and recorded == [140]
        assert not engine.metrics.get(m.TURN_REQUESTS, "2"), "it continues nothing that is known"
        assert engine.run(secret + answer, **asked(store=False)) == 139, "what is kept already is used"
        known = len(engine.memory)
        assert engine.run(secret + answer + text(7, 90), **asked(store=False)) == 140
        assert len(engine.memory) == known and engine.restart(5.0)
        assert engine.run(secret + answer + text(7, 90), **asked(store=False)) == (140 if engine.lowers else 0)


def test_a_secret_is_kept_where_it_cannot_be_known_what_was_meant():
    with closing(Engine()) as engine:
        engine.run(PROMPT, **asked(store="no"))
        assert len(engine.memory) == 0 and engine.metrics.get(m.ERRORS, "hints") == 1
        engine.run(PROMPT, **asked(store=True))
        assert engine.run(PROMPT) == 99


# --- what the operator forbids ---


def fusing(allow):
    return Engine(pages=400, fusion=FusionSettings(min_tokens=16), duties={"allow": allow})


def test_fusion_that_is_forbidden_leaves_no_trace():
    """A request's `fuse` once made an engine index contents for good."""
    with closing(fusing({"documents", "turn"})) as engine:
        engine.run(text(1, 60) + text(2, 90))
        engine.run(text(3, 60) + text(2, 90) + text(4, 60), **asked(fuse=True))
        assert engine.memory.tree.contents is None and engine.cache.tiering.aliases is None
        assert not engine.fusions and engine.metrics.get(m.ERRORS, "hints") == 1
    with closing(fusing({"fuse"})) as engine:
        engine.run(text(1, 60) + text(2, 90))
        engine.run(text(3, 60) + text(2, 90) + text(4, 60), **asked(fuse=True))
        assert engine.fusions, "what is there is known when it is asked for"


def test_what_is_wrong_and_what_is_forbidden_is_told():
    with closing(fusing({"ttl", "turn"})) as engine:
        answer = told(engine, PROMPT, ttl=-1, turn="x", fuse=True, **PIN)
        assert [problem.partition(";")[0] for problem in answer["problems"]] == [
            "ragkv.fuse: not allowed here",
            "ragkv.turn = 'x'",
            "ragkv.pin: not allowed here",
            "ragkv.ttl = -1",
        ]
        assert pinned(engine) == 0 and "problems" not in told(engine, PROMPT, turn=2)


# --- what is told to be stored ---


def test_what_is_told_to_be_stored_is_there():
    """An engine once told of 600 tokens, of which the next request hit 67."""
    with closing(Engine(pages=200, fusion=FusionSettings())) as engine:
        assert told(engine, PROMPT, turn=1)["stored_tokens"] == 0, "the store ends behind the answer"
        assert told(engine, PROMPT, turn=1)["stored_tokens"] == 100
        assert told(engine, PROMPT + text(9, 40), turn=1, store=False)["stored_tokens"] == 100


@pytest.mark.parametrize("pages", [10, 20])
def test_what_found_no_room_is_not_told(pages):
    with closing(Engine(pages=pages, fusion=FusionSettings())) as engine:
        for _ in range(3):
            stored = told(engine, PROMPT, turn=1)["stored_tokens"]
        assert 0 < stored < 100
        assert engine.run(PROMPT) == stored


# --- hints that cost ---


def test_a_document_of_every_token_costs_no_more_chunks_than_none():
    prompt = text(1, 900)
    spans = [{"id": str(number), "start": number, "end": number + 1} for number in range(900)]
    sizes = []
    for hints in ({}, {"documents": spans, "fuse": True}):
        with closing(Engine(pages=400, blocks=400, fusion=FusionSettings(min_tokens=16))) as engine:
            engine.run(prompt, **asked(**hints))
            sizes.append(len(engine.memory))
            assert engine.run(prompt) == 899, "others are not kept from using it"
    assert sizes[1] <= 2 * sizes[0]
