"""What `ragkv bench serve` asks: sessions of chats about filings.

    open        the system prompt, then a filing and a question about it
    follow-up   the chat so far, and another question
    passages    the same, with passages that were retrieved from other filings of the round
    switch      half-way, a new chat about another filing of the round

The assistant's part of a chat is scripted, not what the server answered: every system gets the same bytes, and
each turn has the same length everywhere. A round has filings of its own, so its first turns are cold again.
"""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from ragkv.benchmarks.tenk import Filing, generate_filing, load_filings
from ragkv.errors import ConfigError

OPEN, FOLLOW_UP, PASSAGES, SWITCH = "open", "follow-up", "passages", "switch"
KINDS = (OPEN, FOLLOW_UP, PASSAGES, SWITCH)
Message = dict[str, str]
Cut = Callable[[str, int], str]
"""The first tokens of a text, as text; the whole text where it has no more."""

SYSTEM = "You are a financial analyst. Answer questions about annual reports, briefly and only from their text."
BREAK = "\n\n"
MOST_CHARACTERS = 12  # a token; more of a long filing need not be looked at
RETRIEVED = 3  # passages of a turn that brings some
PASSAGE_CHARACTERS = 700  # at least; whole paragraphs
PASSAGES_A_FILING = 2  # that retrieval finds; few, so that sessions get the same ones


@dataclass(frozen=True)
class Shape:
    """What a round is made of, and how it is played.

    `filings`: different ones a round. `turns`: questions a session. `sessions`: None: one a filing. `tokens`: of
    each filing. `concurrency`: requests in flight. `rate`: sessions that arrive a second (Poisson; inf: all at
    once). `think`: mean seconds between an answer and the next turn (exponential). `passages`: share of follow-up
    turns that bring retrieved passages. `switch`: share of sessions that go over to another filing half-way.
    `answer_tokens`: of every answer. ConfigError names what cannot be.
    """

    filings: int = 4
    turns: int = 5
    sessions: int | None = None
    tokens: int = 3000
    concurrency: int = 2
    rate: float = math.inf
    think: float = 0.0
    passages: float = 0.0
    switch: float = 0.0
    answer_tokens: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("filings", "turns", "sessions", "tokens", "concurrency", "answer_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value}; allowed: whole numbers from 1")
        for name in ("passages", "switch"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} = {getattr(self, name)}; allowed: shares from 0 to 1")
        if not self.rate > 0:
            raise ConfigError(f"rate = {self.rate}; allowed: numbers above 0, or inf")
        if not 0 <= self.think < math.inf:
            raise ConfigError(f"think = {self.think}; allowed: seconds from 0")
        if self.switch and (self.filings < 2 or self.turns < 2):
            raise ConfigError(f"switch = {self.switch}; allowed: only 0 with one filing or one turn")

    @property
    def session_count(self) -> int:
        """Sessions a round."""
        return self.filings if self.sessions is None else self.sessions

    @property
    def half(self) -> int:
        """The turn at which a session that switches does so."""
        return self.turns // 2 + 1


