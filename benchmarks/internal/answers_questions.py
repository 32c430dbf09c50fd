"""Questions with known answers over several passages: what `bench answers` asks.

Generated filings give three kinds in turn. "lookup": a fact of one filing; "comparison": which of two companies
had higher net sales, from a passage of each; "sum": two rows of a table together. The other passages are
distractors, of other filings. Real filings give the questions of their `questions.jsonl` whose answers occur in
them.

Every passage begins with a line that says which filing it is from, and is tokenized by itself.
"""

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ragkv.benchmarks.internal.fusion_trials import BREAK, MOST_CHARACTERS, Trial, chat, encode, window
from ragkv.benchmarks.tenk import Filing, Question, generate_filing, load_filings
from ragkv.benchmarks.tenk_text import QUESTIONS

KINDS = ("lookup", "comparison", "sum")
FILE_KIND = "file"  # of questions.jsonl
SEEDS = 1000  # of filings for each question
NEAR = 40  # characters beside an answer
PRIME = "Answer:"  # in the prompt: small models answer in fewer words then
_COMPANY = re.compile(r"^ *(\S+) .*\n *\(Exact name of registrant", re.MULTILINE)
_SEGMENTS = re.compile(r"NET SALES BY SEGMENT\n.*\n((?:.+\n)+?)Total net sales.*")
_ROW = re.compile(r"(\S.*?) {2,}\$? *([\d,]+)")


@dataclass(frozen=True)
class Source:
    """A filing that a passage is taken from. `title`: how the passage and the question name it; `holding`: words
    of the filing that the passage has to have, "" for a distractor."""

    filing: Filing
    title: str
    holding: str = ""


@dataclass(frozen=True)
class Draft:
    """A question before it is tokenized. `answers`: the known ones, one of which is enough."""

    kind: str
    text: str
    answers: tuple[str, ...]
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Asked:
    """A question as a prompt. `trial`: its passages in the order in which they are asked about; `stored`: the same
    in the order of a chain that is stored before."""

    number: int
    kind: str
    text: str
    answers: tuple[str, ...]
    trial: Trial
    stored: Trial


# --- generated filings ---


def draft(number: int, passages: int, tokens: int, seed: int = 0) -> Draft:
    """The question of that number over generated filings, always the same one. `passages`: at least 2."""
    chance = random.Random(f"{seed}/{number}")
    filings = _filings(number, passages, max(2000, 2 * tokens), seed)
    kind = KINDS[number % len(KINDS)]
    text, answers, holders = {"lookup": _lookup, "comparison": _comparison, "sum": _sum}[kind](filings, chance)
    named = {source.filing.name for source in holders}
    others = [Source(filing, _title(filing)) for filing in filings if filing.name not in named]
    return Draft(kind, text, answers, (*holders, *others))


def _filings(number: int, count: int, words: int, seed: int) -> list[Filing]:
    """So many filings of different companies, which no other question has."""
    found: dict[str, Filing] = {}
    for each in itertools.count((seed * 1_000_003 + number) * SEEDS):
        filing = generate_filing(each, words)
        found.setdefault(_company(filing), filing)
        if len(found) == count:
            return list(found.values())
    raise AssertionError("endless")


_Drafted = tuple[str, tuple[str, ...], list[Source]]


def _lookup(filings: Sequence[Filing], chance: random.Random) -> _Drafted:
    filing = filings[0]
    asked = chance.choice(filing.questions)
    title = _title(filing)
    text = f"{title}: {asked.text}"
    return text, (asked.answer,), [Source(filing, title, _evidence(filing, asked))]


def _comparison(filings: Sequence[Filing], chance: random.Random) -> _Drafted:
    sales = {each.name: _number(each.questions[0].answer) for each in filings}  # the first one asks for net sales
    first = filings[0]
    pair = [first, next(each for each in filings if sales[each.name] != sales[first.name])]
    best = max(pair, key=lambda each: sales[each.name])
    sources = [Source(each, _title(each), _evidence(each, each.questions[0])) for each in pair]
    chance.shuffle(pair)
    text = f"Which company had higher net sales, {_company(pair[0])} or {_company(pair[1])}?"
    return text, (_company(best),), sources


def _sum(filings: Sequence[Filing], chance: random.Random) -> _Drafted:
    filing = filings[0]
    table = _SEGMENTS.search(filing.text)
    assert table is not None
    rows = [(match[1], _number(match[2])) for match in map(_ROW.match, table[1].splitlines()) if match]
    (first, one), (second, other) = chance.sample(rows, 2)
    title = _title(filing)
    text = (
        f"{title}: What were the net sales of {first} and of {second} together in fiscal {_year(filing)}, "
        "in millions of dollars?"
    )
    return text, (f"{one + other:,}",), [Source(filing, title, table[0])]


