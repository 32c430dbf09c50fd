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

A passage is a text, or a pair (id, text). The id names it in the server's answers and metrics; the default is a
digest of the text. The server reports what it reused in `answer.kv_transfer_params["ragkv"]`.
"""

import functools
import hashlib
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from ragkv.config.settings import SELECTION_NAMES
from ragkv.errors import RagKVError
from ragkv.fetch import fetch_json

SEPARATOR = "\n\n"
SHORTEST_TRIMMED = 8  # tokens; a shorter rest of a passage could stand anywhere
CACHED_TEXTS = 1024

Passage: TypeAlias = str | tuple[str, str]


class Tokenizer(Protocol):
    """What `prompt` needs of a tokenizer. Hugging Face's tokenizers and `Server` have it."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text, with or without the special tokens that the model needs around a prompt."""
        ...


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


class Server:
    """A vLLM server: its tokenizer, its models, its completions.

    `url`: with or without /v1; ValueError if it is not http(s)://host:port. `model`: the default is the server's
    first. `timeout`: seconds for each answer. The tokens of the last texts are cached. Methods may be called from
    any thread. They raise `AnswerError`, a RagKVError, if the server cannot be reached, refuses, or gives another
    kind of answer.
    """

    def __init__(
        self, url: str, model: str | None = None, *, api_key: str | None = None, timeout: float = 600
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if "@" in parts.netloc:
            raise ValueError("url: holds a user or a password; allowed: http://host:port, and an API key beside")
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"url = {url!r}; allowed: http://host:port or https://host:port")
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        self.model = model
        self._api_key, self._timeout = api_key, timeout
        self._encoded = functools.lru_cache(CACHED_TEXTS)(self._encode)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text."""
        return list(self._encoded(text, add_special_tokens))

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], template: Mapping[str, Any]) -> list[int]:
        """Token ids of messages in the server's chat template. `template`: more fields for /tokenize."""
        return list(self._tokenize({"messages": list(messages), **template}))

    def models(self) -> list[dict[str, Any]]:
        """The models as /v1/models describes them; at least one."""
        cards = self.call("/v1/models").get("data")
        if isinstance(cards, list) and cards and all(isinstance(card, dict) and "id" in card for card in cards):
            return cards
        raise RagKVError(f"{self.url}/v1/models: the answer is no list of models")

    def complete(self, asked: Prompt, **parameters: Any) -> dict[str, Any]:
        """The JSON answer of /v1/completions. `parameters`: more fields of the request."""
        body = {"prompt": asked.token_ids, **asked.extra_body, **parameters}
        return self.call("/v1/completions", self._with_model(body))

    def call(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The JSON answer to a POST of `body`, or to a GET if there is none."""
        return fetch_json(self.url + path, body, token=self._api_key, timeout=self._timeout)

    def _encode(self, text: str, special: bool) -> tuple[int, ...]:
        return self._tokenize({"prompt": text, "add_special_tokens": special})

    def _tokenize(self, body: Mapping[str, Any]) -> tuple[int, ...]:
        tokens = self.call("/tokenize", self._with_model(body)).get("tokens")
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise RagKVError(f"{self.url}/tokenize: the answer holds no tokens")
        return tuple(tokens)

    def _with_model(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return {**body, "model": self.model} if self.model else dict(body)


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
    for name, text in _named(passages):
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
        raise ValueError(f"messages = {_short(messages)}; allowed: a list of messages, each with role and content")
    settings = _settings(fuse, recompute_ratio, selection, hints)
    tokens = server.encode_chat(messages, template or {})
    taken: list[tuple[int, int]] = []
    documents: list[dict[str, Any]] = []
    for name, text in _named(passages):
        found = (_free(tokens, run, taken) for run in _runs(server, text))
        span = next((each for each in found if each), None)
        if span is not None:
            taken.append(span)
            documents.append({"id": name, "start": span[0], "end": span[1]})
    documents.sort(key=lambda document: document["start"])
    return Prompt(tokens, {"documents": documents, **settings})


def closed(text: str) -> str:
    """A part as it is in a prompt: without blank lines around it, and with one separator at its end."""
    return text.lstrip("\r\n").rstrip() + SEPARATOR


def digest(text: str) -> str:
    """The default id of a passage: 16 hexadecimal digits."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _named(passages: Iterable[Passage]) -> Iterator[tuple[str, str]]:
    if isinstance(passages, str | bytes | Mapping):
        raise ValueError(
            f"passages = {_short(passages)}; allowed: a list of passages, each a text or a pair of id and text"
        )
    texts: dict[str, str] = {}
    for number, passage in enumerate(passages):
        name, text = _pair(number, passage)
        if not text.strip():
            raise ValueError(f"passages[{number}] = {_short(text)}; allowed: a text that is not blank")
        text = closed(text)
        name = digest(text) if name is None else name
        if texts.setdefault(name, text) != text:
            raise ValueError(f"passages[{number}]: id {_short(name)} again; allowed: one text an id")
        yield name, text


def _pair(number: int, passage: Any) -> tuple[str | None, str]:
    match passage:
        case str():
            return None, passage
        case (str() as name, str() as text):
            return name, text
    raise ValueError(f"passages[{number}] = {_short(passage)}; allowed: a text, or a pair of id and text")


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
    return whole[: _find(whole, bare, 0) or 0]


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
    at = _find(tokens, run, 0)
    while at is not None and any(at < end and start < at + len(run) for start, end in taken):
        at = _find(tokens, run, at + 1)
    return None if at is None else (at, at + len(run))


def _find(tokens: list[int], run: list[int], start: int) -> int | None:
    try:
        while run:
            start = tokens.index(run[0], start)
            if tokens[start : start + len(run)] == run:
                return start
            start += 1
    except ValueError:
        pass
    return None


def _short(value: Any) -> str:
    """A faulty value, for a message."""
    return f"{value!r:.80}"
