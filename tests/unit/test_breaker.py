"""The circuit breaker against a naive model, on a clock that the test sets."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from ragkv.kvstore.breaker import Breaker, State

FAILURES, FIRST, LONGEST = 3, 0.5, 4.0


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Model:
    """The history of what was told, from which the state is read anew each time."""

    def __init__(self):
        self.state, self.row, self.trials, self.opened = State.CLOSED, 0, 0, 0.0

    def told(self, event, now):
        if event == "succeeded" and self.state is not State.OPEN:
            self.state, self.row, self.trials = State.CLOSED, 0, 0
        elif event == "trial" and self.due(now):
            self.state = State.HALF_OPEN
        elif event in ("failed", "trip") and self.state is State.HALF_OPEN:
            self.state, self.opened, self.trials = State.OPEN, now, self.trials + 1
        elif event in ("failed", "trip") and self.state is State.CLOSED:
            self.row += 1 if event == "failed" else FAILURES
            if self.row >= FAILURES:
                self.state, self.opened = State.OPEN, now

    def due(self, now):
        rest = FIRST
        for _ in range(self.trials):
            rest = min(2 * rest, LONGEST)
        return self.state is State.OPEN and now >= self.opened + rest


steps = st.one_of(
    st.sampled_from(["succeeded", "failed", "failed", "trip", "trial"]), st.sampled_from([0.25, 0.5, 1.0, 4.0])
)


@settings(max_examples=500, deadline=None)
@given(st.lists(steps, max_size=60))
def test_states(events):
    clock, model = Clock(), Model()
    breaker = Breaker(clock, FAILURES, FIRST, LONGEST)
    for event in events:
        if isinstance(event, float):
            clock.now += event
        elif event == "trial":
            if breaker.due:
                breaker.begin_trial()
            model.told(event, clock.now)
        else:
            getattr(breaker, event)()
            model.told(event, clock.now)
        assert breaker.state is model.state
        assert breaker.due == model.due(clock.now)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def breaker(clock):
    return Breaker(clock, FAILURES, FIRST, LONGEST)


def test_failures_count_in_a_row_only(breaker):
    for _ in range(5):
        breaker.failed()
        breaker.failed()
        breaker.succeeded()
    assert breaker.state is State.CLOSED
    for _ in range(FAILURES):
        assert breaker.state is State.CLOSED
        breaker.failed()
    assert breaker.state is State.OPEN


def test_each_failed_trial_doubles_the_rest_up_to_the_longest(breaker, clock):
    breaker.trip()
    rests = []
    for _ in range(6):
        start = clock.now
        while not breaker.due:
            clock.now += 0.25
        rests.append(clock.now - start)
        breaker.begin_trial()
        assert not breaker.due, "one trial at a time"
        breaker.failed()
    assert rests == [0.5, 1.0, 2.0, 4.0, 4.0, 4.0]


def test_a_good_trial_closes_and_the_next_rest_is_short_again(breaker, clock):
    breaker.trip()
    for _ in range(3):
        clock.now += LONGEST
        breaker.begin_trial()
        breaker.failed()
    clock.now += LONGEST
    breaker.begin_trial()
    breaker.succeeded()
    assert breaker.state is State.CLOSED and not breaker.due
    breaker.failed()
    assert breaker.state is State.CLOSED, "failures before the rest are forgotten"
    breaker.trip()
    clock.now += FIRST
    assert breaker.due


def test_late_words_count_for_nothing_while_it_rests(breaker, clock):
    breaker.trip()
    breaker.succeeded()
    assert breaker.state is State.OPEN
    clock.now += FIRST / 2
    breaker.failed()
    breaker.trip()
    clock.now += FIRST / 2
    assert breaker.due, "late failures do not prolong the rest"


def test_a_trip_ends_a_trial_like_a_failure(breaker, clock):
    breaker.trip()
    clock.now += FIRST
    breaker.begin_trial()
    breaker.trip()
    clock.now += FIRST
    assert breaker.state is State.OPEN and not breaker.due
    clock.now += FIRST
    assert breaker.due


def test_the_values_of_the_states_go_into_the_metrics():
    assert [(state.name, state.value) for state in State] == [("CLOSED", 0), ("HALF_OPEN", 1), ("OPEN", 2)]
