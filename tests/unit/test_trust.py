"""Weights that change in a running engine: what is served and kept before and after it is noticed."""

from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hand_lanes import Lower
from ragkv.connectors.vllm import calls
from ragkv.connectors.vllm.messages import (
    Group,
    Handshake,
    Question,
    StepOrders,
    StepReport,
    WeightsLook,
    WeightsSample,
)
from ragkv.connectors.vllm.sampling import PARTS
from ragkv.connectors.vllm.trust import Trust
from ragkv.connectors.vllm.weights import Rounds, WeightsWatch
from toy_engine import closing, text
from watched import Pool, Watched, own_models

PROMPTS = [text(seed, 96) for seed in range(3)] + [text(0, 60) + text(7, 50)]


@pytest.fixture(autouse=True, scope="module")
def looks():
    with own_models():
        yield


@pytest.fixture
def disk():
    return Lower()


@pytest.fixture
def engine(disk):
    with closing(Watched(lowers=[disk])) as made:
        yield made


def idle(engine, steps=6):
    for _ in range(steps):
        engine.step()
    engine.work()


def test_what_is_computed_is_written_down_once_a_round_has_confirmed_it(engine, disk):
    engine.request(PROMPTS[0])
    engine.step()
    engine.work()
    assert engine.side.unconfirmed and not disk.stored(), "it runs, and no round began after"
    engine.finish(engine.running[0])
    engine.settle()
    assert not engine.side.unconfirmed and disk.stored()
    engine.restart()
    assert engine.run(PROMPTS[0]) == 95


def test_a_running_engine_confirms_now_and_then(engine, disk):
    engine.request(PROMPTS[0])
    for _ in range(Rounds.EVERY + 5):
        engine.step(sample=[5] * 300)
        engine.work()
    assert disk.stored()


@pytest.mark.parametrize("why", ["a small memory", "a stop"])
def test_a_round_for_which_kv_waits_is_over_in_one_step(disk, why):
    """Else a small memory would have lost it by then, and an engine that is stopped would have ended."""

    class Small(Watched):
        memory_tokens = Rounds.SHARE * len(PROMPTS[0])

    with closing((Watched if why == "a stop" else Small)(lowers=[disk])) as engine:
        engine.request(PROMPTS[0])
        engine.step()
        engine.work()
        assert engine.side.unconfirmed and not disk.stored()
        engine.stopping = why == "a stop"
        for _ in range(2):  # a round and its answer; what follows from it
            engine.step(sample=[5] * 3)
            engine.work()
        assert engine.running and disk.stored()


def test_a_change_is_noticed_and_nothing_of_it_is_left(engine, disk):
    engine.run(PROMPTS[0])
    kept = disk.stored()
    assert kept
    engine.change(1)
    wrong = engine.request(PROMPTS[1])
    engine.step()
    engine.work()
    assert engine.side.unconfirmed and disk.stored() == kept
    engine.finish(wrong)
    engine.settle()
    assert disk.stored() == kept, "computed by others than its namespace says"
    assert engine.run(PROMPTS[0]) == engine.run(PROMPTS[1]) == 0, "and nothing of before is served"
    assert engine.run(PROMPTS[0]) == engine.run(PROMPTS[1]) == 95
    engine.change(0)
    idle(engine, Rounds.EVERY + 5)
    assert engine.run(PROMPTS[0]) == 95, "they came back to what is known to be theirs"
    assert engine.run(PROMPTS[1]) == 0


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.sampled_from(range(len(PROMPTS)))),
        st.tuples(st.just("begin"), st.sampled_from(range(len(PROMPTS)))),
        st.tuples(st.just("end"), st.just(0)),
        st.tuples(st.just("change"), st.sampled_from([0, 1, 2])),
        st.tuples(st.just("steps"), st.sampled_from([1, 2, 80])),
        st.tuples(st.sampled_from(["kill", "stop"]), st.sampled_from([0, 1])),
        st.tuples(st.just("call"), st.sampled_from([0, 1])),
        st.tuples(st.just("reset"), st.sampled_from([0, 1])),
    ),
    max_size=25,
)


