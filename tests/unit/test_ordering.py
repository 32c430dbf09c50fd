"""Passages in stored order: the order that is answered is the one that most of is really found of."""

import itertools
from collections import Counter
from random import Random

import pytest

from hand_lanes import Lower, redis
from plane_engine import SPACE, STEP, STRUCTURE, fresh, made
from ragkv.benchmarks.internal.faulty_stores import Fault
from ragkv.config.settings import FusionSettings
from ragkv.connectors.vllm.hints import MOST_ORDERED_TOKENS, MOST_PASSAGES
from ragkv.kvstore import metrics as m
from ragkv.kvstore import ordering
from ragkv.kvstore.chunking import Chunker, TokenChain
from ragkv.kvstore.keys import as_tokens
from toy_engine import BELOW, Engine, Request, closing, text

SYSTEM, QUESTION = text(1, 20), text(2, 9)
PASSAGES = [text(seed, size) for seed, size in enumerate((40, 64, 33, 90, 25), 10)]
TIERS = {"memory alone": list, **BELOW}


@pytest.fixture(params=TIERS.values(), ids=TIERS)
def engine(request):
    with closing(Engine(lowers=request.param(), fusion=FusionSettings())) as made:
        yield made


def written(order, passages=PASSAGES, system=SYSTEM, question=QUESTION):
    """A prompt, and hints that name its passages."""
    tokens, documents = list(system), []
    for number in order:
        start = len(tokens)
        tokens += passages[number]
        documents.append({"id": str(number), "start": start, "end": len(tokens)})
    return [*tokens, *question], {"kv_transfer_params": {"ragkv": {"documents": documents, "fuse": False}}}


def run(engine, order, **more):
    prompt, hints = written(order, **more)
    return engine.run(prompt, **hints)


def found(engine, order):
    """Tokens of passages in that order that a request would be given now, which then is not run."""
    prompt, hints = written(order)
    request = Request(f"probe {order}", prompt, **hints)
    while (tokens := engine.side.lookup(request, 0)) is None:
        engine.work()
    engine.side.finished(request, [[]])
    passages = sum(len(PASSAGES[number]) for number in order)
    return min(max(0, tokens - len(SYSTEM)), passages)


def asking(passages=PASSAGES, system=SYSTEM):
    return Request("asks", [7], kv_transfer_params={"ragkv": {"order": {"before": system, "passages": passages}}})


def ask(engine, **more):
    """What the response says of the order of passages."""
    request = asking(**more)
    while engine.side.lookup(request, 0) is None:
        engine.work()
    told = engine.side.finished(request, [[]])[1]["ragkv"]
    assert "problems" not in told
    return told["order"]


def test_nothing_is_stored(engine):
    assert ask(engine) == {"passages": [0, 1, 2, 3, 4], "tokens": 252, "given_tokens": 0, "ordered_tokens": 0}
    run(engine, [1], system=text(9, 20))
    assert ask(engine)["ordered_tokens"] == 0, "behind another system prompt"


def test_the_longest_chain_comes_first_and_the_rest_as_given(engine):
    run(engine, [3, 1])
    run(engine, [0])
    asked = {"passages": [3, 1, 0, 2, 4], "tokens": 252, "given_tokens": 40, "ordered_tokens": 154}
    assert ask(engine) == asked
    assert [engine.metrics.get(m.ORDERED_TOKENS, kind) for kind in ("all", "given", "ordered")] == [252, 40, 154]
    assert run(engine, asked["passages"]) == len(SYSTEM) + 154


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("forgets", [False, True], ids=["in memory", "after a restart"])
def test_no_order_would_have_more(engine, seed, forgets):
    """And what is told is what requests then find."""
    chance = Random(seed)
    for _ in range(5):
        run(engine, chance.sample(range(5), chance.randrange(1, 5)))
    if forgets:
        engine.restart(5.0)
        for _ in range(seed % 3):
            run(engine, chance.sample(range(5), 2))
    told = ask(engine)
    every = {order: found(engine, order) for order in itertools.permutations(range(5))}
    assert told["ordered_tokens"] == every[tuple(told["passages"])]
    assert told["given_tokens"] == every[0, 1, 2, 3, 4]
    if any(lower.tier.readable for lower in engine.lowers) or not forgets:
        assert told["ordered_tokens"] == max(every.values())


