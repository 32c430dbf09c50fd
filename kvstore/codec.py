"""Payloads: how one chunk's KV lies on disk and in Redis. Never pickle.

    magic 8 | version 2 | header length 4 | header, msgpack | tensor bytes | xxh3-128 of all before, 16

Integers are little-endian. The header says how many tensor bytes follow, so every byte is accounted for; reading
costs time and memory in proportion to the bytes at hand, whatever they claim. An alias (`AliasHeader`) has the
same layout under another magic.
"""

import math
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import xxhash

from ragkv.errors import PayloadError
from ragkv.kvstore.keys import chain_key, marked, tail_key
from ragkv.kvstore.pages import Pages
from ragkv.kvstore.prefix_tree import Chunk, DetachedRoot, origin

Buffer = bytes | bytearray | memoryview

MAGIC = b"\x89RAGKV\r\n"
ALIAS_MAGIC = b"\x89RAGKA\r\n"
VERSION = 1
MOST_HEADER_BYTES = 1 << 20
CHECKSUM_BYTES = 16
HEADER_BYTES, BLOCK_BYTES = 256, 4096  # of a header, about; of a file system
DTYPES = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
}
_PREFIX = struct.Struct("<8sHI")
PREFIX_BYTES = _PREFIX.size
_KEY_BYTES, _TOKEN_BYTES, _MOST_DIMENSIONS, _MOST = 16, 4, 8, 2**31 - 1


@dataclass(frozen=True, slots=True)
class Header:
    """What a payload says of itself. `namespace`, `key` and `parent`: 16 bytes each; `tokens`: little-endian
    int32 bytes, at least one token; `position`: the first token's index in the prompt; `open`: an open tail, its
    end is not a cut; `shape` and `dtype`: of the tensor; `created` and `expires`: seconds since the epoch, 0.0: it
    never does. Of what a plane beside plane 0 has of a chunk `tokens` is the plane's mark (`ragkv.kvstore.keys`),
    and `parent` the chunk's key.

    PayloadError("header"): a field that cannot be.
    """

    namespace: bytes
    key: bytes
    parent: bytes
    tokens: bytes
    position: int
    open: bool
    shape: tuple[int, ...]
    dtype: str
    created: float
    expires: float = 0.0

    def __post_init__(self) -> None:
        for name, good, allowed in _RULES:
            if not good(getattr(self, name)):
                shown = repr(getattr(self, name))
                shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
                raise PayloadError("header", f"payload: {name} = {shown}; allowed: {allowed}")

    @property
    def plane(self) -> int:
        """Whose KV it is; 0: of layers that attend to all tokens."""
        return marked(self.tokens)

    @property
    def token_count(self) -> int:
        """Tokens whose KV of plane 0 it holds."""
        return 0 if self.plane else len(self.tokens) // _TOKEN_BYTES

    @property
    def address(self) -> bytes:
        """Where it must lie."""
        return tail_key(self.parent) if self.open else self.key

    @property
    def raw_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype]


class AliasHeader(Header):
    """Of an alias, which holds no KV but says where some tokens' KV lies: `key` is their content key, `parent`,
    `tokens`, `position` and `expires` are of the chunk that holds it, and the tensor is that chunk's key."""

    __slots__ = ()

    @property
    def token_count(self) -> int:
        """Tokens whose KV it holds: none."""
        return 0


_FIELDS = tuple(Header.__dataclass_fields__)
_KINDS: dict[bytes, type[Header]] = {MAGIC: Header, ALIAS_MAGIC: AliasHeader}


def encode(header: Header, raw: Sequence[Buffer]) -> list[Buffer]:
    """The payload's parts, to be written one after the other; `raw`, the tensor's bytes, is not copied.

    PayloadError("size"): `raw` is not of the header's size. PayloadError("header"): too many tokens.
    """
    size = sum(memoryview(part).nbytes for part in raw)
    if size != header.raw_bytes:
        raise PayloadError("size", f"payload: {size} tensor bytes, the header says {header.raw_bytes}")
    packed = msgpack.packb({name: getattr(header, name) for name in _FIELDS})
    if len(packed) > MOST_HEADER_BYTES:
        raise PayloadError("header", f"payload: a header of {len(packed)} bytes; allowed: {MOST_HEADER_BYTES}")
    magic = ALIAS_MAGIC if isinstance(header, AliasHeader) else MAGIC
    parts: list[Buffer] = [_PREFIX.pack(magic, VERSION, len(packed)) + packed, *raw]
    checksum = xxhash.xxh3_128()
    for part in parts:
        checksum.update(part)
    return [*parts, checksum.digest()]


