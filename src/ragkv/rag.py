"""For applications: prompts made of passages, so that the KV of each passage is found again, and their hints.

Every part (system prompt, each passage, question) is tokenized separately and the token ids are joined, so a
passage has the same tokens at every position. This needs a running server, or any tokenizer with Hugging Face's
`encode`, but neither vLLM nor torch.

```python
from openai import OpenAI
from ragkv import rag

server = rag.Server("http://localhost:8000")
asked = rag.prompt(server, "Answer from the passages.", passages, "Question: who signed?\\nAnswer:")
client = OpenAI(base_url="http://localhost:8000/v1", api_key="-")
answer = client.completions.create(
    model=MODEL, prompt=asked.token_ids, max_tokens=200, extra_body=asked.extra_body
)
```

For `client.chat.completions`, write the messages as usual. They must contain the passages word for word:

```python
asked = rag.chat(server, messages, passages)
answer = client.chat.completions.create(model=MODEL, messages=messages, extra_body=asked.extra_body)
```

Where the order of passages is free, ask in which order most of them need not be computed:

```python
found = rag.order(server, "Answer from the passages.", passages)
asked = rag.prompt(server, "Answer from the passages.", found.passages, "Question: who signed?\\nAnswer:")
```

`order_chat` does so for messages, and `Conversation` over several turns.

A passage is a text, or a pair (id, text). The id names it in the server's answers and metrics; the default is a
digest of the text. The server reports what it reused in `answer.kv_transfer_params["ragkv"]`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ragkv.client import Server as Server
from ragkv.client import Tokenizer as Tokenizer
from ragkv.config.settings import SELECTION_NAMES
from ragkv.passages import SEPARATOR as SEPARATOR
from ragkv.passages import Passage as Passage
from ragkv.passages import closed as closed
from ragkv.passages import digest as digest
from ragkv.passages import find, located, named, short, slots_of


@dataclass(frozen=True, slots=True)
class Ordered:
    """`passages`: in the order to use, each once. `ranks`: for each, its place in the order given, from 0 on.
    `tokens`: of all of them. `ordered_tokens`: of these, how many need not be computed; `given_tokens`: how many
    in the order given."""

    passages: list[Passage]
    ranks: list[int]
    tokens: int = 0
    ordered_tokens: int = 0
    given_tokens: int = 0

    @property
    def relevance(self) -> str:
        """A line for the prompt, between passages and question, that tells a model the order given, by the
        passages' places in the prompt (ContextPilot's annotation)."""
        places = sorted(range(len(self.ranks)), key=lambda place: self.ranks[place])
        return f"Passages by relevance, the most relevant first: {', '.join(str(each + 1) for each in places)}."


@dataclass(frozen=True, slots=True)
class Prompt:
    """`token_ids`: the whole prompt. `hints`: the value for `kv_transfer_params["ragkv"]`."""

    token_ids: list[int]
    hints: dict[str, Any]

    @property
    def documents(self) -> list[dict[str, Any]]:
        """The passages: id, start and end (exclusive), in token positions, ascending. A separator at the end of a
        passage is part of it."""
        found: list[dict[str, Any]] = self.hints["documents"]
        return found

    @property
    def extra_body(self) -> dict[str, Any]:
        """The hints as the OpenAI client's argument `extra_body`."""
        return {"kv_transfer_params": {"ragkv": self.hints}}


def prompt(
    tokenizer: Tokenizer,
    system: str = "",
    passages: Iterable[Passage] = (),
    question: str = "",
    *,
    fuse: bool | None = True,
    recompute_ratio: float | None = None,
    selection: str | None = None,
    hints: Mapping[str, Any] | None = None,
) -> Prompt:
    """The prompt "system, passages, question" for /v1/completions.

    Blank lines around the system prompt and each passage are replaced by one blank line after it; the question is
    not changed. The special tokens that the tokenizer puts before a prompt are added. `fuse`: whether the
    passages' KV may be fused (None: the server's setting decides). `recompute_ratio`: the share of the moved
    tokens to recompute, 0 to 1. `selection`: how to choose them, one of SELECTION_NAMES. `hints`: other hints,
    such as pin and ttl. ValueError: an invalid argument. RagKVError: the server does not answer.
    """
    settings = _settings(fuse, recompute_ratio, selection, hints)
    tokens = _leading(tokenizer)
    if system.strip():
        first = tokenizer.encode(closed(system), add_special_tokens=False)
        tokens = first if first[: len(tokens)] == tokens else tokens + first
    documents = []
    for name, text in named(passages):
        start = len(tokens)
        tokens = tokens + tokenizer.encode(text, add_special_tokens=False)
        documents.append({"id": name, "start": start, "end": len(tokens)})
    if question:
        tokens = tokens + tokenizer.encode(question, add_special_tokens=False)
    return Prompt(tokens, {"documents": documents, **settings})


