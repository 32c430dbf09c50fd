"""Planes of states, and models without a layer that attends to all tokens."""

from types import SimpleNamespace

import pytest

import plane_engine
from hand_lanes import Lower
from plane_engine import END, SPACE, STATE, STATES, STEP, STRUCTURE, fresh, made
from ragkv.connectors.vllm.error_boundary import Faults
from ragkv.connectors.vllm.messages import Group
from ragkv.connectors.vllm.scheduler import SchedulerSide
from ragkv.connectors.vllm.turns import Conversations
from ragkv.kvstore.chunking import Chunker, TokenChain
from ragkv.kvstore.keys import as_tokens
from ragkv.kvstore.metrics import Metrics

WITH_STATES = [name for name in STATES if "states" in name]


@pytest.fixture(params=WITH_STATES)
def engine(request):
    return made(request.param)


def test_the_same_prompt_goes_on_where_the_engine_stopped_last_before_its_end(engine):
    first = fresh(1, 300)
    assert engine.ask(first) == (0, 0)
    assert engine.ask(first)[0] == 288 == 299 // STEP * STEP


def test_the_next_turn_goes_on_behind_the_answer(engine):
    first, answer = fresh(1, 300), fresh(2, 10)
    engine.ask(first, answer=answer)
    assert engine.ask([*first, *answer, *fresh(3, 40)])[0] == 310
    assert engine.ask([*first, *fresh(5, 40)])[0] == 300, "the prompt's own end"
    assert engine.ask([*first, *answer, *fresh(4, 40)])[0] == 310, "what the turn stored is cut elsewhere"


def test_a_prompts_end_stays_when_the_next_turn_is_cut_elsewhere(engine):
    first, answer = fresh(1, 300), fresh(2, 2)
    engine.ask(first, answer=answer)
    engine.ask([*first, *answer, 7])
    assert engine.ask([*first, *answer, *fresh(3, 40)])[0] == 302
    assert engine.ask([*first, *fresh(4, 40)])[0] == 300


def test_a_prompt_that_parts_before_any_state_is_computed(engine):
    first = fresh(1, 300)
    engine.ask(first)
    other = [*first[:150], *fresh(5, 100)]
    assert engine.ask(other) == (0, 150)
    assert engine.ask(other, computed=144)[0] == 240 - 144
    assert engine.ask(other, computed=240)[0] == 0, "the engine has as much itself"


def test_states_lie_below_memory_and_come_back_whole():
    for name in WITH_STATES:
        engine = made(name, lowers=(Lower(),))
        first, answer = fresh(1, 300), fresh(2, 10)
        engine.ask(first, answer=answer)
        engine.cache.close(1.0)
        engine.start()
        assert engine.ask(first)[0] == 288
        engine.forget()
        assert engine.ask([*first, *answer, *fresh(3, 40)])[0] == 310


def test_without_layers_that_attend_to_all_tokens_windows_lie_below_memory_too():
    engine = made("nothing but windows", lowers=(Lower(),))
    first = fresh(1, 300)
    engine.ask(first, answer=fresh(2, 10))
    assert engine.ask(first)[0] == 299
    engine.cache.close(1.0)
    engine.start()
    assert engine.ask(first)[0] == 299


@pytest.mark.parametrize("name", WITH_STATES)
def test_a_tail_below_that_is_another_prompts_hides_no_state(name, monkeypatch):
    """The same document with another question: the state is at the last stop before the document's end."""
    monkeypatch.setattr(plane_engine, "STEP", 64)
    document = [*fresh(1, 283), END]
    for again in ("restart", "forget"):
        engine = made(name, lowers=(Lower(),))
        engine.ask([*document, *fresh(2, 15)])
        if again == "restart":
            engine.cache.close(1.0)
            engine.start()
        else:
            engine.forget()
        assert engine.ask([*document, *fresh(3, 15)])[0] == 256