def decode(value: Buffer) -> tuple[Header, memoryview]:
    """Header and tensor bytes (a view into `value`) of a whole payload or alias. PayloadError: it is neither;
    `reason` is "truncated", "magic", "version", "header", "size" or "checksum"."""
    view = memoryview(value).cast("B")
    start = header_end(view)
    header = _header(view, start)
    end = start + header.raw_bytes
    if len(view) != end + CHECKSUM_BYTES:
        reason = "truncated" if len(view) < end + CHECKSUM_BYTES else "size"
        raise PayloadError(reason, f"payload: {len(view)} bytes, not {end + CHECKSUM_BYTES}")
    if xxhash.xxh3_128_digest(view[:end]) != view[end:]:
        raise PayloadError("checksum", "payload: the checksum does not match")
    return header, view[start:end]


def read_header(first: Buffer) -> tuple[Header, int]:
    """Header of a payload of which `first` holds at least the first `header_end(first)` bytes, and the bytes that
    the whole payload has. The checksum is not looked at. PayloadError as in `decode`."""
    view = memoryview(first).cast("B")
    end = header_end(view)
    header = _header(view, end)
    return header, end + header.raw_bytes + CHECKSUM_BYTES


def header_end(first: Buffer) -> int:
    """Where the header of a payload ends, by its first `PREFIX_BYTES` bytes. PayloadError as in `decode`."""
    start = bytes(first[:PREFIX_BYTES])
    if not any(start[: len(magic)] == magic[: len(start)] for magic in _KINDS):
        raise PayloadError("magic", "payload: not one of ragkv's")
    if len(start) < PREFIX_BYTES:
        raise PayloadError("truncated", f"payload: cut off at byte {len(start)}")
    _, version, length = _PREFIX.unpack(start)
    if version != VERSION:
        raise PayloadError("version", f"payload: version {version}; allowed: {VERSION}")
    if length > MOST_HEADER_BYTES:
        raise PayloadError("header", f"payload: a header of {length} bytes; allowed: {MOST_HEADER_BYTES}")
    return PREFIX_BYTES + int(length)


def address(chunk: Chunk) -> bytes:
    """Where a chunk lies in the lower tiers: under its chain key; an open tail under `tail_key` of its parent, one
    for each parent, the latest, so that an engine that has just started finds it without knowing its tokens; a
    detached chunk where the chunk lies that it is a copy of."""
    if isinstance(chunk.parent, DetachedRoot):
        return chunk.parent.source
    if not chunk.open:
        return chunk.key
    assert chunk.parent is not None
    return tail_key(chunk.parent.key)