@settings(max_examples=30, deadline=None)
@example([("change", 1), ("ask", 1)], 200, True)
@example([("change", 1), ("begin", 1), ("steps", 2), ("kill", 0)], 200, True)
@example([("change", 1), ("begin", 1), ("stop", 0)], 200, True)
@example([("change", 1), ("begin", 1), ("begin", 2), ("begin", 0)], 30, False)
@example([("ask", 0), ("change", 1), ("begin", 1), ("call", 1), ("end", 0)], 30, True)
@given(EVENTS, st.sampled_from([30, 200]), st.booleans())
def test_whatever_happens_nothing_wrong_is_served_once_it_was_noticed(events, pages, through):
    """Requests that begin before it is noticed may be wrong; what they leave behind is asked for later."""
    with closing(Watched(lowers=[Lower(through=through)], pages=pages)) as engine:
        for event, value in events:
            happen(engine, event, value)
        idle(engine, Rounds.EVERY + 5)
        for weights in (0, 1, 2):
            engine.change(weights)
            engine.trust.suspect()
            idle(engine, 2)
            assert engine.trusted == weights or not engine.trust.settled, "after a reset it waits for a request"
            for prompt in PROMPTS:
                engine.run(prompt)
            assert engine.trusted == weights
            engine.restart()
            for prompt in PROMPTS:
                engine.run(prompt)


def happen(engine, event, value):
    if event == "ask":
        engine.run(PROMPTS[value])
    elif event == "begin":
        engine.request(PROMPTS[value])
        engine.step()
    elif event == "end" and engine.running:
        engine.finish(engine.running[0])
    elif event == "steps":
        idle(engine, value)
    elif event == "change" and engine.weights == engine.trusted:  # what is undone unseen cannot be seen
        for request in [*engine.running, *engine.waiting, *engine.loading.values()]:
            engine.fused.add(request.request_id)
        engine.change(value)
    elif event == "call":
        happen(engine, "change", value)
        engine.trust.suspect()
    elif event in ("kill", "stop"):
        engine.weights = value
        engine.restart(None if event == "kill" else 5.0)
    elif event == "reset" and not engine.running and not engine.loading:
        engine.trust.doubt(running=bool(engine.side.requests))
        engine.side.reset()
        happen(engine, "change", value)


# --- the parts ---


NEW = SimpleNamespace(request_id="new")


class Side:
    unconfirmed, requests = True, frozenset({"r"})

    def __init__(self):
        self.confirmed, self.outdated = [], 0

    def confirm(self, number):
        self.confirmed.append(number)

    def outdate(self):
        self.outdated += 1


@pytest.fixture
def trust():
    made = Trust(b"e")
    made.begin([Handshake(None, rank=rank, weights=b"w" * 16) for rank in (0, 1)], None)
    return made


def test_a_round_confirms_when_all_ranks_have_found_nothing(trust):
    side = Side()
    assert trust.round() == 1
    assert trust.question(0, side)[:2] == (0, 1) and trust.round() == 2, (
        "what this step computes waits for the next"
    )
    assert trust.question(0, side)[:2] == (0, 0), "one at a time"
    trust.hear(StepReport(samples=[WeightsSample(1, 0, True)]), side)
    assert not side.confirmed
    trust.hear(StepReport(samples=[WeightsSample(1, 0, True), WeightsSample(1, 1, True)]), side)
    assert side.confirmed == [1] and not side.outdated
    assert trust.question(0, side)[:2] == (0, 2)


def test_one_rank_that_finds_something_is_enough(trust):
    side, before = Side(), trust.namespaces.engine
    trust.question(0, side)
    trust.hear(StepReport(samples=[WeightsSample(1, 1, False)]), side)
    assert side.outdated == 1 and not side.confirmed and trust.serves("new", 0) and not trust.serves("s", 1)
    look, sample = trust.question(1, side)[:2]
    assert look and not sample and trust.ready(NEW, side) is False
    trust.hear(StepReport(samples=[WeightsSample(1, 0, True)], looks=[WeightsLook(look, 0, b"v" * 16)]), side)
    assert not trust.ready(NEW, side)
    trust.hear(StepReport(looks=[WeightsLook(look, 1, b"v" * 16)]), side)
    assert trust.ready(NEW, side) and trust.namespaces.engine != before
    trust.over("r")


def test_a_round_waits_for_work_that_is_worth_it():
    rounds = Rounds(1)
    assert rounds.question(Rounds.ENOUGH, waiting=True) == 0, "nothing has been computed before this step"
    assert rounds.question(5, waiting=False) == 0
    assert rounds.question(5, waiting=True) == 1 and rounds.hear(WeightsSample(1, 0, True)) is True
    asked = [rounds.question(1, waiting=True) for _ in range(Rounds.EVERY + 1)]
    assert asked == [0] * (Rounds.EVERY - 1) + [2, 0]


