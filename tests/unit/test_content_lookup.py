"""Passages by their tokens, from the lower tiers into memory: what comes, who waits, and what becomes of it."""

from dataclasses import replace

import pytest

from hand_lanes import ContentStack, Lower, Stack, redis, words
from ragkv.errors import StoreError
from ragkv.kvstore import metrics as m
from ragkv.kvstore.codec import decode, encode
from ragkv.kvstore.device_tier import DeviceTier
from ragkv.kvstore.gate import BELIEF, Gate
from ragkv.kvstore.keys import as_tokens, chain_key, content_key
from ragkv.kvstore.prefix_tree import Match, is_detached, origin
from ragkv.kvstore.stores.disk import DiskStore
from ragkv.policies import make_policy

HEAD, PASSAGE, OTHER = words(2, 16), words(5, 20), words(6, 19)
TEXT, CUTS = HEAD + PASSAGE + OTHER, [16, 36, 55]
KINDS = pytest.mark.parametrize(
    "lower", [Lower, lambda: Lower(asks=True), redis], ids=["private", "shared", "redis"]
)


def content(tokens):
    return content_key(Stack.SPACE, as_tokens(tokens).tobytes())


def key_of(tokens, cuts, space=Stack.SPACE):
    """Chain key of the last chunk of a prefix that is cut so."""
    for start, end in zip([0, *cuts], cuts, strict=False):
        space = chain_key(space, as_tokens(tokens[start:end]).tobytes())
    return space


PLACE = key_of(TEXT, CUTS[:2])  # the passage's


def emptied(stack, *, ttl=None):
    """The text lies below, with aliases; memory has lost it."""
    stack.keep(TEXT, named=CUTS, ttl=ttl)
    stack.settle()
    stack.forget()
    for lower in stack.lowers:
        lower.store.read.clear()
    return stack


@pytest.fixture
def disk():
    return Lower()


@pytest.fixture
def stack(disk):
    made = emptied(ContentStack(disk))
    yield made
    made.settle()
    made.check()


def forged(**changes):
    def forge(value):
        header, raw = decode(bytes(value))
        return bytearray(b"".join(encode(replace(header, **changes), [raw])))

    return forge


# --- what comes ---


@KINDS
def test_a_new_engine_finds_a_passage_wherever_it_was_computed(lower):
    stack = emptied(ContentStack(lower()))
    stack.start()
    assert stack.bring(PASSAGE, OTHER, words(7, 20)) == [1, 1, 0]
    (chunk,) = stack.holders(PASSAGE)
    assert is_detached(chunk) and origin(chunk) == (Stack.SPACE, 16)
    assert origin(stack.holders(OTHER)[0]) == (Stack.SPACE, 36)
    assert stack.metrics.get(m.PROMOTED_TOKENS, lower().name) == 39
    assert stack.metrics.get(m.WAITS, "loaded") == 1
    stack.check()


@KINDS
def test_it_is_found_in_real_files_again_and_again(lower, tmp_path):
    stack = emptied(ContentStack(replace(lower(), values=DiskStore(tmp_path))))
    stack.start()
    for _ in range(3):
        assert stack.bring(PASSAGE, OTHER) == [1, 1]
        stack.forget()
    stack.check()


def test_it_never_matches(stack):
    assert stack.bring(HEAD, PASSAGE) == [1, 1]
    assert stack.match(TEXT, CUTS).length == 0 and stack.match(PASSAGE).length == 0
    assert stack.get(TEXT, CUTS) == 55, "the text itself is loaded all the same"
    assert sorted(map(is_detached, stack.holders(PASSAGE))) == [False, True]
    assert {origin(chunk) for chunk in stack.holders(PASSAGE)} == {(Stack.SPACE, 16)}
    stack.memory.forget([stack.match(TEXT, CUTS).chunks[0]], m.EXPIRED)
    assert list(map(is_detached, stack.holders(PASSAGE))) == [True]


def test_what_memory_holds_is_not_asked_for(stack, disk):
    stack.bring(PASSAGE)
    disk.store.read.clear()
    assert stack.gather(PASSAGE) is None and stack.gather() is None and disk.store.read == []


def test_what_nobody_has_is_known_at_once(stack, disk):
    assert stack.gather(words(7, 20)) is None and not disk.reads.jobs


