"""What many users do to a server, all at once and for as long as it takes: the load of `internal soak`.

Documents that come again and new ones, two documents in changing order (to be fused, where the server fuses),
tenants, several answers to a prompt, hints that are right and hints that are not, clients that leave in the middle
of an answer. Everything is given by the seed but for the order in which users come to it.
"""

import http.client
import json
import random
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ragkv.rag import Server

SYSTEM_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 40, 8, 4
DOCUMENT_TOKENS = (150, 600)  # from and up to
KNOWN = 24  # documents that may come again: the last ones
LEAVES = 0.1  # of requests: the client goes after the first token
NEW, TWO, SEVERAL, HINTED = 0.3, 0.25, 0.05, 0.3  # shares of requests
TENANTS = (None, "north", "south")
HINTS: tuple[Mapping[str, Any], ...] = (
    {"pin": {"owner": "soak", "seconds": 5}},
    {"ttl": 20},
    {"turn": 3},
    {"documents": [{"id": "filing", "start": SYSTEM_TOKENS, "end": SYSTEM_TOKENS + 100}]},
    {"documents": [{"id": 7, "start": 9, "end": 3}]},  # wrong
    {"nothing": "like it"},  # wrong
)


@dataclass
class Tally:
    """What has come of requests. `failed`: counted by what was said."""

    answered: int = 0
    left: int = 0
    failed: Counter[str] = field(default_factory=Counter)


class Users:
    """So many users of the server at `url`, each asking one request after the other, for `model`, with token ids
    below `vocabulary`."""

    def __init__(self, url: str, model: str, vocabulary: int, count: int, seed: int = 0) -> None:
        self._server, self._vocabulary = Server(url, model, timeout=300), vocabulary
        self._chances = [random.Random(f"{seed} {user}") for user in range(count)]
        self._lock, self._documents = threading.Lock(), KNOWN
        self.tally = Tally()

    def ask_for(self, seconds: float) -> None:
        """Ask until so many seconds are over, and all answers are there."""
        end = time.monotonic() + seconds
        threads = [threading.Thread(target=self._ask_until, args=(end, each)) for each in self._chances]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def body(self, chance: random.Random) -> dict[str, Any]:
        """One request to /v1/completions."""
        prompt = self._tokens("system", SYSTEM_TOKENS)
        for _ in range(1 + (chance.random() < TWO)):
            prompt += self._document(chance)
        prompt += [chance.randrange(self._vocabulary) for _ in range(QUESTION_TOKENS)]
        body: dict[str, Any] = {"model": self._server.model, "prompt": prompt, "max_tokens": ANSWER_TOKENS}
        several = chance.random() < SEVERAL
        body |= {"temperature": float(several), "ignore_eos": True, "n": 1 + several}  # greedy answers are one
        if (tenant := chance.choice(TENANTS)) is not None:
            body["cache_salt"] = tenant
        if chance.random() < HINTED:
            body["kv_transfer_params"] = {"ragkv": chance.choice(HINTS)}
        return body

    def _document(self, chance: random.Random) -> list[int]:
        with self._lock:
            new = chance.random() < NEW
            self._documents += new
            number = self._documents - 1 if new else self._documents - 1 - int(KNOWN * chance.random() ** 2)
        return self._tokens(f"document {number}", random.Random(number).randrange(*DOCUMENT_TOKENS))

    def _tokens(self, seed: str, count: int) -> list[int]:
        chance = random.Random(seed)
        return [chance.randrange(self._vocabulary) for _ in range(count)]

    def _ask_until(self, end: float, chance: random.Random) -> None:
        while time.monotonic() < end:
            body, leaves = self.body(chance), chance.random() < LEAVES
            try:
                if leaves:
                    leave_early(self._server.url, body)
                else:
                    self._server.call("/v1/completions", body)
                said = None
            except Exception as error:  # whatever a server does to its clients is what is counted here
                said = str(error)[:200] or type(error).__name__
            with self._lock:
                self.tally.left += leaves and said is None
                self.tally.answered += not leaves and said is None
                self.tally.failed += Counter([said] if said else [])


def leave_early(url: str, body: Mapping[str, Any]) -> None:
    """Ask for a stream, and hang up at its first line. OSError where the server refuses."""
    place = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=300)
    try:
        data = json.dumps({**body, "stream": True})
        connection.request("POST", "/v1/completions", data, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != http.HTTPStatus.OK:
            raise OSError(f"{answer.status}: {answer.read().decode('utf-8', 'replace')}")
        answer.readline()
    finally:
        connection.close()
