"""Aliases: where a tier says that some tokens lie, which of several holders it names, and when it goes."""

from dataclasses import replace

import pytest

from hand_lanes import ContentStack, Lower, SeenTwice, Stack, redis, words
from ragkv.errors import PayloadError, StoreError
from ragkv.kvstore import metrics as m
from ragkv.kvstore.codec import AliasHeader, decode, encode
from ragkv.kvstore.content_lookup import reader, source
from ragkv.kvstore.keys import as_tokens, content_key, tail_key
from ragkv.kvstore.stores.disk import DiskStore
from ragkv.kvstore.stores.inventory import Inventory

TEXT = words(1, 60)  # chunks of 21 and 23 tokens, and a tail of 16
PASSAGE = words(5, 20)
NEAR, FAR = words(2, 16) + PASSAGE, words(3, 31) + PASSAGE  # the passage at 16, at 31
KINDS = pytest.mark.parametrize(
    "lower", [Lower, lambda: Lower(asks=True), redis], ids=["private", "shared", "redis"]
)


def content(tokens):
    return content_key(Stack.SPACE, as_tokens(tokens).tobytes())


def keep(stack, text):
    """Store a text that ends with the passage, which is a chunk."""
    start = len(text) - len(PASSAGE)
    return stack.keep(text, named=[start, len(text)])


def alias_of(lower, tokens=PASSAGE):
    """What the tier's alias of some tokens says; None where there is none."""
    value = lower.values.values.get(content(tokens))
    if value is None:
        return None
    header, raw = decode(value[0])
    assert isinstance(header, AliasHeader) and raw == source(header)
    return header


def one(lower=None, **changes):
    lower = lower or Lower()
    return ContentStack(lower, **changes), lower


# --- what is written ---


@KINDS
def test_every_whole_chunk_that_is_written_leaves_an_alias(lower):
    stack, lower = one(lower())
    first, second, _ = stack.keep(TEXT)
    stack.settle()
    assert lower.stored() == {
        first.key, second.key, tail_key(second.key), content(TEXT[:21]), content(TEXT[21:44])
    }  # fmt: skip
    alias = alias_of(lower, TEXT[21:44])
    assert (source(alias), alias.parent, alias.position) == (second.key, first.key, 21)
    assert (alias.namespace, alias.token_count) == (Stack.SPACE, 0)
    stack.check()


def test_without_being_asked_there_are_none():
    lower = Lower()
    stack = Stack(lower)
    stack.keep(TEXT), stack.settle()
    assert len(lower.stored()) == 3 and stack.tiering.aliases is None
    assert stack.cache.content is None


def test_a_chunk_is_there_before_its_alias():
    stack, lower = one()
    keep(stack, NEAR)
    seen = []
    while lower.writes.step():
        seen.append((alias_of(lower) is None, len(lower.stored())))
    assert seen == [(True, 1), (True, 2), (True, 3), (False, 4)], "two chunks, then two aliases"
    stack.settle()
    assert 16 + 4 * len(PASSAGE) < len(lower.values.get(content(PASSAGE))) < 400, "an alias is small"


@pytest.mark.parametrize("through", [True, False])
@KINDS
def test_what_is_written_in_the_end_leaves_one_too(lower, through):
    lower = lower()
    lower.through = through
    stack, _ = one(lower)
    keep(stack, NEAR)
    assert stack.cache.close(5.0)
    assert source(alias_of(lower)) in lower.stored()


def test_what_memory_evicts_leaves_one_too():
    stack, lower = one(Lower(through=False), pages=24)
    keep(stack, NEAR)
    stack.keep(words(8, 90)), stack.settle()
    assert stack.match(NEAR).length < len(NEAR) and source(alias_of(lower)) in lower.stored()
    stack.check()


def test_a_write_that_fails_leaves_nobody_waiting():
    stack, lower = one()
    lower.store.errors["put"] = StoreError("timeout", "slow")
    keep(stack, NEAR), stack.settle()
    lower.store.errors.clear()
    stack.check()
    assert lower.stored() == set() and not lower.index.keys()


# --- which holder ---


@pytest.mark.parametrize("pause", [True, False], ids=["one by one", "at once"])
@KINDS
@pytest.mark.parametrize("order", [(NEAR, FAR), (FAR, NEAR)], ids=["near first", "far first"])
def test_less_text_before_wins(lower, order, pause):
    stack, lower = one(lower())
    for text in order:
        keep(stack, text)
        if pause:
            stack.settle()
    stack.settle()
    assert alias_of(lower).position == 16
    stack.check()


