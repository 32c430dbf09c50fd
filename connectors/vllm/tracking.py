"""What the scheduler side notes of a request, and of a job that workers have been given."""

from dataclasses import dataclass, field
from typing import Any

from ragkv.connectors.vllm.hints import NO_HINTS, Hints
from ragkv.kvstore.catalogue import Chunk, Match
from ragkv.kvstore.chunking import TokenChain
from ragkv.kvstore.promotion import Fetch

NO_MATCH = Match((), 0)


@dataclass(slots=True)
class Tracked:
    """A request under way. `computed`: what vLLM had itself at the last lookup; `seen`: what that lookup was of;
    `stored`: first tokens that need no look any more; `asked`: first tokens that admission has seen; `tail`: the
    open tail stored or read last; `fetch`: what is brought up for it, once; `declined`: the gate said that
    computing is quicker; `sources`: tokens by tier."""

    request: Any
    namespace: bytes
    chain: TokenChain
    hints: Hints = NO_HINTS
    blocks: list[int] = field(default_factory=list)
    match: Match = NO_MATCH
    computed: int = 0
    seen: tuple[int, int] = (-1, -1)
    stored: int = 0
    asked: int = 0
    tail: Chunk | None = None
    fetch: Fetch | None = None
    fetched: bool = False
    declined: bool | None = None
    sources: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class UnderWay:
    """A job given out: what it fills (stores, copies) or reads (loads), what it makes superfluous, who still
    works. `starts`: where the chunks of a store begin. `pages`: of a copy to the device tier."""

    chunks: list[Chunk]
    workers: int
    is_store: bool
    superseded: Chunk | None = None
    failed: bool = False
    hints: Hints = NO_HINTS
    starts: list[int] = field(default_factory=list)
    pages: list[bytes] = field(default_factory=list)
    namespace: bytes = b""
