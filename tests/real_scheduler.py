"""vLLM's own scheduler and block tables with ragkv's connector, over a model that is only numbers.

What a model of any kind computes is a number that follows from all tokens so far. Each layer of attention keeps
that of each token, a layer with states that of the last one. Before anything is computed the model looks at all
that its layers attend to, where vLLM's tables say: so it sees KV that was loaded wrongly, or not at all. The step
is that of vLLM's model runner: blocks are zeroed and copied, states move on, loads begin after the forward.
"""

import itertools
from collections import deque
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import save_file
from vllm import EngineArgs, SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.model_executor.layers.mamba.checkpoint import compute_mamba_prefill_checkpoints
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash, resolve_kv_cache_block_sizes
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, MambaSpec, SlidingWindowSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from ragkv.connectors.vllm import NAME
from ragkv.connectors.vllm.connector import RagKVConnector

DIM, SIZE = 32, 1024  # elements of a token's K in a layer; bytes of a state
MOST = 1 << 20  # numbers that float32 holds exactly


def numbers(tokens):
    """What the model computes for each token; it follows from all tokens up to it."""
    found, last = [], 7
    for token in tokens:
        last = (last * 31 + token + 1) * 2654435761 % (1 << 32)
        found.append(last % MOST)
    return found


def next_token(values):
    """What the model says to tokens of these numbers."""
    return values[-1] % 1000 + 3


