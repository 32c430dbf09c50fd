"""Content lookup: chunks by their tokens alone, wherever they were computed, from the lower tiers into memory.

A chunk lies under its chain key. Under its content key lies an alias that names it: a few hundred bytes in the
layout of a payload (`ragkv.kvstore.codec.AliasHeader`). Of several chunks that hold the same tokens the alias
names the first that was written, unless another has less text before it: then that one. The chunks that aliases
name are brought up as detached copies, without their ancestors. Whatever is doubtful is a miss.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from ragkv.errors import PayloadError
from ragkv.kvstore.chunking import TokenChain
from ragkv.kvstore.codec import BLOCK_BYTES, HEADER_BYTES, AliasHeader, ChunkCodec, Header, decode, encode
from ragkv.kvstore.io_pool import EXPIRED, Wanted, Write
from ragkv.kvstore.keys import TOKEN_BYTES, chain_key, content_key
from ragkv.kvstore.memory_tier import MemoryTier
from ragkv.kvstore.prefix_tree import Chunk, is_detached, origin
from ragkv.kvstore.promotion import Promotion, Read
from ragkv.kvstore.prompt import Fetch
from ragkv.kvstore.storage_tier import StorageTier
from ragkv.kvstore.stores.contract import KEY_BYTES, Buffer

ENOUGH = 2  # holders that are asked for, where one is enough


def source(alias: AliasHeader) -> bytes:
    """Key of the chunk that an alias names."""
    return chain_key(alias.parent, alias.tokens)


def reader(namespace: bytes, tokens: bytes, wall: Callable[[], float]) -> Callable[[Buffer], AliasHeader]:
    """What checks a value that should be the alias of these tokens (int32 bytes); it raises PayloadError. `wall`:
    seconds since the epoch."""

    def accept(value: Buffer) -> AliasHeader:
        header, named = decode(value)
        if not isinstance(header, AliasHeader):
            raise PayloadError("magic", "alias: it is a payload")
        if header.namespace != namespace:
            raise PayloadError("namespace", "alias: it is of another namespace")
        if header.tokens != tokens or named != source(header):
            raise PayloadError("tokens", "alias: it is of other tokens than its key says")
        if header.expires and header.expires <= wall():
            raise PayloadError("expired", "alias: its time is over")
        return header

    return accept


class ContentLookup:
    """Detached copies of chunks, found by tokens. Memory must index its contents."""

    def __init__(self, memory: MemoryTier, codec: ChunkCodec, promotion: Promotion) -> None:
        self._memory, self._codec, self._promotion = memory, codec, promotion

    def fetch(self, namespace: bytes, wanted: Sequence[bytes]) -> Fetch | None:
        """Begin to bring up chunks that hold just these tokens (int32 bytes each) and were computed anywhere in
        `namespace`; None where there is nothing, or it is not worth the wait. What comes is found in the content
        index, and is not pinned once the fetch is let go."""
        lacking = {content_key(namespace, tokens): tokens for tokens in wanted if tokens}
        lacking = {key: tokens for key, tokens in lacking.items() if not self._held(namespace, tokens)}
        coming = self._coming(namespace, lacking)
        keys, probes = [key for key in lacking if key not in coming], False
        if keys and self._promotion.readable:
            count = sum(len(lacking[key]) for key in keys) // TOKEN_BYTES
            probe = self._promotion.probes(count, count)
            keys, probes = ([], False) if probe is None else (keys, probe)
        load = functools.partial(self._load, wanted=lacking)
        return self._promotion.begin(namespace, keys, load, probes=probes, coming=bool(coming))

    def _held(self, namespace: bytes, tokens: bytes) -> bool:
        contents = self._memory.tree.contents
        return contents is not None and bool(contents.holders(namespace, tokens, ENOUGH))

    def _coming(self, namespace: bytes, wanted: dict[bytes, bytes]) -> dict[bytes, Chunk]:
        """By content key, what is on its way of that which is wanted."""
        ours = (c for c in self._promotion.loading if is_detached(c) and origin(c)[0] == namespace)
        by_key = {content_key(namespace, chunk.tokens): chunk for chunk in ours if chunk in self._memory}
        return {key: chunk for key, chunk in by_key.items() if key in wanted}

    def _load(self, fetch: Fetch, wanted: dict[bytes, bytes]) -> None:
        """Wait for what is on its way meanwhile, and order the aliases of the rest to be read."""
        coming = self._coming(fetch.namespace, wanted)
        for chunk in coming.values():
            self._promotion.join(fetch, chunk)
        by_tier: dict[StorageTier, list[Wanted]] = {}
        for key, tokens in wanted.items():
            tier = fetch.holders.get(key)
            if tier is not None and key not in coming and not self._held(fetch.namespace, tokens):
                accept = reader(fetch.namespace, tokens, self._codec.wall)
                by_tier.setdefault(tier, []).append(Wanted(key, accept))
        for tier in sorted(by_tier, key=lambda tier: tier.bit):
            order = functools.partial(self._order, fetch, wanted, tier)
            self._promotion.read_beside(fetch, tier, by_tier[tier], order)

    def _order(self, fetch: Fetch, wanted: dict[bytes, bytes], tier: StorageTier, found: list[Any]) -> None:
        """Aliases were read: order the reads of what they name, as far as it is worth it and there is room."""
        self._promotion.spend(fetch)
        if fetch.over:
            return
        coming = self._coming(fetch.namespace, wanted)
        lacking: list[AliasHeader] = []
        for alias in found:
            if alias is not None and alias.key in coming:
                self._promotion.join(fetch, coming[alias.key])
            elif alias is not None and not self._held(fetch.namespace, alias.tokens):
                lacking.append(alias)
        count = sum(len(alias.tokens) for alias in lacking) // TOKEN_BYTES
        if not lacking or not self._promotion.worth(fetch, count, {tier.name: count}):
            return
        reads: list[Read] = []
        for alias in lacking:
            chunk = self._memory.reserve_detached(fetch.namespace, source(alias), alias.tokens, alias.position)
            if chunk is not None:
                reads.append(self._read(chunk, tier, alias))
        self._promotion.read(fetch, reads)

    def _read(self, chunk: Chunk, tier: StorageTier, alias: AliasHeader) -> Read:
        """A chunk's payload; and its alias once more, which is rejected where it leads nowhere."""
        (fill,) = self._codec.readers([chunk])
        check = reader(alias.namespace, alias.tokens, self._codec.wall)
        came = False

        def accept(value: Buffer) -> Header:
            nonlocal came
            header = fill(value)
            came = True
            return header

        def judge(value: Buffer) -> AliasHeader:
            there = check(value)
            if not came and there == alias:
                raise PayloadError(EXPIRED, "alias: what it names is gone")
            return there

        return Read(chunk, tier, Wanted(source(alias), accept), Wanted(alias.key, judge))


