"""Turns of conversations: which turn a request is, and what of each turn's prompts was not computed again.

vLLM knows no conversations. A prompt that continues the whole prompt of an earlier request is the next turn after
it; another question about the same document does not, for the earlier question is not in it. Of the answer nothing
is asked: chat templates may encode it in other tokens. A prompt that is equal to an earlier one is the same turn.
"""

from collections import OrderedDict
from dataclasses import dataclass

import xxhash

from ragkv.connectors.vllm.request_state import RequestState
from ragkv.kvstore import metrics as m
from ragkv.kvstore.chunking import TokenChain
from ragkv.kvstore.keys import chain_key
from ragkv.kvstore.metrics import Metrics

SHORTEST = 16  # tokens; what is shorter begins too many prompts to tell anything
MOST_PROMPTS = 20_000
MOST_LENGTHS = 2048  # of prompts that are compared with one
LAST = 5  # this turn and all that follow have one label


@dataclass(frozen=True, slots=True)
class _Prompt:
    """`behind`: key of its last chunk; `tail`: how many tokens follow that; and which turn it was."""

    behind: bytes
    tail: int
    turn: int


class Conversations:
    """The prompts used last, at most `limit`, each found by its last chunk and a hash of what follows that. What
    was cut of a prompt is cut alike in all that continue it."""

    def __init__(self, limit: int = MOST_PROMPTS) -> None:
        self._limit = limit
        self._prompts: OrderedDict[bytes, _Prompt] = OrderedDict()  # the one used last comes last
        self._tails: dict[bytes, dict[int, int]] = {}  # behind a chunk: lengths, and how many prompts have them
        self._left = 0  # lengths that may still be compared

    def __len__(self) -> int:
        return len(self._prompts)

    def turn(self, namespace: bytes, chain: TokenChain) -> int:
        """The turn of a prompt, from 1 on: as told by the longest that it continues or is equal to."""
        self._left = MOST_LENGTHS
        for place in range(len(chain.ends), -1, -1):
            behind, start = (chain.keys[place - 1], chain.ends[place - 1]) if place else (namespace, 0)
            name = self._longest(behind, chain, start)
            if name is not None:
                self._prompts.move_to_end(name)
                found = self._prompts[name]
                return found.turn if start + found.tail == len(chain.tokens) else found.turn + 1
        return 1

    def remember(self, namespace: bytes, chain: TokenChain, turn: int) -> None:
        """A prompt was this turn."""
        size = len(chain.tokens)
        if size < SHORTEST:
            return
        behind, start = (chain.keys[-1], chain.ends[-1]) if chain.ends else (namespace, 0)
        name, tail = _name(behind, chain, start, size), size - start
        if name not in self._prompts:
            tails = self._tails.setdefault(behind, {})
            tails[tail] = tails.get(tail, 0) + 1
        self._prompts[name] = _Prompt(behind, tail, turn)
        self._prompts.move_to_end(name)
        if len(self._prompts) > self._limit:
            self._forget(self._prompts.popitem(last=False)[1])

    def _longest(self, behind: bytes, chain: TokenChain, start: int) -> bytes | None:
        """The longest prompt behind a chunk that a chain begins with. Each token is hashed once, however many
        lengths there are."""
        found, at, running = None, start, xxhash.xxh3_128(behind)  # as `_name`, length by length
        for tail in sorted(self._tails.get(behind, ())):
            self._left -= 1
            if start + tail > len(chain.tokens) or self._left < 0:
                break
            running.update(chain.tokens[at : start + tail].tobytes())
            at, name = start + tail, running.digest()
            found = name if name in self._prompts else found
        return found

    def _forget(self, old: _Prompt) -> None:
        tails = self._tails[old.behind]
        tails[old.tail] -= 1
        if not tails[old.tail]:
            del tails[old.tail]
        if not tails:
            del self._tails[old.behind]


class Turns:
    """Counts requests by turn. A hint `turn` is believed; 0 says that a request is no part of a conversation."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._conversations = Conversations()

    def begin(self, state: RequestState) -> None:
        """A request came, and its chain holds its prompt."""
        namespace, chain, hinted = state.prompt.namespace, state.prompt.chain.as_others(), state.hints.turn
        state.turn = self._conversations.turn(namespace, chain) if hinted is None else hinted
        if state.turn and state.hints.store:
            self._conversations.remember(namespace, chain, state.turn)

    def count(self, state: RequestState, external: int) -> None:
        """A request was taken up, perhaps not for the first time, with `external` tokens behind vLLM's own hit."""
        if not state.turn or state.counted:
            return
        state.counted = True
        turn = f"{LAST}+" if state.turn >= LAST else str(state.turn)
        reused = state.computed + external - state.fusion.mended
        self._metrics.count(m.TURN_REQUESTS, turn=turn)
        self._metrics.count(m.TURN_PROMPT_TOKENS, state.request.num_prompt_tokens, turn=turn)
        self._metrics.count(m.TURN_REUSED_TOKENS, reused, turn=turn)


def _name(behind: bytes, chain: TokenChain, start: int, end: int) -> bytes:
    return chain_key(behind, chain.tokens[start:end].tobytes())