class Backend:
    """Writes K and V as FlashAttention does: [B, H, N, 2D]."""

    def __init__(self, block_tokens):
        self.block_tokens = block_tokens

    def do_kv_cache_update(self, layer, key, value, cache, slots):
        cache[slots // self.block_tokens, :, slots % self.block_tokens, :DIM] = key
        cache[slots // self.block_tokens, :, slots % self.block_tokens, DIM:] = value


class Engine:
    """`specs`: of each group of layers, one layer each. Asked with `run`. `ahead`: with asynchronous scheduling, a
    step is scheduled before it is known what the one before has sampled."""

    def __init__(self, folder, specs, *, blocks=200, step=64, seqs=4, ragkv=None, ahead=False):
        self.specs, self.names = specs, [f"model.layers.{n}.attn" for n in range(len(specs))]
        self.config = vllm_config(folder, step, seqs, max(spec.block_size for spec in specs), ragkv)
        groups = [KVCacheGroupSpec([name], spec) for name, spec in zip(self.names, specs, strict=True)]
        caches = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)
        self.config.cache_config.num_gpu_blocks = blocks
        block, self.hash_block = resolve_kv_cache_block_sizes(caches, self.config)
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(self.hash_block, sha256)
        self.config.scheduler_config.async_scheduling = ahead
        self.scheduler = (AsyncScheduler if ahead else Scheduler)(
            self.config, caches, StructuredOutputManager(self.config), block, hash_block_size=self.hash_block
        )
        layers = {name: SimpleNamespace(impl=Backend(spec.block_size)) for name, spec in self.attention()}
        self.config.compilation_config.static_forward_context.update(layers)
        self.worker = RagKVConnector(self.config, KVConnectorRole.WORKER, caches)
        self.tensors = {}
        for name, spec in zip(self.names, specs, strict=True):
            shape = (blocks, 1, 1, SIZE) if isinstance(spec, MambaSpec) else (blocks, 1, spec.block_size, 2 * DIM)
            kind = torch.int8 if isinstance(spec, MambaSpec) else torch.float32
            self.tensors[name] = torch.zeros(shape, dtype=kind)
        self.worker.register_kv_caches(self.tensors)
        self.scheduler.connector.set_xfer_handshake_metadata_pp_aware(
            {(0, 0): self.worker.get_handshake_metadata()}
        )
        self.tables, self.columns, self.known = {}, {}, {}
        self.texts, self.done = {}, {}  # tokens that the worker knows, and how many of them are computed
        self.outputs, self.ahead = deque(), ahead
        self.names_of_requests, self.cached = map(str, itertools.count()), {}

    def attention(self):
        """Names and specs of the layers that keep KV for each token."""
        return [each for each in zip(self.names, self.specs, strict=True) if not isinstance(each[1], MambaSpec)]

    def add(self, prompt, tokens=4):
        """A request; its name."""
        name = next(self.names_of_requests)
        parameters = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        parameters.update_from_generation_config({}, 2)
        self.known[name] = Request(
            request_id=name,
            prompt_token_ids=list(prompt),
            sampling_params=parameters,
            pooling_params=None,
            block_hasher=self.hasher,
        )
        self.scheduler.add_request(self.known[name])
        return name

    def run(self, *prompts, tokens=4):
        """Answers' tokens, and of each prompt's tokens how many were not computed."""
        added = [self.add(prompt, tokens) for prompt in prompts]
        for _ in range(5000):
            pending = self.scheduler.connector.has_pending_push_work()
            if not (self.scheduler.has_requests() or self.outputs or pending):
                break
            self.step()
        else:
            raise AssertionError("requests never end")
        return [(list(self.known[name].output_token_ids), self.cached[name]) for name in added]

    def evict(self):
        """Empty vLLM's own cache."""
        assert self.scheduler.reset_prefix_cache()

    def close(self):
        self.worker.shutdown()
        self.scheduler.shutdown()

    def step(self):
        """One step of the engine."""
        made = self.scheduler.schedule()
        for block in made.new_block_ids_to_zero or ():
            for tensor in self.tensors.values():
                tensor[block] = 0
        self._take_tables(made)
        for copy in made.kv_cache_block_copies or ():
            self._copy(copy)
        self.worker.handle_preemptions(made.kv_connector_metadata)
        self._move_states(made)
        self.worker.bind_connector_metadata(made.kv_connector_metadata)
        sampled = [self._forward(name, count) for name, count in made.num_scheduled_tokens.items()]
        for name, count in made.num_scheduled_tokens.items():
            self.done[name] += count
        self.worker.start_load_kv(None)
        self.worker.wait_for_save()
        moved = self.worker.get_transfer_results(made.finished_req_ids)
        told = KVConnectorOutput(
            finished_sending=moved.finished_sending,
            finished_recving=moved.finished_recving,
            failed_recving=moved.failed_recving,
            invalid_block_ids=self.worker.get_block_ids_with_load_errors(),
            kv_connector_worker_meta=self.worker.build_connector_worker_meta(),
        )
        self.worker.clear_connector_metadata()
        names = list(made.num_scheduled_tokens)
        output = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: place for place, name in enumerate(names)},
            sampled_token_ids=sampled,
            kv_connector_output=told,
        )
        self.outputs.append((made, output))
        while len(self.outputs) > int(self.ahead and bool(names)):
            self.scheduler.update_from_output(*self.outputs.popleft())

    def _take_tables(self, made):
        for name in made.finished_req_ids:
            self.tables.pop(name, None), self.columns.pop(name, None)
        for new in made.scheduled_new_reqs:
            self.tables[new.req_id] = [list(table) for table in new.block_ids]
            self.texts[new.req_id], self.done[new.req_id] = list(new.prompt_token_ids), new.num_computed_tokens
            self.columns.pop(new.req_id, None)
            self.cached.setdefault(new.req_id, new.num_computed_tokens)
        cached = made.scheduled_cached_reqs
        given = zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True)
        for name, more, done in given:
            self.done[name] = done
            if name in cached.resumed_req_ids:
                self.texts[name] = list(self.known[name].all_token_ids)
                self.tables[name] = [list(table) for table in more]
                self.columns.pop(name, None)
            elif more is not None:
                for table, blocks in zip(self.tables[name], more, strict=True):
                    table.extend(blocks)

    def _copy(self, copy):
        for tensor in self.tensors.values():
            tensor[copy.dst_block_id] = tensor[copy.src_block_id]

    def _move_states(self, made):
        """The state goes on in the block of the step's last token (vLLM: `preprocess_mamba`)."""
        for name, count in made.num_scheduled_tokens.items():
            done = self.done[name]
            for group, spec in enumerate(self.specs):
                if not isinstance(spec, MambaSpec):
                    continue
                columns, table = self.columns.setdefault(name, {}), self.tables[name][group]
                before = columns.get(group, (done - 1) // spec.block_size)
                after = columns[group] = -(-(done + count) // spec.block_size) - 1
                if before not in (-1, after):
                    states = self.tensors[self.names[group]]
                    states[table[after]] = states[table[before]]

    def _forward(self, name, count):
        done, text = self.done[name], self.texts[name]
        after = done + count
        values = numbers(text[:after])
        assert len(values) == after
        for group, (layer, spec) in enumerate(zip(self.names, self.specs, strict=True)):
            table, cache = self.tables[name][group], self.tensors[layer]
            if isinstance(spec, MambaSpec):
                self._state(spec, table, cache, values, done, after)
            else:
                self._attention(spec, table, cache, values, done)
        sampled = [next_token(values)] if after == len(text) else []
        text += sampled
        return sampled

    def _attention(self, spec, table, cache, values, done):
        first = 0
        if isinstance(spec, SlidingWindowSpec):
            first = max(0, done - spec.sliding_window + 1)
        elif getattr(spec, "attention_chunk_size", None):
            first = done // spec.attention_chunk_size * spec.attention_chunk_size
        size = spec.block_size
        slots = [table[place // size] * size + place % size for place in range(len(values))]
        flat, wanted = cache.view(-1, 2 * DIM), torch.tensor(values, dtype=torch.float32)[:, None]
        right = (flat[slots[first:done]] == wanted[first:done]).all()
        assert right, f"wrong KV among {first} to {done}"
        assert min(slots[done:]) >= size, "a token is written into the null block"
        flat[slots[done:]] = wanted[done:].expand(-1, 2 * DIM)

    def _state(self, spec, table, cache, values, done, after):
        block = table[-(-after // spec.block_size) - 1]
        if done:
            assert state_of(cache[block]) == values[done - 1], f"a wrong state behind {done} tokens"
        assert block, "a state is written into the null block"
        cache[block, 0, 0] = state(values[-1])
        if spec.num_prefill_checkpoint_blocks:
            (offset,), (column,) = compute_mamba_prefill_checkpoints(
                [after], [after - done], self.hash_block, spec.block_size, 1, False, self.hash_block
            )
            if column >= 0:
                cache[table[column], 0, 0] = state(values[done + offset - 1])


def state(value):
    """A state's bytes."""
    return torch.from_numpy(np.full(SIZE // 4, value, dtype=np.int32).view(np.int8).copy())


def state_of(block):
    """The number that a state is of; None: it is none."""
    found = set(block.reshape(-1).numpy().view(np.int32).tolist())
    return found.pop() if len(found) == 1 else None


def vllm_config(folder, step, seqs, block, ragkv):
    """Of a model of two kinds of layers; the folder has its configuration, and some file of weights."""
    from transformers import Lfm2Config

    fields = {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "conv_L_cache": 3}
    more = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    Lfm2Config(vocab_size=4096, **fields, **more, architectures=["Lfm2ForCausalLM"]).save_pretrained(folder)
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    config = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=seqs,
        max_num_batched_tokens=step,
        enforce_eager=True,
        enable_prefix_caching=True,
        disable_hybrid_kv_cache_manager=False,
        kv_transfer_config=KVTransferConfig(
            kv_connector=NAME, kv_role="kv_both", kv_connector_extra_config=ragkv or {}
        ),
    ).create_engine_config()
    config.cache_config.block_size = block
    return config
