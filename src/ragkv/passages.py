"""Passages: their names, their text as it is in prompts, and where they stand in a prompt or a message."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from ragkv.client import Tokenizer

SEPARATOR = "\n\n"
SHORTEST_TRIMMED = 8  # tokens; a shorter rest of a passage could stand anywhere

Passage: TypeAlias = str | tuple[str, str]


def closed(text: str) -> str:
    """A part as it is in a prompt: without blank lines around it, and with one separator at its end."""
    return text.lstrip("\r\n").rstrip() + SEPARATOR


def digest(text: str) -> str:
    """The default id of a passage: 16 hexadecimal digits."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def named(passages: Iterable[Passage]) -> Iterator[tuple[str, str]]:
    """Id and text of each passage, as it is in a prompt. ValueError: what is none, or two texts of one id."""
    if isinstance(passages, str | bytes | Mapping):
        raise ValueError(
            f"passages = {short(passages)}; allowed: a list of passages, each a text or a pair of id and text"
        )
    texts: dict[str, str] = {}
    for number, passage in enumerate(passages):
        name, text = _pair(number, passage)
        if not text.strip():
            raise ValueError(f"passages[{number}] = {short(text)}; allowed: a text that is not blank")
        text = closed(text)
        name = digest(text) if name is None else name
        if texts.setdefault(name, text) != text:
            raise ValueError(f"passages[{number}]: id {short(name)} again; allowed: one text an id")
        yield name, text


def _pair(number: int, passage: Any) -> tuple[str | None, str]:
    match passage:
        case str():
            return None, passage
        case (str() as name, str() as text):
            return name, text
    raise ValueError(f"passages[{number}] = {short(passage)}; allowed: a text, or a pair of id and text")


def located(tokenizer: Tokenizer, tokens: list[int], passages: Iterable[Passage]) -> list[dict[str, Any]]:
    """The spans of passages in a prompt, ascending, of those that are found."""
    taken: list[tuple[int, int]] = []
    documents: list[dict[str, Any]] = []
    for name, text in _longest_first(named(passages)):
        found = (_free(tokens, run, taken) for run in _runs(tokenizer, text))
        span = next((each for each in found if each), None)
        if span is not None:
            taken.append(span)
            documents.append({"id": name, "start": span[0], "end": span[1]})
    return sorted(documents, key=lambda document: int(document["start"]))


def slots_of(content: Any, texts: Mapping[str, str]) -> list[tuple[int, int, str]]:
    """Where passages stand in a message's text, each in lines of its own: start, end and id of each that is found,
    ascending."""
    slots: list[tuple[int, int, str]] = []
    for name, text in _longest_first(texts.items()) if isinstance(content, str) else ():
        bare = text.removesuffix(SEPARATOR)
        at = content.find(bare)
        while at >= 0:
            end = at + len(bare)
            alone = content[at - 1 : at] in ("", "\n") and content[end : end + 1] in ("", "\n", "\r")
            if alone and all(at >= last or end <= first for first, last, _ in slots):
                slots.append((at, end, name))
                break
            at = content.find(bare, at + 1)
    return sorted(slots)


def _longest_first(passages: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """One that another contains does not take that one's place."""
    return sorted(passages, key=lambda passage: -len(passage[1]))


def _runs(tokenizer: Tokenizer, text: str) -> Iterator[list[int]]:
    """What a passage's tokens may be amid other text, the likeliest first."""
    bare = text.removesuffix(SEPARATOR)
    alone, closing = (tokenizer.encode(each, add_special_tokens=False) for each in (bare, text))
    yield from (alone, closing)
    for run in (alone[1:], alone[:-1], alone[1:-1]):
        if len(run) >= SHORTEST_TRIMMED:
            yield run


def _free(tokens: list[int], run: list[int], taken: list[tuple[int, int]]) -> tuple[int, int] | None:
    """The first place of a run that no other passage has."""
    at = find(tokens, run, 0)
    while at is not None and any(at < end and start < at + len(run) for start, end in taken):
        at = find(tokens, run, at + 1)
    return None if at is None else (at, at + len(run))


def find(tokens: list[int], run: list[int], start: int) -> int | None:
    """The first position, from `start` on, at which a run of tokens stands; None: nowhere, or it is empty."""
    try:
        while run:
            start = tokens.index(run[0], start)
            if tokens[start : start + len(run)] == run:
                return start
            start += 1
    except ValueError:
        pass
    return None


def short(value: Any) -> str:
    """A faulty value, for a message."""
    return f"{value!r:.80}"
