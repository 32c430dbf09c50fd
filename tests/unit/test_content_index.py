"""Contents: an index from tokens to chunks, in step with the catalogue."""

import numpy as np
import pytest

from ragkv.kvstore.prefix_tree import Chunk, ContentIndex, DetachedRoot

SPACE, OTHER = b"space" * 3 + b"1", b"other" * 3 + b"1"


def chunk(name, tokens, root=None):
    return Chunk(
        name, Chunk(SPACE, None, b"") if root is None else root, np.array(tokens, dtype=np.int32).tobytes()
    )


def test_holders_are_found_by_tokens_alone_and_go_one_by_one():
    contents, one, two, other = ContentIndex(), chunk(b"1", [1, 2]), chunk(b"2", [1, 2]), chunk(b"3", [1, 3])
    for each in (one, two, other):
        contents.add(each)
    assert contents.holders(SPACE, one.tokens, 9) == [one, two]
    assert contents.holders(SPACE, other.tokens, 9) == [other]
    assert contents.holders(SPACE, b"", 9) == []
    contents.check_integrity([one, two, other])
    contents.remove(one)
    contents.remove(one)
    assert contents.holders(SPACE, one.tokens, 9) == [two]
    contents.remove(two)
    assert contents.holders(SPACE, two.tokens, 9) == []
    contents.remove(two)
    contents.check_integrity([other])
    contents.clear()
    contents.check_integrity([])


def test_tokens_and_namespaces_are_compared_not_only_hashed(monkeypatch):
    monkeypatch.setattr("ragkv.kvstore.prefix_tree.xxhash.xxh3_64_intdigest", lambda tokens, seed: 7)
    contents, one, two = ContentIndex(), chunk(b"1", [1, 2]), chunk(b"2", [1, 3])
    contents.add(one)
    contents.add(two)
    assert contents.holders(SPACE, one.tokens, 9) == [one]
    assert contents.holders(SPACE, two.tokens, 9) == [two]
    assert contents.holders(OTHER, two.tokens, 9) == []
    contents.remove(one)
    assert contents.holders(SPACE, one.tokens, 9) == []


def test_others_of_another_namespace_are_not_in_the_way():
    """One tenant holds what another asks for a thousand times: that is not looked at."""
    contents, root = ContentIndex(), Chunk(OTHER, None, b"")
    for number in range(1000):
        contents.add(chunk(number.to_bytes(2, "little"), [1, 2], root))
    ours, loose = chunk(b"1", [1, 2]), chunk(b"2", [1, 2], DetachedRoot(SPACE, b"h", 7))
    contents.add(ours)
    contents.add(loose)
    assert contents.holders(SPACE, ours.tokens, 2) == [ours, loose]


@pytest.mark.parametrize("most", [1, 2, 5, 8])
def test_of_very_many_holders_the_first_and_the_last_are_given(most):
    contents, many = ContentIndex(), [chunk(bytes([number]), [1, 2]) for number in range(100)]
    for each in many:
        contents.add(each)
    given = contents.holders(SPACE, many[0].tokens, most)
    assert given == many[: most // 2] + many[len(many) - (most - most // 2) :]
