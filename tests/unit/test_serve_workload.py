"""The chats of the serving benchmark: the same for the same seed, and what they are said to be."""

import math
from collections import Counter

import pytest

from ragkv.benchmarks.serve_workload import SYSTEM, Shape, choose_filings, make_sessions
from ragkv.benchmarks.tenk import Filing, Question
from ragkv.errors import ConfigError
from serve_tools import cut, filing

SHAPE = Shape(filings=3, turns=5, tokens=200, sessions=6)
FILINGS = [filing(number) for number in range(6)]


def kinds(sessions):
    return Counter(turn.kind for session in sessions for turn in session.turns)


def test_a_session_opens_a_filing_and_asks_on_in_the_same_chat():
    sessions = make_sessions(SHAPE, FILINGS, cut, 0)
    assert [session.id for session in sessions] == list(range(6))
    for session in sessions:
        named = FILINGS[session.id % 3]
        system, opening = session.turns[0].messages
        assert system == {"role": "system", "content": SYSTEM}
        name, text, question = opening["content"].split("\n\n", 1)[0], cut(named.text, 200), opening["content"]
        assert name == f"Annual report {named.name}:" and f"\n\n{text}\n\n{named.name[1:]}: what of" in question
        assert [turn.number for turn in session.turns] == [1, 2, 3, 4, 5]
        assert [turn.kind for turn in session.turns] == ["open", *["follow-up"] * 4]
        for before, after in zip(session.turns, session.turns[1:], strict=False):
            *history, answer, asked = after.messages
            assert tuple(history) == before.messages
            assert (answer["role"], asked["role"]) == ("assistant", "user")
        questions = [turn.messages[-1]["content"].split("\n\n")[-1] for turn in session.turns]
        assert len(set(questions)) == 5


def test_answers_in_the_chat_are_the_known_ones_or_sentences_of_the_filing():
    last = make_sessions(SHAPE, FILINGS, cut, 0)[0].turns[-1].messages
    for asked, answered in zip(last[1::2], last[2::2], strict=False):
        assert answered["content"] == f"It is {asked['content'].split()[-1].rstrip('?')}."
    sentence = "The company sold more of everything than in the year before."
    unknown = Filing("U", f"{sentence} {FILINGS[0].text}", (Question("What?", ""), Question("Who?", "")))
    chat = make_sessions(Shape(filings=1, turns=3, tokens=50), [unknown], cut, 0)[0].turns[-1].messages
    assert [message["content"] for message in chat[2::2]] == [sentence, sentence]


def test_the_same_seed_and_round_give_the_same_bytes_and_others_do_not():
    shape = Shape(filings=3, turns=5, tokens=200, rate=2, think=1, passages=0.5, switch=0.5)
    again = [make_sessions(shape, list(FILINGS), cut, 1) for _ in range(2)]
    assert again[0] == again[1]
    assert make_sessions(shape, FILINGS, cut, 0) != again[0]
    other = Shape(**(vars(shape) | {"seed": 1}))
    assert make_sessions(other, FILINGS, cut, 1) != again[0]


def test_more_passages_leave_times_and_questions_as_they_are():
    few, many = (
        make_sessions(Shape(3, 5, 6, 200, rate=2, think=1, passages=p), FILINGS, cut, 0) for p in (0, 0.5)
    )
    assert [(s.arrives, s.think) for s in few] == [(s.arrives, s.think) for s in many]
    assert [s.turns[0] for s in few] == [s.turns[0] for s in many]


@pytest.mark.parametrize("share, count", [(0, 0), (0.25, 6), (1, 24)])
def test_a_share_of_the_follow_up_turns_brings_passages_of_other_filings(share, count):
    sessions = make_sessions(Shape(3, 5, 6, 200, passages=share), FILINGS, cut, 0)
    assert kinds(sessions) == Counter(
        {"open": 6, "passages": count, "follow-up": 24 - count} if share else {"open": 6, "follow-up": 24}
    )
    texts = [cut(filing.text, 200) for filing in FILINGS[:3]]
    brought = Counter()
    for session in sessions:
        for turn in session.turns:
            if turn.kind == "passages":
                lead, *passages, question = turn.messages[-1]["content"].split("\n\n")
                assert lead == "Passages from annual reports:" and question.startswith(
                    f"{session.id % 3}: what of"
                )
                body = turn.messages[-1]["content"].split("\n\n", 1)[1].rsplit("\n\n", 1)[0]
                assert sum(passage in texts[session.id % 3] for passage in passages) == 0
                assert all(any(passage in text for text in texts) for passage in passages)
                brought[body] += 1
    if share == 1:  # the same few passages, in other orders
        assert len(brought) > 5
        assert len({frozenset(body.split("\n\n")) for body in brought}) < len(brought)