def test_prompts_without_hints_are_followed_by_their_tokens():
    with closing(Engine(fusion=FusionSettings())) as engine:
        prompt, _ = written([3, 1])
        engine.run(prompt)
        assert ask(engine)["passages"][:2] == [3, 1] and ask(engine)["ordered_tokens"] == 154


@pytest.mark.parametrize("seed", range(6))
def test_prompts_that_part_behind_a_passage_within_a_chunk_are_both_found(seed):
    """The chunks of prompts without hints end elsewhere: two of them may begin with the same passage."""
    first, second, third = (text(1000 + 10 * seed + number, 30) for number in range(3))
    with closing(Engine(fusion=FusionSettings())) as engine:
        for other in (second, third):
            engine.run([*SYSTEM, *first, *other, *QUESTION])
        for other in (second, third):
            told = ask(engine, passages=[other, first])
            assert told["passages"] == [1, 0] and told["ordered_tokens"] == 60


def test_what_memory_drops_while_a_tier_is_asked_is_not_claimed():
    with closing(Engine(lowers=[Lower(asks=True, through=False)], fusion=FusionSettings())) as engine:
        run(engine, [3, 1])
        request = asking()
        assert engine.side.lookup(request, 0) is None
        engine.cache.reset()
        while engine.side.lookup(request, 0) is None:
            engine.work()
        assert (
            engine.side.finished(request, [[]])[1]["ragkv"]["order"]["ordered_tokens"]
            == 0
            == found(engine, [3, 1])
        )


def test_it_keeps_nothing_and_others_are_not_changed(engine):
    run(engine, [2, 0])
    before = {chunk.key for chunk in engine.memory.tree}
    ask(engine)
    engine.settle()
    assert {chunk.key for chunk in engine.memory.tree} == before and engine.pins == 0
    assert run(engine, [2, 0]) == len(written([2, 0])[0]) - 1


def test_tenants_and_adapters_see_their_own():
    with closing(Engine(fusion=FusionSettings())) as engine:
        prompt, hints = written([4, 2])
        engine.run(prompt, cache_salt="one", **hints)
        for salt, tokens in (("one", 58), ("two", 0), (None, 0)):
            request = asking()
            request.cache_salt = salt
            engine.side.lookup(request, 0)
            assert engine.side.finished(request, [[]])[1]["ragkv"]["order"]["ordered_tokens"] == tokens


@pytest.mark.parametrize("when", ["deadline", "error"])
def test_a_tier_that_does_not_answer_costs_the_order_alone(when):
    lower = redis()
    with closing(Engine(lowers=[lower], fusion=FusionSettings())) as engine:
        run(engine, [3, 1])
        engine.restart(5.0)
        request = asking()
        assert engine.side.lookup(request, 0) is None
        if when == "deadline":
            engine.pass_time(2.0)
        else:
            lower.plan = lambda method, number: Fault.FAIL
            lower.reads.run()
        while engine.side.lookup(request, 0) is None:
            engine.work()
        told = engine.side.finished(request, [[]])[1]["ragkv"]["order"]
        assert told["passages"] == [0, 1, 2, 3, 4] and told["ordered_tokens"] == 0


def test_aborted_while_it_waits():
    lower = Lower(asks=True)
    with closing(Engine(lowers=[lower], fusion=FusionSettings())) as engine:
        run(engine, [3, 1])
        engine.restart(5.0)
        request = asking()
        assert engine.side.lookup(request, 0) is None
        assert "order" not in engine.side.finished(request, [[]])[1]["ragkv"]
        engine.settle()
        assert ask(engine)["ordered_tokens"] == 154


