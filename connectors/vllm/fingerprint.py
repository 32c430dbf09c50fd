"""A fingerprint of a model's weights as they lie in a worker's memory: exact, and cheap enough to be taken again.

Integer arithmetic on the tensors' own device. A word at place i of a tensor goes through a mixing that is one to
one and depends on i, and the results are added up modulo 2**64, in two lanes: a change of one word, one bit of it,
always changes both sums; other changes escape with a chance of about 2**-64 or less. It is no defence against who
means to deceive. Names, shapes and dtypes go in by a cryptographic hash, as do the sums.
"""

import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import torch

from ragkv.errors import RagKVError

WORD = 8
CHUNK = 1 << 15  # words: 256 KiB, so that what a chunk needs stays in a core's cache
BATCH = {"cpu": 1}  # chunks at once, by kind of device; a launch costs more than the work elsewhere
ELSEWHERE = 128
REMOVED = "_ragkv_removed"  # a module's: the fingerprint of a weight that was taken out of it
PACKED = "weight"
WRAPPED = ".base_layer."  # in names, where vLLM may run adapters
LOW = 0xFFFFFFFF
ODD = (0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))

Sums = tuple[torch.Tensor, torch.Tensor]


def fingerprint_model(model: Any) -> bytes:
    """16 bytes over every parameter and buffer: name, shape, dtype and bytes. Equal for equal content, whatever
    its strides, order and sharing, and on whatever device. Takes up to 200 MiB of a device's memory, 2 MiB of a
    CPU's. RagKVError: weights were taken out of the model where `watch_packing` did not see it."""
    tensors = {name: tensor.detach() for name, tensor in _tensors(model)}
    digest = hashlib.blake2b(fingerprint_tensors(tensors), digest_size=16)
    for name, module in sorted(model.named_modules(remove_duplicate=False), key=lambda each: each[0]):
        weight, removed = module._parameters.get(PACKED), getattr(module, REMOVED, None)
        if weight is None or weight.numel():
            continue
        if removed is None:
            raise RagKVError(f"the weight of {name} was packed away, and cannot be looked at")
        digest.update(repr((f"{name}.".replace(WRAPPED, "."), removed)).encode())
    return digest.digest()


def watch_packing() -> None:
    """From now on note the fingerprint of weights that vLLM's CPU build puts into another form, out of the model's
    parameters. Safe to call twice; before a model is loaded."""
    from vllm.model_executor.layers import utils

    pack = getattr(utils, "dispatch_cpu_unquantized_gemm", None)
    if pack is None or getattr(pack, REMOVED, False):
        return

    @functools.wraps(pack)
    def noted(layer: Any, remove_weight: bool) -> Any:
        weight = layer.weight
        digest = None if weight.is_meta else fingerprint_tensors({PACKED: weight.detach()})
        packed = pack(layer, remove_weight)
        if weight.numel() and not layer.weight.numel():
            setattr(layer, REMOVED, digest)
        return packed

    setattr(noted, REMOVED, True)
    utils.dispatch_cpu_unquantized_gemm = noted


@torch.no_grad()
def fingerprint_tensors(tensors: dict[str, torch.Tensor]) -> bytes:
    """As `fingerprint_model`, over tensors by name."""
    known: dict[tuple[Any, ...], Sums] = {}
    sums: list[Sums] = []
    for tensor in tensors.values():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if place not in known or not tensor.numel():
            known[place] = _sums(tensor)
        sums.append(known[place])
    values = _on_host(sums)
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(zip(tensors, values, strict=True)):
        tensor = tensors[name]
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype), value)).encode())
    return digest.digest()


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        yield name.replace(WRAPPED, "."), tensor


def _on_host(sums: list[Sums]) -> list[tuple[int, int]]:
    """The values of sums, fetched once a device."""
    found: list[tuple[int, int]] = [(0, 0)] * len(sums)
    for device in {first.device for first, _ in sums}:
        places = [place for place, each in enumerate(sums) if each[0].device == device]
        values = torch.stack([torch.stack(sums[place]) for place in places]).tolist()
        for place, (first, second) in zip(places, values, strict=True):
            found[place] = first, second
    return found


