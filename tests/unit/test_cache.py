"""The door, step by step: what its contract says, and a state machine would find late."""

import numpy as np
import pytest

from hand_lanes import Lower, Stack, assert_at_rest, words
from ragkv.kvstore.cache import PINNED_ALL
from ragkv.kvstore.device_tier import DeviceTier
from ragkv.kvstore.pins import Pin
from ragkv.kvstore.prompt import Lookup, Prompt, Result
from ragkv.policies import make_policy

TEXT = words(1, 60)
MISS = Lookup(Result.MISS)


@pytest.fixture
def stack():
    made = Stack(Lower())
    yield made
    made.settle()
    assert_at_rest(made.cache)


def prompt(stack, tokens=TEXT, **more):
    return Prompt(stack.SPACE, stack.chain(tokens), **more)


def keep(stack, tokens=TEXT, **more):
    asked = prompt(stack, tokens, **more)
    store = stack.cache.prepare_store(asked, len(tokens))
    for chunk in store.chunks:
        stack.pages.fill(chunk, memoryview(stack.bytes_of(chunk)))
    stack.cache.complete_store(store, ok=True)
    return asked


def test_a_store_says_where_each_token_goes(stack):
    store = stack.cache.prepare_store(prompt(stack), 60)
    assert store.positions.tolist() == list(range(60)) and store.rows.dtype == np.int64
    assert len(set(store.rows.tolist())) == 60 and stack.cache.lookup(prompt(stack), 0, 59) == MISS
    assert stack.cache.prepare_store(prompt(stack), 60) is None, "it is being stored"
    stack.cache.complete_store(store, ok=False)
    assert len(stack.cache) == 0


def test_what_is_found_stays_until_it_is_released(stack):
    keep(stack), stack.settle()
    asked = prompt(stack)
    assert stack.cache.lookup(asked, 20, 59) == Lookup(Result.HIT, 39)
    stack.cache.reset()
    assert stack.memory.leaving and stack.memory.used
    stack.cache.release(asked)
    assert not stack.memory.used


def test_what_is_loaded_stays_until_that_ends(stack):
    keep(stack), stack.settle()
    asked = prompt(stack)
    stack.cache.lookup(asked, 20, 59)
    (load,) = stack.cache.prepare_load(asked, 20, 59)
    assert load.positions.tolist() == list(range(20, 59)) and load.sources == {"memory": 39}
    with pytest.raises(ValueError, match="not to be had"):
        stack.cache.prepare_load(asked, 20, 61)
    stack.cache.release(asked)
    stack.cache.reset()
    assert stack.memory.used
    stack.cache.complete_load(load, ok=True)
    assert not stack.memory.used


def test_what_lies_below_is_pending_and_then_a_hit_of_its_tier(stack):
    keep(stack), stack.settle()
    stack.start()
    asked = prompt(stack)
    assert stack.cache.lookup(asked, 0, 59) == Lookup(Result.PENDING)
    stack.lowers[0].reads.run(), stack.cache.tick()
    assert stack.cache.lookup(asked, 0, 59) == Lookup(Result.HIT, 59)
    (load,) = stack.cache.prepare_load(asked, 0, 59)
    assert load.sources == {"disk": 59}
    stack.cache.release(asked), stack.cache.complete_load(load, ok=True)


def test_what_is_skipped_is_looked_up_again(stack):
    keep(stack)
    asked = prompt(stack)
    stack.cache.lookup(asked, 0, 59)
    stack.cache.skip(asked)
    assert not asked.match and not asked.kept
    assert stack.cache.lookup(asked, 0, 59).tokens == 59
    stack.cache.release(asked)


def test_pins_that_are_refused_are_told(stack):
    asked = [keep(stack, words(seed, 60), pin=Pin(f"desk {seed}", 9.0)) for seed in range(3)]
    assert [each.pins_refused for each in asked] == [False, True, True]
    assert stack.told == [("pins", PINNED_ALL)] * 2
    stack.cache.unpin(b"", "desk 0")


def test_hot_chunks_are_copied_to_the_device_tier_and_read_from_there(stack):
    stack.memory.device = DeviceTier(20, make_policy("lru"), after=1)
    keep(stack)
    asked = prompt(stack)
    assert stack.cache.lookup(asked, 0, 60).tokens == 60
    store = stack.cache.touch(asked)
    assert store.device and store.positions.tolist() == list(range(60))
    (load,) = stack.cache.prepare_load(asked, 0, 60)
    assert not load.device, "no worker has said that it is copied"
    stack.cache.complete_load(load, ok=True)
    stack.cache.complete_store(store, ok=True)
    (load,) = stack.cache.prepare_load(asked, 0, 60)
    assert load.device and load.sources == {"device": 60}
    stack.cache.complete_load(load, ok=False)
    (load,) = stack.cache.prepare_load(asked, 0, 60)
    assert not load.device, "what could not be read is lost"
    stack.cache.complete_load(load, ok=True), stack.cache.release(asked)