@KINDS
def test_of_equals_the_first_is_kept(lower):
    stack, lower = one(lower())
    for seed in (2, 6):
        keep(stack, words(seed, 16) + PASSAGE), stack.settle()
    first = stack.chain(NEAR, [16]).keys[0]
    assert alias_of(lower).parent == first and lower.store.calls["put"] == 7, "four chunks, three aliases"


def test_a_better_one_overtakes_one_that_is_being_replaced():
    """Three holders, the best in the middle; the last answers are in before anything is written."""
    stack, lower = one()
    farthest = words(4, 32) + FAR
    stack.keep(farthest, named=[32, 63, 83]), stack.settle()
    assert alias_of(lower).position == 63
    for text in (NEAR, FAR):
        keep(stack, text)
    lower.reads.run(), stack.cache.tick()
    lower.writes.run(), stack.settle()
    assert alias_of(lower).position == 16
    stack.check()


@KINDS
def test_a_damaged_one_is_written_anew(lower):
    stack, lower = one(lower())
    keep(stack, NEAR), stack.settle()
    lower.spoil(content(PASSAGE), lambda value: value[:-1])
    keep(stack, FAR), stack.settle()
    assert alias_of(lower).position == 31
    assert stack.metrics.get(m.REJECTED_PAYLOADS, lower.name, "truncated") == 1
    stack.check()


def test_a_tier_that_cannot_be_read_keeps_what_it_has():
    stack, lower = one(redis())
    keep(stack, FAR), stack.settle()
    lower.store.errors["get_many"] = StoreError("timeout", "slow")
    keep(stack, NEAR), stack.settle()
    lower.store.errors.clear()
    assert alias_of(lower).position == 31
    stack.check()


# --- use, budget, admission ---


@pytest.mark.parametrize("asks", [False, True])
def test_what_was_written_before_gets_one_when_it_is_used(asks):
    lower = Lower(asks=asks)
    stack = Stack(lower)
    keep(stack, NEAR), stack.settle()
    assert alias_of(lower) is None
    stack = ContentStack(lower)
    assert stack.get(NEAR, [16, 36]) == 36
    lower.store.read.clear()
    for _ in range(2):
        stack.tiering.touch(stack.match(NEAR, [16, 36]).chunks)
        stack.settle()
    assert alias_of(lower).position == 16 and lower.store.calls["put"] == 2
    assert lower.store.read == [], "nothing had to be compared"


def test_what_was_written_before_gets_one_when_it_is_computed_anew():
    lower = Lower()
    stack = Stack(lower)
    keep(stack, NEAR), stack.settle()
    stack = ContentStack(lower)
    keep(stack, NEAR), stack.settle()
    assert alias_of(lower).position == 16 and lower.store.calls["put"] == 2


def test_in_redis_it_does_not():
    lower = redis()
    stack = Stack(lower)
    keep(stack, NEAR), stack.settle()
    stack = ContentStack(lower)
    assert stack.get(NEAR, [16, 36]) == 36
    stack.tiering.touch(stack.match(NEAR, [16, 36]).chunks), stack.settle()
    assert alias_of(lower) is None


def test_what_another_engine_wrote_without_one_gets_one():
    shared = redis()
    without = Stack(shared)
    keep(without, NEAR), without.settle()
    stack, _ = one(shared)
    keep(stack, NEAR), stack.settle()
    assert alias_of(shared).position == 16


def test_a_use_keeps_an_alias_with_its_holder():
    stack, lower = one()
    first, second = keep(stack, NEAR)
    stack.settle()
    stack.tiering.touch([first, second]), stack.settle()
    used = {key: when for key, (_, when) in lower.values.values.items()}
    order = [first.key, content(NEAR[:16]), second.key, content(PASSAGE)]
    assert sorted(used, key=used.get, reverse=True) == order


def test_an_alias_goes_before_its_holder_and_both_are_within_the_budget():
    stack, lower = one(Lower(capacity=40 << 10))
    texts = [words(seed, 16) + words(seed + 50, 20) for seed in range(10, 22)]
    for text in texts:
        stack.keep(text, named=[16, 36]), stack.settle()
        lower.check()
        for value, _ in lower.values.values.values():
            header = decode(value)[0]
            assert not isinstance(header, AliasHeader) or source(header) in lower.index
    assert 0 < len(lower.index) <= 10 and lower.index.keys() == lower.stored()
    assert alias_of(lower, texts[-1][16:]) is not None


