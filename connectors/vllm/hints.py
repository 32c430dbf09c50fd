"""Hints of a request: `kv_transfer_params["ragkv"]`, all optional, never a reason to fail.

    {"ragkv": {"documents": [{"id": "10-K 2023", "start": 12, "end": 3012}],
               "pin": {"owner": "desk 7", "seconds": 3600, "documents": ["10-K 2023"]},
               "unpin": {"owner": "desk 6"}, "ttl": 86400, "priority": 1, "store": true,
               "fuse": true, "recompute_ratio": 0.15, "selection": "query", "turn": 2,
               "order": {"before": [1, 512, 9], "passages": [[73, 8, 2], [51, 8, 6]]}}}

`documents`: token positions in the prompt; chunks end at both, so that a document is cut alike in every prompt
that names it (unless chunks get too short by it; the first `MOST_DOCUMENTS` count). `pin`: keep in memory, for
an owner and so many seconds, the prompt up to the end of the last of these documents, or all of it where none is
named; `unpin` takes all of an owner's pins back. Owners are a tenant's own. `ttl`: serve what this request adds
no longer than so many seconds, from any tier. `priority`: 0 to 9; what has less goes first. `store`: false keeps
nothing of the request in any tier, neither prompt nor answer; what is kept already is used. (A value that is not a
boolean counts as false: the prompt may hold a secret.) `fuse`: reuse documents that return at another position, or
not; `recompute_ratio`, `selection`: of them, how much is computed again, and which tokens; where absent, as
`fusion.*` says. `turn`: of its conversation, for the metrics, which else infer it; 0: it is no part of one.
`order`: token ids of passages, and of the text before them in a later prompt: the response says in which order
most of them need not be computed (`ragkv.kvstore.ordering`). The request's own prompt may be one token.

A hint can cost others nothing: everything here is bounded, and so is what follows from it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from reprlib import Repr
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, TypeAdapter, model_validator

from ragkv.config.settings import HINT_NAMES, SELECTION_NAMES
from ragkv.kvstore.keys import Tokens, as_tokens
from ragkv.kvstore.pins import Pin

KEY = "ragkv"
LONGEST = 3e9  # seconds to live; a century
LONGEST_PIN = 604_800  # seconds; a week
HIGHEST = 9
LATEST = 1_000_000  # turn
MOST_DOCUMENTS = 256
MOST_PASSAGES, MOST_ORDERED_TOKENS = 64, 65_536  # of an order
LAST = 2**31 - 1  # token position
OWNER = 200  # characters of a name
SHOWN = 80  # characters of a faulty value
SHOWN_NAMES = 5  # unknown hints that are named


@dataclass(frozen=True, slots=True)
class Document:
    """A span of the prompt, in tokens, and what the application calls it ("" where it has no name)."""

    id: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Order:
    """Passages to be ordered, after the tokens `before`; int32 [n] each."""

    before: Tokens
    passages: tuple[Tokens, ...]


@dataclass(frozen=True, slots=True)
class Hints:
    """`given`: the request gave some, good or bad; `problems`: what is wrong with the bad ones, a line each."""

    documents: tuple[Document, ...] = ()
    pin: Pin | None = None
    unpin: str | None = None
    ttl: float | None = None
    priority: int = 0
    fuse: bool | None = None
    recompute_ratio: float | None = None
    selection: str | None = None
    turn: int | None = None
    store: bool = True
    order: Order | None = field(default=None, compare=False)
    given: bool = field(default=False, compare=False)
    problems: tuple[str, ...] = field(default=(), compare=False)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Positions, ascending, at which chunks should end."""
        return tuple(sorted({edge for each in self.documents for edge in (each.start, each.end)} - {0}))


NO_HINTS = Hints()


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Span(_Strict):
    model_config = ConfigDict(extra="ignore")

    id: Any = None
    start: int = Field(ge=0)
    end: int = Field(le=LAST)

    @model_validator(mode="after")
    def _not_empty(self) -> "_Span":
        if self.start >= self.end:
            raise ValueError("start >= end")
        return self


_Owner = Annotated[str, Field(min_length=1, max_length=OWNER)]


class _Unpin(_Strict):
    owner: _Owner


class _Pin(_Strict):
    owner: _Owner
    seconds: float = Field(gt=0, le=LONGEST_PIN)
    documents: list[str] = Field(default=[], max_length=MOST_DOCUMENTS)


_Token = Annotated[int, Field(ge=0, le=LAST)]


class _Order(_Strict):
    before: Annotated[list[_Token], FailFast()] = []
    passages: Annotated[
        list[Annotated[list[_Token], FailFast(), Field(min_length=1)]],
        FailFast(),
        Field(min_length=1, max_length=MOST_PASSAGES),
    ]

    @model_validator(mode="before")
    @classmethod
    def _bounded(cls, given: Any) -> Any:
        """Before each of its tokens is looked at."""
        passages = given.get("passages") if isinstance(given, dict) else None
        if not isinstance(passages, list):
            raise ValueError("no passages")
        lists = [given.get("before"), *passages[: MOST_PASSAGES + 1]]
        if sum(len(each) for each in lists if isinstance(each, list)) > MOST_ORDERED_TOKENS:
            raise ValueError("too many tokens")
        return given


