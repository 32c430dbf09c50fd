"""Some tokens of one request through the engine's own forward, in whatever order and pieces.

Every contiguous run of tokens is a virtual sequence: the request's block table, the run's end as its length, the
run as its query. The backend writes each layer's K and V of all of them before it attends, causally, over what the
request's blocks hold. So tokens already there are attended to as they are, and no model or backend has to know.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ragkv.connectors.vllm.protocol import Indices, Run, TokenIds, positions_of, slots_of

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
        self._most_runs, self._most_tokens = scheduler.max_num_seqs, scheduler.max_num_batched_tokens

    def compute(self, tokens: TokenIds, positions: Indices, blocks: Indices) -> None:
        """Compute K and V of the tokens at `positions` (ascending) and put them into the request's `blocks`.

        `tokens`: int32, of the prompt from its beginning. All tokens before each position must be in the blocks,
        or among the `positions`.
        """
        for runs in self.batches(positions):
            self.forward(tokens, runs, blocks)

    def batches(self, positions: Indices) -> Iterator[list[Run]]:
        """The runs of ascending positions, in batches that the engine can take."""
        return batches(runs_of(positions), self._most_runs, self._most_tokens)

    def forward(self, tokens: TokenIds, runs: list[Run], blocks: Indices) -> None:
        """As `compute`, of one batch."""
        runs = sorted(runs, key=lambda run: run[1] - run[0])  # backends that tell decodes apart want them first
        positions = positions_of(runs)
        slots = self._on_device(slots_of(blocks, positions, self._block_tokens))
        common = self._common(runs, positions, slots, blocks)
        metadata = self._builder.build(0, common)
        ids = self._on_device(tokens[positions].astype(np.int32))
        with self._context(dict.fromkeys(self._layers, metadata), dict.fromkeys(self._layers, slots), len(ids)):
            self._model(input_ids=ids, positions=self._on_device(positions))

    def _common(self, runs: list[Run], positions: Indices, slots: torch.Tensor, blocks: Indices) -> Any:
        from vllm.v1.attention.backend import CommonAttentionMetadata

        lengths = np.array([end - start for start, end in runs], dtype=np.int32)
        begins = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        ends = torch.tensor([end for _, end in runs], dtype=torch.int32)
        longest = int(ends.max())
        used = blocks[: -(-longest // self._block_tokens)]
        table = (used[:, None] * self._split + np.arange(self._split)).reshape(1, -1).astype(np.int32)
        given = {
            "query_start_loc": begins.to(self._device),
            "query_start_loc_cpu": begins,
            "seq_lens": ends.to(self._device),
            "seq_lens_cpu_upper_bound": ends,
            "_seq_lens_cpu": ends,
            "_num_computed_tokens_cpu": ends - torch.from_numpy(lengths),
            "num_reqs": len(runs),
            "num_actual_tokens": len(positions),
            "max_query_len": int(lengths.max()),
            "max_seq_len": longest,
            "block_table_tensor": self._on_device(np.repeat(table, len(runs), axis=0)),
            "slot_mapping": slots,
            "causal": True,
            "positions": self._on_device(positions),
            "is_prefilling": torch.ones(len(runs), dtype=torch.bool),
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

    def _on_device(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device)


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


def runs_of(positions: Indices) -> list[Run]:
    """The contiguous runs of ascending positions."""
    if not len(positions):
        return []
    edges = np.flatnonzero(np.diff(positions) != 1) + 1
    starts = positions[np.concatenate([[0], edges])]
    ends = positions[np.concatenate([edges - 1, [len(positions) - 1]])] + 1
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def batches(runs: list[Run], most_runs: int, most_tokens: int) -> Iterator[list[Run]]:
    """Ascending runs in batches of at most so many runs and tokens; long runs are cut. In this order it is the
    same as all at once: nothing attends to what comes behind it."""
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
