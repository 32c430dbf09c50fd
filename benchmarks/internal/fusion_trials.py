"""Prompts of retrieved passages, and the text after which each passage was prefilled: what `internal fusion` asks.

Two kinds of text. "questions": passages of several filings in a new order, one of which holds the answer, and a
question; the continuation over which quality is measured is full prefill's own greedy answer. "running": a
filing's running text, cut into passages that keep its order, then a little more of it; the continuation is what
the filing says next. Parts are tokenized each by itself, so a passage has the same tokens wherever it stands.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragkv.benchmarks.tenk import Filing, generate_filing, load_filings

TEXTS = ("questions", "running")
STORED = ("prefix", "elsewhere", "alone")
BREAK = "\n\n"
MOST_CHARACTERS = 12  # a token; more of a long filing need not be looked at
MORE = 64  # tokens of running text between the passages and the continuation
READ = "The following is taken from an annual report.\n\n"
SYSTEM = "You are a financial analyst. Answer the question from the excerpts of annual reports, in a few words."
_SLOT = "<passages>"


@dataclass(frozen=True)
class Shape:
    """Sizes in tokens. `stored`: what a passage was prefilled behind: "prefix": the system prompt alone, as
    `ragkv ingest` does; "elsewhere": the system prompt and an unrelated passage, as plain traffic leaves it;
    "alone": nothing."""

    passages: int = 6
    passage_tokens: int = 500
    stored: str = "prefix"
    text: str = "questions"
    continuation: int = 32

    def __post_init__(self) -> None:
        for name, value, allowed in (("--text", self.text, TEXTS), ("--stored", self.stored, STORED)):
            if value not in allowed:
                raise ValueError(f"{name} = {value!r}; allowed: {', '.join(allowed)}")


@dataclass(frozen=True)
class Trial:
    """Token ids of a prompt's parts. `behind`: for each passage, what it was prefilled behind; `continuation`:
    the text's own next tokens, or None for full prefill's answer."""

    name: str
    system: Sequence[int]
    passages: Sequence[Sequence[int]]
    question: Sequence[int]
    behind: Sequence[Sequence[int]]
    continuation: Sequence[int] | None = None

    @property
    def prompt(self) -> list[int]:
        """System prompt, passages, question."""
        return [*self.system, *(token for passage in self.passages for token in passage), *self.question]

    def documents(self) -> list[dict[str, Any]]:
        """The passages' spans in the prompt, as hints."""
        spans, start = [], len(self.system)
        for number, passage in enumerate(self.passages):
            spans.append(_span(self.name, number, start, len(passage)))
            start += len(passage)
        return spans

    def prefills(self) -> list[tuple[list[int], list[dict[str, Any]]]]:
        """The prompts that store the passages, each with its hint."""
        return [
            ([*before, *passage], [_span(self.name, number, len(before), len(passage))])
            for number, (before, passage) in enumerate(zip(self.behind, self.passages, strict=True))
        ]


def _span(name: str, number: int, start: int, size: int) -> dict[str, Any]:
    return {"id": f"{name}#{number}", "start": start, "end": start + size}


def choose_filings(folder: Path | None, trials: int, shape: Shape) -> list[Filing]:
    """The filings of a folder, or as many generated ones as `trials` trials need, each long enough."""
    if folder is not None:
        return load_filings(folder)
    words = max(2000, 2 * (shape.passages * shape.passage_tokens + MORE + shape.continuation))
    return [generate_filing(seed, words) for seed in range(trials + 2 * shape.passages)]


def build_trial(tokenizer: Any, filings: Sequence[Filing], number: int, shape: Shape) -> Trial:
    """The trial of that number, always the same one. ValueError: the filings are too short."""
    chance = random.Random(number)
    build = _questions if shape.text == "questions" else _running
    system, passages, question, continuation = build(tokenizer, filings, number, shape, chance)
    if shape.stored == "prefix":
        behind = [system] * len(passages)
    elif shape.stored == "alone":
        behind = [[] for _ in passages]
    else:
        behind = [
            [*system, *_passage(tokenizer, filings[(number + n) % len(filings)], shape.passage_tokens, chance)]
            for n in range(shape.passages, 2 * shape.passages)
        ]
    return Trial(f"trial {number}", system, passages, question, behind, continuation)


_Parts = tuple[list[int], list[list[int]], list[int], list[int] | None]


def _questions(
    tokenizer: Any, filings: Sequence[Filing], number: int, shape: Shape, chance: random.Random
) -> _Parts:
    filing = filings[number % len(filings)]
    asked = filing.questions[number % len(filing.questions)]
    system, end = chat(tokenizer)
    others = [filings[(number + n) % len(filings)] for n in range(1, shape.passages)]
    passages = [_passage(tokenizer, other, shape.passage_tokens, chance) for other in others]
    passages.append(_passage(tokenizer, filing, shape.passage_tokens, chance, asked.answer))
    chance.shuffle(passages)
    return system, passages, encode(tokenizer, f"Question: {asked.text}{end}"), None


def _running(
    tokenizer: Any, filings: Sequence[Filing], number: int, shape: Shape, chance: random.Random
) -> _Parts:
    size = shape.passage_tokens
    total = shape.passages * size
    ids = window(tokenizer, filings[number % len(filings)], total + MORE + shape.continuation, chance)
    passages = [ids[at : at + size] for at in range(0, total, size)]
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    more, continuation = ids[total : total + MORE], ids[total + MORE :]
    return [*start, *encode(tokenizer, READ)], passages, more, continuation


def chat(tokenizer: Any) -> tuple[list[int], str]:
    """Tokens up to the passages, and the text behind the question, by the model's chat template if it has one."""
    if not tokenizer.chat_template:
        return encode(tokenizer, SYSTEM + BREAK), "\nAnswer:"
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": _SLOT}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, _, after = text.partition(_SLOT)
    return encode(tokenizer, before), after


def _passage(tokenizer: Any, filing: Filing, tokens: int, chance: random.Random, holding: str = "") -> list[int]:
    """Some of a filing, closed by a blank line: just `tokens` tokens. `holding`: a text to be found in it."""
    end = encode(tokenizer, BREAK)
    return window(tokenizer, filing, tokens - len(end), chance, holding) + end


def window(tokenizer: Any, filing: Filing, tokens: int, chance: random.Random, holding: str = "") -> list[int]:
    """Just `tokens` tokens of a filing from the start of a paragraph on, and of the one that holds a text, if it
    can be. ValueError: the filing is too short."""
    text, needed = filing.text, tokens * MOST_CHARACTERS
    found = text.find(holding) if holding else -1
    start = chance.randrange(max(1, len(text) - needed)) if found < 0 else max(0, found - 2 * tokens)
    limit = len(text) if found < 0 else found
    paragraph = text.find(BREAK, start, limit)
    if paragraph >= 0:
        start = paragraph + len(BREAK)
    elif start:
        start = text.find(" ", start, limit) + 1 or start
    ids = encode(tokenizer, text[start : start + needed])[:tokens]
    if len(ids) < tokens:
        ids = encode(tokenizer, text[-needed:])[-tokens:]
    if len(ids) < tokens:
        raise ValueError(f"{filing.name} has {len(ids)} tokens; a trial needs {tokens} of it")
    return ids


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text by itself, without those that a tokenizer adds."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids
