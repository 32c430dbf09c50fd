"""Step 1 of `ragkv bench gpu`: pinning, layouts, the order and the speed of copies. Needs torch, and no vLLM."""

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from ragkv.benchmarks.gpu_judge import Check, judge_bandwidth, judge_copies
from ragkv.connectors.vllm.layout import Geometry, probe
from ragkv.connectors.vllm.pinning import Pinning, Runtime, find_runtime, pin
from ragkv.connectors.vllm.streams import Streams
from ragkv.connectors.vllm.transfer import StagedMover, Tier, job_slices
from ragkv.errors import LayoutError, SegmentError
from ragkv.kvstore.segment import Segment

GIB = 1 << 30
ELEMENTS = {1: torch.uint8, 2: torch.bfloat16}  # vLLM's fp8 caches are of bytes
TRIES = 3  # of a speed, of which the best counts


@dataclass(frozen=True)
class Sizes:
    """`tokens`: of a round, whole pages; `staging`: bytes, both halves."""

    layers: int = 8
    heads: int = 8
    head_dim: int = 128
    block_tokens: int = 16
    page_tokens: int = 32
    tokens: int = 256
    rounds: int = 40
    staging: int = 64 << 20

    @property
    def geometry(self) -> Geometry:
        """Of a cache of 2 bytes an element."""
        return Geometry(self.layers, self.heads, self.head_dim, 2, self.block_tokens)


ROUNDS, SPEED = Sizes(), Sizes(layers=32, tokens=16384, rounds=1)


