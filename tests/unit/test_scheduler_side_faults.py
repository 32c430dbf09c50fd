"""The scheduler side against the toy engine: preemption, aborts, what fails, what is full."""

import pytest

from ragkv.connectors.vllm.messages import StepReport
from ragkv.kvstore import metrics as m
from toy_engine import BLOCK, MIN, Engine, Request, closing, text


@pytest.fixture(params=[1, 2], ids=["1 worker", "2 workers"])
def engine(request):
    with closing(Engine(workers=request.param)) as made:
        yield made


def test_a_lookup_is_repeated_while_the_request_waits_for_blocks(engine):
    prompt = text(1, 60)
    engine.run(prompt)
    free, engine.free = engine.free, []
    request = engine.request(prompt)
    for _ in range(3):
        assert engine.step() == {}
    assert engine.pins == 1, "what was found is kept for it"
    engine.side.reset()  # what was found is gone, and is not loaded
    assert engine.pins == 0
    engine.free = free
    assert engine.step()[request.request_id] == 0


def test_what_is_stored_meanwhile_is_found_by_who_waits(engine):
    prompt = text(1, 60)
    waiter = Request("waiter", prompt)
    assert engine.side.lookup(waiter, 0) == 0
    engine.run(prompt)
    assert engine.side.lookup(waiter, 0) == 59
    assert engine.side.lookup(waiter, 16) == 43
    assert not engine.side.finished(waiter, [[]])[0]


def test_preempted_and_resumed_with_other_blocks(engine):
    prompt = text(1, 70)
    request = engine.request(prompt)
    answer = text(2, 30)
    for _ in range(10):
        engine.step(sample=answer)
    old = set(request.blocks)
    engine.preempt(request)
    stranger = engine.request(text(3, 100))  # takes the blocks
    engine.waiting.reverse()
    engine.waiting.sort(key=lambda r: r is request)
    assert engine.step(sample=answer)[request.request_id] >= 69
    assert old != set(request.blocks)
    for _ in range(12):
        engine.step(sample=answer, run=[request])
    tokens = list(request.all_token_ids)
    engine.finish(request), engine.finish(stranger)
    engine.settle()
    assert engine.run([*tokens, 5]) == len(tokens) - 1


def test_preempted_in_the_middle_of_its_prompt(engine):
    prompt = text(1, 150)
    request = engine.request(prompt)
    engine.step(budget=40)
    engine.preempt(request)
    hit = engine.step(budget=30)[request.request_id]
    assert MIN <= hit <= 40
    engine.step(budget=30)
    engine.finish(request)
    engine.settle()
    assert engine.run(prompt) == hit + 30


def test_aborted_before_it_was_taken_up(engine):
    engine.run(text(1, 60))
    free, engine.free = engine.free, []
    request = engine.request(text(1, 60))
    engine.step()
    engine.finish(request)
    engine.free = free
    assert not engine.held and request.request_id not in engine.side.requests


def test_aborted_while_it_is_prefilled(engine):
    prompt = text(1, 150)
    request = engine.request(prompt)
    engine.step(budget=45), engine.step(budget=40)
    engine.finish(request)
    assert engine.held, "its blocks are still read"
    engine.settle()
    assert not engine.held
    assert engine.run(prompt) == 85