def test_another_namespace_has_it_not(stack, disk):
    assert stack.gather(PASSAGE, space=bytes(16)) is None
    stack.gather(PASSAGE)
    disk.reads.step(), stack.cache.tick()
    assert stack.gather(PASSAGE, space=bytes(16)) is None, "what is on its way is not for it"
    stack.settle()
    assert stack.gather(PASSAGE, space=bytes(16)) is None


def test_the_same_passage_twice_is_one(stack, disk):
    assert stack.bring(PASSAGE, PASSAGE) == [1, 1]
    assert disk.store.read.count(PLACE) == 1


def test_passages_may_come_from_several_tiers():
    quick, slow = Lower("disk"), redis()
    stack = emptied(ContentStack(quick, slow))
    for key in (content(PASSAGE), PLACE):
        quick.values.delete([key]), quick.index.drop(key)
    gather = stack.gather(PASSAGE, OTHER)
    stack.settle()
    assert len(stack.holders(PASSAGE)) == len(stack.holders(OTHER)) == 1
    assert sorted(gather.sources.values()) == ["disk", "redis"]
    stack.check()


# --- who waits, and how long ---


def test_a_gather_is_over_when_all_has_come(stack, disk):
    gather = stack.gather(PASSAGE)
    for seen in ([content(PASSAGE)], [content(PASSAGE), PLACE, content(PASSAGE)]):
        assert stack.promotion.waits(gather)
        disk.reads.step()
        assert stack.promotion.waits(gather), "read, but nobody has heard of it"
        stack.cache.tick()
        assert disk.store.read == seen
    assert not stack.promotion.waits(gather) and len(stack.holders(PASSAGE)) == 1


def gathering(lower, steps):
    """A gather whose first reads have ended: by steps its question, its alias, its chunk."""
    stack = emptied(ContentStack(lower))
    gather = stack.gather(PASSAGE)
    for _ in range(steps):
        lower.reads.step(), stack.cache.tick()
    return stack, gather


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_at_the_deadline_it_is_a_miss(steps):
    """While it asks, reads the alias, or reads the chunk."""
    lower = redis()
    stack, gather = gathering(lower, steps)
    stack.clock.now += 1.999
    assert stack.promotion.waits(gather)
    stack.clock.now += 0.001
    assert not stack.promotion.waits(gather) and not stack.holders(PASSAGE)
    assert stack.metrics.get(m.WAITS, "deadline") == stack.metrics.get(m.TIER_ERRORS, "redis", "deadline") == 1
    stack.settle()
    assert len(stack.holders(PASSAGE)) == (steps == 2), "what has been ordered goes on"
    assert stack.bring(PASSAGE) == [1]
    stack.check()


@pytest.mark.parametrize("steps", range(4))
@KINDS
def test_two_requests_share_a_read(lower, steps):
    """However far the first one is."""
    lower = lower()
    stack = emptied(ContentStack(lower))
    first = stack.gather(PASSAGE)
    for _ in range(steps):
        lower.reads.step(), stack.cache.tick()
    second = stack.gather(PASSAGE, OTHER)
    stack.settle()
    assert lower.store.read.count(PLACE) == 1
    assert not stack.promotion.waits(first) and not stack.promotion.waits(second)
    assert stack.metrics.get(m.WAITS, "loaded") == 2
    assert len(stack.holders(PASSAGE)) == len(stack.holders(OTHER)) == 1
    stack.check()


def test_what_memory_got_meanwhile_is_not_loaded(stack, disk):
    gather = stack.gather(PASSAGE)
    stack.keep(TEXT, named=CUTS)
    disk.reads.step(), stack.cache.tick()
    assert not stack.promotion.waits(gather) and PLACE not in disk.store.read
    assert list(map(is_detached, stack.holders(PASSAGE))) == [False]


def test_who_shares_a_read_waits_for_it_and_has_a_deadline_of_its_own():
    lower = redis()
    stack, _ = gathering(lower, 2)
    stack.clock.now += 1
    second = stack.gather(PASSAGE)
    assert second is not None and stack.promotion.waits(second)
    assert len(lower.reads.jobs) == 1, "it asks nobody"
    stack.clock.now += 1.5
    assert stack.promotion.waits(second)
    lower.reads.step(), stack.cache.tick()
    assert not stack.promotion.waits(second)
    stack.check()


