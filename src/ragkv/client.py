"""A vLLM server, as applications see it: its tokenizer, its models, its completions."""

import functools
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ragkv.errors import RagKVError
from ragkv.fetch import fetch_json

CACHED_TEXTS = 1024


class Tokenizer(Protocol):
    """What `prompt` needs of a tokenizer. Hugging Face's tokenizers and `Server` have it."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text, with or without the special tokens that the model needs around a prompt."""
        ...


class Asked(Protocol):
    """What `Server.complete` sends, such as `ragkv.rag.Prompt`."""

    @property
    def token_ids(self) -> list[int]:
        """The whole prompt."""
        ...

    @property
    def extra_body(self) -> dict[str, Any]:
        """More fields of the request."""
        ...


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

    def complete(self, asked: Asked, **parameters: Any) -> dict[str, Any]:
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