def _evidence(filing: Filing, asked: Question) -> str:
    """The line of a generated filing that answers one of its questions."""
    entries = (entry.split(" | ") for entry in QUESTIONS)
    shown = next(words for text, _, words in entries if asked.text.startswith(text.partition("{when}")[0]))
    lines = [line for line in filing.text.splitlines() if _place(asked.answer, line)]
    return next((line for line in lines if shown in line), lines[0])


def _title(filing: Filing) -> str:
    return f"Annual report of {_company(filing)} for fiscal {_year(filing)}"


def _company(filing: Filing) -> str:
    """One word, so that the names of two companies have none in common."""
    name = _COMPANY.search(filing.text)
    assert name is not None
    return name[1]


def _year(filing: Filing) -> str:
    return filing.name.split("_")[1]


def _number(text: str) -> int:
    return int(text.replace(",", ""))


# --- real filings ---


def load_drafts(folder: Path, passages: int, seed: int = 0) -> tuple[list[Draft], int]:
    """Questions about a folder's filings in an order of the seed's, and how many were left out: those whose answer
    is unknown or does not occur in the filing. ValueError: nothing is left, or no *.txt file, or a bad line."""
    filings = load_filings(folder)
    written = [(n, asked) for n, filing in enumerate(filings) for asked in filing.questions if asked.answer]
    kept = [(n, asked, found) for n, asked in written if (found := _around(asked.answer, filings[n].text))]
    if not kept:
        raise ValueError(f"{folder}: expected a questions.jsonl with answers that occur in the filings")
    chance = random.Random(seed)
    chance.shuffle(kept)
    drafts = []
    for n, asked, found in kept:
        others = [filings[(n + step) % len(filings)] for step in range(1, passages)]
        sources = [Source(filings[n], filings[n].name, found), *(Source(each, each.name) for each in others)]
        drafts.append(Draft(FILE_KIND, f"{filings[n].name}: {asked.text}", (asked.answer,), tuple(sources)))
    return drafts, len(written) - len(kept)


# --- prompts ---


def build(tokenizer: Any, number: int, made: Draft, tokens: int, seed: int = 0) -> Asked:
    """The prompt of a question, with passages of just `tokens` tokens in an order that depends on the seed alone.

    ValueError: a filing is too short, or a passage too short for what it has to hold.
    """
    chance = random.Random(f"{seed}/{number}/order")
    passages = [_passage(tokenizer, source, tokens, chance) for source in made.sources]
    chance.shuffle(passages)
    order = chance.sample(range(len(passages)), len(passages))
    system, end = chat(tokenizer)
    question = encode(tokenizer, f"Question: {made.text}{end.removesuffix(PRIME)}{PRIME}")
    trial = Trial(f"question {number}", system, passages, question, [system] * len(passages))
    stored = replace(trial, passages=[passages[n] for n in order])
    return Asked(number, made.kind, made.text, made.answers, trial, stored)


def _passage(tokenizer: Any, source: Source, tokens: int, chance: random.Random) -> list[int]:
    """A line with the title, then some of the filing, closed by a blank line."""
    begin, end = encode(tokenizer, f"[{source.title}]\n"), encode(tokenizer, BREAK)
    room = tokens - len(begin) - len(end)
    if room <= 0:
        raise ValueError(f"--passage-tokens = {tokens}; allowed: more than {len(begin) + len(end)}, of a title")
    for take in (window, _up_to):
        found = take(tokenizer, source.filing, room, chance, source.holding)
        if source.holding in tokenizer.decode(found, clean_up_tokenization_spaces=False):
            return [*begin, *found, *end]
    raise ValueError(f"--passage-tokens = {tokens}; allowed: so many that a passage can hold {source.holding!r}")


def _up_to(tokenizer: Any, filing: Filing, tokens: int, _: random.Random, holding: str) -> list[int]:
    """As `window`, ending with what has to be in the passage; or the filing's first tokens."""
    text, needed = filing.text, tokens * MOST_CHARACTERS
    end = text.find(holding) + len(holding)
    ids = encode(tokenizer, text[max(0, end - needed) : end])[-tokens:]
    return ids if len(ids) == tokens else encode(tokenizer, text[:needed])[:tokens]


def _place(words: str, text: str) -> re.Match[str] | None:
    """Where a text has these words, not as a part of longer ones or of a larger number."""
    return re.search(rf"(?<![\w,.]){re.escape(words)}(?!\w|[,.]\d)", text)


def _around(words: str, text: str) -> str:
    """The words with the text around them in their line, to tell the place from others; "" if not found."""
    found = _place(words, text)
    if found is None:
        return ""
    before, after = text[max(0, found.start() - NEAR) : found.start()], text[found.end() : found.end() + NEAR]
    return before.rpartition("\n")[2] + found[0] + after.partition("\n")[0]
