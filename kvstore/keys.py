"""Names of what is kept: namespaces, chain keys, and tokens as bytes.

All hashes are xxh3-128 over bytes laid out here, so they are equal on every machine and in every process.
xxh3 is fast, not collision-resistant: whoever looks a key up compares the tokens too.
"""

import functools
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
import xxhash

TOKEN_BYTES = 4
MARK_BYTES = 8
FORMAT_VERSION = 1

Tokens = npt.NDArray[np.int32]


def namespace(identity: Mapping[str, Any]) -> bytes:
    """16-byte name of a space in which equal tokens mean equal KV.

    `identity` holds everything that KV depends on beside the tokens (model, weights, dtype, geometry,
    adapter, tenant); values are None, bool, int, float, str, bytes, or lists and string-keyed maps of these.
    The order of keys does not matter. TypeError: a value that has no stable bytes.
    """
    packed = msgpack.packb([FORMAT_VERSION, _sorted(dict(identity))], unicode_errors="surrogatepass")
    return xxhash.xxh3_128_digest(packed)


def chain_key(parent: bytes, tokens: bytes) -> bytes:
    """Key of a chunk behind `parent` (a chain key, or a namespace for the first chunk)."""
    return xxhash.xxh3_128_digest(parent + tokens)


def chain_keys(parent: bytes, tokens: bytes, cuts: Sequence[int]) -> list[bytes]:
    """Keys of chunks behind one another, the first behind `parent`; each holds the tokens from one of the
    ascending positions `cuts` to the next."""
    keys: list[bytes] = []
    for start, end in pairwise(cuts):
        parent = chain_key(parent, tokens[TOKEN_BYTES * start : TOKEN_BYTES * end])
        keys.append(parent)
    return keys


def tail_key(parent: bytes) -> bytes:
    """Where the open tail behind a chunk (or a namespace) lies in the lower tiers, given that chunk's key."""
    return tail_keys([parent])[0]


def tail_keys(parents: Sequence[bytes]) -> list[bytes]:
    """As `tail_key`, of each of `parents`."""
    return [xxhash.xxh3_128_digest(b"tail" + parent) for parent in parents]


def window_key(chunk: bytes, plane: int) -> bytes:
    """Key of what a plane beside plane 0 has of a chunk, given the chunk's."""
    return chain_key(chunk, mark(plane))


@functools.cache
def mark(plane: int) -> bytes:
    """What stands for the tokens of what a plane beside plane 0 has of a chunk: none that a prompt could have."""
    return np.array([-1, plane], dtype="<i4").tobytes()


def marked(tokens: bytes) -> int:
    """The plane whose mark `tokens` is; 0: they are tokens."""
    if len(tokens) != MARK_BYTES:
        return 0
    first, plane = np.frombuffer(tokens, dtype="<i4").tolist()
    return plane if first == -1 and plane > 0 else 0


def content_key(namespace: bytes, tokens: bytes) -> bytes:
    """Key of tokens wherever they stand."""
    return xxhash.xxh3_128_digest(b"content" + namespace + tokens)


def as_tokens(ids: Sequence[int]) -> Tokens:
    """Token ids as a little-endian int32 array of shape [len(ids)]."""
    return np.fromiter(ids, dtype="<i4", count=len(ids))


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"namespace: keys must be strings, got {list(value)}")
        return {key: _sorted(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [_sorted(each) for each in value]
    return value