def test_a_choosy_tier_chooses_among_aliases_too():
    stack, lower = one(Lower(admission=SeenTwice()))
    (first, second) = keep(stack, NEAR)
    stack.tiering.stored([first, second])
    stack.settle()
    assert lower.stored() == {first.key, second.key}
    stack.tiering.touch([first, second]), stack.settle()
    assert alias_of(lower).position == 16


def test_an_alias_ends_with_its_holder():
    stack, lower = one()
    text = NEAR
    for chunk in (new := stack.memory.reserve(Stack.SPACE, stack.chain(text, [16, 36]), 36)):
        stack.memory.commit(chunk)
        stack.memory.pins.expire(chunk, stack.clock() + 60)
    stack.tiering.stored(new), stack.settle()
    assert alias_of(lower).expires == decode(lower.values.get(new[1].key))[0].expires == stack.wall() + 60


# --- what is believed, and what people see ---


ALIAS = AliasHeader(
    namespace=Stack.SPACE,
    key=content(PASSAGE),
    parent=b"p" * 16,
    tokens=as_tokens(PASSAGE).tobytes(),
    position=16,
    open=False,
    shape=(16,),
    dtype="uint8",
    created=1e9,
)


def value_of(alias=ALIAS, named=None):
    return b"".join(encode(alias, [source(alias) if named is None else named]))


def test_an_alias_comes_back():
    header, raw = decode(value_of())
    assert header == ALIAS and type(header) is AliasHeader and raw == source(ALIAS)
    assert reader(Stack.SPACE, ALIAS.tokens, lambda: 1e9)(value_of()) == ALIAS
    assert value_of()[:8] == b"\x89RAGKA\r\n"


def test_every_flipped_bit_of_an_alias_is_refused():
    value, read = bytearray(value_of()), reader(Stack.SPACE, ALIAS.tokens, lambda: 1e9)
    for bit in range(8 * len(value)):
        value[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PayloadError):
            read(value)
        value[bit // 8] ^= 1 << bit % 8
    assert read(value) == ALIAS


@pytest.mark.parametrize(
    "value, reason",
    [
        (value_of(replace(ALIAS, namespace=bytes(16))), "namespace"),
        (value_of(replace(ALIAS, tokens=as_tokens(words(6, 20)).tobytes())), "tokens"),
        (value_of(named=b"x" * 16), "tokens"),
        (value_of(replace(ALIAS, expires=1e9)), "expired"),
        (b"", "truncated"),
        (b"\x89RAGK", "truncated"),
        (b"\x89RAGKB\r\n" + value_of()[8:], "magic"),
    ],
)
def test_what_is_not_believed(value, reason):
    with pytest.raises(PayloadError) as error:
        reader(Stack.SPACE, ALIAS.tokens, lambda: 1e9)(value)
    assert error.value.reason == reason


def test_a_payload_is_no_alias_and_an_alias_no_payload():
    stack, lower = one()
    first, second = keep(stack, NEAR)
    stack.settle()
    payload, alias = lower.values.get(second.key), lower.values.get(content(PASSAGE))
    with pytest.raises(PayloadError) as error:
        reader(Stack.SPACE, second.tokens, lambda: 1e9)(payload)
    assert error.value.reason == "magic"
    stack.forget()
    lower.spoil(first.key, lambda value: bytearray(alias))
    assert stack.get(NEAR, named=[16, 36]) == 0
    assert stack.metrics.get(m.REJECTED_PAYLOADS, "disk", "magic") == 1


def test_people_see_sound_values(tmp_path):
    store = DiskStore(tmp_path)
    stack, _ = one(Lower(values=store, asks=True))
    keep(stack, NEAR), stack.settle()
    for whole in (False, True):
        found = {value.key: value for value in Inventory(tmp_path).values(whole=whole)}
        assert len(found) == 4 and not any(value.fault for value in found.values())
        assert found[content(PASSAGE)].header.namespace == Stack.SPACE
    totals = Inventory(tmp_path).totals()
    assert (totals.files, totals.tokens, totals.namespaces, totals.bad) == (4, 36, 1, 0), "no token counts twice"
    store.put(content(NEAR[:16]), [value_of()])
    faults = [value.fault for value in Inventory(tmp_path).values(whole=True) if value.fault]
    assert faults == ["key"], "it is another's"
