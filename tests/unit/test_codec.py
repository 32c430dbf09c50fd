"""Payloads: round trips, and every kind of harm to one: none is decoded wrong, and none raises anything else."""

import dataclasses
import itertools
import struct
import tracemalloc

import hypothesis.strategies as st
import msgpack
import numpy as np
import pytest
import xxhash
from hypothesis import example, given, settings

from ragkv.errors import PayloadError
from ragkv.kvstore.codec import (
    CHECKSUM_BYTES,
    DTYPES,
    MAGIC,
    MOST_HEADER_BYTES,
    PREFIX_BYTES,
    VERSION,
    Header,
    decode,
    encode,
    header_end,
    read_header,
)

HEADER = Header(
    namespace=b"n" * 16,
    key=b"k" * 16,
    parent=b"p" * 16,
    tokens=np.arange(5, dtype="<i4").tobytes(),
    position=1234,
    open=False,
    shape=(2, 2, 5, 1, 4),
    dtype="bfloat16",
    created=1.5e9,
)
RAW = bytes(range(HEADER.raw_bytes))
FIELDS = [field.name for field in dataclasses.fields(Header)]


def whole(header=HEADER, raw=RAW):
    return b"".join(encode(header, [raw]))


def sealed(packed, raw=RAW, version=VERSION):
    """A payload with a header of any bytes, and the right checksum."""
    start = struct.pack("<8sHI", MAGIC, version, len(packed)) + packed + raw
    return start + xxhash.xxh3_128_digest(start)


def fields_of(header=HEADER, **changes):
    return {name: getattr(header, name) for name in FIELDS} | changes


def reason(value, reader=decode):
    with pytest.raises(PayloadError) as error:
        reader(value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    return error.value.reason


headers = st.builds(
    Header,
    namespace=st.binary(min_size=16, max_size=16),
    key=st.binary(min_size=16, max_size=16),
    parent=st.binary(min_size=16, max_size=16),
    tokens=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=300).map(
        lambda ids: np.array(ids, dtype="<i4").tobytes()
    ),
    position=st.integers(0, 2**31 - 1),
    open=st.booleans(),
    shape=st.tuples(st.integers(1, 4), st.lists(st.integers(0, 4), max_size=4)).map(lambda s: (s[0], *s[1])),
    dtype=st.sampled_from(sorted(DTYPES)),
    created=st.floats(0, 1e12),
    expires=st.floats(0, 1e12),
)


@given(header=headers, data=st.data())
def test_what_is_encoded_comes_back(header, data):
    raw = data.draw(st.binary(min_size=header.raw_bytes, max_size=header.raw_bytes))
    cut = data.draw(st.integers(0, len(raw)))
    parts = encode(header, [raw[:cut], bytearray(raw[cut:])])
    value = b"".join(parts)
    assert decode(value) == (header, raw)
    assert decode(bytearray(value)) == (header, raw)
    assert read_header(value[: header_end(value)]) == (header, len(value))


def test_nothing_is_copied():
    raw = [np.arange(40, dtype=np.uint16), memoryview(RAW)[80:]]
    parts = encode(HEADER, raw)
    assert parts[1] is raw[0] and parts[2] is raw[1]
    value = bytearray(b"".join(parts))
    _, tensor = decode(value)
    value[-CHECKSUM_BYTES - 1] ^= 0xFF
    assert tensor[-1] == RAW[-1] ^ 0xFF


def test_a_buffer_of_any_shape_is_read():
    value = whole()
    value += bytes(-len(value) % 4)
    assert reason(memoryview(value).cast("I")) == "size"
    words = memoryview(whole(dataclasses.replace(HEADER, tokens=b"1234" * 6))).cast("H")
    assert decode(words)[1] == RAW


def test_the_layout_is_pinned():
    """These bytes lie on people's disks: to change them is to change `VERSION`."""
    value = whole(dataclasses.replace(HEADER, expires=2.5e9))
    assert value[:PREFIX_BYTES] == b"\x89RAGKV\r\n" + b"\x01\x00" + struct.pack("<I", header_end(value) - 14)
    assert xxhash.xxh3_128_hexdigest(value) == "8cbc415459c1228db7dad630643e930c"


