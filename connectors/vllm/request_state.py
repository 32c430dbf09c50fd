"""What the scheduler side notes of a request under way."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ragkv.connectors.vllm.hints import NO_HINTS, Hints
from ragkv.connectors.vllm.messages import Tables
from ragkv.kvstore.chunking import TokenChain
from ragkv.kvstore.fusion.matching import Piece
from ragkv.kvstore.fusion.plan import Declined, Plan
from ragkv.kvstore.keys import as_tokens
from ragkv.kvstore.ordering import OrderSearch
from ragkv.kvstore.prompt import Prompt


@dataclass(frozen=True, slots=True)
class Recorder:
    """What is told every prompt once: its namespace and its tokens, cut."""

    record: Callable[[bytes, TokenChain], None]
    close: Callable[[], None]


@dataclass(slots=True)
class FusionState:
    """Of a request; written by `Fusing` alone."""

    passages: Sequence[Piece] | None = None  # of which `plan` is made
    plan: Plan | None = None
    outcome: tuple[Sequence[Piece], int, Plan | Declined] | None = (
        None  # what was found, after which token; and so
    )
    mended: int = 0  # tokens that the last fusion computes
    moved: int = 0  # tokens that it does not


@dataclass(slots=True)
class RequestState:
    """A request under way. The scheduler side writes it, but for `fusion` (`Fusing`) and `turn` (`Turns`)."""

    request: Any  # vLLM's
    prompt: Prompt
    hints: Hints = NO_HINTS
    tables: Tables = ()  # of the engine's cache
    computed: int = 0  # tokens that vLLM had itself at the last lookup
    looked_up: bool = False  # and not taken up since
    refused: bool = False  # a load failed: it is computed
    stored: int = 0  # first tokens that are stored, or need not be
    junction: int = 0  # up to where its tokens were stored, though it cannot go on there
    offered: dict[int, dict[int, int]] = field(default_factory=dict)  # blocks that have states in this step
    marked: int = 0  # where what layers with windows hold was kept last
    sources: dict[str, int] = field(default_factory=dict)  # tokens of the last load, by tier
    approximate: int | None = None  # from where on its KV is not exact
    fusion: FusionState = field(default_factory=FusionState)
    search: OrderSearch | None = None  # for the order of passages that it asks for
    turn: int = 0  # of its conversation, 0 for none
    counted: bool = False  # among the requests of its turn

    @property
    def places(self) -> list[int]:
        """Where other prompts are likely to part from this one: where one has, and where its documents end."""
        return sorted({self.junction, *(each.end for each in self.hints.documents[-1:])})

    def extend(self) -> None:
        """Let the chain hold all tokens that the request has by now."""
        chain = self.prompt.chain
        known = len(chain.tokens)
        if known < self.request.num_tokens:
            chain.extend(as_tokens(self.request.all_token_ids[known:]))

    def unload(self) -> None:
        """What it loaded last is not its own any more."""
        self.sources, self.fusion.mended, self.fusion.moved = {}, 0, 0

    def taint(self, position: int) -> None:
        """From this position on its KV is not exact."""
        self.approximate = self.exact_upto(position)

    def exact_upto(self, position: int) -> int:
        """`position`, or where its exact KV ends."""
        return position if self.approximate is None else min(self.approximate, position)


def tenant_of(request: Any) -> bytes:
    """A name for whom a request belongs to, 16 bytes; none where it has no `cache_salt`."""
    salt = request.cache_salt
    return (
        b"" if salt is None else hashlib.blake2b(str(salt).encode(errors="surrogatepass"), digest_size=16).digest()
    )


def progress(requests: Mapping[str, RequestState | None], scheduler_output: Any) -> list[tuple[str, int]]:
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


def _set_blocks(state: RequestState | None, blocks: Any, *, replace: bool) -> None:
    if state is None or blocks is None:
        return
    if replace or not state.tables:
        state.tables = [list(table) for table in blocks]
    else:
        for table, more in zip(state.tables, blocks, strict=True):
            table.extend(more)