def test_blocks_are_kept_until_the_last_store_is_done(engine):
    request = engine.request(text(1, 60))
    engine.step()
    for _ in range(9):
        engine.step()
    engine.finish(request)
    assert engine.held == {request.request_id: request}
    orders = engine.side.take_orders()
    assert orders.finishing == {request.request_id} == {job.request for job in orders.stores}
    assert {slot // BLOCK for job in orders.stores for slot in job.slots.tolist()} <= set(request.blocks)
    for index, worker in enumerate(engine.workers):
        worker.begin(orders)
        assert worker.take_finished() == (set(), set()), "nothing is copied yet"
        worker.carry_out()
        engine.outputs[index].append((worker.take_report(), *worker.take_finished(), set()))
    engine.deliver()
    assert not engine.held


def test_a_finish_with_nothing_new_keeps_no_blocks(engine):
    prompt = text(1, 60)
    engine.run(prompt)
    request = engine.request(prompt)
    engine.step()
    engine.finish(request)
    assert not engine.held


def test_a_failed_store_matches_never_and_is_tried_again(engine):
    prompt = text(1, 100)
    engine.fail("store", worker=len(engine.workers) - 1)  # one of them is enough
    engine.run(prompt)
    assert engine.memory.used == 0, "what failed keeps no room"
    engine.fail(worker=len(engine.workers) - 1)
    assert engine.run(prompt) == 0
    assert engine.run(prompt) == 99


def test_a_failed_store_before_others_that_hold(engine):
    prompt = text(1, 100)
    request = engine.request(prompt)
    engine.fail("store")
    engine.step(budget=60, deliver=False)
    engine.fail()
    engine.step(budget=60, deliver=False)  # behind chunks that never came
    engine.deliver()
    assert engine.side.lookup(Request("probe", prompt), 0) == 0
    engine.side.finished(Request("probe", prompt), [[]])
    engine.finish(request)
    engine.settle()
    assert engine.run(prompt) == 99  # the finish wrote them anew


@pytest.mark.parametrize("budget", [10**6, 20])
def test_a_failed_load_is_computed_and_nothing_that_rests_on_it_is_kept(engine, budget):
    prompt = text(1, 100)
    engine.run(prompt[:60])
    request = engine.request(prompt)
    engine.fail("load")
    assert engine.step(budget=budget)[request.request_id] == 60
    assert request.num_computed_tokens == 0, "vLLM starts anew"
    engine.fail()
    while request.num_tokens == 100:
        engine.step(budget=budget)
    assert engine.pins == 0
    engine.finish(request)
    engine.settle()
    assert engine.run(prompt) >= 60
    assert engine.run(prompt) == 99  # every load is checked


def test_a_load_that_fails_on_one_of_two_workers_is_a_recompute_once_both_have_ended():
    with closing(Engine(workers=2)) as engine:
        prompt = text(1, 150)
        engine.run(prompt[:60])
        request = engine.request(prompt)
        engine.fail("load", worker=1)
        engine.step(deliver=False)
        engine.fail(worker=1)
        engine.deliver(1)
        assert request.request_id in engine.loading, "the other worker may still write into its blocks"
        assert request.num_computed_tokens == 0
        engine.deliver(0)
        assert request in engine.waiting
        assert engine.step()[request.request_id] == 0, "it is not loaded again"
        engine.finish(request)
        engine.settle()
        assert engine.run(prompt) == 149


@pytest.mark.parametrize("budget", [10**6, 20])
def test_a_failed_load_and_an_abort_leave_nothing_behind(budget):
    """Not even in vLLM's own cache, which keeps the blocks of what was computed."""
    for aborts_at in range(4):
        with closing(Engine(own_cache=True)) as engine:
            prompt = text(1, 100)
            engine.run(prompt)
            engine.pool.forget()
            request = engine.request([*prompt, *text(2, 20)])
            engine.fail("load")
            for _ in range(aborts_at):
                engine.step(budget=budget)
                engine.fail()
            engine.finish(request)
            engine.settle()
            engine.fail()
            engine.run([*prompt, *text(3, 30)])  # what it runs on is checked
            engine.pool.forget()
            assert engine.run([*prompt, *text(3, 30)]) == 129


def test_a_failed_load_spoils_who_shares_the_blocks(engine):
    prompt, other = text(1, 64), text(2, 60)
    engine.run(prompt)
    first, second = engine.request(prompt), engine.request(prompt + other)
    engine.fail("load")
    engine.step(run=())
    engine.fail()
    engine.finish(first), engine.finish(second)
    engine.settle()
    assert engine.run(prompt + other) <= 64


def test_disappoint(engine, monkeypatch):
    prompt = text(1, 100)
    engine.run(prompt[:60])
    request = engine.request(prompt)

    def broken(_):
        raise KeyError("lost")

    with monkeypatch.context() as patch:
        patch.setattr(engine.memory, "touch", broken)
        assert engine.step()[request.request_id] == 60
    assert request.num_computed_tokens == 0 and request in engine.waiting, "vLLM was told to compute"
    engine.step()
    engine.finish(request)
    engine.settle()
    assert engine.run(prompt) <= 60
    assert engine.run(prompt) == 99


def test_disappoint_without_a_promise_spoils_nothing(engine):
    request = engine.request(text(1, 40))
    engine.side.lookup(request, 0)
    engine.side.fail_allocation(request, [[4, 5, 6]], 0)
    assert engine.side.take_orders().given_up == {}


def test_disappoint_keeps_vllms_own_blocks(engine):
    engine.run(text(1, 40))
    request = engine.request(text(1, 40))
    assert engine.side.lookup(request, 16) == 23
    engine.side.fail_allocation(request, [[4, 5, 6, 7, 8]], 23)
    assert engine.side.take_orders().given_up == {request.request_id: [6, 7, 8]}
    assert not engine.side.report(None, (), [request.request_id])


def test_reports_of_workers_come_apart():
    engine = Engine(workers=2)
    prompt = text(1, 100)
    engine.request(prompt)
    engine.step(deliver=False)
    engine.deliver(0)
    probe = Request("probe", prompt)
    assert engine.side.lookup(probe, 0) == 0, "one worker has not written yet"
    engine.deliver(1)
    assert engine.side.lookup(probe, 0) == 99
    engine.side.finished(probe, [[]])


def test_reports_of_unknown_jobs_are_ignored(engine):
    engine.side.report(StepReport({12345: 2}, {12345}))


def test_a_tier_without_room_refuses_and_stays_right():
    engine = Engine(pages=30)
    requests = [engine.request(text(seed, 100)) for seed in range(4)]
    engine.step(deliver=False)  # all is pinned: written, not reported
    engine.step(deliver=False)
    engine.deliver()
    assert engine.metrics.get(m.REFUSED_CHUNKS, m.NO_ROOM) >= 3
    for request in requests:
        engine.finish(request)
    engine.settle()
    assert sum(engine.run(text(seed, 100)) > 0 for seed in range(4)) >= 1
    engine.check()


def test_after_a_reset_nothing_old_matches(engine):
    prompt = text(1, 100)
    engine.run(prompt[:40])
    request = engine.request(prompt)
    engine.step(deliver=False, budget=70)  # load and store under way
    engine.side.reset()
    request.world = 9  # new weights; vLLM preempts all in this case
    engine.deliver()
    assert request.request_id in engine.loading, "its KV is not to be used, though it has come"
    engine.step()
    assert engine.step()[request.request_id] == 0
    engine.finish(request)
    engine.settle()
    engine.check()
    assert engine.memory.used == 0
    assert engine.run(prompt, world=9) == 0
    assert engine.run(prompt, world=9) == 99