class Request(SimpleNamespace):
    """vLLM's, as far as the scheduler side looks at it."""

    def __init__(self, tokens, **more):
        super().__init__(
            request_id="r",
            all_token_ids=list(tokens),
            num_prompt_tokens=len(tokens),
            num_tokens=len(tokens),
            num_computed_tokens=0,
            kv_transfer_params=None,
            lora_request=None,
            cache_salt=None,
            mm_features=[],
            shared_prefix_boundary=0,
            block_hashes=[],
            **more,
        )

    def say(self, *tokens, computed):
        self.all_token_ids += tokens
        self.num_tokens, self.num_computed_tokens = len(self.all_token_ids), computed


def side_over(engine):
    metrics, groups = Metrics(), [Group(0, 0, STEP), Group(1, 1, STEP)]
    chunker = Chunker(16, 24, 32, STRUCTURE)
    return SchedulerSide(
        engine.cache, groups, 1, metrics, Faults(metrics), chunker=chunker, namespace_of=lambda request: SPACE
    )


@pytest.mark.parametrize("ahead", [0, 1], ids=["as far as its tokens", "one step ahead"])
def test_the_state_of_an_answers_end_is_kept_where_the_engine_has_it(ahead):
    """Asynchronous scheduling computes the last token too, before it is known that it is the last."""
    engine = made("states")
    side, tables = side_over(engine), [[*range(1, 8)], [0] * 6 + [7]]
    request = Request(fresh(1, 100))
    assert side.lookup(request, 0) == 0
    side.allocated(request, tables, 0)
    request.say(7, 8, 2, computed=102 + ahead)
    assert side.finished(request, tables)[0]
    stores = [(job.group, set((job.slots // STEP).tolist()), len(job.slots)) for job in side.take_orders().stores]
    assert stores == [(0, {*range(1, 8)}, 102 + ahead), (1, {7}, STATE.pages(1))]


@pytest.mark.parametrize("keeps", [True, False])
def test_vllm_stops_where_prompts_have_parted_if_a_state_can_be_kept_there(keeps):
    engine = made("states")
    first = fresh(1, 300)
    engine.ask(first)
    side = side_over(engine)
    hints = None if keeps else {"ragkv": {"store": False}}
    request = Request([*first[:150], *fresh(2, 60)])
    request.kv_transfer_params = hints
    assert side.lookup(request, 0) == 0
    assert request.shared_prefix_boundary == (144 if keeps else 0)


@pytest.mark.parametrize("offered", [True, False])
def test_a_state_that_a_forward_leaves_on_its_way_is_taken_where_vllm_offers_it(offered):
    """Layers of Mamba 2 leave the state at the last boundary within the step that computes the prompt's end."""
    engine = made("states")
    side, request, tables = side_over(engine), Request(fresh(1, 300)), [[*range(1, 20)], [0] * 18 + [7]]
    assert side.lookup(request, 0) == 0
    side.allocated(request, tables, 0)
    offers = {"r": [(1, 5, 288)]} if offered else {}
    new = SimpleNamespace(req_id="r", block_ids=tables, num_computed_tokens=0)
    orders = side.orders(
        SimpleNamespace(
            num_scheduled_tokens={"r": 300},
            total_num_scheduled_tokens=300,
            scheduled_new_reqs=[new],
            scheduled_cached_reqs=SimpleNamespace(req_ids=[]),
            kv_connector_block_state=SimpleNamespace(
                get_block_ids=lambda request: tables, boundary_state_offloads=offers
            ),
        )
    )
    states = [set((job.slots // STEP).tolist()) for job in orders.stores if job.group == 1]
    assert states == ([{5}] if offered else []) + [{7}]
    assert tables[1][17] == 0, "the request's table is left alone"


def test_turns_are_told_where_chunks_end_with_prompts():
    first = fresh(1, 100)
    next_turn = [*first, *fresh(2, 10), *fresh(3, 40)]
    turns = Conversations()
    for number, tokens in enumerate((first, next_turn), 1):
        chain = TokenChain(SPACE, Chunker(16, 24, 32, STRUCTURE), (), [96, len(tokens)])
        chain.extend(as_tokens(tokens))
        chain = chain.as_others()
        assert turns.turn(SPACE, chain) == number
        turns.remember(SPACE, chain, number)
