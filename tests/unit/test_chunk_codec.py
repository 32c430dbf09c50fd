"""What is believed of a payload: only what fits the chunk, the place and the engine that asked for it."""

from dataclasses import replace

import pytest

from hand_lanes import Lower, Stack, redis, words
from ragkv.kvstore import metrics as m
from ragkv.kvstore.codec import decode, encode
from ragkv.kvstore.keys import as_tokens, chain_key, tail_key
from ragkv.kvstore.pages import PageShape

TEXT = words(1, 60)  # chunks of 21 and 23 tokens, and a tail of 16
OTHER = bytes(range(100, 116))


def forged(**changes):
    """A payload that is whole, but says something else."""

    def forge(value):
        header, raw = decode(bytes(value))
        return b"".join(encode(replace(header, **changes), [raw]))

    return forge


def of_other_tokens(value):
    header, raw = decode(bytes(value))
    tokens = as_tokens(words(9, header.token_count)).tobytes()
    return b"".join(encode(replace(header, tokens=tokens), [raw]))


def other_layout(value):
    header, raw = decode(bytes(value))
    tokens, ranks, layers, two, row = header.shape
    return b"".join(encode(replace(header, shape=(tokens, layers, ranks, two, row)), [raw]))


def fewer_tokens(value):
    header, raw = decode(bytes(value))
    less = header.token_count - 4
    shape = (less, *header.shape[1:])
    made = replace(header, tokens=header.tokens[: 4 * less], shape=shape)
    return b"".join(encode(made, [raw[: made.raw_bytes]]))


def flipped(value):
    value[-40] ^= 1
    return value


WRONG = {
    "checksum": (flipped, "checksum"),
    "cut off": (lambda value: value[:-30], "truncated"),
    "empty": (lambda value: b"", "truncated"),
    "grown": (lambda value: value + b"x", "size"),
    "foreign": (lambda value: b"#!/bin/sh\n" + value, "magic"),
    "tokens": (of_other_tokens, "tokens"),
    "fewer tokens": (fewer_tokens, "tokens"),
    "namespace": (forged(namespace=OTHER), "namespace"),
    "parent": (forged(parent=OTHER), "tokens"),
    "key": (forged(key=OTHER), "tokens"),
    "position": (forged(position=1), "tokens"),
    "layout": (other_layout, "shape"),
    "dtype": (forged(dtype="bfloat16"), "shape"),
    "expired": (forged(expires=1e9), "expired"),
}


@pytest.fixture(params=[Lower, redis], ids=["disk", "redis"])
def stack(request):
    made = Stack(request.param())
    made.keep(TEXT), made.settle()
    made.start()
    yield made
    made.settle()
    made.check()


@pytest.mark.parametrize("change, reason", WRONG.values(), ids=WRONG)
def test_a_wrong_payload_is_a_miss_and_goes(stack, change, reason):
    (lower,) = stack.lowers
    first, second = stack.chain(TEXT).keys
    lower.spoil(second, change)
    assert stack.get(TEXT) == 21
    assert stack.metrics.get(m.REJECTED_PAYLOADS, lower.name, reason) == 1
    assert lower.stored() >= {first} and second not in lower.stored()
    assert lower.index is None or (first in lower.index and second not in lower.index)
    assert stack.get(TEXT) == 21 and lower.store.read.count(second) == 1


@pytest.mark.parametrize("change, reason", [*WRONG.values(), (forged(open=True), "tokens")])
def test_a_wrong_first_payload_leaves_nothing(stack, change, reason):
    (lower,) = stack.lowers
    first, _ = stack.chain(TEXT).keys
    lower.spoil(first, change)
    assert stack.get(TEXT) == 0
    assert stack.metrics.get(m.REJECTED_PAYLOADS, lower.name, reason) == 1 and first not in lower.stored()


TAILS = {name: wrong for name, wrong in WRONG.items() if name not in ("tokens", "fewer tokens")}


@pytest.mark.parametrize(
    "change, reason",
    [*TAILS.values(), (of_other_tokens, "tokens"), (fewer_tokens, "tokens"), (forged(open=False), "tokens")],
)
def test_a_wrong_tail_is_a_miss_and_goes(stack, change, reason):
    (lower,) = stack.lowers
    where = tail_key(stack.chain(TEXT).keys[-1])
    lower.spoil(where, change)
    assert stack.get(TEXT) == 44 and len(stack.memory) == 2
    assert stack.metrics.get(m.REJECTED_PAYLOADS, lower.name, reason) == 1 and where not in lower.stored()


def test_a_payload_of_another_chunk_under_its_key(stack):
    (lower,) = stack.lowers
    first, second = stack.chain(TEXT).keys
    lower.values.values[first] = lower.values.values[second]
    assert stack.get(TEXT) == 0
    assert stack.metrics.get(m.REJECTED_PAYLOADS, lower.name, "tokens") == 1


def test_a_tail_of_tokens_that_hash_to_its_key(stack):
    """All of it is in order, but it is another tail than memory had: only what it shares is used."""
    (lower,) = stack.lowers
    parent = stack.chain(TEXT).keys[-1]

    def change(value):
        header, raw = decode(bytes(value))
        tokens = as_tokens(TEXT[44:50] + words(9, 10)).tobytes()
        return b"".join(encode(replace(header, tokens=tokens, key=chain_key(parent, tokens)), [raw]))

    lower.spoil(tail_key(parent), change)
    stack.bytes_of = lambda chunk: b"".join(stack.pages.parts(chunk))
    assert stack.get(TEXT) == 50


def test_two_engines_of_different_layout_share_nothing():
    lower = Lower()
    stack = Stack(lower)
    stack.keep(TEXT), stack.settle()
    stack.SHAPE = PageShape(ranks=1, layers=2, page_tokens=4, row_elements=3, itemsize=2, dtype="float16")
    stack.start()
    assert stack.get(TEXT) == 0
    assert stack.metrics.get(m.REJECTED_PAYLOADS, "disk", "shape") >= 1


@pytest.mark.parametrize("length", [1, 4, 5, 19])
def test_only_the_filled_rows_are_written(length):
    """What a page has free may be another tenant's."""
    stack = Stack(Lower())
    stack.bytes[:] = 0xAB
    (chunk,) = stack.keep(words(3, length), named=[length])
    stack.settle()
    _, raw = decode(stack.lowers[0].values.get(chunk.key))
    assert len(raw) == length * stack.SHAPE.token_bytes and bytes(raw) == stack.bytes_of(chunk)


def test_times_outlive_the_process():
    stack = Stack(Lower())
    stack.keep(TEXT, ttl=100.0), stack.settle()
    stack.wall.now += 40
    stack.start()  # its clock begins anew
    assert stack.get(TEXT) == 60
    stack.clock.now += 59
    stack.settle()
    assert stack.match(TEXT).length == 60
    stack.clock.now += 2
    stack.settle()
    assert stack.match(TEXT).length == 0 and stack.memory.used == 0
    stack.wall.now += 61
    assert stack.get(TEXT) == 0
    assert stack.metrics.get(m.REJECTED_PAYLOADS, "disk", "expired") == 3
    stack.check()
