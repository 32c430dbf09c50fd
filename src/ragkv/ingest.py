"""Prefill passages ahead of time, each after the system prompt, so that a server has their KV when it is needed.

Each passage is one request with one output token, which is never fused. So its KV is exact, and was computed in
the context in which it fuses best (CacheBlend's chunks after a shared prefix). When the server reports that all of
a passage is stored, the passage is recorded in a journal, and skipped the next time. Stores are asynchronous, so a
server that does not report this at once is asked again.
"""

import functools
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ragkv.chains import likely_chains, read_retrievals
from ragkv.errors import RagKVError
from ragkv.rag import Server, closed, prompt

ASKED = 3  # times, until a server says that it has stored a passage
LONGEST_LINE, LONGEST_KEY, MOST_KEYS = 4096, 128, 4_000_000  # of a journal
LARGEST_TEXT = 256 << 20  # bytes of a file
SMALLEST_ROOM = 16  # tokens for a passage, behind the system prompt

_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
_CUTS = (re.compile(r"\n"), re.compile(r"(?<=[.!?;:])\s+"), re.compile(r"\s+"))


@dataclass(slots=True)
class FileReport:
    """The result for one file."""

    file: str
    passages: int = 0
    known: int = 0  # passages that the journal had
    answered: int = 0  # passages that were sent
    tokens: int = 0  # of all passages, without the system prompt
    stored_tokens: int = 0  # of the requests, system prompt included, as the server reports
    hit_tokens: int = 0  # the same, of what was stored before
    error: str | None = None  # why not all of the file is stored


