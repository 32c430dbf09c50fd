"""What the scheduler side notes of a request, and of a job that workers have been given."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ragkv.connectors.vllm.hints import NO_HINTS, Hints
from ragkv.kvstore.catalogue import Chunk, Match
from ragkv.kvstore.chunking import TokenChain
from ragkv.kvstore.fusion.matching import Piece
from ragkv.kvstore.fusion.plan import Declined, Plan
from ragkv.kvstore.keys import as_tokens
from ragkv.kvstore.promotion import Fetch

NO_MATCH = Match((), 0)
ANSWER_SECONDS = 0.002  # that a step may stand still for a tier's answer: less than a step lost
IDLE_SECONDS = 0.005  # that an engine with nothing to compute stands still, and leaves its time to the load


@dataclass(frozen=True, slots=True)
class Recorder:
    """What is told every prompt once: its namespace and its tokens, cut."""

    record: Callable[[bytes, TokenChain], None]
    close: Callable[[], None]


@dataclass(slots=True)
class Tracked:
    """A request under way. `tenant`: whose it is. `computed`: what vLLM had itself at the last lookup; `seen`: of
    what that was; `stored`: first tokens that need no look any more; `asked`: first tokens that admission has
    seen; `tail`: the open tail stored or read last; `looked`: looked up since vLLM took it up last; `held`: chunks
    that are kept for it until then; `pages`: of memory that its match has; `refused`: a load failed, so it is
    computed; `fetch`: what is brought up for it, once; `declined`: the gate said that computing is quicker;
    `small`: what was found is too little; `sources`: tokens by tier. `plan`: of fusion, as of `planned`;
    `gather`: what is brought up for it, once; `outcome`: what was found, behind which token, and what came of it;
    `approximate`: from where on its KV is not exact; `mended`: tokens that a fusion computed. `turn`: of its
    conversation, 0 for none; `counted`: among its turn's requests."""

    request: Any
    namespace: bytes
    chain: TokenChain
    hints: Hints = NO_HINTS
    tenant: bytes = b""
    blocks: list[int] = field(default_factory=list)
    match: Match = NO_MATCH
    computed: int = 0
    seen: tuple[int, int] = (-1, -1)
    stored: int = 0
    asked: int = 0
    tail: Chunk | None = None
    looked: bool = False
    held: tuple[Chunk, ...] = ()
    pages: int = 0
    refused: bool = False
    fetch: Fetch | None = None
    fetched: bool = False
    declined: bool | None = None
    small: bool = False
    sources: dict[str, int] = field(default_factory=dict)
    plan: Plan | None = None
    planned: tuple[int, int] | None = None
    gather: Any = None
    gathered: bool = False
    outcome: tuple[Sequence[Piece], int, Plan | Declined] | None = None
    approximate: int | None = None
    mended: int = 0
    turn: int = 0
    counted: bool = False

    def extend(self) -> None:
        """Let the chain hold all tokens that the request has by now."""
        known = len(self.chain.tokens)
        if known < self.request.num_tokens:
            self.chain.extend(as_tokens(self.request.all_token_ids[known:]))

    def taint(self, position: int) -> None:
        """From this position on its KV is not exact."""
        self.approximate = position if self.approximate is None else min(self.approximate, position)

    def exact_upto(self, position: int) -> int:
        """`position`, or where its exact KV ends."""
        return position if self.approximate is None else min(self.approximate, position)


@dataclass(slots=True)
class UnderWay:
    """A job given out, of a request: what it fills (stores, copies) or reads (loads), what it makes superfluous,
    who still works. `starts`: where the chunks of a store begin. `pages`: of a copy to the device tier. `copies`:
    chunks whose copies there are read. `confirmed_by`: the number that confirms what a store reads."""

    request: str
    chunks: list[Chunk]
    workers: int
    is_store: bool
    superseded: Chunk | None = None
    failed: bool = False
    hints: Hints = NO_HINTS
    starts: list[int] = field(default_factory=list)
    pages: list[bytes] = field(default_factory=list)
    copies: list[Chunk] = field(default_factory=list)
    namespace: bytes = b""
    tenant: bytes = b""
    confirmed_by: int = 0


def tenant_of(request: Any) -> bytes:
    """A name for whom a request belongs to, 16 bytes; none where it has no `cache_salt`."""
    salt = request.cache_salt
    return (
        b"" if salt is None else hashlib.blake2b(str(salt).encode(errors="surrogatepass"), digest_size=16).digest()
    )


def progress(requests: Mapping[str, Tracked | None], scheduler_output: Any) -> list[tuple[str, int]]:
    """(request, tokens computed after this step) of all that run in it; keeps their block tables."""
    scheduled = scheduler_output.num_scheduled_tokens
    after = []
    for new in scheduler_output.scheduled_new_reqs:
        _set_blocks(requests.get(new.req_id), new.block_ids, replace=True)
        after.append((new.req_id, new.num_computed_tokens + scheduled[new.req_id]))
    cached = scheduler_output.scheduled_cached_reqs
    for index, request_id in enumerate(cached.req_ids):
        replace = request_id in cached.resumed_req_ids
        _set_blocks(requests.get(request_id), cached.new_block_ids[index], replace=replace)
        after.append((request_id, cached.num_computed_tokens[index] + scheduled[request_id]))
    return after


def _set_blocks(tracked: Tracked | None, blocks: Any, *, replace: bool) -> None:
    if tracked is None or blocks is None:
        return
    if replace:
        tracked.blocks = list(blocks[0])
    else:
        tracked.blocks.extend(blocks[0])