def test_sizes_of_the_header():
    assert HEADER.token_count == 5 and HEADER.raw_bytes == 2 * 2 * 5 * 1 * 4 * 2


def test_every_flipped_bit_is_refused():
    value = bytearray(whole())
    seen = set()
    for bit in range(8 * len(value)):
        value[bit // 8] ^= 1 << bit % 8
        seen.add(reason(value))
        value[bit // 8] ^= 1 << bit % 8
    assert seen == {"magic", "version", "header", "size", "truncated", "checksum"}
    assert decode(value) == (HEADER, RAW)


def test_every_truncation_is_refused():
    value = whole()
    for size in range(len(value)):
        assert reason(value[:size]) == "truncated"
        if size < header_end(value):
            assert reason(value[:size], read_header) == "truncated"
        else:
            assert read_header(value[:size]) == (HEADER, len(value))


@pytest.mark.parametrize("more", [b"\0", bytes(16), whole()])
def test_what_follows_is_refused(more):
    assert reason(whole() + more) == "size"


def test_every_region_exchanged_is_refused():
    other = whole(dataclasses.replace(HEADER, key=b"o" * 16), RAW[::-1])
    value = whole()
    assert len(value) == len(other)
    borders = [PREFIX_BYTES, header_end(value), len(value) - CHECKSUM_BYTES, len(value)]
    for start, end in itertools.pairwise(borders):
        assert reason(value[:start] + other[start:end] + value[end:]) == "checksum"


@pytest.mark.parametrize("version", [0, VERSION + 1, 0x0100, 0xFFFF])
def test_other_versions_are_refused(version):
    value = sealed(msgpack.packb(fields_of()), version=version)
    assert reason(value) == reason(value, read_header) == "version"


@pytest.mark.parametrize("start", [b"", b"\x89", b"\x80\x04pickle", b"PK\x03\x04" * 9, bytes(100)])
def test_what_is_no_payload(start):
    assert reason(start) in {"magic", "truncated"}


def test_a_header_that_claims_gigabytes_allocates_nothing():
    claims = b"".join([MAGIC, struct.pack("<HI", VERSION, 0xFFFFFFFF), bytes(50)])
    assert reason(claims) == reason(claims, read_header) == "header"
    claims = b"".join([MAGIC, struct.pack("<HI", VERSION, MOST_HEADER_BYTES), bytes(50)])
    assert reason(claims) == reason(claims, read_header) == "truncated"


NESTED_ARRAYS = b"\xdd\x00\x07\x00\x00" * 100  # as many as the bytes that follow, each
BAD_PACKED = {
    "nothing": b"",
    "text": b"\xff" * 20,
    "cut off": msgpack.packb(fields_of())[:-1],
    "more behind": msgpack.packb(fields_of()) + b"\xc0",
    "a list": msgpack.packb([1, 2, 3]),
    "nil": b"\xc0",
    "arrays that claim half a million each": NESTED_ARRAYS + bytes(1 << 19),
    "deep arrays": b"\x91" * 100_000,
    "deep maps": b"\x81\x01" * 100_000,
    "a map that claims 4 billion": b"\xdf\xff\xff\xff\xff" + bytes(100),
    "an extension": msgpack.packb(fields_of(created=msgpack.ExtType(5, b"xxxx"))),
    "a time": msgpack.packb(fields_of(created=msgpack.Timestamp(5))),
    "not UTF-8": msgpack.packb(fields_of(), use_bin_type=True).replace(b"bfloat16", b"bfloat1\xff"),
    "a field missing": msgpack.packb({k: v for k, v in fields_of().items() if k != "created"}),
    "a field more": msgpack.packb(fields_of(more=1)),
    "another order": msgpack.packb(dict(reversed(fields_of().items()))),
    "a field twice": b"\x8a" + msgpack.packb(fields_of())[1:].replace(b"\xa7expires", b"\xa7created"),
    "keys that are bytes": msgpack.packb({k.encode(): v for k, v in fields_of().items()}),
    "nine dimensions": msgpack.packb(fields_of(shape=[1] * 9)),
    "keys that are arrays": b"\x81\x91\x01\x01",
}


@pytest.mark.parametrize("packed", BAD_PACKED.values(), ids=BAD_PACKED.keys())
def test_headers_that_are_none(packed):
    value = sealed(packed)
    assert reason(value) == reason(value, read_header) == "header"


@pytest.mark.parametrize("packed", BAD_PACKED.values(), ids=BAD_PACKED.keys())
def test_a_bad_header_takes_little_memory(packed):
    value = sealed(packed)
    tracemalloc.start()
    try:
        reason(value)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


BAD_FIELDS = [
    ("namespace", [b"", b"n" * 15, b"n" * 17, "n" * 16, None, 5]),
    ("key", [b"", b"k" * 17, "k" * 16]),
    ("parent", [b"", b"p" * 17, None]),
    ("tokens", [b"", b"123", b"12345", "1234", [1], None]),
    ("position", [-1, 2**31, 2**63, 1.0, True, None, "1"]),
    ("open", [0, 1, None, "true"]),
    ("shape", [[], [0], [0, 1], [1, -1], [-1], [1.0], [True], [2**31], 80, None, {"a": 1}, [[80]]]),
    ("dtype", ["", "float64", "bfloat16 ", "torch.bfloat16", b"bfloat16", None, ["bfloat16"]]),
    ("created", [-1.0, 5, float("nan"), float("inf"), None, "now", True]),
    ("expires", [-1.0, 0, float("nan"), float("inf"), None]),
]


@pytest.mark.parametrize("name, bad", [(name, bad) for name, all_bad in BAD_FIELDS for bad in all_bad])
def test_fields_that_cannot_be(name, bad):
    value = sealed(msgpack.packb(fields_of(**{name: bad})))
    assert reason(value) == reason(value, read_header) == "header"
    with pytest.raises(PayloadError, match=rf"payload: {name} = .*; allowed: "):
        decode(value)
    if type(bad) is not list:
        with pytest.raises(PayloadError, match=rf"payload: {name} = .*; allowed: "):
            dataclasses.replace(HEADER, **{name: bad})


@pytest.mark.parametrize(
    "shape, expected", [((2, 2, 5, 1, 5), "truncated"), ((2, 2, 5, 1, 3), "size"), ((2**31 - 1,) * 8, "truncated")]
)
def test_the_size_must_be_the_shapes(shape, expected):
    assert reason(sealed(msgpack.packb(fields_of(shape=shape)))) == expected


def test_a_smaller_dtype_is_another_size():
    assert reason(sealed(msgpack.packb(fields_of(dtype="int8")))) == "size"


@pytest.mark.parametrize("raw", [b"", RAW[:-1], RAW + b"\0"])
def test_encoding_another_size_is_refused(raw):
    with pytest.raises(PayloadError, match=rf"{len(raw)} tensor bytes, the header says 160") as error:
        encode(HEADER, [raw])
    assert error.value.reason == "size"


def test_encoding_too_many_tokens_is_refused():
    header = dataclasses.replace(HEADER, tokens=bytes(MOST_HEADER_BYTES))
    with pytest.raises(PayloadError, match=rf"allowed: {MOST_HEADER_BYTES}") as error:
        encode(header, [RAW])
    assert error.value.reason == "header"


@settings(max_examples=200, deadline=None)
@given(value=st.binary(max_size=300))
@example(value=MAGIC)
@example(value=MAGIC + b"\x01\x00\x00\x00\x00\x00")
def test_any_bytes_are_refused(value):
    assert reason(value)
    assert reason(MAGIC + value)


@settings(max_examples=200, deadline=None)
@given(packed=st.binary(max_size=300), raw=st.binary(max_size=50))
def test_any_header_under_a_right_checksum_is_refused(packed, raw):
    assert reason(sealed(packed, raw)) == "header"


plain = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
anything = st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(FIELDS), bad=anything)
def test_a_field_is_good_or_refused(name, bad):
    fields = fields_of(**{name: bad})
    value = sealed(msgpack.packb(fields))
    try:
        header, raw = decode(value)
    except PayloadError as error:
        assert error.reason in {"header", "size", "truncated"}
    else:
        assert raw == RAW
        assert list(getattr(header, name)) == bad if name == "shape" else getattr(header, name) == bad
