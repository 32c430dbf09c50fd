"""Annual reports (10-K filings) to ask questions about: generated ones, and real ones from a folder.

A generated filing is a pure function of its seed and length. Its company, prose and numbers are invented, but
its accounts articulate: segments add up to net sales, cash flows move the balance sheet, the sheet balances.
"""

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ragkv.benchmarks.tenk_text import (
    COVER,
    FIXED,
    GROWTH,
    INDUSTRIES,
    PHRASES,
    QUESTIONS,
    TABLES,
    TITLES,
    WEIGHTS,
)

MIN_QUESTIONS = 8


@dataclass(frozen=True)
class Question:
    """A question about a filing, and its answer: "" where nobody has written one down."""

    text: str
    answer: str


@dataclass(frozen=True)
class Filing:
    """A filing as plain text, paragraphs separated by blank lines, and at least `MIN_QUESTIONS` questions."""

    name: str
    text: str
    questions: tuple[Question, ...]


class _Writer:
    """Fills in templates from a stream of numbers that only the seed decides, the least used ones first."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random
        self._used: Counter[str] = Counter()
        self._written: set[str] = set()
        self.phrases: dict[str, str | list[str]] = {}
        for name, _, choices in (entry.partition(": ") for entry in PHRASES):
            self.phrases[name] = choices.split(", ")

    def number(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(self._random() * (high - low + 1))

    def pick(self, choices: Sequence[str]) -> str:
        return choices[self.number(0, len(choices) - 1)]

    def share(self, amount: int, low: int, high: int) -> int:
        """Some low to high thousandths of the amount."""
        return amount * self.number(low, high) // 1000

    def fill(self, template: str) -> str:
        """The template with its slots filled, without repeating a phrase while there are others."""
        taken: set[str] = set()

        def phrase(slot: re.Match[str]) -> str:
            low, dots, high = slot[1].partition("..")
            if dots:
                return f"{self.number(int(low), int(high)):,}"
            choices = self.phrases[low]
            if isinstance(choices, str):
                return choices
            taken.add(choice := self.pick([choice for choice in choices if choice not in taken] or choices))
            return choice

        while "{" in template:
            template = re.sub(r"{([^{}]+)}", phrase, template)
        return template[0].upper() + template[1:]

    def paragraph(self, item: str) -> tuple[str, str]:
        """A title, which may be "", and a paragraph to grow the item with."""
        sentences = []
        for kind, count in (("a", 1), ("b", 2)):
            pool = [entry for entry in GROWTH if entry.startswith(f"{item} {kind} | ")]
            for template in sorted(pool, key=lambda t: (self._used[t], self._random()))[:count]:
                for _ in range(50):  # a template repeats itself only when it has little else to say
                    if (sentence := self.fill(template.partition(" | ")[2])) not in self._written:
                        break
                self._used[template] += 1
                self._written.add(sentence)
                sentences.append(sentence)
        title, _, text = " ".join(sentences).rpartition(" :: ")
        return title, text


def _advance(w: _Writer, a: dict[str, int]) -> None:
    """Move the accounts on by a year, in which `sales` are already known."""
    sales = a["sales"]
    a["cost"], a["sga"], a["rnd"] = w.share(sales, 560, 630), w.share(sales, 140, 180), w.share(sales, 22, 48)
    a["gross"] = sales - a["cost"]
    a["operating"] = a["gross"] - a["sga"] - a["rnd"]
    a["interest"] = w.share(a["debt"], 38, 52)
    a["pretax"] = a["operating"] - a["interest"]
    a["tax"] = w.share(a["pretax"], 205, 245)
    a["net"] = a["pretax"] - a["tax"]
    a["diluted"] -= w.share(a["diluted"], 5, 20)
    a["eps"] = 100 * a["net"] // a["diluted"]
    a["depreciation"], a["capex"] = a["plant"] // 10, w.share(sales, 32, 55)
    a["operations"] = a["net"] + a["depreciation"]
    for name, low, sign in (("receivables", 150, -1), ("inventories", 120, -1), ("payables", 155, 1)):
        a[f"more_{name}"] = w.share(sales, low, low + 20) - a[name]
        a[name] += a[f"more_{name}"]
        a["operations"] += sign * a[f"more_{name}"]
    a["dividends"], a["borrowed"] = w.share(a["net"], 250, 350), w.share(sales, 0, 40) - w.share(sales, 0, 25)
    spare = a["operations"] - a["capex"] - a["dividends"] + a["borrowed"]
    a["repurchases"] = max(0, w.share(spare, 400, 900))
    a["opening"], a["change"] = a["cash"], spare - a["repurchases"]
    a["cash"] += a["change"]
    a["plant"] += a["capex"] - a["depreciation"]
    a["debt"] += a["borrowed"]
    a["retained"] += a["net"] - a["dividends"] - a["repurchases"]
    a["current"] = w.share(a["debt"], 40, 90)
    a["long_term"] = a["debt"] - a["current"]
    a["assets"] = a["cash"] + a["receivables"] + a["inventories"] + a["plant"] + a["goodwill"]
    a["liabilities"], a["equity"] = a["payables"] + a["debt"], a["paid_in"] + a["retained"]
    a["claims"] = a["liabilities"] + a["equity"]


def _accounts(w: _Writer, segments: Sequence[str]) -> dict[str, list[int]]:
    """Three years of accounts in millions of dollars (`eps` in cents), newest first."""
    a = {name: w.number(300, 2400) for name in segments}
    total = sum(a.values())
    a |= {"plant": total // 3, "goodwill": total // 4, "receivables": total // 6, "inventories": total // 8}
    a["cash"] = total - sum(a[k] for k in ("plant", "goodwill", "receivables", "inventories"))
    a |= {"debt": total // 3, "payables": total // 6, "paid_in": total // 9}
    a["diluted"] = w.share(total, 40, 90)
    a["retained"] = total - a["debt"] - a["payables"] - a["paid_in"]
    books: defaultdict[str, list[int]] = defaultdict(list)
    for _ in range(3):
        a |= {name: w.share(a[name], 955, 1135) for name in segments}
        a["sales"] = sum(a[name] for name in segments)
        _advance(w, a)
        for name, value in a.items():
            books[name].insert(0, value)
    return books


def _money(account: str, value: int) -> str:
    if account == "eps":
        return f"{value // 100}.{value % 100:02}"
    return f"({-value:,})" if value < 0 else f"{value:,}"


def _table(spec: str, years: Sequence[int], books: Mapping[str, Sequence[int]]) -> str:
    """Columns as `pdftotext -layout` leaves them, under a title and the unit."""
    title, *rows = spec.split("; ")
    lines = [title, f"{'(in millions)':52}" + "".join(f"{year:>16}" for year in years)]
    for label, _, account in (row.partition("=") for row in rows):
        name, sign = account.lstrip("-"), -1 if account[0] == "-" else 1
        cells = [_money(name, sign * value) for value, _ in zip(books[name], years, strict=False)]
        dollar = "$" if label[0] == "$" else " "
        lines.append(f"{label.lstrip('$'):52}" + "".join(f"{dollar:>6}{cell:>10}" for cell in cells))
    return "\n".join(lines)


def _found(w: _Writer, seed: int) -> dict[str, list[str]]:
    """Make up a company and its accounts, and tell the writer; returns the segments and their products."""
    stems, ends = w.phrases["stem"], w.phrases["end"]
    short = stems[seed % len(stems)] + ends[(seed + seed // len(stems)) % len(ends)]
    kind, trade, inputs, customers, *lines = w.pick(INDUSTRIES).split(" | ")
    segments = {name: products.split(", ") for name, _, products in (line.partition(": ") for line in lines)}
    *others, last = segments
    books = _accounts(w, list(segments))
    largest = max(segments, key=lambda name: books[name][0])
    year, end = w.number(2019, 2024), w.pick(["December 31", "September 30", "June 30"])
    city, state, code = w.fill("{home}").split()
    ceo, cfo = w.fill("{first} {last}, {first} {last}").split(", ")
    for name, values in books.items():
        w.phrases |= {name: _money(name, values[0]), f"{name}1": _money(name, values[1])}
    w.phrases |= {"y": f"{year}", "y1": f"{year - 1}", "y2": f"{year - 2}", "yearend": f"{end}, {year}"}
    w.phrases |= {"when": f"fiscal {year}", "later": [str(year + ahead) for ahead in range(2, 11)]}
    w.phrases |= {"short": short, "company": f"{short} {kind}, Inc.", "ticker": short[:4].upper()}
    w.phrases["trade"] = trade
    w.phrases |= {"city": city, "state": state, "zip": code, "incorporated": w.fill("{incorporated}")}
    w.phrases |= {"ceo": ceo, "cfo": cfo, "input": inputs.split(", "), "customer": customers.split(", ")}
    w.phrases |= {"largest": largest, "top": _money("", books[largest][0]), "count": f"{len(segments)}"}
    w.phrases |= {"segments": f"{', '.join(others)} and {last}", "employees": f"{w.number(31, 199) * 100:,}"}
    w.phrases["segment_rows"] = "; ".join(f"{name}={name}" for name in segments)
    for name, _, spec in (entry.partition(": ") for entry in TABLES):
        years = range(year, year - (2 if name == "balance" else 3), -1)
        w.phrases[f"{name}_table"] = _table(w.fill(spec), years, books)
    return segments


def _body(w: _Writer, segments: Mapping[str, list[str]], words: int) -> dict[str, list[str]]:
    """The paragraphs of each item: the fixed ones there is room for, then as many others as it takes."""
    fixed = [(item, int(rank), w.fill(text)) for item, rank, text in (entry.split(" | ") for entry in FIXED)]
    for limit in (4, 3, 2, 1, 0):
        kept = [(item, text) for item, rank, text in fixed if rank <= limit]
        size = len(COVER.split()) + sum(len(text.split()) for _, text in kept)
        if size <= words:
            break
    body = {item: [text for i, text in kept if i == item] for item in (entry.split()[0] for entry in TITLES)}
    grown: dict[str, list[tuple[str, str]]] = {item: [] for item in WEIGHTS}
    spent: Counter[str] = Counter()
    while size + spent.total() + 40 < words:
        item = min(WEIGHTS, key=lambda item: (spent[item] + 60) / WEIGHTS[item])
        w.phrases["seg"] = name = w.pick(list(segments))
        w.phrases["product"] = segments[name]
        grown[item].append(w.paragraph(item))
        spent[item] += len(" ".join(grown[item][-1]).split())
    for item, paragraphs in grown.items():
        previous = ""
        for title, text in sorted(paragraphs, key=lambda paragraph: paragraph[0]):
            body[item].append(text if title == previous else f"{title}\n{text}")
            previous = title
    return body


def generate_filing(seed: int = 0, words: int = 2000) -> Filing:
    """A filing of about `words` words; below some 350 it is as short as one with its questions can be.

    A seed and a length give the same text wherever they run, and the answer to each question occurs in it.
    """
    w = _Writer(seed)
    segments = _found(w, seed)
    body = _body(w, segments, words)
    cover = "\n".join(line.center(100).rstrip() for line in w.fill(COVER).splitlines())
    contents, blocks, size = ["TABLE OF CONTENTS"], [], 0
    for item, _, title in (entry.partition(" ") for entry in TITLES):
        if not body[item]:
            continue
        number = int(item.rstrip("A"))
        heading = f"PART {'I' if number < 5 else 'II' if number < 10 else 'III' if number < 15 else 'IV'}"
        if heading not in blocks:
            blocks.append(heading)
        contents.append(f"{f'Item {item}.':10}{title:86}{3 + size // 500:>4}")
        blocks += [f"Item {item}. {title}", *body[item]]
        size += sum(len(text.split()) for text in body[item])
    text = "\n\n".join([cover, *(["\n".join(contents)] if words >= 1000 else []), *blocks]) + "\n"
    asked = [entry.split(" | ") for entry in QUESTIONS]
    questions = tuple(Question(w.fill(q), w.fill(answer)) for q, answer, shown in asked if shown in text)
    return Filing(w.fill("{short}_{y}_10K").upper(), text, questions)


def _read_questions(path: Path) -> dict[str, list[Question]]:
    """The questions of a `questions.jsonl`, by filing."""
    questions: defaultdict[str, list[Question]] = defaultdict(list)
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                filing, question, answer = (entry[key] for key in ("filing", "question", "answer"))
                if not all(isinstance(value, str) for value in (filing, question, answer)):
                    raise TypeError
            except (ValueError, TypeError, KeyError):
                expected = 'a JSON object with the strings "filing", "question" and "answer"'
                raise ValueError(f"{path}, line {number}: expected {expected}, got {line[:80]!r}") from None
            questions[filing].append(Question(question, answer))
    return questions


def load_filings(folder: Path) -> list[Filing]:
    """The filings a folder holds as *.txt files, by name, with the questions of its `questions.jsonl` if any.

    The answers need not occur literally in the filing. Generic questions, with the answer "", make up the
    number to `MIN_QUESTIONS`. Raises ValueError if there is no *.txt file or a malformed line of questions.
    """
    paths = sorted(folder.glob("*.txt"))
    if not paths:
        raise ValueError(f"{folder}: expected a folder with at least one filing as a *.txt file")
    listed = folder / "questions.jsonl"
    questions = _read_questions(listed) if listed.exists() else {}
    generic = [Question(q.partition(" | ")[0].replace("{when}", "the last fiscal year"), "") for q in QUESTIONS]
    filings = []
    for path in paths:
        asked = questions.get(path.stem, [])
        asked = asked + generic[: max(0, MIN_QUESTIONS - len(asked))]
        filings.append(Filing(path.stem, path.read_text("utf-8", "replace"), tuple(asked)))
    return filings
