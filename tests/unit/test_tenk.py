import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from ragkv.benchmarks.tenk import MIN_QUESTIONS, Filing, Question, generate_filing, load_filings

GOLDEN_SHA256 = "67f691d939676ad976199e77e4a46ba268b2034a53b99cad2d8e4aad7f779d25"
SEEDS = range(8)


def sha256(filing: Filing) -> str:
    return hashlib.sha256(filing.text.encode()).hexdigest()


def table(filing: Filing, title: str) -> dict[str, list[int]]:
    """A table's rows by label, newest year first, with amounts per share in cents."""
    (block,) = [block for block in filing.text.split("\n\n") if block.startswith(title)]
    rows = {}
    for line in block.splitlines()[2:]:
        cells = line[52:].replace("$", "").replace(",", "").replace("(", "-").replace(")", "").split()
        rows[line[:52].strip()] = [int(cell.replace(".", "")) for cell in cells]
    return rows


def add(*columns: list[int]) -> list[int]:
    return [sum(cells) for cells in zip(*columns, strict=True)]


def subtract(column: list[int], *others: list[int]) -> list[int]:
    return [cell - other for cell, other in zip(column, add(*others), strict=True)]


def test_text_is_pinned() -> None:
    assert sha256(generate_filing(seed=7, words=2000)) == GOLDEN_SHA256


def test_different_seeds_give_different_companies_and_numbers() -> None:
    filings = [generate_filing(seed, 500) for seed in range(50)]
    assert len({filing.name for filing in filings}) == 50
    assert len({filing.text for filing in filings}) == 50
    assert len({filing.questions[0].answer for filing in filings}) > 45


@pytest.mark.parametrize("seed", SEEDS)
def test_statements_add_up(seed: int) -> None:
    filing = generate_filing(seed)
    income = table(filing, "CONSOLIDATED STATEMENTS OF INCOME")
    assert income["Gross profit"] == subtract(income["Net sales"], income["Cost of sales"])
    segments = table(filing, "NET SALES BY SEGMENT")
    assert segments.pop("Total net sales") == income["Net sales"] == add(*segments.values())
    balance = table(filing, "CONSOLIDATED BALANCE SHEETS")
    assert balance["Total assets"] == balance["Total liabilities and equity"]
    assert balance["Total assets"] == add(balance["Total liabilities"], balance["Total shareholders' equity"])
    cash = table(filing, "CONSOLIDATED STATEMENTS OF CASH FLOWS")
    closing, opening = cash["Cash at end of year"], cash["Cash at beginning of year"]
    assert closing == add(opening, cash["Net change in cash"]) and opening[:2] == closing[1:]
    assert balance["Cash and cash equivalents"] == closing[:2]


@pytest.mark.parametrize("words", [300, 2000])
@pytest.mark.parametrize("seed", SEEDS)
def test_answers_occur_in_the_text(seed: int, words: int) -> None:
    filing = generate_filing(seed, words)
    assert len({question.text for question in filing.questions}) >= MIN_QUESTIONS
    for question in filing.questions:
        assert question.answer
        assert question.answer in filing.text


def test_answers_are_those_of_the_statements() -> None:
    filing = generate_filing(5, 2000)
    answers = {question.text.split(" in fiscal")[0]: question.answer for question in filing.questions}
    income = table(filing, "CONSOLIDATED STATEMENTS OF INCOME")
    cash = table(filing, "CONSOLIDATED STATEMENTS OF CASH FLOWS")
    segments = table(filing, "NET SALES BY SEGMENT")
    del segments["Total net sales"]
    assert answers["What were net sales"] == f"{income['Net sales'][0]:,}"
    spent = -cash["Additions to property, plant and equipment"][0]
    assert answers["What was capital expenditure"] == f"{spent:,}"
    largest = max(segments, key=lambda name: segments[name][0])
    assert answers["Which segment had the largest net sales"] == largest


@pytest.mark.parametrize("words", [300, 500, 2000, 10_000, 50_000])
def test_length_is_about_what_was_asked_for_and_no_long_paragraph_is_repeated(words: int) -> None:
    filing = generate_filing(1, words)
    assert 0.75 * words <= len(filing.text.split()) <= 1.25 * words
    assert table(filing, "CONSOLIDATED STATEMENTS OF INCOME")["Net sales"]
    paragraphs = Counter(p for p in filing.text.split("\n\n") if len(p) > 40)
    assert len(paragraphs) > words // 100 and paragraphs.most_common(1)[0][1] == 1


def write_questions(folder: Path, *lines: str) -> None:
    (folder / "questions.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")


def test_filings_load_in_order_with_generic_questions(tmp_path: Path) -> None:
    (tmp_path / "B_2023_10K.txt").write_text("the second", "utf-8")
    (tmp_path / "A_2023_10K.txt").write_bytes(b"caf\xe9")
    (tmp_path / "notes.md").write_text("not a filing", "utf-8")
    first, second = load_filings(tmp_path)
    assert (first.name, first.text) == ("A_2023_10K", "caf\N{REPLACEMENT CHARACTER}")
    assert (second.name, second.text) == ("B_2023_10K", "the second")
    assert len(set(first.questions)) == MIN_QUESTIONS
    assert {question.answer for question in first.questions} == {""}
    assert not any("{" in question.text for question in first.questions)


def test_questions_of_a_filing_come_first_and_are_all_kept(tmp_path: Path) -> None:
    for name in ("A", "B"):
        (tmp_path / f"{name}.txt").write_text(name, "utf-8")
    asked = [Question(f"Question\u2028{i}?", f"answer {i}") for i in range(MIN_QUESTIONS + 2)]
    lines = [{"filing": "A", "question": q.text, "answer": q.answer, "id": 1} for q in asked]
    lines.append({"filing": "B", "question": "Who?", "answer": "B"})
    write_questions(tmp_path, *(json.dumps(line, ensure_ascii=False) for line in lines))
    first, second = load_filings(tmp_path)
    assert first.questions == tuple(asked)
    assert second.questions[0] == Question("Who?", "B")
    assert len(second.questions) == MIN_QUESTIONS


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '"text"',
        '{"filing": "A", "question": "?"}',
        '{"filing": "A", "question": "?", "answer": 1}',
    ],
)
def test_malformed_question_names_its_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "A.txt").write_text("A", "utf-8")
    write_questions(tmp_path, '{"filing": "A", "question": "Who?", "answer": "A"}', line)
    with pytest.raises(ValueError, match=r"questions\.jsonl, line 2: expected a JSON object") as error:
        load_filings(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("folder", [".", "absent"])
def test_folder_without_filings_is_named(tmp_path: Path, folder: str) -> None:
    with pytest.raises(ValueError, match=r"expected a folder with at least one filing") as error:
        load_filings(tmp_path / folder)
    assert str(tmp_path / folder) in str(error.value)