def test_a_slow_tier_is_declined():
    gate = Gate()
    gate.prefill.note(64, 0.064)
    for size in (1, 10, 100, 1000) * BELIEF:
        gate.tier("disk").note(size, size * 1.0)
    stack = emptied(ContentStack(Lower(), gate=gate))
    assert stack.gather(PASSAGE) is None
    assert stack.metrics.get(m.GATE_DECISIONS, "disk", "decline") == 1
    stack.check()


# --- what goes wrong ---


def test_a_missing_payload_is_a_miss_and_its_alias_goes(stack, disk):
    disk.values.delete([PLACE])
    assert stack.bring(PASSAGE, OTHER) == [0, 1]
    assert content(PASSAGE) not in disk.stored() and content(PASSAGE) not in disk.index
    assert content(OTHER) in disk.stored() and disk.notes == []
    assert stack.metrics.get(m.WAITS, "loaded") == 1
    assert stack.gather(PASSAGE) is None, "it is known now"
    stack.keep(TEXT, named=CUTS), stack.settle(), stack.forget()
    assert stack.bring(PASSAGE) == [1], "and it is written again"


def test_an_alias_that_names_another_holder_meanwhile_stays(stack, disk):
    disk.values.delete([PLACE])
    gather = stack.gather(PASSAGE)
    disk.reads.step(), stack.cache.tick()
    nearer = PASSAGE + words(8, 30)
    stack.keep(nearer, named=[20])
    disk.reads.jobs.rotate(-1)  # the question which is better comes first
    disk.writes.run(), disk.reads.step(), stack.cache.tick(), disk.writes.run()
    stack.settle()
    assert not stack.promotion.waits(gather)
    stack.forget()
    assert stack.bring(PASSAGE) == [1] and origin(stack.holders(PASSAGE)[0])[1] == 0


WRONG = {
    "damaged": (lambda value: value[:-40] + bytes(40), "checksum"),
    "cut off": (lambda value: value[:50], "truncated"),
    "foreign": (lambda value: b"#!/bin/sh\n" + value, "magic"),
    "namespace": (forged(namespace=bytes(16)), "namespace"),
    "position": (forged(position=15), "tokens"),
    "tokens": (forged(tokens=as_tokens(words(9, 20)).tobytes()), "tokens"),
    "parent": (forged(parent=bytes(16)), "tokens"),
    "time": (forged(expires=1.0), "expired"),
}


@pytest.mark.parametrize("what", WRONG)
@KINDS
def test_a_wrong_payload_is_a_miss_and_goes_with_its_alias(lower, what):
    lower = lower()
    stack = emptied(ContentStack(lower))
    change, reason = WRONG[what]
    lower.spoil(PLACE, change)
    assert stack.bring(PASSAGE, OTHER) == [0, 1]
    assert stack.metrics.get(m.REJECTED_PAYLOADS, lower.name, reason) >= 1
    assert not {PLACE, content(PASSAGE)} & lower.stored()
    assert bool(lower.notes) == (what != "time")
    stack.check()


@pytest.mark.parametrize("what", [what for what in WRONG if what != "position"])
@KINDS
def test_a_wrong_alias_is_a_miss_and_goes(lower, what):
    lower = lower()
    stack = emptied(ContentStack(lower))
    change, reason = WRONG[what]
    lower.spoil(content(PASSAGE), change)
    assert stack.bring(PASSAGE, OTHER) == [0, 1]
    assert stack.metrics.get(m.REJECTED_PAYLOADS, lower.name, reason) == 1
    assert content(PASSAGE) not in lower.stored() and PLACE in lower.stored()
    assert stack.get(TEXT, CUTS) == 55, "exact reuse does not need it"
    stack.check()


def test_an_alias_with_a_wrong_position_brings_nothing(stack, disk):
    disk.spoil(content(PASSAGE), forged(position=15))
    assert stack.bring(PASSAGE) == [0]


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_tier_that_fails_is_a_miss_and_loses_nothing(steps):
    lower = redis()
    stack, gather = gathering(lower, steps)
    lower.store.errors = {method: StoreError("timeout", "slow") for method in ("get_many", "contains")}
    stack.settle()
    assert not stack.promotion.waits(gather) and not stack.holders(PASSAGE) and stack.memory.used == 0
    lower.store.errors = {}
    assert content(PASSAGE) in lower.stored() and stack.bring(PASSAGE) == [1]
    stack.check()


def test_without_room_what_fits_is_loaded():
    stack = emptied(ContentStack(Lower(), pages=16))  # 4 + 5 + 5 pages of 4 tokens
    stack.pages_wanted = 10
    stack.start()
    assert stack.bring(HEAD, PASSAGE, OTHER) == [1, 1, 0]
    stack.check()