def test_a_small_memory_does_not_wait_until_it_is_full():
    rounds = Rounds(1, memory_tokens=160)
    assert rounds.question(19, waiting=False) == 0 and rounds.question(1, waiting=True) == 0
    assert rounds.question(1, waiting=True) == 1


def test_an_answer_that_never_comes_is_asked_for_again():
    rounds = Rounds(1)
    assert rounds.question(0, waiting=True) == 1
    assert any(rounds.question(0, waiting=True) == 2 for _ in range(Rounds.LOST + 1))
    assert rounds.hear(WeightsSample(1, 0, True)) is None and rounds.hear(WeightsSample(2, 0, True)) is True


def test_a_fault_between_question_and_workers_loses_no_question(engine):
    engine.side.ask(Question(5))
    engine.side.invalidate_in_flight()
    assert engine.side.take_orders().asked.look == 5 and not engine.side.take_orders().asked.look


def test_an_answer_that_is_lost_is_asked_for_again_and_at_last_nobody_waits(trust):
    side = Side()
    trust.suspect()
    asked = [trust.question(1, side).look for _ in range(WeightsWatch.TRIES * (WeightsWatch.LOST + 2))]
    assert len(set(asked) - {0}) >= WeightsWatch.TRIES
    assert trust.ready(NEW, side) and not trust.serves("new", 0) and side.outdated == 1
    late = next(filter(None, (trust.question(0, side).look for _ in range(2 * WeightsWatch.LOST))))
    trust.hear(StepReport(looks=[WeightsLook(late, rank, b"w" * 16) for rank in (0, 1)]), side)
    assert trust.serves("new", 0) and trust.settled


def test_weights_that_could_not_be_looked_at_once_are_no_others(trust):
    side, known = Side(), trust.namespaces.engine

    def look(*found):
        number = next(filter(None, (trust.question(1, side).look for _ in range(2 * WeightsWatch.LOST))))
        trust.hear(StepReport(looks=[WeightsLook(number, rank, each) for rank, each in enumerate(found)]), side)
        return trust.namespaces.engine

    trust.suspect()
    lost = look(b"w" * 16, None)
    assert lost != known and trust.ready(NEW, side) and not trust.serves("new", 0), "nothing is kept meanwhile"
    assert trust.question(1, side).sample == 0 and trust.question(1, side).give_up
    assert look(None, None) not in (lost, known) and not trust.settled
    assert look(b"w" * 16, b"w" * 16) == known and trust.serves("new", 0), "its own KV, and nothing of between"


def test_what_is_known_does_not_wait_for_what_follows_from_it(trust):
    class Broken(Side):
        def outdate(self):
            raise OSError("half done")

    side, known = Broken(), trust.namespaces.engine
    trust.suspect()
    number = trust.question(1, side).look
    with pytest.raises(OSError):
        trust.hear(StepReport(looks=[WeightsLook(number, rank, b"v" * 16) for rank in (0, 1)]), side)
    assert trust.namespaces.engine != known
    trust.question(0, side)
    with pytest.raises(OSError):
        trust.hear(StepReport(samples=[WeightsSample(trust.round() - 1, 0, False)]), side)
    assert not trust.settled


def test_a_call_while_the_engine_sleeps_is_followed_by_no_look_before_a_request_comes(trust):
    """Its weights have no memory."""
    side = Side()
    trust.suspect()
    assert trust.question(0, side).look, "it is awake"
    trust.doubt(running=False)
    trust.suspect()
    assert trust.question(0, side) == (0, 0, False, True) and not trust.settled
    assert not trust.ready(NEW, side) and trust.question(0, side).look


@pytest.mark.parametrize("told", [False, True])
def test_a_worker_gives_up_a_round_when_it_is_told_so(engine, told):
    worker = engine.workers[0]
    worker.begin(StepOrders(asked=Question(sample=1), tokens=1))
    worker.begin(StepOrders(asked=Question(give_up=told), tokens=1))
    for _ in range(PARTS):
        worker.begin(StepOrders(tokens=1))
    report = worker.take_report()
    assert report is None if told else report.samples == [WeightsSample(1, 0, True)]


