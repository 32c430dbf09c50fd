"""The questions of `bench answers`: answers are right, and in the passages."""

import json
import re

import pytest

from fusion_bench_tools import Talker, Words, text_of
from ragkv.benchmarks.internal.answers_questions import KINDS, build, draft, load_drafts

SIZE = 700  # of which each space in a table is one


def asked_of(number, passages=4, tokenizer=None, **change):
    made = draft(number, passages, SIZE, **change)
    return made, build(tokenizer or Words(), number, made, SIZE, **change)


def number_of(text):
    return int(text.replace(",", ""))


def passage_of(asked, title):
    """The text of the passage that says it is from there."""
    (found,) = (p for p in map(text_of, asked.trial.passages) if p.startswith(f"[{title}]\n"))
    return found


def test_the_same_number_and_seed_give_the_same_question():
    made, asked = asked_of(4)
    assert (made, asked) == asked_of(4)
    assert made.text != asked_of(4, seed=1)[0].text
    assert made.text != asked_of(7)[0].text


@pytest.mark.parametrize("number", range(9))
def test_passages_have_their_size_and_come_from_different_companies(number):
    made, asked = asked_of(number)
    assert asked.kind == made.kind == KINDS[number % 3]
    assert [len(passage) for passage in asked.trial.passages] == [SIZE] * 4
    assert len({source.title.split(" for ")[0] for source in made.sources}) == 4
    for source in made.sources:
        assert source.holding in passage_of(asked, source.title)
        assert passage_of(asked, source.title).endswith("\n\n")
    assert asked.text in text_of(asked.trial.question)
    assert asked.trial.behind == [asked.trial.system] * 4, "as ragkv ingest stores them"


def test_a_lookup_is_answered_where_the_company_is_told():
    seen = set()
    for number in range(0, 90, 3):
        made, asked = asked_of(number)
        seen.add(made.text.partition(": ")[2].partition(" in fiscal")[0])
        (holder,) = (source for source in made.sources if source.holding)
        assert made.text.startswith(f"{holder.title}: ")
        (answer,) = made.answers
        assert re.search(rf"(?<![\d,.]){re.escape(answer)}(?![\d])", passage_of(asked, holder.title))
    assert len(seen) >= 6


def test_a_comparison_names_the_company_with_more():
    places = set()
    for number in range(1, 60, 3):
        made, asked = asked_of(number)
        named = re.search(r"net sales, (\w+) or (\w+)\?", made.text).groups()
        titles = [source.title for source in made.sources]
        sales = {}
        for company in named:
            passage = passage_of(asked, next(title for title in titles if f" {company} " in title))
            told = re.search(r"Net sales in fiscal \d+ were \$([\d,]+) million|Net sales +\$ +([\d,]+)", passage)
            sales[company] = number_of(told[1] or told[2])
        assert made.answers == (max(sales, key=sales.get),)
        assert len(sales) == 2
        places.add(named.index(made.answers[0]))
    assert places == {0, 1}, "either may be named first"


def test_a_sum_is_of_two_rows_of_the_table():
    for number in range(2, 60, 3):
        made, asked = asked_of(number)
        first, second, year = re.search(
            r"net sales of (.+) and of (.+) together in fiscal (\d+),", made.text
        ).groups()
        holder = made.sources[0]
        lines = passage_of(asked, holder.title).splitlines()
        head = lines[lines.index("NET SALES BY SEGMENT") + 1].split()
        assert head == ["(in", "millions)", year, str(int(year) - 1), str(int(year) - 2)]
        rows = {name: line for name in (first, second) for line in lines if line.startswith(f"{name}  ")}
        values = [number_of(rows[name].removeprefix(name).split()[0]) for name in (first, second)]
        assert [number_of(answer) for answer in made.answers] == [sum(values)]


def test_orders_change_from_question_to_question():
    answered_at = set()
    for number in range(0, 60, 3):
        made, asked = asked_of(number)
        at = [n for n, p in enumerate(asked.trial.passages) if made.sources[0].title in text_of(p)[:100]]
        answered_at.update(at)
        assert sorted(asked.stored.passages) == sorted(asked.trial.passages)
        assert asked.stored.question == asked.trial.question
    assert answered_at == {0, 1, 2, 3}
    assert any(asked_of(n)[1].stored.passages != asked_of(n)[1].trial.passages for n in range(3))


def test_questions_stand_where_the_chat_template_has_them():
    asked = asked_of(0, tokenizer=Talker())[1]
    assert text_of(asked.trial.system).endswith("<user>")
    assert text_of(asked.trial.question).endswith("</><assistant>Answer:")
    assert text_of(asked_of(0)[1].trial.question).endswith("?\nAnswer:")


@pytest.mark.parametrize("tokens", [5, 40])
def test_passages_too_short_for_the_answer_are_refused(tokens):
    with pytest.raises(ValueError, match=f"--passage-tokens = {tokens}; allowed: "):
        build(Words(), 2, draft(2, 4, SIZE), tokens)


# --- real filings ---


@pytest.fixture
def folder(tmp_path):
    """Two filings of numbers, and questions about them: some cannot be asked."""
    for name in ("one", "two"):
        parts = [f"{name} {n} 1,{n:03} is not {n}.{n} but\n" + f"word {name} " * 30 for n in range(200)]
        (tmp_path / f"{name}.txt").write_text("\n\n".join(parts))
    lines = [("one", "Which?", "177"), ("one", "Who?", "nobody"), ("two", "What?", "33.33"), ("two", "How?", "")]
    (tmp_path / "questions.jsonl").write_text(
        "".join(json.dumps({"filing": f, "question": q, "answer": a}) + "\n" for f, q, a in lines)
    )
    return tmp_path


def test_real_questions_are_those_whose_answers_occur(folder):
    drafts, left_out = load_drafts(folder, 3)
    assert left_out == 1
    assert sorted((each.text, each.answers) for each in drafts) == [
        ("one: Which?", ("177",)),
        ("two: What?", ("33.33",)),
    ]
    for number, made in enumerate(drafts):
        assert (made.kind, len(made.sources)) == ("file", 3)
        asked = build(Words(), number, made, 120)
        (holder,) = (p for p in map(text_of, asked.trial.passages) if made.sources[0].holding in p)
        assert made.answers[0] in holder.split()


def test_a_number_is_not_found_within_a_larger_one(folder):
    drafts, _ = load_drafts(folder, 2)
    (made,) = (each for each in drafts if each.answers == ("177",))
    assert made.sources[0].holding.startswith("one 177 1,177 is not")


def test_a_folder_without_answers_is_refused(folder):
    (folder / "questions.jsonl").unlink()
    with pytest.raises(ValueError, match="answers that occur in the filings"):
        load_drafts(folder, 2)