def test_what_is_being_brought_up_is_not_evicted(disk):
    stack = emptied(ContentStack(disk, pages=16))
    stack.gather(PASSAGE)
    disk.reads.step(), stack.cache.tick()
    stack.keep(words(9, 64)), stack.keep(words(10, 64))
    stack.settle()
    assert len(stack.holders(PASSAGE)) == 1
    stack.check()


def test_a_reset_while_it_is_brought_up(stack, disk):
    gather = stack.gather(PASSAGE)
    disk.reads.step(), stack.cache.tick()
    stack.memory.reset()
    assert stack.memory.used > 0, "a thread may be writing there"
    second = stack.gather(PASSAGE)
    assert stack.promotion.waits(second), "it cannot have what was dropped"
    stack.settle()
    assert not stack.promotion.waits(gather) and not stack.promotion.waits(second)
    assert len(stack.holders(PASSAGE)) == 1
    stack.forget()
    assert stack.holders(PASSAGE) == []


# --- what becomes of it ---


def test_it_is_evicted_as_others_are_and_not_given_to_a_tier_that_lacks_it():
    quick, slow = Lower("disk"), redis()
    stack = emptied(ContentStack(quick, slow, pages=16))
    for key in (content(PASSAGE), PLACE):
        quick.values.delete([key]), quick.index.drop(key)
    assert stack.bring(PASSAGE) == [1]
    assert stack.keep(words(9, 64)), "it made room"
    stack.settle()
    assert stack.holders(PASSAGE) == [] and not {PLACE, content(PASSAGE)} & quick.stored()
    stack.check()


def test_in_the_end_it_is_not_written(stack, disk):
    other = redis()
    both, before = ContentStack(disk, other), len(disk.stored())
    assert both.bring(PASSAGE) == [1]
    assert both.cache.close(5.0)
    assert other.stored() == set() and len(disk.stored()) == before


def test_what_is_used_loose_is_used_below(stack, disk):
    stack.bring(PASSAGE)
    stack.tiering.touch(stack.holders(PASSAGE)), stack.settle()
    used = {key: when for key, (_, when) in disk.values.values.items()}
    assert set(sorted(used, key=used.get)[-2:]) == {PLACE, content(PASSAGE)}


def test_it_is_not_what_a_new_alias_names(stack, disk):
    stack.bring(PASSAGE)
    disk.values.delete([content(PASSAGE)]), disk.index.drop(content(PASSAGE))
    stack.tiering.touch(stack.holders(PASSAGE)), stack.settle()
    assert content(PASSAGE) not in disk.stored()


def test_its_time_ends(disk):
    stack = emptied(ContentStack(disk), ttl=60)
    stack.bring(PASSAGE)
    (chunk,) = stack.holders(PASSAGE)
    assert stack.memory.pins.expiry(chunk) == pytest.approx(stack.clock() + 60)
    stack.clock.now += 59
    stack.cache.tick()
    assert stack.holders(PASSAGE) == [chunk]
    stack.clock.now += 1
    stack.cache.tick()
    assert stack.holders(PASSAGE) == [] and stack.memory.used == 0
    stack.wall.now += 60
    assert stack.bring(PASSAGE) == [0]
    assert content(PASSAGE) not in disk.stored() and disk.notes == []
    stack.check()


def test_it_can_be_held_and_forgotten(stack):
    stack.bring(PASSAGE)
    (chunk,) = stack.holders(PASSAGE)
    assert stack.memory.pins.hold("owner", chunk, stack.clock() + 9)
    stack.memory.pin([chunk])
    stack.memory.forget([chunk], m.EXPIRED)
    assert stack.holders(PASSAGE) == [] and stack.memory.used == 5, "its pages are still read"
    stack.memory.unpin([chunk])
    stack.memory.pins.release("owner")
    assert stack.memory.used == 0


def test_it_is_not_copied_to_the_device(stack):
    stack.memory.device = DeviceTier(20, make_policy("lru"), after=1)
    stack.bring(PASSAGE)
    (chunk,) = stack.holders(PASSAGE)
    assert stack.memory.touch(Match((chunk,), 20)) == [] and chunk.hits == 1
    stack.get(TEXT, CUTS)
    assert len(stack.memory.touch(stack.match(TEXT, CUTS))) == 3
    stack.memory.device = None