def _sums(tensor: torch.Tensor) -> Sums:
    """Both lanes of one tensor."""
    device = tensor.device
    first, second = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
    at = 0
    for words in _words(tensor, BATCH.get(device.type, ELSEWHERE) * CHUNK):
        whole = len(words) // CHUNK * CHUNK
        for part in (words[:whole].view(-1, CHUNK), words[whole:].view(1, -1)):
            if part.numel():
                one, two = _mix(part, at)
                first += one
                second += two
                at += len(part)
    return first, second


def _mix(words: torch.Tensor, at: int) -> Sums:
    """Sums over chunks of words, int64 [chunks, at most CHUNK], the first of which is chunk `at` of its tensor."""
    before, factors = _places(words.device)
    length = words.shape[1]
    chunk = torch.arange(at + 1, at + 1 + len(words), device=words.device)[:, None]
    value = torch.bitwise_xor(words, before[:length])
    value *= (chunk * ODD[0]) | 1
    spare = _fold(value, None)
    value *= factors[:length]
    _fold(value, spare)
    value *= ODD[1]
    value += chunk
    first = value.sum()
    _fold(value, spare)
    value *= ODD[2]
    value ^= before[:length]
    _fold(value, spare)
    value *= factors[:length]
    return first, value.sum()


def _fold(value: torch.Tensor, spare: torch.Tensor | None) -> torch.Tensor:
    """Mix the upper half of every word into its lower half, in place. One to one."""
    spare = (
        torch.bitwise_right_shift(value, 32) if spare is None else torch.bitwise_right_shift(value, 32, out=spare)
    )
    spare &= LOW
    value ^= spare
    return spare


@functools.lru_cache(maxsize=16)
def _places(device: torch.device) -> Sums:
    """Words for every place in a chunk: any, and odd ones."""
    pick = torch.Generator().manual_seed(20240613)
    low, high = -(1 << 63), (1 << 63) - 1
    before, factors = (torch.randint(low, high, (CHUNK,), generator=pick, dtype=torch.int64) for _ in range(2))
    return before.to(device), (factors | 1).to(device)


def _words(tensor: torch.Tensor, limit: int) -> Iterator[torch.Tensor]:
    """All bytes of a tensor in its logical order, as int64, `limit` words at once; zeros fill the last word."""
    room = limit * WORD
    if tensor.is_contiguous():
        flat = tensor.reshape(-1).view(torch.uint8)
        for start in range(0, len(flat), room):
            yield _as_words(flat[start : start + room])
        return
    held = torch.empty(room, dtype=torch.uint8, device=tensor.device)
    used = 0
    for piece in _pieces(tensor, max(1, room // tensor.element_size())):
        flat = piece.contiguous().reshape(-1).view(torch.uint8)
        while len(flat):
            count = min(len(flat), room - used)
            held[used : used + count] = flat[:count]
            flat, used = flat[count:], used + count
            if used == room:
                yield _as_words(held)
                used = 0
    if used:
        yield _as_words(held[:used])


def _pieces(tensor: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
    """Parts of a tensor in its logical order, none with more than `most` elements."""
    if tensor.numel() <= most:
        yield tensor
        return
    rows = max(1, most * len(tensor) // tensor.numel())
    for start in range(0, len(tensor), rows):
        part = tensor[start : start + rows]
        yield from _pieces(part if part.numel() <= most else part[0], most)


def _as_words(flat: torch.Tensor) -> torch.Tensor:
    """Bytes as int64; copied where they do not begin at a word of memory, or do not fill the last."""
    if len(flat) % WORD or flat.storage_offset() % WORD or flat.data_ptr() % WORD:
        padded = torch.zeros(-(-len(flat) // WORD) * WORD, dtype=torch.uint8, device=flat.device)
        padded[: len(flat)] = flat
        flat = padded
    return flat.view(torch.int64)
