"""What a connector and the cache exchange: a request's prompt, results of lookups, loads and stores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ragkv.kvstore.chunking import TokenChain
from ragkv.kvstore.fusion.matching import Piece
from ragkv.kvstore.pins import Pin
from ragkv.kvstore.prefix_tree import Chunk, Match
from ragkv.kvstore.storage_tier import StorageTier

NO_MATCH = Match((), 0)

Indices = npt.NDArray[np.int64]


class Result(Enum):
    """The result of a lookup: MISS, HIT, or PENDING. PENDING: lower tiers are still being read; ask again."""

    MISS = "miss"
    HIT = "hit"
    PENDING = "pending"


class Lookup(NamedTuple):
    """`result`, and for a HIT the number of `tokens` beyond those that the engine has itself."""

    result: Result
    tokens: int = 0


@dataclass(eq=False, slots=True, kw_only=True)
class Fetch:
    """What is being brought into memory for a request."""

    namespace: bytes
    began: float
    deadline: float
    load: Callable[["Fetch"], None]  # called with the last answer: orders the reads
    complete: Callable[["Fetch"], bool] = lambda fetch: False  # called with the last read: whether it goes on
    holders: dict[bytes, StorageTier] = field(default_factory=dict)  # by key, the quickest tier that has it
    asking: int = 1  # questions without an answer, and the one that the fetch itself is
    loading: int = 1  # reads that have not ended, and the same
    sizes: dict[str, int] = field(default_factory=dict)  # bytes that are read, by tier
    sources: dict[Chunk, str] = field(default_factory=dict)  # the tier that each chunk came from
    waiting_for: list[StorageTier] = field(default_factory=list)  # one for each question and small read
    over: bool = False  # the request need not wait any more
    kept: list[Chunk] = field(default_factory=list)  # chunks that have come, pinned until they are used
    gone: bool = False  # the request does not want them any more
    probes: bool = False  # it does not pay, and is tried all the same
    since: float = 0.0  # when tiers were last given something to do
    spent: float = 0.0  # seconds that tiers needed up to then
    result: str = "missed"


@dataclass(eq=False, slots=True)
class Prompt:
    """A request's prompt. The caller creates it, and extends `chain` before each call as the request grows. Fields
    from `match` on belong to the cache; others may only read them."""

    namespace: bytes  # nothing is shared between two
    chain: TokenChain
    tenant: bytes = b""  # whose pins its pins are
    priority: int = 0
    ttl: float | None = None  # seconds that what it stores may be kept; None: as long as may be
    pin: Pin | None = None
    # ---
    match: Match = NO_MATCH  # in memory, at the last lookup
    matched: tuple[int, ...] = ()  # tokens looked up and computed, and memory's version, of which that is
    passages: Sequence[Piece] = ()  # what `lookup_content` found
    searched: tuple[int, int] = (-1, -1)  # tokens of the prompt, and where the search began, of which that is
    kept: tuple[Chunk, ...] = ()  # pinned until `release`
    fetch: Fetch | None = None  # what is brought up of its prefix, once
    fetched: bool = False
    content_fetch: Fetch | None = None  # what is brought up by content, once
    content_fetched: bool = False
    declined: bool | None = None  # the gate said that computing is quicker than loading from memory
    small: bool = False  # what was found is too little to be worth a load
    admitted: int = 0  # first tokens that admission has seen
    tail: Chunk | None = None  # the open tail that was stored or loaded last
    pins_refused: bool = False  # not all that `pin` asked for is pinned


@dataclass(eq=False, slots=True)
class Load:
    """A copy of n tokens from a paged tier into the engine. `rows`: int64 [n], a token's place in the tier (page *
    tokens per page + offset). `positions`: int64 [n], its position in the prompt. `shifts`: int64 [n], by how many
    positions it has moved; None: no token has. `device`: the rows are of the device tier. `sources`: number of
    tokens by the tier they came from. `plane`: whose rows they are."""

    rows: Indices
    positions: Indices
    chunks: list[Chunk]
    pinned: list[Chunk]  # until `complete_load`; so are their ancestors
    device: bool = False
    shifts: Indices | None = None
    sources: dict[str, int] = field(default_factory=dict)
    plane: int = 0


@dataclass(eq=False, slots=True)
class Store:
    """A copy of n tokens from the engine into a paged tier; `rows` and `positions` as of `Load`. `device`: into
    the device tier, of chunks that are in memory already."""

    prompt: Prompt
    rows: Indices
    positions: Indices
    chunks: list[Chunk]
    device: bool = False
    pages: list[bytes] = field(default_factory=list)  # of a copy into the device tier
    superseded: Chunk | None = None  # an open tail whose tokens this store holds too
    number: int = 0  # confirms it
    plane: int = 0
