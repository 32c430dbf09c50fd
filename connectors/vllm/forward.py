"""Some tokens of one request through the engine's own forward, in whatever order and pieces.

Every contiguous run of tokens is a virtual sequence: the request's block table, the run's end as its length, the
run as its query. The backend writes each layer's K and V of all of them before it attends, causally, over what the
request's blocks hold. So tokens already there are attended to as they are, and no model or backend has to know.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ragkv.connectors.vllm.messages import Indices, Run, TokenIds, positions_of, slots_of
from ragkv.connectors.vllm.streams import Event, Packed, compute_stream

MOST_TOKENS = 2048  # of one forward: vLLM's memory profiling did not see it, so its activations must be small
ATTENTION_INPUTS = ("query", "key", "value")


class EngineForward:
    """`layers`: attention layers by name, of one group; `kernel_tokens`: tokens a block as the backend sees it,
    `block_tokens`: as vLLM's scheduler does. Raises whatever the backend raises where it cannot be used so."""

    def __init__(
        self,
        vllm_config: Any,
        kv_cache_spec: Any,
        layers: dict[str, Any],
        model: torch.nn.Module,
        block_tokens: int,
        kernel_tokens: int,
        device: torch.device,
    ) -> None:
        self._config, self._layers, self._model = vllm_config, list(layers), model
        self._block_tokens, self._split = block_tokens, block_tokens // kernel_tokens
        self._device = device
        spec = kv_cache_spec if self._split == 1 else dataclasses.replace(kv_cache_spec, block_size=kernel_tokens)
        backend = next(iter(layers.values())).get_attn_backend()
        self._builder = backend.get_builder_cls()(spec, self._layers, vllm_config, device)
        scheduler = vllm_config.scheduler_config
        self._most_runs = scheduler.max_num_seqs
        self._most_tokens = min(scheduler.max_num_batched_tokens, MOST_TOKENS)
        self._compute = compute_stream(device)
        self._last: Event | None = None  # after the last forward

    def compute(self, tokens: TokenIds, positions: Indices, blocks: Indices) -> None:
        """Compute K and V of the tokens at `positions` (ascending) and put them into the request's `blocks`.

        `tokens`: int32, of the prompt from its beginning. All tokens before each position must be in the blocks,
        or among the `positions`.
        """
        for runs in self.batches(positions):
            self.forward(tokens, runs, blocks)

    def batches(self, positions: Indices) -> Iterator[list[Run]]:
        """The runs of ascending positions, in batches that the engine can take."""
        return batches(contiguous(positions), self._most_runs, self._most_tokens)

    def forward(self, tokens: TokenIds, runs: list[Run], blocks: Indices) -> None:
        """As `compute`, of one batch. The host waits for the forward before it, and for nothing else of ours."""
        runs = sorted(runs, key=lambda run: run[1] - run[0])  # backends that tell decodes apart want them first
        positions = positions_of(runs)
        lengths = np.array([end - start for start, end in runs], dtype=np.int32)
        ends = np.array([end for _, end in runs], dtype=np.int32)
        begins = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        used = blocks[: -(-int(ends.max()) // self._block_tokens)]
        table = (used[:, None] * self._split + np.arange(self._split)).reshape(1, -1).astype(np.int32)
        slots = slots_of(blocks, positions, self._block_tokens)
        ids = tokens[positions].astype(np.int32)
        if self._last is not None:
            self._last.synchronize()  # builders write into host buffers that the last forward's copies may read
        packed = Packed([slots, positions, ids, begins, ends, np.repeat(table, len(runs), axis=0)], self._device)
        sent = Sent(*packed.on_device())
        metadata = self._builder.build(0, self._common(lengths, begins, ends, sent))
        slot_mapping = dict.fromkeys(self._layers, sent.slots)
        try:
            with self._context(dict.fromkeys(self._layers, metadata), slot_mapping, len(ids)):
                self._model(input_ids=sent.ids, positions=sent.positions)
        finally:  # a watch may have ended it
            self._last = self._compute.record()

    def _common(
        self,
        lengths: np.ndarray[Any, Any],
        begins: np.ndarray[Any, Any],
        ends: np.ndarray[Any, Any],
        sent: "Sent",
    ) -> Any:
        from vllm.v1.attention.backend import CommonAttentionMetadata

        ends_cpu = torch.from_numpy(ends)
        given = {
            "query_start_loc": sent.begins,
            "query_start_loc_cpu": torch.from_numpy(begins),
            "seq_lens": sent.ends,
            "seq_lens_cpu_upper_bound": ends_cpu,
            "_seq_lens_cpu": ends_cpu,
            "_num_computed_tokens_cpu": torch.from_numpy(ends - lengths),
            "num_reqs": len(lengths),
            "num_actual_tokens": int(lengths.sum()),
            "max_query_len": int(lengths.max()),
            "max_seq_len": int(ends.max()),
            "block_table_tensor": sent.table,
            "slot_mapping": sent.slots,
            "causal": True,
            "positions": sent.positions,
            "is_prefilling": torch.ones(len(lengths), dtype=torch.bool),
        }
        known = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
        return CommonAttentionMetadata(**{name: value for name, value in given.items() if name in known})

    @contextlib.contextmanager
    def _context(self, metadata: Any, slots: Any, tokens: int) -> Iterator[None]:
        from vllm.forward_context import set_forward_context

        given = {"num_tokens": tokens, "slot_mapping": slots, "skip_compiled": True}
        known = inspect.signature(set_forward_context).parameters
        with set_forward_context(metadata, self._config, **{k: v for k, v in given.items() if k in known}):
            yield


class Sent(NamedTuple):
    """What a forward reads, on the device."""

    slots: torch.Tensor
    positions: torch.Tensor
    ids: torch.Tensor
    begins: torch.Tensor
    ends: torch.Tensor
    table: torch.Tensor


class _Enough(Exception):
    """Ends a forward of which no more is wanted."""


@contextlib.contextmanager
def watch(layers: Sequence[Any], seen: Callable[[int, Any], None], *, stop: bool) -> Iterator[None]:
    """While it holds, call `seen(i, (query, key, value))` before the attention of `layers[i]`; `stop`: end the
    forward before the last of them (one forward a `watch` then)."""

    def hook_of(number: int) -> Any:
        def hook(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = dict(zip(ATTENTION_INPUTS, inputs, strict=False)) | named
            seen(number, tuple(given.get(name) for name in ATTENTION_INPUTS))
            if stop and number == len(layers) - 1:
                raise _Enough

        return hook

    handles = [
        layer.register_forward_pre_hook(hook_of(number), with_kwargs=True) for number, layer in enumerate(layers)
    ]
    try:
        yield
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()


def contiguous(positions: Indices) -> list[Run]:
    """The contiguous runs of ascending positions."""
    if not len(positions):
        return []
    edges = np.flatnonzero(np.diff(positions) != 1) + 1
    starts = positions[np.concatenate([[0], edges])]
    ends = positions[np.concatenate([edges - 1, [len(positions) - 1]])] + 1
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def batches(runs: list[Run], most_runs: int, most_tokens: int) -> Iterator[list[Run]]:
    """Ascending runs in batches of at most so many runs and tokens; long runs are cut. In this order it is the
    same as all at once: no token attends to later ones."""
    batch: list[Run] = []
    room = most_tokens
    for start, end in runs:
        while start < end:
            if len(batch) == most_runs or not room:
                yield batch
                batch, room = [], most_tokens
            upto = min(end, start + room)
            batch.append((start, upto))
            room -= upto - start
            start = upto
    if batch:
        yield batch
