"""What the fuzzer of engines does: a plan of operations that a seed gives.

An episode is a tree of prompts. Each new prompt repeats an earlier one up to an offset, which visits every token
and the borders of pages, chunks, blocks and steps; or it is the next turn of a conversation, so that answers
become part of prompts. Prompts of different episodes share nothing (at most their first token), so an episode can
be played alone. A plan depends on the seed and on the right answers only, never on what the tested engine says.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

VOCABULARY = 512
LONGEST_PROMPT, LONGEST_ANSWER = 280, 24
BORDERS = (8, 16, 24, 32, 48, 96)  # of pages, chunks, blocks, steps, as engine_fuzz sets them
WAVES, WAVE_ASKS = 4, 25
KNOWN = 60  # earlier prompts that new ones begin with

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Ask:
    """A greedy request, in vLLM's queue from now on. `salt`: its tenant's; `copies`: vLLM's n."""

    name: str
    prompt: Tokens
    tokens: int
    salt: str | None = None
    copies: int = 1

    def __str__(self) -> str:
        tenant = f" of tenant {self.salt}" if self.salt else ""
        copies = f", n={self.copies}" if self.copies > 1 else ""
        return f"ask {self.name}{tenant} ({len(self.prompt)} tokens, answer {self.tokens}{copies})"


@dataclass(frozen=True)
class Step:
    """So many steps of the engine."""

    count: int

    def __str__(self) -> str:
        return f"step {self.count}"


@dataclass(frozen=True)
class Abort:
    """Abort a request, which may have ended already."""

    name: str

    def __str__(self) -> str:
        return f"abort {self.name}"


@dataclass(frozen=True)
class Reset:
    """Empty vLLM's own prefix cache. `connector`: ragkv's too; `running`: preempt all requests for it, else vLLM
    refuses while blocks are in use."""

    connector: bool = False
    running: bool = False

    def __str__(self) -> str:
        return "reset" + " with connector" * self.connector + " with preemption" * self.running


Operation = Ask | Step | Abort | Reset


@dataclass(frozen=True)
class Shares:
    """How often: of requests, or (resets) for each request. `clean`: of the waves, which end in a reset, so that
    what comes next is loaded from the tiers."""

    abort: float = 0.08
    copies: float = 0.08
    reset: float = 0.06
    reset_running: float = 0.02
    reset_connector: float = 0.01
    clean: float = 0.7


class Episode:
    """The waves of one episode. `learn` the right answers to a wave's prompts before the next wave."""

    def __init__(self, seed: int, number: int, shares: Shares) -> None:
        self.number = number
        self._shares = shares
        self._chance = random.Random(f"{seed} {number}")
        self._opening = (number // VOCABULARY % VOCABULARY, number % VOCABULARY)
        self._salts = (None, None, None, f"{seed}.{number}.a", f"{seed}.{number}.b")
        self._known: list[Tokens] = []
        self._answers: dict[Tokens, Tokens] = {}
        self._asked = 0
        self._sweep = 0

    def learn(self, answers: Mapping[Tokens, Tokens]) -> None:
        """Right answers to prompts of the last wave."""
        self._answers.update(answers)

    def wave(self, asks: int = WAVE_ASKS) -> list[Operation]:
        """Operations with `asks` requests; all requests are to be run to their end after the last one."""
        chance, shares = self._chance, self._shares
        operations: list[Operation] = []
        aborts: list[tuple[int, Abort]] = []  # after how many operations
        for _ in range(asks):
            ask = self._ask()
            operations.append(ask)
            if chance.random() < shares.abort:
                aborts.append((len(operations) + chance.randrange(8), Abort(ask.name)))
            operations += self._resets()
            if chance.random() < 0.6:
                operations.append(Step(chance.choice((1, 1, 2, 3, 5, 8, 20))))
        for at, abort in reversed(aborts):
            operations.insert(at, abort)
        if chance.random() < shares.clean:
            operations += [Step(10_000), Reset()]
        return operations

    def _ask(self) -> Ask:
        chance = self._chance
        prompt = self._prompt()
        self._known = [*self._known, prompt][-KNOWN:]
        tokens = chance.choice((1, 2, 3, 4, 4, 6, 8, 8, LONGEST_ANSWER))
        copies = chance.choice((2, 3)) if chance.random() < self._shares.copies else 1
        self._asked += 1
        return Ask(f"{self.number}-{self._asked}", prompt, tokens, chance.choice(self._salts), copies)

    def _resets(self) -> Iterator[Reset]:
        if self._chance.random() < self._shares.reset:
            yield Reset()
        if self._chance.random() < self._shares.reset_running:
            yield Reset(running=True)
        if self._chance.random() < self._shares.reset_connector:
            yield Reset(connector=True, running=True)

    def _prompt(self) -> Tokens:
        chance = self._chance
        if len(self._known) < 3:
            return self._opening + self._fresh(chance.randrange(100, 260))
        earlier = chance.choice(self._known[-12:] if chance.random() < 0.5 else self._known)
        kind = chance.choices(("fresh", "again", "cut", "branch", "turn", "moved"), (4, 20, 8, 35, 25, 8))[0]
        if kind == "fresh":
            return self._opening + self._fresh(chance.randrange(20, 260))
        if kind == "again":
            return earlier
        if kind == "moved":
            return self._moved()
        if kind == "turn" and (answer := self._answers.get(earlier)):
            said = answer[: chance.choice((1, 2, len(answer)))]
            if (room := LONGEST_PROMPT - len(earlier) - len(said)) > 0:
                return earlier + said + self._fresh(min(room, chance.choice((1, 2, 10, 30))))
        kept = earlier[: max(len(self._opening), self._offset(len(earlier)))]
        if kind == "cut" or len(kept) == LONGEST_PROMPT:
            return kept
        return kept + self._fresh(chance.randint(1, min(60, LONGEST_PROMPT - len(kept))))

    def _moved(self) -> Tokens:
        """Passages of earlier prompts at other positions: exact reuse must not take their KV."""
        passages = self._opening + self._fresh(self._chance.randrange(6))
        for _ in range(self._chance.randrange(1, 4)):
            earlier = self._chance.choice(self._known)
            start = self._offset(len(earlier)) - 1
            passages += earlier[start : start + self._chance.choice((16, 24, 50, 100))]
        return passages[:LONGEST_PROMPT]

    def _offset(self, length: int) -> int:
        """From 1 to `length`: one after the other, or around a border."""
        if self._chance.random() < 0.5:
            self._sweep += 1
            return 1 + self._sweep % length
        border = self._chance.choice(BORDERS)
        near = border * self._chance.randint(1, length // border + 1) + self._chance.choice((-1, 0, 1))
        return max(1, min(near, length))

    def _fresh(self, count: int) -> Tokens:
        """New text; sometimes with repeats, which hash alike."""
        if self._chance.random() < 0.1:
            return (self._chance.randrange(VOCABULARY),) * count
        return tuple(self._chance.choices(range(VOCABULARY), k=count))


def asks_of(operations: Sequence[Operation]) -> list[Ask]:
    """The requests among some operations."""
    return [each for each in operations if isinstance(each, Ask)]
