"""After a reset: whether the weights are those of the start, as far as the scheduler side can know."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragkv.connectors.vllm.identity import Namespaces
from ragkv.connectors.vllm.messages import WeightsLook
from ragkv.connectors.vllm.weights import WeightsWatch, combine

A, B, C = (bytes([number]) * 16 for number in (1, 2, 3))


@pytest.fixture
def watch():
    return WeightsWatch({0: A, 1: B})


def ask(watch):
    """A request waits: the number of the question."""
    watch.want()
    return watch.question()


def look(watch, first=A, second=B):
    """One doubt, with these answers."""
    watch.doubt()
    number = ask(watch)
    assert number and watch.hear(WeightsLook(number, 0, first)) is None and not watch.settled
    return watch.hear(WeightsLook(number, 1, second))


def test_sleep_and_wake_keep_everything(watch):
    assert watch.settled and look(watch) == look(watch) == "same"
    assert watch.settled and watch.current == combine({0: A, 1: B})


@pytest.mark.parametrize("answers", [(A, C), (C, B), (B, A)])
def test_other_weights_on_any_rank_are_others(watch, answers):
    assert look(watch, *answers) == "changed" and watch.current == combine(dict(enumerate(answers)))
    assert look(watch, *answers) == "same"
    assert look(watch) == "changed" and watch.current == combine({0: A, 1: B}), "they came back"


def test_nothing_is_asked_until_a_request_waits(watch):
    """The pause may not be over, and the update still to come."""
    watch.want()
    assert watch.question() == 0, "no doubt"
    watch.doubt()
    assert watch.question() == 0
    watch.want()
    assert watch.question() and watch.question() == 0, "once"


def test_answers_to_an_earlier_question_do_not_count(watch):
    watch.doubt()
    old = ask(watch)
    watch.hear(WeightsLook(old, 0, A))
    watch.doubt()
    assert watch.hear(WeightsLook(old, 1, B)) is None and not watch.settled
    new = ask(watch)
    assert watch.hear(WeightsLook(new, 0, A)) is None, "the first rank's old answer is forgotten"
    assert watch.hear(WeightsLook(new, 1, B)) == "same"


@pytest.mark.parametrize("first", [{}, {0: None}])
def test_weights_that_were_never_known_cannot_be_the_same(first):
    watch = WeightsWatch(first or {0: None})
    watch.doubt()
    assert watch.hear(WeightsLook(ask(watch), 0, A)) == "unknown"


def test_a_rank_that_cannot_look_leaves_doubt(watch):
    assert look(watch, A, None) == "unknown" and watch.settled


def test_ranks_count_in_their_order_and_not_in_that_of_their_answers():
    assert combine({0: A, 1: B}) == combine({1: B, 0: A}) != combine({0: B, 1: A})
    assert combine({0: A, 1: A}) != combine({0: A}) and combine({0: A, 1: None}) is combine({}) is None


@given(st.lists(st.sampled_from(["doubt", "ask", "first", "second", "change"]), max_size=40))
def test_what_is_settled_is_what_the_workers_had_last(events):
    """Weights change only after a doubt and before its question, as vLLM has it."""
    watch, weights, number = WeightsWatch({0: A, 1: B}), A, 0
    for event in events:
        if event == "doubt":
            watch.doubt()
            number = 0
        elif event == "change" and not watch.settled and not number:
            weights = C if weights == A else A
        elif event == "ask" and not watch.settled and not number:
            number = ask(watch)
        elif event in ("first", "second") and number:
            watch.hear(WeightsLook(number, 0, weights) if event == "first" else WeightsLook(number, 1, B))
        if watch.settled:
            assert watch.current == combine({0: weights, 1: B})


def test_weights_that_come_back_find_their_namespace():
    request = SimpleNamespace(prompt_embeds=None, lora_request=None, mm_features=[], cache_salt=None)
    spaces, again = Namespaces(b"engine"), Namespaces(b"engine")
    spaces.set_weights("a")
    first = spaces.of(request)
    spaces.set_weights("c")
    changed = spaces.of(request)
    assert changed != first
    spaces.set_weights("b")
    assert spaces.of(request) not in (first, changed)
    again.set_weights("c")
    assert again.of(request) == changed, "the same for another engine with these weights"
    spaces.set_weights("a")
    assert spaces.of(request) == first