@dataclass(frozen=True)
class Turn:
    """One request. `number`: from 1, over the whole session; `messages`: the whole chat so far, question last."""

    number: int
    kind: str
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Session:
    """`arrives`: seconds after the round began; `think`: seconds after each answer but the last."""

    id: int
    arrives: float
    think: tuple[float, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class _Document:
    """The part of a filing that is asked about in a round."""

    filing: Filing
    text: str


class _Chat:
    """A chat about one document, with questions and scripted answers in an order of its own."""

    def __init__(self, document: _Document, chance: random.Random) -> None:
        self.document = document
        self._questions = chance.sample(document.filing.questions, len(document.filing.questions))
        self._sentences = re.findall(r"\b[A-Z][^.?!\n]{40,250}\.(?=\s)", document.text) or ["It does not say."]
        self._chance = chance
        self._messages: list[Message] = [{"role": "system", "content": SYSTEM}]
        self._asked = 0

    def ask(self, *before: str) -> tuple[Message, ...]:
        """The chat with the next question, behind some text if there is any; then its answer is part of it."""
        question = self._questions[self._asked % len(self._questions)]
        self._asked += 1
        self._messages.append({"role": "user", "content": BREAK.join([*before, question.text])})
        chat = tuple(self._messages)
        answer = question.answer or self._chance.choice(self._sentences)
        self._messages.append({"role": "assistant", "content": answer})
        return chat

    def open(self) -> tuple[Message, ...]:
        """The first turn, which brings the document."""
        return self.ask(f"Annual report {self.document.filing.name}:", self.document.text)


def choose_filings(folder: Path | None, shape: Shape, rounds: int) -> list[Filing]:
    """Filings for that many rounds: those of a folder, or generated ones that no other seed has.

    ValueError where the folder holds none.
    """
    if folder is not None:
        filings = load_filings(folder)
        start = shape.seed * shape.filings % len(filings)
        return filings[start:] + filings[:start]
    first = shape.seed * 1_000_000
    return [generate_filing(first + n, max(400, shape.tokens)) for n in range(rounds * shape.filings)]


def make_sessions(shape: Shape, filings: Sequence[Filing], cut: Cut, round_number: int) -> list[Session]:
    """The sessions of a round (from 0), always the same for a shape, filings and round.

    Rounds take one filing after another, then later parts of long ones. ConfigError where text runs out.
    """
    documents = _documents(shape, filings, cut, round_number)

    def chance(purpose: str) -> random.Random:
        return random.Random(f"{shape.seed} {round_number} {purpose}")

    numbers = range(shape.session_count)
    switching = set(chance("switch").sample(numbers, round(shape.switch * len(numbers))))
    later = [(s, n) for s in numbers for n in range(2, shape.turns + 1) if s not in switching or n != shape.half]
    carrying = set(chance("passages").sample(later, round(shape.passages * len(later))))
    found = _retrievable(documents, chance("retrieval")) if carrying else {}
    clock, thinking = chance("arrivals"), chance("think")
    gaps = [0.0] + [clock.expovariate(shape.rate) if math.isfinite(shape.rate) else 0.0 for _ in numbers[1:]]
    sessions = []
    for number, arrives in zip(numbers, accumulate(gaps), strict=True):
        bringing = {turn for session, turn in carrying if session == number}
        turns = _turns(shape, documents, number, number in switching, bringing, found, chance(f"session {number}"))
        think = tuple(thinking.expovariate(1 / shape.think) if shape.think else 0.0 for _ in turns[1:])
        sessions.append(Session(number, arrives, think, turns))
    return sessions


def _turns(
    shape: Shape,
    documents: Sequence[_Document],
    number: int,
    switches: bool,
    bringing: set[int],
    found: dict[str, list[str]],
    chance: random.Random,
) -> tuple[Turn, ...]:
    """The turns of one session; `bringing`: the numbers of those with passages."""
    home = number % len(documents)
    chat = _Chat(documents[home], chance)
    turns = [Turn(1, OPEN, chat.open())]
    for turn in range(2, shape.turns + 1):
        if switches and turn == shape.half:
            away = (home + chance.randrange(1, len(documents))) % len(documents)
            chat = _Chat(documents[away], chance)
            turns.append(Turn(turn, SWITCH, chat.open()))
        elif turn in bringing:
            others = [text for name, texts in found.items() if name != chat.document.filing.name for text in texts]
            pool = others or [text for texts in found.values() for text in texts]
            passages = chance.sample(pool, min(RETRIEVED, len(pool)))
            turns.append(Turn(turn, PASSAGES, chat.ask("Passages from annual reports:", *passages)))
        else:
            turns.append(Turn(turn, FOLLOW_UP, chat.ask()))
    return tuple(turns)


def _documents(shape: Shape, filings: Sequence[Filing], cut: Cut, round_number: int) -> list[_Document]:
    """The documents of a round, each of just `shape.tokens` tokens."""
    span = shape.tokens * MOST_CHARACTERS
    longest = max(len(filing.text) for filing in filings)
    places = [(f, at) for at in range(0, longest, span) for f in filings if at == 0 or at + span <= len(f.text)]
    first = round_number * shape.filings
    chosen = places[first : first + shape.filings]
    if len(chosen) < shape.filings:
        raise ConfigError(
            f"filings = {shape.filings}: round {round_number + 1} needs {first + shape.filings} texts of "
            f"{shape.tokens} tokens, the filings give {len(places)}; allowed: fewer rounds, filings or tokens"
        )
    documents = []
    for filing, at in chosen:
        start = filing.text.find(BREAK, at, at + span // 2) + len(BREAK) if at else 0
        window = filing.text[max(start, at) : at + span]
        text = cut(window, shape.tokens)
        if len(text) >= len(window):
            raise ConfigError(f"tokens = {shape.tokens}: {filing.name} has no more than that; allowed: fewer")
        documents.append(_Document(filing, text))
    return documents


def _retrievable(documents: Sequence[_Document], chance: random.Random) -> dict[str, list[str]]:
    """The passages that retrieval finds in this round, by filing."""
    found: dict[str, list[str]] = {}
    for document in documents:
        blocks = _blocks(document.text)
        found.setdefault(document.filing.name, []).extend(
            chance.sample(blocks, min(PASSAGES_A_FILING, len(blocks)))
        )
    return found


def _blocks(text: str) -> list[str]:
    """Runs of whole paragraphs, each of at least `PASSAGE_CHARACTERS`; a shorter text is one."""
    blocks: list[str] = []
    open_block = ""
    for paragraph in text.split(BREAK):
        open_block = f"{open_block}{BREAK}{paragraph}" if open_block else paragraph
        if len(open_block) >= PASSAGE_CHARACTERS:
            blocks.append(open_block)
            open_block = ""
    return blocks or [text]