@dataclass(frozen=True, slots=True)
class Passage:
    """A passage to prefill. `key`: its name in the journal. `parts`: the passages of a chain."""

    id: str
    text: str
    tokens: int
    key: str
    parts: tuple["Passage", ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server reports of one passage. `complete`: all of it is stored."""

    stored_tokens: int
    hit_tokens: int
    complete: bool


class Journal:
    """The passages that a server has, in a file of JSON lines. Incomplete lines (after a crash) are skipped.
    OSError: the file cannot be read or written."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file
        self._keys: set[str] = set()
        line = b""
        if file.exists():
            with file.open("rb") as lines:
                for line in iter(lambda: lines.readline(LONGEST_LINE), b""):
                    self._note(line)
        self._mend = "" if line.endswith(b"\n") or not line else "\n"

    def _note(self, line: bytes) -> None:
        try:
            key = json.loads(line)["key"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return
        if isinstance(key, str) and len(key) <= LONGEST_KEY and len(self._keys) < MOST_KEYS:
            self._keys.add(key)

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def add(self, passage: Passage) -> None:
        """Record a passage. It is in the file when this returns."""
        line = json.dumps({"key": passage.key, "id": passage.id, "tokens": passage.tokens})
        with self._file.open("a", encoding="utf-8") as file:
            file.write(f"{self._mend}{line}\n")
        self._mend = ""
        self._keys.add(passage.key)


class Ingest:
    """Cuts files into passages and prefills them. `known`: whether a passage with this key can be skipped.

    `passage_tokens`: the most tokens of a passage; None: each file is one passage. With the system prompt, no
    passage is longer than the server's `max_model_len`. RagKVError: the server does not answer, or the system
    prompt leaves fewer than `SMALLEST_ROOM` tokens.
    """

    def __init__(
        self, server: Server, system: str, passage_tokens: int | None, known: Callable[[str], bool]
    ) -> None:
        self._server, self._system, self.known = server, system, known
        self._passage_tokens = passage_tokens
        self.url = server.url
        server.model, longest = served(server.models(), server.model)
        self.model = server.model
        self.system_tokens = len(prompt(server, system).token_ids)
        self._room = None if longest is None else longest - self.system_tokens - 1
        if self._room is not None and self._room < SMALLEST_ROOM:
            raise RagKVError(
                f"the system prompt has {self.system_tokens} tokens; allowed: {SMALLEST_ROOM + 1} less than the "
                f"{longest} of {self.model}"
            )
        self.reported = False  # whether the server has said what it keeps

    def passages(self, name: str, text: str) -> list[Passage]:
        """A file's passages, each of as many paragraphs as fit. RagKVError: there is no text, or it is too
        long."""
        if not text.strip():
            raise RagKVError("it holds no text")
        limit = self._passage_tokens
        pieces = {name: text}
        if limit is not None:
            limit = limit if self._room is None else min(limit, self._room)
            pieces = {f"{name}#{number}": piece for number, piece in enumerate(cut(text, self._count, limit))}
        found = [Passage(name, piece, self._count(piece), self._key(piece)) for name, piece in pieces.items()]
        longest = max(found, key=lambda passage: passage.tokens)
        if self._room is not None and longest.tokens > self._room:
            raise RagKVError(f"{longest.id} has {longest.tokens} tokens; allowed: {self._room}")
        return found

    def chain(self, passages: Sequence[Passage]) -> Passage:
        """Passages behind one another, as many as a prompt has room for, as one to prefill."""
        sizes = list(itertools.accumulate(each.tokens for each in passages))
        fit = tuple(each for each, size in zip(passages, sizes, strict=True) if size <= (self._room or size))
        key = self._key("\0".join(closed(each.text) for each in fit))
        return Passage(" ".join(each.id for each in fit), "", sizes[len(fit) - 1], key, fit)

    def prefill(self, passage: Passage) -> Answer:
        """Have the server compute and store a passage. Asks up to `ASKED` times until it reports that all of it is
        stored. RagKVError: the server does not answer."""
        parts = [(each.id, each.text) for each in passage.parts or (passage,)]
        asked = prompt(self._server, self._system, parts, fuse=False)
        hints = {"ragkv": asked.hints | {"turn": 0}}  # what follows it is no second turn
        had: int | None = None  # of the first answer: later ones have what it stored
        stored = 0
        for _ in range(ASKED):
            answer = self._server.complete(asked, max_tokens=1, temperature=0, kv_transfer_params=hints)
            params = answer.get("kv_transfer_params")
            report = params.get("ragkv") if isinstance(params, dict) else None
            if not isinstance(report, dict):
                return Answer(0, 0, False)
            self.reported = True
            stored, hit = (_whole(report.get(name)) for name in ("stored_tokens", "hit_tokens"))
            had = hit if had is None else had
            if stored >= asked.documents[-1]["end"]:
                return Answer(stored, had, True)
        return Answer(stored, had or 0, False)

    def _count(self, text: str) -> int:
        return len(self._server.encode(closed(text)))

    def _key(self, text: str) -> str:
        named = json.dumps([self._server.url, self.model, self._system, closed(text)])
        return hashlib.blake2b(named.encode(), digest_size=16).hexdigest()


def run(
    ingest: Ingest,
    files: Sequence[Path],
    journal: Journal,
    concurrency: int,
    tick: Callable[[int, int], None],
    *,
    retrievals: Path | None = None,
    chains: int = 0,
) -> list[FileReport]:
    """Prefill all files, with `concurrency` requests at a time. Returns their reports, in the same order.

    If a file fails, its remaining passages are not sent, and the other files continue. `tick(done, all)` is called
    with numbers of passages, for progress bars. `retrievals`: a log of past retrievals (`ragkv.chains`), of which
    `chains` likely chains of the passages are prefilled as well; its report is the last.
    """
    reports = [FileReport(str(file)) for file in files]
    names = Counter(file.name for file in files)
    labels = [file.name if names[file.name] == 1 else str(file) for file in files]
    pool = ThreadPoolExecutor(concurrency)
    read = [pool.submit(_passages, ingest, label, file) for label, file in zip(labels, files, strict=True)]
    known: dict[str, Passage] = {}
    waiting: _Waiting = {}
    try:
        for report, each in zip(reports, read, strict=True):
            passages = _found(report, each.result)
            known.update((passage.id, passage) for passage in passages)
            waiting.update(_submit(pool, ingest, report, passages))
            tick(0, len(waiting))
        _collect(waiting, journal, tick)
        if retrievals is not None:
            reports.append(FileReport(str(retrievals)))
            likely = _found(reports[-1], functools.partial(_chains, ingest, retrievals, chains, known))
            _collect(_submit(pool, ingest, reports[-1], likely), journal, tick)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return reports


_Waiting: TypeAlias = dict["Future[Answer | None]", tuple[FileReport, Passage]]


def _found(report: FileReport, read: Callable[[], list[Passage]]) -> list[Passage]:
    """What is to be prefilled of a file; nothing, where it cannot be read, which its report then says."""
    try:
        return read()
    except (RagKVError, OSError, ValueError) as error:
        report.error = _reason(error)
        return []


def _submit(pool: ThreadPoolExecutor, ingest: Ingest, report: FileReport, passages: list[Passage]) -> _Waiting:
    """Send what the journal does not have."""
    unknown = [passage for passage in passages if not ingest.known(passage.key)]
    report.passages, report.known = len(passages), len(passages) - len(unknown)
    report.tokens = sum(passage.tokens for passage in passages)
    return {pool.submit(_send, ingest, report, passage): (report, passage) for passage in unknown}


def _collect(waiting: _Waiting, journal: Journal, tick: Callable[[int, int], None]) -> None:
    for done, future in enumerate(as_completed(waiting), 1):
        answer = future.result()
        if answer is not None:
            report, passage = waiting[future]
            report.answered += 1
            report.stored_tokens += answer.stored_tokens
            report.hit_tokens += answer.hit_tokens
            if answer.complete:
                journal.add(passage)
        tick(done, len(waiting))


def _chains(ingest: Ingest, file: Path, most: int, passages: Mapping[str, Passage]) -> list[Passage]:
    log = read_retrievals(file)
    known = [[name for name in each if name in passages] for each in log]
    if log and not any(known):
        named = next((name for each in log for name in each), "")
        raise RagKVError(
            f"none of its ids, such as {named!r}, is a passage here; allowed: {next(iter(passages), '')}"
        )
    chains = [ingest.chain([passages[name] for name in chain]) for chain in likely_chains(known, most)]
    return list({chain.key: chain for chain in chains if len(chain.parts) > 1}.values())


def cut(text: str, count: Callable[[str], int], limit: int) -> Iterator[str]:
    """Cut a text, verbatim, into pieces of as many paragraphs as fit into `limit` tokens. `count`: tokens of a
    text.

    A paragraph that is too long is halved until it fits: at the end of a line, sentence or word near its middle
    if there is one.
    """
    start = end = size = 0  # size: as many tokens as text[start:end] can have
    for first, last in _paragraphs(text):
        for left, right, tokens in _fitting(text, first, last, count, limit):
            most = size + left - end + tokens
            if end > start and most > limit:
                most = count(text[start:right])
                if most > limit:
                    yield text[start:end]
                    end = start
            if end == start:
                start, most = left, tokens
            end, size = right, most
    if end > start:
        yield text[start:end]


def served(cards: Sequence[dict[str, Any]], name: str | None) -> tuple[str, int | None]:
    """Name and `max_model_len` (in tokens; None: not given) of the model called `name`, or of the first (None).
    `cards`: as /v1/models gives them. RagKVError: no model has that name."""
    found = next((card for card in cards if name in (None, card["id"])), None)
    if found is None:
        raise RagKVError(f"--model = {name!r}; allowed: {', '.join(str(card['id']) for card in cards)}")
    # An adapter's card leaves the length to the card of its base.
    lengths = (card.get("max_model_len") for card in (found, *cards))
    return str(found["id"]), next((length for length in lengths if type(length) is int), None)


def _paragraphs(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    for gap in _BLANK_LINES.finditer(text):
        yield start, gap.start()
        start = gap.end()
    yield start, len(text)


def _fitting(
    text: str, start: int, end: int, count: Callable[[str], int], limit: int
) -> Iterator[tuple[int, int, int]]:
    """Start, end and tokens of the pieces of a paragraph, without line breaks around; nothing of a blank one."""
    piece = text[start:end]
    start, end = end - len(piece.lstrip("\r\n")), start + len(piece.rstrip())
    if start >= end:
        return
    tokens = count(text[start:end])
    if tokens <= limit or end - start < 2:
        yield start, end, tokens
        return
    middle = (start + end) // 2
    ends = (each.end() for each in _near(text, middle, max((end - start) // 4, 1), end))
    at = min(ends, key=lambda position: abs(position - middle), default=middle)
    yield from _fitting(text, start, at, count, limit)
    yield from _fitting(text, at, end, count, limit)


def _near(text: str, middle: int, reach: int, end: int) -> list[re.Match[str]]:
    """The best kind of place to cut that is found within reach of the middle."""
    for kind in _CUTS:
        found = [each for each in kind.finditer(text, middle - reach, middle + reach) if each.end() < end]
        if found:
            return found
    return []


def _passages(ingest: Ingest, label: str, file: Path) -> list[Passage]:
    return ingest.passages(label, read_text(file))


def read_text(file: Path) -> str:
    """The text of a file. OSError: it cannot be read. UnicodeDecodeError: it is not UTF-8. RagKVError: it has more
    than `LARGEST_TEXT` bytes."""
    with file.open("rb") as stream:
        raw = stream.read(LARGEST_TEXT + 1)
    if len(raw) > LARGEST_TEXT:
        raise RagKVError(f"it has more than {LARGEST_TEXT >> 20} MiB; allowed: fewer")
    return raw.decode("utf-8-sig")


def _send(ingest: Ingest, report: FileReport, passage: Passage) -> Answer | None:
    """None where the file has failed, now or before."""
    if report.error is None:
        try:
            return ingest.prefill(passage)
        except RagKVError as error:
            report.error = f"{passage.id}: {error}"
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8: byte {error.start}"
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _whole(value: Any) -> int:
    return value if type(value) is int and value > 0 else 0