class Interleaved:
    """FlashAttention's cache in vLLM 0.32: a block is [heads, tokens, 2 * head_dim]."""

    name = "[blocks, heads, tokens, 2 * head_dim]"

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Of a block."""
        return sizes.heads, sizes.block_tokens, 2 * sizes.head_dim

    def do_kv_cache_update(self, layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
        """As an attention layer writes K and V."""
        tokens, half = cache.shape[2], cache.shape[3] // 2
        cache[slots // tokens, :, slots % tokens, :half] = _cast(key, cache)
        cache[slots // tokens, :, slots % tokens, half:] = _cast(value, cache)


class Apart(Interleaved):
    """FlashAttention's in 0.25: a block is [2, tokens, heads, head_dim]."""

    name = "[blocks, 2, tokens, heads, head_dim]"

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Of a block."""
        return 2, sizes.block_tokens, sizes.heads, sizes.head_dim

    def do_kv_cache_update(self, layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
        """As an attention layer writes K and V."""
        tokens = cache.shape[2]
        cache[slots // tokens, 0, slots % tokens] = _cast(key, cache)
        cache[slots // tokens, 1, slots % tokens] = _cast(value, cache)


def _cast(values: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    return values.to(torch.float8_e4m3fn).view(torch.uint8) if cache.dtype is torch.uint8 else values


def probed(
    backend: Interleaved, sizes: Sizes, blocks: int, itemsize: int, device: torch.device
) -> tuple[Any, Any]:
    """A cache of all layers in one storage, [blocks, layers, ...], zeroed, and its layers as they were found."""
    shape = (blocks, sizes.layers, *backend.shape(sizes))
    whole = torch.zeros(shape, dtype=ELEMENTS[itemsize], device=device)
    layers = {f"layer.{number}": SimpleNamespace(impl=backend) for number in range(sizes.layers)}
    caches = {name: whole[:, number] for number, name in enumerate(layers)}
    geometry = Geometry(sizes.layers, sizes.heads, sizes.head_dim, itemsize, sizes.block_tokens)
    return whole, probe(layers, caches, geometry, blocks, torch.bfloat16)


class World:
    """A cache, a tier in host memory, and a mover between them. Round n stores noise + n from its `source` blocks,
    spoils these, and loads what was stored into blocks of its own; `busy`: keeps the compute stream so."""

    def __init__(
        self,
        sizes: Sizes,
        device: torch.device,
        streams: Streams,
        host: Callable[[int], torch.Tensor],
        busy: Callable[[], None],
    ) -> None:
        """`host(bytes)`: host memory, uint8."""
        self.sizes, self.device, self.streams, self._busy = sizes, device, streams, busy
        self._blocks = sizes.tokens // sizes.block_tokens  # of a round
        whole, found = probed(Interleaved(), sizes, self._blocks * (sizes.rounds + 1), 2, device)
        self.cache = whole.view(torch.int16)
        chance = torch.Generator().manual_seed(7)
        shape = (self._blocks, *whole.shape[1:])
        self.noise = torch.randint(-30_000, 30_000, shape, dtype=torch.int16, generator=chance).to(device)
        self.bytes = sizes.tokens * sizes.geometry.token_bytes  # of a round
        self.elements = host(sizes.rounds * self.bytes).view(torch.int16)
        tier = Tier(self.elements, sizes.geometry, sizes.page_tokens, 1, 0)
        self.mover = StagedMover(found, tier, sizes.staging, device, streams)
        pages = torch.randperm(tier.tokens // sizes.page_tokens, generator=chance) * sizes.page_tokens
        self._rows = (pages[:, None] + torch.arange(sizes.page_tokens)).flatten()

    def slots(self, number: int) -> torch.Tensor:
        """Of round `number`'s own blocks; -1: of those that all rounds store from."""
        return torch.arange(self.sizes.tokens) + (number + 1) * self.sizes.tokens

    def rows(self, number: int) -> torch.Tensor:
        """Of round `number`'s pages."""
        return self._rows[number * self.sizes.tokens : (number + 1) * self.sizes.tokens]

    def run(self) -> int:
        """All rounds, without a wait of the host; how many elements are wrong in the end."""
        for number in range(self.sizes.rounds):
            self.streams.compute.submit(functools.partial(self._fill, number))
            self.move("store", self.rows(number), self.slots(-1))
            self.mover.fence_stores()
            self.streams.compute.submit(self._spoil)
            self.move("load", self.rows(number), self.slots(number))
        self.mover.close()
        own = self.cache[self._blocks :].view(self.sizes.rounds, *self.noise.shape)
        return sum(int((own[number] != self.noise + number).sum()) for number in range(self.sizes.rounds))

    def move(self, kind: str, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """In pieces, as the worker does."""
        for part in job_slices(rows.numpy(), self.sizes.page_tokens, self.mover.most_tokens):
            getattr(self.mover, kind)(rows[part], slots[part])

    def _fill(self, number: int) -> None:
        self._busy()
        self.cache[: self._blocks] = self.noise + number

    def _spoil(self) -> None:
        self.cache[: self._blocks] = -1


def check_pinning(
    elements: torch.Tensor, runtime: Runtime | None, kernel: Callable[[], Any]
) -> tuple[Check, Pinning]:
    """Pin, pin again, be refused, and run a kernel after each: it would raise an error that was left behind."""
    size = elements.numel() * elements.element_size()
    first = second = Pinning(None)
    try:
        first = pin(elements, size, runtime)
        kernel()
        second = pin(elements, size, runtime)
        kernel()
        refused = Pinning(runtime)
        refused.add(elements.data_ptr(), 0)
        kernel()
    except Exception as error:  # whatever a kernel raises is the finding
        return Check(1, "pinning", False, f"a kernel fails after pinning: {error}", True), first
    said = f"{size / GIB:.2g} GiB of host memory {'' if first.ok else 'not '}pinned"
    again = "a second time too" if second.ok else "a second time fails"
    taken = "a refusal leaves no error" if not refused.ok else "an empty piece was not refused"
    ok = first.ok and second.ok and not refused.ok
    return Check(1, "pinning", ok, f"{said}, {again}, {taken}", False, {"bytes": size}), first


def check_layouts(device: torch.device, sizes: Sizes = ROUNDS) -> Check:
    """Known layouts must be found, and proven, on this device."""
    for backend in (Interleaved(), Apart()):
        for itemsize in ELEMENTS:
            try:
                probed(backend, sizes, 4, itemsize, device)
            except LayoutError as error:
                return Check(1, "layouts", False, f"{backend.name}, {8 * itemsize} bits: {error}", True)
    return Check(1, "layouts", True, f"{2 * len(ELEMENTS)} layouts found and proven", True)


def check_speed(world: World) -> Iterator[Check]:
    """Loads and stores of whole pages against plain copies of as many bytes."""
    half = torch.empty(world.sizes.staging // 4, dtype=torch.int16, device=world.device)
    host = world.elements[: len(world.elements) // len(half) * len(half)].view(-1, len(half))
    rows, slots = world.rows(0), world.slots(0)
    for kind in ("load", "store"):

        def plain(kind: str = kind) -> None:
            for part in host:
                target, source = (half, part) if kind == "load" else (part, half)
                target.copy_(source, non_blocking=True)

        def ours(kind: str = kind) -> None:
            world.move(kind, rows, slots)

        stream = world.streams.load if kind == "load" else world.streams.store
        raw = len(host.flatten()) * 2 / _best(world.streams, functools.partial(stream.submit, plain))
        yield judge_bandwidth(kind, raw, world.bytes / _best(world.streams, ours))


def _best(streams: Streams, work: Callable[[], None]) -> float:
    """Seconds of the fastest try."""
    seconds = []
    for _ in range(TRIES):
        for stream in (streams.compute, streams.load, streams.store):
            stream.synchronize()
        started = time.perf_counter()
        work()
        for stream in (streams.load, streams.store):
            stream.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def host_memory(size: int) -> tuple[torch.Tensor, Segment | None]:
    """Shared memory, as the memory tier's is, or where there is too little, memory of this process."""
    try:
        segment = Segment(f"bench-gpu-{size}", size, populate=True)
    except SegmentError:
        return torch.zeros(size, dtype=torch.uint8), None
    return torch.frombuffer(segment.buffer, dtype=torch.uint8), segment


def check_copies(
    device: torch.device,
    streams: Streams,
    size: int = 8 * GIB,
    rounds: Sizes = ROUNDS,
    speed: Sizes = SPEED,
    runtime: Runtime | None = None,
) -> Iterator[Check]:
    """Step 1, check by check."""
    memory, segment = host_memory(size)
    square = torch.ones(4096, 4096, device=device) if device.type == "cuda" else torch.ones(8, 8)
    pinned: Pinning | None = None
    try:
        check, pinned = check_pinning(memory, runtime or find_runtime(), lambda: (square[:8, :8] + 1).cpu())
        yield check
        yield check_layouts(device, rounds)

        def host(wanted: int) -> torch.Tensor:
            return memory[:wanted]

        def busy() -> None:
            for _ in range(4):
                torch.mm(square, square)

        yield judge_copies(World(rounds, device, streams, host, busy).run(), rounds.rounds)
        world = World(speed, device, streams, host, busy)
        yield from check_speed(world)
        world.mover.close()
    finally:
        if pinned is not None:
            pinned.release()
        if segment is not None:
            segment.close()
