"""The prompts of `internal fusion`."""

import pytest

from fusion_bench_tools import Talker, Words, text_of
from ragkv.benchmarks.internal.fusion_trials import STORED, TEXTS, Shape, build_trial, choose_filings
from ragkv.benchmarks.tenk import Filing, Question


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("stored", STORED)
def test_a_trial_has_the_passages_it_is_asked_for(text, stored):
    shape = Shape(4, 64, stored, text, 24)
    filings = choose_filings(None, 3, shape)
    for number in range(3):
        trial = build_trial(Words(), filings, number, shape)
        assert trial == build_trial(Words(), filings, number, shape)
        assert [len(passage) for passage in trial.passages] == [64] * 4
        assert len({tuple(passage) for passage in trial.passages}) == 4
        for span, passage in zip(trial.documents(), trial.passages, strict=True):
            assert trial.prompt[span["start"] : span["end"]] == list(passage)
        for (prompt, (span,)), before, passage in zip(trial.prefills(), trial.behind, trial.passages, strict=True):
            assert prompt == [*before, *passage]
            assert (span["start"], span["end"]) == (len(before), len(prompt))
        lengths = {"prefix": len(trial.system), "alone": 0, "elsewhere": len(trial.system) + 64}
        assert {len(before) for before in trial.behind} == {lengths[stored]}
        ids = [each["id"] for each in trial.documents()]
        assert ids == [span["id"] for _, (span,) in trial.prefills()]
        assert len({*ids, "trial 9#0"}) == 5


def test_what_stands_elsewhere_is_before_no_passage_of_the_prompt():
    shape = Shape(4, 64, "elsewhere")
    filings = choose_filings(None, 1, shape)
    trial = build_trial(Words(), filings, 0, shape)
    prompt = text_of(trial.prompt)
    assert all(text_of(before[len(trial.system) :]) not in prompt for before in trial.behind)
    assert len({tuple(before) for before in trial.behind}) == 4
    unrelated = [filing.text for filing in filings[4:]]
    assert all(text_of(before[len(trial.system) : -1]) in "".join(unrelated) for before in trial.behind)


def test_one_passage_holds_the_answer_and_their_order_changes():
    shape = Shape(5, 300)
    filings = choose_filings(None, 8, shape)
    places = []
    for number in range(8):
        trial = build_trial(Words(), filings, number, shape)
        asked = filings[number].questions[number % len(filings[number].questions)]
        holders = [n for n, passage in enumerate(trial.passages) if asked.answer in text_of(passage)]
        assert holders
        assert asked.text in text_of(trial.question)
        assert all(text_of(passage).endswith("\n\n") for passage in trial.passages)
        assert trial.continuation is None
        places += holders
    assert {0, 4} <= set(places)
    assert sum(place == 4 for place in places) < 4


def test_running_text_goes_on_through_passages_question_and_continuation():
    shape = Shape(6, 64, "prefix", "running", 40)
    filings = choose_filings(None, 1, shape)
    trial = build_trial(Words(), filings, 0, shape)
    assert text_of(trial.prompt[len(trial.system) :] + trial.continuation) in filings[0].text
    assert len(trial.continuation) == 40
    assert trial.system[0] == Words.bos_token_id


def test_passages_stand_where_the_chat_template_has_them():
    shape = Shape(2, 64)
    trial = build_trial(Talker(), choose_filings(None, 1, shape), 0, shape)
    assert text_of(trial.system).endswith("</><user>")
    assert text_of(trial.question).startswith("Question: ") and text_of(trial.question).endswith("</><assistant>")


def test_a_short_filing_gives_its_end_or_an_error():
    filing = Filing("SMALL", "x" + " x" * 30 + "\n\ny" + " z" * 19, (Question("Why?", "z z"),))
    (passage,) = build_trial(Words(), [filing], 0, Shape(1, 25)).passages
    assert text_of(passage) == " x" * 3 + "\n\ny" + " z" * 19 + "\n\n"
    with pytest.raises(ValueError, match="SMALL has 52 tokens; a trial needs 59 of it"):
        build_trial(Words(), [filing], 0, Shape(1, 60))
