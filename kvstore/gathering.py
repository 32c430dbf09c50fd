"""Chunks by their tokens alone, from the lower tiers up into memory, while a request waits.

The tiers are asked for aliases; these name chunks, which are brought up as loose copies: outside of the tree of
prompts, since what they were computed behind need not come with them. Whatever is doubtful is a miss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ragkv.errors import PayloadError
from ragkv.kvstore.aliases import holder, reader
from ragkv.kvstore.catalogue import Chunk, origin
from ragkv.kvstore.codec import AliasHeader, Header
from ragkv.kvstore.keys import TOKEN_BYTES, content_key
from ragkv.kvstore.lifting import BATCH_BYTES, Lift, Lifts, Read
from ragkv.kvstore.stores.contract import Buffer
from ragkv.kvstore.tier import StoreTier
from ragkv.kvstore.tier_jobs import EXPIRED, Wanted

HELD = 2  # holders that are asked for, where one is enough


@dataclass(eq=False, slots=True, kw_only=True)
class Gather(Lift):
    """Passages of a prompt. `wanted`: by content key, the tokens (int32 bytes) that memory lacked."""

    wanted: dict[bytes, bytes]


class Gathering(Lifts[Gather]):
    """Loose copies of chunks. Until this is called memory must index its contents."""

    def gather(self, namespace: bytes, wanted: Sequence[bytes]) -> Gather | None:
        """Begin to bring up chunks that hold just these tokens (int32 bytes each) and were computed anywhere in
        `namespace`; None where nothing is to be had, or not worth the wait. What comes is found in the hierarchy's
        `contents`, and is not pinned."""
        lacking = {content_key(namespace, tokens): tokens for tokens in wanted if tokens}
        lacking = {key: tokens for key, tokens in lacking.items() if not self._held(namespace, tokens)}
        now = self._clock()
        gather = Gather(namespace=namespace, began=now, since=now, deadline=now + self._deadline, wanted=lacking)
        coming = self._coming(gather)
        keys = [key for key in lacking if key not in coming]
        if keys and any(tier.readable for tier in self._tiers):
            count = sum(len(lacking[key]) for key in keys) // TOKEN_BYTES
            if self._declines(gather, count, count * self._payloads.pages.shape.token_bytes):
                keys = []
        self._ask(gather, keys)
        if not coming and not self._found(gather):
            return None
        self._answered(gather)
        return gather

    def _held(self, namespace: bytes, tokens: bytes) -> bool:
        return bool(self._hierarchy.index_contents().holders(namespace, tokens, HELD))

    def _coming(self, gather: Gather) -> dict[bytes, Chunk]:
        """By content key, what is on its way of that which is wanted."""
        ours = (chunk for chunk in self._loading if origin(chunk)[0] == gather.namespace)
        by_key = {content_key(gather.namespace, chunk.tokens): chunk for chunk in ours if chunk in self._hierarchy}
        return {key: chunk for key, chunk in by_key.items() if key in gather.wanted}

    def _load(self, gather: Gather) -> None:
        """Wait for what is on its way meanwhile, and order the aliases of the rest to be read."""
        coming = self._coming(gather)
        for chunk in coming.values():
            self._join(gather, chunk)
        for tier in self._tiers:
            keys = [
                key
                for key, tokens in gather.wanted.items()
                if key not in coming
                and self._holder(gather, key) is tier
                and not self._held(gather.namespace, tokens)
            ]
            if keys:
                self._read_aliases(gather, tier, keys)

    def _read_aliases(self, gather: Gather, tier: StoreTier, keys: list[bytes]) -> None:
        def done(found: list[Any]) -> None:
            gather.waiting_for.remove(tier)
            self._spend(gather)
            if not gather.over:
                self._order(gather, tier, [alias for alias in found if alias is not None])
            self._loaded(gather)

        gather.loading += 1
        gather.waiting_for.append(tier)
        wall = self._payloads.wall
        tier.read([Wanted(key, reader(gather.namespace, gather.wanted[key], wall)) for key in keys], done)

    def _order(self, gather: Gather, tier: StoreTier, aliases: list[AliasHeader]) -> None:
        """Order the reads of what aliases name, as far as it is worth it and there is room."""
        coming = self._coming(gather)
        for alias in aliases:
            if alias.key in coming:
                self._join(gather, coming[alias.key])
        lacking = [
            alias
            for alias in aliases
            if alias.key not in coming and not self._held(gather.namespace, alias.tokens)
        ]
        count = sum(len(alias.tokens) for alias in lacking) // TOKEN_BYTES
        if not lacking or not self._worth(
            gather, count, {tier.name: count * self._payloads.pages.shape.token_bytes}
        ):
            return
        reads: list[Read] = []
        for alias in lacking:
            chunk = self._hierarchy.reserve_loose(gather.namespace, holder(alias), alias.tokens, alias.position)
            if chunk is not None:
                reads.append(self._wanted(chunk, tier, alias))
        self._read(gather, reads, BATCH_BYTES)

    def _wanted(self, chunk: Chunk, tier: StoreTier, alias: AliasHeader) -> Read:
        """A chunk's payload; and its alias once more, which goes where it leads nowhere."""
        fill = self._payloads.filler(chunk, alias.namespace, alias.position)
        check = reader(alias.namespace, alias.tokens, self._payloads.wall)
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

        return Read(chunk, tier, Wanted(holder(alias), accept), Wanted(alias.key, judge))