@dataclass(frozen=True, slots=True, eq=False)
class _Offer:
    tier: StorageTier
    alias: AliasHeader
    write: Write


class Aliases:
    """Aliases on their way into the lower tiers. `cost`: of a chunk, as tiers' policies weigh it."""

    def __init__(self, codec: ChunkCodec, cost: Callable[[Chunk], float]) -> None:
        self._codec, self._cost = codec, cost
        self._offered: list[_Offer] = []
        self._comparing: list[_Offer] = []
        self._coming: dict[tuple[str, bytes], int] = {}  # tier and key of what is being written: its position

    @property
    def idle(self) -> bool:
        """Whether none is on its way."""
        return not (self._offered or self._comparing or self._coming)

    def offer(self, tier: StorageTier, chunk: Chunk, expires: float) -> None:
        """A tier has a chunk, or will have it before anything ordered from now on; the next `order` leaves an
        alias there. `expires`: seconds since the epoch, 0.0 for never."""
        assert chunk.parent is not None
        namespace, position = origin(chunk)
        alias = AliasHeader(
            namespace=namespace,
            key=content_key(namespace, chunk.tokens),
            parent=chunk.parent.key,
            tokens=chunk.tokens,
            position=position,
            open=False,
            shape=(KEY_BYTES,),
            dtype="uint8",
            created=self._codec.wall(),
            expires=expires,
        )
        size = -(-(len(chunk.tokens) + HEADER_BYTES) // BLOCK_BYTES) * BLOCK_BYTES
        cost = self._cost(chunk) * size / self._codec.size(chunk)  # so that it is evicted as its chunk is
        write = Write(alias.key, chunk.key, size, cost, lambda: lambda: encode(alias, [source(alias)]))
        self._offered.append(_Offer(tier, alias, write))

    def order(self, *, compare: bool = True) -> None:
        """Order what was offered to be written. Where the tier has one, or may have one, that is read and
        compared; without `compare` it is kept."""
        offered, self._offered = self._offered, []
        unsure: dict[StorageTier, list[_Offer]] = {}
        for offer in offered:
            known = offer.tier.knows(offer.write.key)
            if known is False or (known is None and not compare):
                self._write(offer)
            elif compare:
                unsure.setdefault(offer.tier, []).append(offer)
        for tier, some in unsure.items():
            self._compare(tier, some)

    def finish(self) -> None:
        """Order the rest without waiting for an answer: there will be none."""
        self._offered += self._comparing
        self.order(compare=False)

    def _compare(self, tier: StorageTier, offers: list[_Offer]) -> None:
        def done(found: list[Any]) -> None:
            self._comparing = [offer for offer in self._comparing if offer not in offers]
            for offer, there in zip(offers, found, strict=True):
                if there is None:
                    self._write(offer)
                elif offer.alias.position < there.position:
                    self._write(offer, replaces=True)

        self._comparing += offers
        wall = self._codec.wall
        accepts = [reader(offer.alias.namespace, offer.alias.tokens, wall) for offer in offers]
        tier.read([Wanted(o.write.key, accept) for o, accept in zip(offers, accepts, strict=True)], done)

    def _write(self, offer: _Offer, *, replaces: bool = False) -> None:
        at, position = (offer.tier.name, offer.write.key), offer.alias.position
        coming = self._coming.get(at)
        if coming is not None and coming <= position:
            return

        def done(ok: bool) -> None:
            if self._coming.get(at) == position:
                del self._coming[at]

        if offer.tier.write(replace(offer.write, replaces=replaces or coming is not None), done):
            self._coming[at] = position


def cuts(chain: TokenChain, start: int) -> list[bytes]:
    """The tokens (int32 bytes) of each chunk of a chain that begins at or after `start`."""
    raw, ends = chain.tokens.tobytes(), [0, *chain.ends]
    return [raw[TOKEN_BYTES * first : TOKEN_BYTES * end] for first, end in pairwise(ends) if first >= start]