def test_a_share_of_the_sessions_goes_over_to_another_filing_half_way():
    sessions = make_sessions(Shape(3, 5, 6, 200, switch=0.5), FILINGS, cut, 0)
    assert kinds(sessions) == Counter({"open": 6, "follow-up": 21, "switch": 3})
    for session in sessions:
        for before, turn in zip(session.turns, session.turns[1:], strict=False):
            if turn.kind == "switch":
                assert turn.number == 3 and len(turn.messages) == 2
                names = [chat.messages[1]["content"].split("\n\n")[0] for chat in (before, turn)]
                assert names[0] != names[1] and set(names) <= {f"Annual report F{n}:" for n in range(3)}
                assert len(session.turns[3].messages) == 4


def test_rounds_have_filings_of_their_own_then_later_parts():
    long = [filing(number, 3000) for number in range(2)]
    shape = Shape(filings=2, turns=1, tokens=100)
    opened = [
        session.turns[0].messages[1]["content"].split("\n\n", 1)[1].rsplit("\n\n", 1)[0]
        for round_number in range(3)
        for session in make_sessions(shape, [*long, *FILINGS[2:4]], cut, round_number)
    ]
    assert [text.split("w")[0] for text in opened] == ["f0", "f1", "f2", "f3", "f0", "f1"]
    words = [word for text in opened for word in text.split()]
    assert len(words) == len(set(words)) == 600
    assert all(int(text.split()[0].split("w")[1]) % 20 == 0 for text in opened)  # from a paragraph on


def test_text_that_runs_out_is_one_clear_error():
    with pytest.raises(
        ConfigError, match=r"round 3 needs 9 texts of 200 tokens, the filings give 6; allowed: fewer"
    ):
        make_sessions(SHAPE, FILINGS, cut, 2)
    with pytest.raises(ConfigError, match=r"tokens = 400: F0 has no more than that; allowed: fewer"):
        make_sessions(Shape(tokens=400), FILINGS, cut, 0)


def test_sessions_arrive_and_think_as_often_as_asked():
    many = Shape(filings=1, turns=3, sessions=4000, tokens=20, rate=5, think=2)
    sessions = make_sessions(many, FILINGS, cut, 0)
    arrivals = [session.arrives for session in sessions]
    assert arrivals == sorted(arrivals) and arrivals[0] == 0
    assert arrivals[-1] / len(arrivals) == pytest.approx(1 / 5, rel=0.1)
    thought = [pause for session in sessions for pause in session.think]
    assert len(thought) == 8000 and sum(thought) / len(thought) == pytest.approx(2, rel=0.1)
    assert {(s.arrives, s.think) for s in make_sessions(SHAPE, FILINGS, cut, 0)} == {(0.0, (0.0,) * 4)}


@pytest.mark.parametrize(
    "name, value",
    [
        *((name, 0) for name in ("filings", "turns", "sessions", "tokens", "concurrency", "rate")),
        ("answer_tokens", -1),
        ("rate", math.nan),
        ("think", -1),
        ("think", math.inf),
        ("passages", 1.1),
        ("switch", -0.1),
    ],
)
def test_a_shape_that_cannot_be_is_named(name, value):
    with pytest.raises(ConfigError, match=rf"{name} = {value}; allowed: "):
        Shape(**{name: value})


@pytest.mark.parametrize("more", [{"filings": 1}, {"turns": 1}])
def test_nobody_switches_without_another_filing_or_turn(more):
    with pytest.raises(ConfigError, match=r"switch = 0.5; allowed: only 0"):
        Shape(switch=0.5, **more)


def test_generated_filings_are_as_many_as_the_rounds_need_and_no_seed_shares_one(tmp_path):
    shape = Shape(filings=2, tokens=300)
    chosen = choose_filings(None, shape, 3)
    others = choose_filings(None, Shape(filings=2, tokens=300, seed=1), 3)
    assert len({filing.text for filing in [*chosen, *others]}) == 12
    for round_number in range(3):
        assert len(make_sessions(shape, chosen, cut, round_number)) == 2
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name} and no more")
    named = [[f.name for f in choose_filings(tmp_path, Shape(filings=2, seed=seed), 9)] for seed in (0, 1)]
    assert named == [["a", "b", "c"], ["c", "a", "b"]]
