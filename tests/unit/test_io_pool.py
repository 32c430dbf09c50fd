"""Lanes: order, outcomes on the draining thread, and jobs that hang (until an event that the test sets)."""

import threading

import pytest

from ragkv.kvstore.io_pool import Completions, Lane, Outcome, run

PATIENCE = 30.0  # seconds after which a test has failed; none waits that long


@pytest.fixture
def completions():
    return Completions()


@pytest.fixture
def made(completions):
    """Makes lanes; whatever a test does, their jobs are let go and their threads end."""
    lanes, gate = [], threading.Event()

    def make(threads=1):
        lanes.append(Lane("test", threads, completions))
        return lanes[-1]

    yield make, gate
    gate.set()
    assert all(lane.close(PATIENCE) for lane in lanes)


def started():
    """The threads of all lanes."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("ragkv-test-")]


def drain(completions, results, count):
    while len(results) < count:
        assert completions.drain(PATIENCE), "an outcome never came"


def test_one_thread_keeps_the_order(made, completions):
    lane, ran, came = made[0](), [], []
    for number in range(200):
        lane.submit(lambda number=number: ran.append(number) or number, lambda outcome: came.append(outcome.value))
    drain(completions, came, 200)
    assert ran == came == list(range(200))


def test_outcomes_are_handed_over_where_they_are_drained(made, completions):
    lane, jobs, dones = made[0](2), set(), []
    for _ in range(20):
        lane.submit(
            lambda: jobs.add(threading.current_thread().name), lambda _: dones.append(threading.current_thread())
        )
    assert lane.close(PATIENCE)
    assert dones == [], "nothing is handed over before somebody drains"
    assert completions.drain() and set(dones) == {threading.current_thread()} and len(dones) == 20
    assert jobs <= {"ragkv-test-0", "ragkv-test-1"}
    assert not completions.drain()


def test_several_threads_run_side_by_side(made, completions):
    """Three jobs that all wait for one another."""
    lane, meet, came = made[0](3), threading.Barrier(3), []
    for _ in range(3):
        lane.submit(lambda: meet.wait(PATIENCE), came.append)
    drain(completions, came, 3)
    assert all(outcome.error is None for outcome in came)


def test_an_exception_is_an_outcome_and_the_lane_goes_on(made, completions):
    lane, came, error = made[0](), [], ValueError("broken")

    def fail():
        raise error

    lane.submit(fail, came.append)
    lane.submit(lambda: 7, came.append)
    drain(completions, came, 2)
    assert came[0].error is error and came[0].value is None
    assert came[1].value == 7 and came[1].error is None
    assert all(outcome.seconds >= 0 for outcome in came)


def test_run_tells_value_error_and_time(monkeypatch):
    ticks = iter([1.0, 1.25, 2.0, 4.5])
    monkeypatch.setattr("ragkv.kvstore.io_pool.time.perf_counter", lambda: next(ticks))
    assert run(lambda: "value") == Outcome("value", None, 0.25)
    failed = run(lambda: {}["missing"])
    assert (failed.value, type(failed.error), failed.seconds) == (None, KeyError, 2.5)


def test_what_is_no_fault_of_a_job_goes_through():
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stop)


def test_what_an_outcome_leads_to_is_drained_too(made, completions):
    """A job that is submitted by an outcome comes in the same drain or the next; none is lost."""
    lane, came = made[0](), []

    def again(outcome):
        came.append(outcome.value)
        if outcome.value < 5:
            lane.submit(lambda: outcome.value + 1, again)

    lane.submit(lambda: 0, again)
    drain(completions, came, 6)
    assert came == list(range(6))


def test_an_empty_drain_does_not_wait(completions):
    assert completions.drain() is False
    assert completions.drain(0.0) is False
    completions.post(lambda outcome: None, Outcome(None, None, 0.0))
    assert completions.drain(PATIENCE) is True


def test_a_waiting_drain_wakes_with_the_first_outcome(made, completions):
    make, gate = made
    lane, came, waiting = make(), [], threading.Event()
    lane.submit(lambda: gate.wait(PATIENCE), came.append)

    def release():
        waiting.wait(PATIENCE)
        gate.set()

    other = threading.Thread(target=release)
    other.start()
    waiting.set()
    assert completions.drain(PATIENCE) and came[0].value is True
    other.join(PATIENCE)


def test_threads_are_daemons_and_start_with_the_first_job(made, completions):
    lane, came = made[0](2), []
    assert not started()
    lane.submit(lambda: threading.current_thread().daemon, came.append)
    drain(completions, came, 1)
    assert came[0].value is True
    assert [thread.daemon for thread in started()] == [True, True]


def test_close_finishes_what_was_submitted_and_takes_no_more(made, completions):
    lane, ran = made[0](), []
    for number in range(50):
        lane.submit(lambda number=number: ran.append(number), lambda outcome: None)
    assert lane.close(PATIENCE)
    lane.submit(lambda: ran.append("late"), lambda outcome: ran.append("late"))
    assert lane.close(PATIENCE) and lane.close(0.0), "a second close finds nothing to do"
    completions.drain()
    assert ran == list(range(50))


def test_a_lane_without_jobs_closes_at_once(made):
    lane = made[0]()
    assert lane.close(0.0)
    lane.submit(lambda: None, lambda outcome: None)
    assert not started()


def test_close_does_not_wait_for_a_job_that_hangs(made, completions, monkeypatch):
    """Its wait for the threads is bounded by what is left of the seconds, on a clock that the test sets."""
    make, gate = made
    lane, began, came = make(2), threading.Event(), []
    lane.submit(lambda: began.set() or gate.wait(PATIENCE), came.append)
    assert began.wait(PATIENCE)
    waits, clock = [], iter([100.0, 100.0, 103.0])
    monkeypatch.setattr("ragkv.kvstore.io_pool.time.monotonic", lambda: next(clock))
    for thread in started():
        monkeypatch.setattr(thread, "join", waits.append)
    assert lane.close(2.0) is False
    assert waits == [2.0, 0.0], "the second thread gets what the first has left"
    monkeypatch.undo()
    gate.set()
    drain(completions, came, 1)
    assert came[0].value is True and lane.close(PATIENCE)


def test_abandon_drops_what_has_not_begun(made, completions):
    make, gate = made
    lane, began, ran, came = make(), threading.Event(), [], []
    lane.submit(lambda: began.set() or gate.wait(PATIENCE), came.append)
    for number in range(10):
        lane.submit(lambda number=number: ran.append(number), came.append)
    assert began.wait(PATIENCE)
    assert lane.close(0.0) is False
    lane.abandon()
    gate.set()
    assert lane.close(PATIENCE), "its thread ends behind the job that had begun"
    completions.drain()
    assert ran == [] and [outcome.value for outcome in came] == [True]


def test_outcomes_of_all_lanes_come_through_one_queue(made, completions):
    make, _ = made
    came = []
    for lane in (make(), make(3)):
        for _ in range(20):
            lane.submit(lambda: 1, came.append)
    drain(completions, came, 40)
    assert sum(outcome.value for outcome in came) == 40
