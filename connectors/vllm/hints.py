"""Hints of a request: `kv_transfer_params["ragkv"]`, all optional, never a reason to fail.

    {"ragkv": {"documents": [{"id": "10-K 2023", "start": 12, "end": 3012}],
               "pin": {"owner": "desk 7", "seconds": 3600, "documents": ["10-K 2023"]},
               "unpin": {"owner": "desk 6"}, "ttl": 86400, "priority": 1, "store": true,
               "fuse": true, "recompute_ratio": 0.15, "selection": "query", "turn": 2}}

`documents`: token positions in the prompt; chunks end at both, so that a document is cut alike in every prompt
that names it (unless chunks get too short by it; the first `MOST_DOCUMENTS` count). `pin`: keep in memory, for
an owner and so many seconds, the prompt up to the end of the last of these documents, or all of it where none is
named; `unpin` takes all of an owner's pins back. Owners are a tenant's own. `ttl`: serve what this request adds
no longer than so many seconds, from any tier. `priority`: 0 to 9; what has less goes first. `store`: false keeps
nothing of the request in any tier, neither prompt nor answer; what is kept already is used. (So does what is no
boolean: there may be a secret.) `fuse`: reuse documents that return at another position, or not;
`recompute_ratio`, `selection`: of them, how much is computed again, and which tokens; where absent, as `fusion.*`
says. `turn`: of its conversation, for the metrics, which else infer it; 0: it is no part of one.

A hint can cost others nothing: everything here is bounded, and so is what follows from it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from reprlib import Repr
from typing import Any

from ragkv.config.settings import HINT_NAMES, SELECTION_NAMES

KEY = "ragkv"
LONGEST = 3e9  # seconds to live; a century
LONGEST_PIN = 604_800  # seconds; a week
HIGHEST = 9
LATEST = 1_000_000  # turn
MOST_DOCUMENTS = 256
LAST = 2**31 - 1  # token position
OWNER = 200  # characters of a name
SHOWN = 80  # characters of a faulty value
SHOWN_NAMES = 5  # unknown hints that are named


@dataclass(frozen=True, slots=True)
class Pin:
    """`end`: up to which token; None for all of the prompt."""

    owner: str
    seconds: float
    end: int | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """A span of the prompt, in tokens, and what the application calls it ("" where it has no name)."""

    id: str
    start: int
    end: int


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
    given: bool = field(default=False, compare=False)
    problems: tuple[str, ...] = field(default=(), compare=False)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Positions, ascending, at which chunks should end."""
        return tuple(sorted({edge for each in self.documents for edge in (each.start, each.end)} - {0}))


NO_HINTS = Hints()


def with_problem(hints: Hints, problem: str) -> Hints:
    """The same hints, and one thing more that is wrong with them; told once."""
    return hints if problem in hints.problems else replace(hints, problems=(*hints.problems, problem))


def read_hints(params: Any, allow: Collection[str] = HINT_NAMES) -> Hints:
    """The hints that hold, of the kinds in `allow`, and all that is wrong with the others."""
    given = params.get(KEY) if isinstance(params, dict) else None
    if given is None:
        return NO_HINTS
    if not isinstance(given, dict):
        return Hints(
            given=True, problems=(f"{KEY} = {short(given)}; allowed: a mapping with {', '.join(HINT_NAMES)}",)
        )
    reader = _Reader(given, allow)
    spans = reader.documents()
    return Hints(
        given=True,
        documents=tuple(Document(_name(span.get("id")), span["start"], span["end"]) for span in spans),
        fuse=reader.checked("fuse", _is_bool, "true or false"),
        recompute_ratio=reader.checked("recompute_ratio", _is_ratio, "a number from 0 to 1"),
        selection=reader.checked("selection", _is_selection, ", ".join(SELECTION_NAMES)),
        turn=reader.checked("turn", _is_turn, f"a whole number from 0 to {LATEST}"),
        store=reader.store(),
        pin=reader.pin(spans),
        unpin=reader.unpin(),
        ttl=reader.checked("ttl", _is_time, f"seconds, above 0, at most {LONGEST:.0f}"),
        priority=reader.checked("priority", _is_priority, f"a whole number from 0 to {HIGHEST}") or 0,
        problems=tuple(reader.problems),
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


class _Reader:
    """Takes a mapping apart, and notes what is wrong."""

    def __init__(self, given: Mapping[Any, Any], allow: Collection[str]) -> None:
        self._given, self._allow = given, allow
        self.problems: list[str] = []
        few = list(islice((key for key in given if key not in HINT_NAMES), SHOWN_NAMES + 1))
        named = [f"{KEY}.{short(key)}" for key in few[:SHOWN_NAMES]] + ["..."] * (len(few) > SHOWN_NAMES)
        if few:
            self.problems.append(f"{', '.join(named)}: unknown; allowed: {', '.join(HINT_NAMES)}")

    def checked(self, name: str, good: Any, allowed: str) -> Any:
        """A value that is good, or None."""
        value = self._given.get(name)
        if value is None:
            return None
        if name not in self._allow:
            kinds = ", ".join(sorted(self._allow)) or "none"
            self.problems.append(f"{KEY}.{name}: not allowed here; hints.allow = {kinds}")
            return None
        if good(value):
            return value
        self.problems.append(f"{KEY}.{name} = {short(value)}; allowed: {allowed}")
        return None

    def documents(self) -> list[dict[str, Any]]:
        spans = self.checked("documents", _are_spans, "a list of maps with start < end, token positions") or []
        if len(spans) > MOST_DOCUMENTS:
            self.problems.append(f"{KEY}.documents: {len(spans)} of them; the first {MOST_DOCUMENTS} count")
        return list(spans[:MOST_DOCUMENTS])

    def pin(self, spans: list[dict[str, Any]]) -> Pin | None:
        allowed = (
            f"a map with owner (1 to {OWNER} characters), seconds (above 0, at most {LONGEST_PIN}) and perhaps "
            "documents (a list of ids of documents above)"
        )
        ends = {span["id"]: span["end"] for span in spans if isinstance(span.get("id"), str)}
        found = self.checked("pin", lambda pin: _is_pin(pin, ends), allowed)
        if found is None:
            return None
        named = found.get("documents")
        return Pin(found["owner"], float(found["seconds"]), max(ends[each] for each in named) if named else None)

    def store(self) -> bool:
        """False, too, where it is not known what was meant."""
        found = self.checked("store", _is_bool, "true or false")
        return "store" not in self._allow or self._given.get("store") is None or found is True

    def unpin(self) -> str | None:
        found = self.checked(
            "unpin",
            lambda value: _has_owner(value) and len(value) == 1,
            f"a map with owner (1 to {OWNER} characters)",
        )
        return None if found is None else str(found["owner"])


def _name(given: Any) -> str:
    return given[:OWNER] if isinstance(given, str) else ""


def _are_spans(spans: Any) -> bool:
    return isinstance(spans, list) and all(map(_is_span, islice(spans, MOST_DOCUMENTS)))


def _is_span(span: Any) -> bool:
    if not isinstance(span, dict):
        return False
    start, end = span.get("start"), span.get("end")
    return type(start) is int and type(end) is int and 0 <= start < end <= LAST


def _has_owner(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("owner"), str) and 0 < len(value["owner"]) <= OWNER


def _is_pin(pin: Any, ends: Mapping[str, int]) -> bool:
    if not _has_owner(pin) or not pin.keys() <= {"owner", "seconds", "documents"}:
        return False
    seconds, named = pin.get("seconds"), pin.get("documents", [])
    if not _is_time(seconds) or seconds > LONGEST_PIN:
        return False
    return isinstance(named, list) and len(named) <= MOST_DOCUMENTS and all(_is_id(each, ends) for each in named)


def _is_id(name: Any, ends: Mapping[str, int]) -> bool:
    return isinstance(name, str) and name in ends


def _is_bool(value: Any) -> bool:
    return type(value) is bool


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= LONGEST


def _is_ratio(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _is_selection(value: Any) -> bool:
    return isinstance(value, str) and value in SELECTION_NAMES


def _is_turn(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LATEST


def _is_priority(value: Any) -> bool:
    return type(value) is int and 0 <= value <= HIGHEST
