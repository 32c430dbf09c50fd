"""Contents: an index from tokens to chunks, in step with the catalogue."""

import numpy as np

from ragkv.kvstore.catalogue import Chunk
from ragkv.kvstore.contents import Contents


def chunk(name, tokens):
    return Chunk(name, None, np.array(tokens, dtype=np.int32).tobytes())


def test_holders_are_found_by_tokens_alone_and_go_one_by_one():
    contents, one, two, other = Contents(), chunk(b"1", [1, 2]), chunk(b"2", [1, 2]), chunk(b"3", [1, 3])
    for each in (one, two, other):
        contents.add(each)
    assert contents.holders(one.tokens) == [one, two]
    assert contents.holders(other.tokens) == [other]
    assert contents.holders(b"") == []
    contents.check_integrity([one, two, other])
    contents.remove(one)
    contents.remove(one)
    assert contents.holders(one.tokens) == [two]
    contents.remove(two)
    assert contents.holders(two.tokens) == []
    contents.remove(two)
    contents.check_integrity([other])
    contents.clear()
    contents.check_integrity([])


def test_tokens_are_compared_not_only_hashed(monkeypatch):
    monkeypatch.setattr("ragkv.kvstore.contents.xxhash.xxh3_64_intdigest", lambda tokens: 7)
    contents, one, two = Contents(), chunk(b"1", [1, 2]), chunk(b"2", [1, 3])
    contents.add(one)
    contents.add(two)
    assert contents.holders(one.tokens) == [one]
    assert contents.holders(two.tokens) == [two]
    contents.remove(one)
    assert contents.holders(one.tokens) == []