def chat(
    server: Server,
    messages: Sequence[Mapping[str, Any]],
    passages: Iterable[Passage],
    *,
    template: Mapping[str, Any] | None = None,
    fuse: bool | None = True,
    recompute_ratio: float | None = None,
    selection: str | None = None,
    hints: Mapping[str, Any] | None = None,
) -> Prompt:
    """Hints for /v1/chat/completions: the positions of passages in messages that contain them word for word.

    The server renders the messages and tokenizes them as a whole. A passage is found by its tokens, except for one
    token at each edge that may have merged with the text around it, so put a blank line before and after each
    passage. A passage that is not found gets no hint, and may still be fused by its structure. `template`: other
    fields of the request that shape the prompt, such as tools or chat_template_kwargs. Other arguments and errors:
    as for `prompt`.
    """
    if isinstance(messages, str | bytes | Mapping):
        raise ValueError(f"messages = {short(messages)}; allowed: a list of messages, each with role and content")
    settings = _settings(fuse, recompute_ratio, selection, hints)
    tokens = server.encode_chat(messages, template or {})
    return Prompt(tokens, {"documents": located(server, tokens, passages), **settings})


def order(server: Server, system: str, passages: Iterable[Passage], *, cache_salt: str | None = None) -> Ordered:
    """Passages in the order in which most of a prompt "system, passages, …" need not be computed.

    Those that the engine has stored as a chain behind the system prompt come first, the rest as given: so give the
    most relevant first. The engine is asked by a request of one token. Where it cannot say, they stay as given.
    `cache_salt`: that of the requests, if they have one. Errors: as for `prompt`.
    """
    once = list(_by_name(passages).values())
    asked = prompt(server, system, once)
    spans = [(each["start"], each["end"]) for each in asked.documents]
    before = asked.token_ids[: spans[0][0]] if spans else []
    return _ask(server, once, before, [asked.token_ids[start:end] for start, end in spans], cache_salt)


def order_chat(
    server: Server,
    messages: Sequence[Mapping[str, Any]],
    passages: Iterable[Passage],
    *,
    template: Mapping[str, Any] | None = None,
    cache_salt: str | None = None,
) -> tuple[list[dict[str, Any]], Ordered]:
    """As `order`, for messages that contain the passages word for word: new messages, in which they have changed
    places. The passages of one message are ordered: of the last that contains any, each in lines of its own.
    Others, and those that are not found, are not in `Ordered.passages`. All stay as they are where one of them
    stands in another message too, or other text stands between some of them. Of lower tiers only what
    `prompt` has stored is found. Arguments and errors: as for `chat`."""
    if isinstance(messages, str | bytes | Mapping):
        raise ValueError(f"messages = {short(messages)}; allowed: a list of messages, each with role and content")
    new = [dict(message) for message in messages]
    of_name = _by_name(passages)
    texts = dict(named(of_name.values()))
    for message in reversed(new):
        slots = slots_of(message.get("content"), texts)
        if slots:
            break
    else:
        return new, Ordered([], [])
    names = [name for _, _, name in slots]
    held = [of_name[name] for name in names]
    tokens = server.encode_chat(messages, template or {})
    spans = located(server, tokens, held)
    edges = [each["start"] for each in spans]
    between = [tokens[each["end"] : start] for each, start in zip(spans, edges[1:], strict=False)]
    others = [slots_of(each.get("content"), texts) for each in new if each is not message]
    twice = {name for each in others for _, _, name in each} & set(names)
    if twice or [each["id"] for each in spans] != names or between != between[:1] * len(between):
        return new, Ordered(held, list(range(len(held))))
    runs = [tokens[each["start"] : each["end"]] + (between[0] if between else []) for each in spans]
    found = _ask(server, held, tokens[: edges[0]], runs, cache_salt)
    content, text = message["content"], ""
    for place, (_, end, _) in enumerate(slots):
        after = slots[place + 1][0] if place + 1 < len(slots) else len(content)
        first, last, _ = slots[found.ranks[place]]
        text += content[first:last] + content[end:after]
    message["content"] = content[: slots[0][0]] + text
    return new, found