def test_where_nothing_may_be_loaded_the_order_is_not_looked_for():
    with closing(Engine(fusion=FusionSettings(), duties={"loads": False})) as engine:
        run(engine, [3, 1])
        request = asking()
        assert engine.side.lookup(request, 0) == 0
        assert "order" not in engine.side.finished(request, [[]])[1]["ragkv"]


def test_the_search_is_bounded():
    """All orders of many equal passages are stored alike: it looks at a few thousand."""
    passages = [text(10, 20)] * MOST_PASSAGES
    with closing(Engine(pages=2000, blocks=2000, fusion=FusionSettings())) as engine:
        engine.run([*SYSTEM, *text(10, 20) * MOST_PASSAGES, *QUESTION])
        told = ask(engine, passages=passages)
        assert sorted(told["passages"]) == list(range(MOST_PASSAGES))
        assert 0 < told["ordered_tokens"] <= told["tokens"] == 20 * MOST_PASSAGES <= MOST_ORDERED_TOKENS


@pytest.mark.parametrize("below", [list, lambda: [Lower()], lambda: [redis()]], ids=["memory", "disk", "redis"])
def test_hostile_orders_cost_no_more_than_others(below, monkeypatch):
    """Stored short passages, and long ones behind each: once a lookup took two seconds."""
    calls = Counter()

    def counted(name, cost):
        real = getattr(ordering, name)
        monkeypatch.setattr(ordering, name, lambda *args: (calls.update({name: cost(*args)}), real(*args))[1])

    counted("longest_shared", lambda last, rest: 1)
    counted("chain_keys", lambda parent, raw, cuts: len(cuts))
    short, long = text(50, 16), text(51, MOST_ORDERED_TOKENS - 20 - 16 * 40)
    with closing(Engine(pages=4000, blocks=4000, lowers=below(), fusion=FusionSettings())) as engine:
        prompt, hints = written(range(40), [short] * 40)
        engine.run(prompt, **hints)
        told = ask(engine, passages=[short] * 40 + [long])
        assert told["ordered_tokens"] > 0 and calls.total() <= 2 * ordering.MOST_STEPS


@pytest.mark.parametrize("planes", ["window", "chunks", "both", "wide", "states", "states and windows"])
@pytest.mark.parametrize("below", [False, True], ids=["memory", "disk"])
def test_a_model_of_several_kinds_of_layers_goes_on_only_where_all_of_them_can(planes, below):
    engine = made(planes, lowers=(Lower(),) if below else ())
    system, passages, question = fresh(1, 48), [fresh(2, 64), fresh(3, 80), fresh(4, 48)], fresh(5, 40)
    chunker = Chunker(16, 24, 32, STRUCTURE)

    def asked(order, end=()):
        """As by a connector, where hints name the passages."""
        tokens = [*system, *(token for number in order for token in passages[number]), *end]
        named = list(itertools.accumulate((len(passages[number]) for number in order), initial=len(system)))
        stops = {(len(tokens) - 1) // STEP * STEP} if engine.states else set()
        engine.chain = lambda given: extended(
            TokenChain(SPACE, chunker, named, sorted({*stops, len(tokens)} - {0})), given
        )
        return engine.ask(tokens, keep=(lambda stop: False) if end else None)[0]

    asked([0])
    asked([2, 1])
    if below:
        engine.start()
    search = engine.cache.ordering.begin(chunker, SPACE, as_tokens(system), [as_tokens(each) for each in passages])
    while engine.cache.ordering.waits(search):
        assert engine.work() or search.result
    hits = {order: max(0, asked(order, question) - 48) for order in itertools.permutations(range(3))}
    assert hits[2, 1, 0] == max(hits.values()) == 128
    if engine.states and below:  # their prompts are cut for their own sake too, and lower tiers are asked by cuts
        assert search.result.order == (0, 1, 2) and search.result.tokens == 0
    else:
        assert search.result.order == (2, 1, 0) and search.result.tokens == 128


def extended(chain, tokens):
    chain.extend(as_tokens(tokens))
    return chain