_Bool = Annotated[bool, Field(strict=True)]
_OWNER = f"owner (1 to {OWNER} characters)"
# For each hint what a value must be, and how errors say it.
_RULES: Mapping[str, tuple[Any, str]] = {
    "documents": (list[_Span], "a list of maps with start < end, token positions"),
    "fuse": (_Bool, "true or false"),
    "recompute_ratio": (Annotated[float, Field(strict=True, ge=0, le=1)], "a number from 0 to 1"),
    "selection": (Literal.__getitem__(SELECTION_NAMES), ", ".join(SELECTION_NAMES)),
    "turn": (Annotated[int, Field(strict=True, ge=0, le=LATEST)], f"a whole number from 0 to {LATEST}"),
    "store": (_Bool, "true or false"),
    "order": (
        _Order,
        f"a map with passages (1 to {MOST_PASSAGES} lists of token ids) and perhaps before (a list of token ids); "
        f"at most {MOST_ORDERED_TOKENS} tokens",
    ),
    "pin": (
        _Pin,
        f"a map with {_OWNER}, seconds (above 0, at most {LONGEST_PIN}) and perhaps documents (a list of ids of "
        "documents above)",
    ),
    "unpin": (_Unpin, f"a map with {_OWNER}"),
    "ttl": (Annotated[float, Field(strict=True, gt=0, le=LONGEST)], f"seconds, above 0, at most {LONGEST:.0f}"),
    "priority": (Annotated[int, Field(strict=True, ge=0, le=HIGHEST)], f"a whole number from 0 to {HIGHEST}"),
}
_CHECKS: Mapping[str, TypeAdapter[Any]] = {name: TypeAdapter(rule) for name, (rule, _) in _RULES.items()}


def with_problem(hints: Hints, problem: str) -> Hints:
    """The same hints, and one thing more that is wrong with them; told once."""
    return hints if problem in hints.problems else replace(hints, problems=(*hints.problems, problem))


def read_hints(params: Any, allow: Collection[str] = HINT_NAMES) -> Hints:
    """The valid hints of the kinds in `allow`, and all that is wrong with the others."""
    given = params.get(KEY) if isinstance(params, dict) else None
    if given is None:
        return NO_HINTS
    if not isinstance(given, dict):
        problem = f"{KEY} = {short(given)}; allowed: a mapping with {', '.join(HINT_NAMES)}"
        return Hints(given=True, problems=(problem,))
    problems = _unknown(given)
    spans = _read(given, "documents", allow, problems) or []
    ends = {each.id: each.end for each in spans if isinstance(each.id, str)}
    found = {name: _read(given, name, allow, problems, ends) for name in _RULES if name != "documents"}
    pin, unpin, order = found["pin"], found["unpin"], found["order"]
    return Hints(
        given=True,
        documents=tuple(Document(_name(each.id), each.start, each.end) for each in spans),
        fuse=found["fuse"],
        recompute_ratio=found["recompute_ratio"],
        selection=found["selection"],
        turn=found["turn"],
        store="store" not in allow or given.get("store") is None or found["store"] is True,
        pin=pin and Pin(pin.owner, pin.seconds, max((ends[each] for each in pin.documents), default=None)),
        unpin=unpin and unpin.owner,
        order=order and Order(as_tokens(order.before), tuple(map(as_tokens, order.passages))),
        ttl=found["ttl"],
        priority=found["priority"] or 0,
        problems=tuple(problems),
    )


class _Repr(Repr):
    """Bounded in time too: a mapping is not sorted."""

    maxlevel = 3

    def repr_dict(self, x: Mapping[Any, Any], level: int) -> str:
        """As `Repr` does, in the order given."""
        if level <= 0:
            return "{...}"
        pairs = islice(x.items(), self.maxdict)
        shown = [f"{self.repr1(key, level - 1)}: {self.repr1(value, level - 1)}" for key, value in pairs]
        return f"{{{', '.join(shown + ['...'] * (len(x) > self.maxdict))}}}"


def short(value: Any) -> str:
    """A value, in at most `SHOWN` characters, all of them printable."""
    try:
        text = _Repr().repr(value)
    except ValueError:  # a number of thousands of digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _unknown(given: Mapping[Any, Any]) -> list[str]:
    few = list(islice((key for key in given if key not in HINT_NAMES), SHOWN_NAMES + 1))
    named = [f"{KEY}.{short(key)}" for key in few[:SHOWN_NAMES]] + ["..."] * (len(few) > SHOWN_NAMES)
    return [f"{', '.join(named)}: unknown; allowed: {', '.join(HINT_NAMES)}"] if few else []


def _name(given: Any) -> str:
    return given[:OWNER] if isinstance(given, str) else ""


def _read(
    given: Mapping[Any, Any],
    name: str,
    allow: Collection[str],
    problems: list[str],
    documents: Collection[str] = (),
) -> Any:
    """A valid value, or None; what is wrong with it goes into `problems`. `documents`: ids that a pin may name."""
    value = given.get(name)
    if value is None:
        return None
    if name not in allow:
        problems.append(f"{KEY}.{name}: not allowed here; hints.allow = {', '.join(sorted(allow)) or 'none'}")
        return None
    if name == "documents" and isinstance(value, list) and len(value) > MOST_DOCUMENTS:
        problems.append(f"{KEY}.documents: {len(value)} of them; the first {MOST_DOCUMENTS} count")
        value = value[:MOST_DOCUMENTS]
    try:
        if isinstance(value, dict) and len(value) > len(_Pin.model_fields):  # else each key would be an error
            raise ValueError("too many keys")
        found = _CHECKS[name].validate_python(value)
        if name == "pin" and not set(found.documents) <= set(documents):
            raise ValueError("an unknown document")
        return found
    except ValueError:  # ValidationError is one
        problems.append(f"{KEY}.{name} = {short(value)}; allowed: {_RULES[name][1]}")
        return None