class ChunkCodec:
    """Chunks as payloads: what is written, and what is believed when read. `wall`: seconds since the epoch, for
    what outlives the process."""

    def __init__(self, pages: Pages, wall: Callable[[], float] = time.time) -> None:
        self.pages, self.wall = pages, wall

    def size(self, chunk: Chunk) -> int:
        """Bytes that a chunk's payload occupies, about: with its header, in whole blocks of a file system."""
        return -(-(self.pages.size(chunk) + len(chunk.tokens) + HEADER_BYTES) // BLOCK_BYTES) * BLOCK_BYTES

    def writer(self, chunk: Chunk, *, expires: float, copy: bool) -> Callable[[], Sequence[Buffer]]:
        """What makes a chunk's payload, on any thread: of its bytes as they are now if `copy`, else it must be
        called while the chunk is pinned. `expires`: seconds since the epoch, 0.0 for never."""
        assert chunk.parent is not None
        namespace, position = origin(chunk)
        shape = self.pages.shapes[chunk.plane]
        header = Header(
            namespace=namespace,
            key=chunk.key,
            parent=chunk.parent.key,
            tokens=chunk.tokens,
            position=position,
            open=chunk.open,
            shape=shape.of(len(chunk)),
            dtype=shape.dtype,
            created=self.wall(),
            expires=expires,
        )
        if copy:
            raw = self.pages.parts(chunk, copy=True)
            return lambda: encode(header, raw)
        return lambda: encode(header, self.pages.parts(chunk))

    def readers(self, chunks: Sequence[Chunk]) -> list[Callable[[Buffer], Header]]:
        """What checks a payload against all that is known of a reserved chunk, and fills the chunk's pages, for
        each of some chunks of one namespace. What another plane has of a chunk may begin later than was reserved:
        where, its header says. It raises PayloadError."""
        namespace = origin(chunks[0])[0] if chunks else b""
        return [self._reader(chunk, namespace) for chunk in chunks]

    def _reader(self, chunk: Chunk, namespace: bytes) -> Callable[[Buffer], Header]:
        parent, key, position = chunk.parent, address(chunk), chunk.position
        assert parent is not None
        detached = isinstance(parent, DetachedRoot)  # its parent is not known, but follows from its key

        def read(value: Buffer) -> Header:
            header, raw = self._decode(value, namespace)
            follows = chain_key(header.parent, header.tokens) == key if detached else header.parent == parent.key
            starts = position == header.position or (chunk.plane and position < header.position < chunk.end)
            found = (header.key, header.tokens, header.open)
            if not (follows and starts) or found != (key, chunk.tokens, False):
                raise PayloadError("tokens", "payload: it is of other tokens than its key says")
            if chunk.plane and header.position + header.shape[0] != chunk.end:
                raise PayloadError("tokens", "payload: it ends elsewhere than its chunk")
            self.pages.fill(chunk, raw, header.shape[0])
            return header

        return read

    def tail_reader(
        self, namespace: bytes, parent: bytes, position: int
    ) -> Callable[[Buffer], tuple[Header, memoryview]]:
        """What checks a payload that should be the open tail after the chunk of key `parent`, which ends at
        `position`, of tokens yet unknown. It raises PayloadError."""
        expected = parent, position, True

        def read(value: Buffer) -> tuple[Header, memoryview]:
            header, raw = self._decode(value, namespace)
            if (header.parent, header.position, header.open) != expected:
                raise PayloadError("tokens", "payload: it is of another place than its key says")
            if header.key != chain_key(header.parent, header.tokens):
                raise PayloadError("tokens", "payload: its key is not of its tokens")
            return header, raw

        return read

    def _decode(self, value: Buffer, namespace: bytes) -> tuple[Header, memoryview]:
        """Header and bytes of a payload that fits this engine. PayloadError."""
        header, raw = decode(value)
        if isinstance(header, AliasHeader):
            raise PayloadError("magic", "payload: it is an alias")
        shapes = self.pages.shapes
        if header.namespace != namespace:
            raise PayloadError("namespace", "payload: it is of another namespace")
        plane = header.plane
        shape = shapes[plane] if plane < len(shapes) else None
        tokens = header.shape[0] if plane else len(header.tokens) // _TOKEN_BYTES
        if shape is None or (header.shape, header.dtype) != (shape.of(tokens), shape.dtype):
            raise PayloadError("shape", f"payload: {header.shape} {header.dtype} does not fit this engine")
        if header.expires and header.expires <= self.wall():
            raise PayloadError("expired", "payload: its time is over")
        return header, raw


def _header(view: memoryview, end: int) -> Header:
    if len(view) < end:
        raise PayloadError("truncated", f"payload: cut off in the header, at byte {len(view)}")
    try:  # the limits: an array is allocated as long as it claims to be
        fields = msgpack.unpackb(
            view[PREFIX_BYTES:end], max_array_len=_MOST_DIMENSIONS, max_map_len=len(_FIELDS), max_ext_len=0
        )
    except Exception as error:  # msgpack's own advice: it raises all kinds
        raise PayloadError("header", "payload: the header is not msgpack as it must be") from error
    if type(fields) is not dict or tuple(fields) != _FIELDS:  # so none stands twice: there are only so many
        raise PayloadError("header", f"payload: the header's fields must be {', '.join(_FIELDS)}")
    if type(fields["shape"]) is list:
        fields["shape"] = tuple(fields["shape"])
    return _KINDS[bytes(view[: len(MAGIC)])](**fields)


def _is_key(value: Any) -> bool:
    return type(value) is bytes and len(value) == _KEY_BYTES


def _is_tokens(value: Any) -> bool:
    return type(value) is bytes and bool(value) and len(value) % _TOKEN_BYTES == 0


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST


def _is_shape(value: Any) -> bool:
    sizes = type(value) is tuple and 1 <= len(value) <= _MOST_DIMENSIONS
    return sizes and all(type(size) is int and 0 <= size <= _MOST for size in value) and value[0] > 0


def _is_time(value: Any) -> bool:
    return type(value) is float and 0 <= value < math.inf


_RULES = (
    ("namespace", _is_key, f"{_KEY_BYTES} bytes"),
    ("key", _is_key, f"{_KEY_BYTES} bytes"),
    ("parent", _is_key, f"{_KEY_BYTES} bytes"),
    ("tokens", _is_tokens, f"bytes, a positive multiple of {_TOKEN_BYTES}"),
    ("position", _is_count, f"an integer from 0 to {_MOST}"),
    ("open", lambda value: type(value) is bool, "true or false"),
    ("shape", _is_shape, f"1 to {_MOST_DIMENSIONS} integers from 0 to {_MOST}, the first from 1"),
    ("dtype", lambda value: type(value) is str and value in DTYPES, ", ".join(DTYPES)),
    ("created", _is_time, "seconds since the epoch"),
    ("expires", _is_time, "seconds since the epoch, or 0.0"),
)