def test_a_request_that_vllm_does_not_let_wait_is_not_forgotten(trust):
    side = Side()
    trust.suspect()
    trust.ready(SimpleNamespace(request_id="hasty", skip_reading_prefix_cache=True), side)
    number = trust.question(1, side).look
    trust.bind(Pool(used=[1]))
    trust.hear(StepReport(looks=[WeightsLook(number, rank, b"v" * 16) for rank in (0, 1)]), side)
    trust.over("r")
    trust.serves("x", 16)
    assert not trust.allocated("x", [[1, 2]], [Group(0, 0, 16)]), "it has computed on other weights, and goes on"


def test_blocks_of_all_groups_of_layers_are_looked_at(trust):
    """One table has no block where its layers' window is past; what stands there is no block of anybody."""
    groups, pool = [Group(1, 0, 16), Group(0, 1, 32)], Pool(used=[1])
    pool.null_block = pool.blocks[0]
    trust.suspect()
    trust.bind(pool)
    trust.ready(SimpleNamespace(request_id="early", skip_reading_prefix_cache=True), Side())
    number = trust.question(1, Side()).look
    trust.hear(StepReport(looks=[WeightsLook(number, rank, b"v" * 16) for rank in (0, 1)]), Side())
    assert not trust.allocated("early", [[0, 2], [1, 3, 4]], groups)
    cached = SimpleNamespace(req_ids=["early"], new_block_ids=[([5], [6])])
    trust.scheduled(SimpleNamespace(scheduled_cached_reqs=cached))
    for name, window, full in (("a", [0, 5], [11]), ("b", [0, 12], [6]), ("c", [0, 2], [13])):
        trust.serves(name, 64)
        assert not trust.allocated(name, [window, full], groups), "a block of an old request"
        trust.over(name)
    trust.serves("d", 32)
    assert trust.allocated("d", [[0, 9], [10]], groups), "no block of theirs"


def test_an_adapter_replaced_while_a_request_of_it_runs_leaves_nothing_of_it(engine, disk, tmp_path):
    def write(weights):
        (tmp_path / "adapter_config.json").write_text("{}")
        (tmp_path / "adapter_model.safetensors").write_bytes(weights)
        return SimpleNamespace(lora_int_id=1, lora_path=str(tmp_path), load_inplace=weights != b"old")

    names, request = engine.trust.namespaces, engine.request(PROMPTS[0])
    request.lora_request = write(b"old")
    names.note_adapter(request.lora_request)
    engine.step(budget=48)
    engine.work()
    assert engine.side.unconfirmed
    names.note_adapter(write(b"new, and longer"))
    engine.step()
    engine.finish(request)
    engine.settle()
    assert not disk.stored() and not engine.memory.everything()


def test_a_call_to_the_workers_is_followed_by_a_look(monkeypatch, trust):
    class EngineCore:
        def collective_rpc(self, method, *args):
            if method is None:
                raise OSError("half done")
            return [method, *args]

        def add_lora(self, lora_request):
            if lora_request is None:
                raise OSError("no such adapter")
            return f"loaded {lora_request}"

    module = SimpleNamespace(EngineCore=EngineCore)
    monkeypatch.setitem(calls.sys.modules, "vllm.v1.engine.core", module)
    adapters = []
    other = calls.Calls(adapters.append, lambda: adapters.append("failed"))
    other.listen(), other.listen()
    trust.begin([Handshake(None, rank=0, weights=b"w" * 16)], None)
    assert trust.ready(NEW, Side()) and EngineCore().collective_rpc("reload_weights", 1) == ["reload_weights", 1]
    assert trust.ready(NEW, Side()) is False and trust.question(0, Side()).look
    assert other.new() and not other.new() and not other.slept()
    with pytest.raises(OSError):
        EngineCore().collective_rpc(None)
    assert other.new()
    EngineCore().collective_rpc("sleep", 1)
    assert other.slept() and not other.slept() and other.new()
    side = Side()
    assert trust.question(0, side).look == 0 and side.outdated == 1, "the weights may have no memory"
    assert EngineCore().add_lora("one") == EngineCore().add_lora(lora_request="one") == "loaded one"
    assert adapters == ["one", "one"] and not other.new()
    with pytest.raises(OSError):
        EngineCore().add_lora(None)
    assert adapters == ["one", "one", None, "failed"]