class Conversation:
    """Turns with retrieval in each, for /v1/completions. What was sent stays as it is, token by token: each turn
    goes on behind the KV of the last. A passage that has been sent is left out when it is retrieved again.

    `server`, `system`, `cache_salt`: as for `order`. Not for several threads at once.
    """

    def __init__(self, server: Server, system: str = "", *, cache_salt: str | None = None) -> None:
        self._server, self._system, self._salt = server, system, cache_salt
        self._sent = self._begun = prompt(server, system, fuse=None)
        self._texts: dict[str, str] = {}  # of the passages that were sent, by id
        self._asked: tuple[Prompt, dict[str, str]] | None = None  # with the texts of its passages

    @property
    def left_out(self) -> frozenset[str]:
        """Ids of the passages that have been sent, and are left out."""
        return frozenset(self._texts)

    def ask(
        self,
        passages: Iterable[Passage],
        question: str,
        *,
        ordered: bool = True,
        relevance: bool = False,
        **more: Any,
    ) -> Prompt:
        """The prompt of the next turn: all that was sent, the passages that are new, the question. `ordered`: in
        stored order, in the first turn (behind an answer nothing is stored yet). `relevance`: with
        `Ordered.relevance` before the question, where the order is not the one given. `more`: arguments of
        `prompt`. ValueError: as for `prompt`, and an id that was sent with another text."""
        given = _by_name(passages)
        texts = dict(named(given.values()))
        for name, text in texts.items():
            if self._texts.get(name, text) != text:
                raise ValueError(f"passages: id {short(name)} again; allowed: one text an id")
        new = [one for name, one in given.items() if name not in self._texts]
        line = ""
        if ordered and self._sent is self._begun and new:
            found = order(self._server, self._system, new, cache_salt=self._salt)
            new = found.passages
            line = found.relevance + SEPARATOR if relevance and found.ranks != sorted(found.ranks) else ""
        before = self._sent.token_ids
        asked = prompt(_Bare(self._server), "", new, line + question, **more)
        documents = [
            {**each, "start": len(before) + each["start"], "end": len(before) + each["end"]}
            for each in asked.documents
        ]
        made = Prompt(before + asked.token_ids, {**asked.hints, "documents": self._sent.documents + documents})
        self._asked = made, texts
        return made

    def answered(self, answer: str | Sequence[int], closing: str = SEPARATOR) -> None:
        """The last prompt was answered so: by a text, or better by its token ids. `closing`: what stands behind
        the answer. A prompt that is not answered is forgotten. ValueError: nothing was asked."""
        if self._asked is None:
            raise ValueError("answered: nothing was asked since the last answer; allowed: one answer a prompt")
        asked, texts = self._asked
        tokens = self._server.encode(answer) if isinstance(answer, str) else list(answer)
        behind = self._server.encode(closing) if closing else []
        self._sent, self._asked = Prompt(asked.token_ids + tokens + behind, asked.hints), None
        self._texts |= texts


class _Bare:
    """A tokenizer that puts nothing before a prompt."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def _by_name(passages: Iterable[Passage]) -> dict[str, Passage]:
    """Passages by their ids, each once, in the order given."""
    if not isinstance(passages, str | bytes | Mapping):
        passages = list(passages)
    return dict(zip([name for name, _ in named(passages)], passages, strict=True))


def _ask(
    server: Server, passages: list[Passage], before: list[int], runs: list[list[int]], salt: str | None
) -> Ordered:
    """What the engine answers; as given, where that is no order."""
    as_given = Ordered(passages, list(range(len(passages))), sum(map(len, runs)))
    if len(passages) < 2:
        return as_given
    hints = {"order": {"before": before, "passages": runs}, "store": False, "fuse": False, "turn": 0}
    body: dict[str, Any] = {} if salt is None else {"cache_salt": salt}
    answer = server.complete(Prompt((before or runs[0])[:1], hints), max_tokens=1, temperature=0, **body)
    params = answer.get("kv_transfer_params")
    report = params.get("ragkv") if isinstance(params, dict) else None
    told = report.get("order") if isinstance(report, dict) else None
    ranks = told.get("passages") if isinstance(told, dict) else None
    if not isinstance(told, dict) or not isinstance(ranks, list) or not all(type(rank) is int for rank in ranks):
        return as_given
    if sorted(ranks) != as_given.ranks:
        return as_given
    figures = (told.get(name) for name in ("ordered_tokens", "given_tokens"))
    return Ordered(
        [passages[rank] for rank in ranks], ranks, as_given.tokens, *(x if type(x) is int else 0 for x in figures)
    )


def _settings(
    fuse: bool | None, ratio: float | None, selection: str | None, hints: Mapping[str, Any] | None
) -> dict[str, Any]:
    if not isinstance(fuse, bool | None):
        raise ValueError(f"fuse = {fuse!r}; allowed: True, False, None")
    if ratio is not None and not (type(ratio) in (int, float) and 0 <= ratio <= 1):
        raise ValueError(f"recompute_ratio = {ratio!r}; allowed: a number from 0 to 1")
    if selection is not None and selection not in SELECTION_NAMES:
        raise ValueError(f"selection = {selection!r}; allowed: {', '.join(SELECTION_NAMES)}")
    given = {"fuse": fuse, "recompute_ratio": ratio, "selection": selection}
    if clash := sorted(set(hints or ()) & {"documents", *given}):
        raise ValueError(f"hints: {clash[0]} has an argument of its own; allowed: other hints")
    return {**{name: value for name, value in given.items() if value is not None}, **(hints or {})}


def _leading(tokenizer: Tokenizer) -> list[int]:
    """Special tokens that the tokenizer puts before every prompt, such as BOS."""
    whole, bare = (list(tokenizer.encode("a", add_special_tokens=special)) for special in (True, False))
    return whole[: find(whole, bare, 0) or 0]
