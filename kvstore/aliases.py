"""Aliases: so that the lower tiers can be asked for tokens wherever they were computed.

A chunk lies under its chain key. Under its content key lies an alias that names it: a few hundred bytes in the
layout of a payload (`ragkv.kvstore.codec.AliasHeader`). Of several chunks that hold the same tokens the alias
names the first that was written, unless another has less text before it: then that one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ragkv.errors import PayloadError
from ragkv.kvstore.catalogue import Chunk
from ragkv.kvstore.codec import AliasHeader, decode, encode
from ragkv.kvstore.keys import chain_key, content_key
from ragkv.kvstore.payloads import BLOCK_BYTES, HEADER_BYTES, Payloads
from ragkv.kvstore.stores.contract import KEY_BYTES, Buffer
from ragkv.kvstore.tier import StoreTier
from ragkv.kvstore.tier_jobs import Wanted, Write


def holder(alias: AliasHeader) -> bytes:
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
        if header.tokens != tokens or named != holder(header):
            raise PayloadError("tokens", "alias: it is of other tokens than its key says")
        if header.expires and header.expires <= wall():
            raise PayloadError("expired", "alias: its time is over")
        return header

    return accept


@dataclass(frozen=True, slots=True, eq=False)
class _Offer:
    tier: StoreTier
    alias: AliasHeader
    write: Write


class Aliases:
    """Aliases on their way down. `cost`: of tokens (int32 bytes) at a position, as tiers' policies weigh it."""

    def __init__(self, payloads: Payloads, cost: Callable[[bytes, int], float]) -> None:
        self._payloads, self._cost = payloads, cost
        self._offered: list[_Offer] = []
        self._comparing: list[_Offer] = []
        self._coming: dict[tuple[str, bytes], int] = {}  # tier and key of what is being written: its position

    def offer(self, tier: StoreTier, chunk: Chunk, namespace: bytes, position: int, expires: float) -> None:
        """A tier has a chunk, or will have it before anything ordered from now on; the next `order` leaves an
        alias there. `expires`: seconds since the epoch, 0.0 for never."""
        assert chunk.parent is not None
        alias = AliasHeader(
            namespace=namespace,
            key=content_key(namespace, chunk.tokens),
            parent=chunk.parent.key,
            tokens=chunk.tokens,
            position=position,
            open=False,
            shape=(KEY_BYTES,),
            dtype="uint8",
            created=self._payloads.wall(),
            expires=expires,
        )
        size = -(-(len(chunk.tokens) + HEADER_BYTES) // BLOCK_BYTES) * BLOCK_BYTES
        cost = self._cost(chunk.tokens, position) * size / self._payloads.size(chunk)  # goes as its holder would
        write = Write(alias.key, chunk.key, size, cost, lambda: lambda: encode(alias, [holder(alias)]))
        self._offered.append(_Offer(tier, alias, write))

    def order(self, *, compare: bool = True) -> None:
        """Order what was offered to be written. Where the tier has one, or may have one, that is read and
        compared; without `compare` it is kept."""
        offered, self._offered = self._offered, []
        unsure: dict[StoreTier, list[_Offer]] = {}
        for offer in offered:
            known = offer.tier.knows(offer.write.key)
            if known is False or (known is None and not compare):
                self._write(offer)
            elif compare:
                unsure.setdefault(offer.tier, []).append(offer)
        for tier, some in unsure.items():
            self._compare(tier, some)

    def finish(self) -> None:
        """Order all that is left without waiting for an answer: there will be none."""
        self._offered += self._comparing
        self.order(compare=False)

    def _compare(self, tier: StoreTier, offers: list[_Offer]) -> None:
        def done(found: list[Any]) -> None:
            self._comparing = [offer for offer in self._comparing if offer not in offers]
            for offer, there in zip(offers, found, strict=True):
                if there is None:
                    self._write(offer)
                elif offer.alias.position < there.position:
                    self._write(offer, replaces=True)

        self._comparing += offers
        wall = self._payloads.wall
        accepts = [reader(offer.alias.namespace, offer.alias.tokens, wall) for offer in offers]
        tier.read([Wanted(o.write.key, accept) for o, accept in zip(offers, accepts, strict=True)], done)

    def _write(self, offer: _Offer, *, replaces: bool = False) -> None:
        at, position = (offer.tier.name, offer.write.key), offer.alias.position
        coming = self._coming.get(at)
        if coming is not None and coming <= position:
            return

        def done(well: bool) -> None:
            if self._coming.get(at) == position:
                del self._coming[at]

        if offer.tier.write(replace(offer.write, replaces=replaces or coming is not None), done):
            self._coming[at] = position
