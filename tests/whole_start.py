"""A start of vLLM with one worker, as far as connectors see it, without an engine."""

import contextlib
import gc
import os
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
from vllm.config import KVTransferConfig
from vllm.distributed import parallel_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from engine_config import caches, config, spec
from ragkv.connectors.vllm import NAME, lifecycle
from ragkv.connectors.vllm.connector import RagKVConnector
from ragkv.connectors.vllm.messages import StepOrders
from ragkv.kvstore import segment

HEADS, DIM, LAYERS, BLOCKS, TOKENS = 3, 6, 3, 5, 4
ASIDE = "this engine runs without KV reuse: "


@contextlib.contextmanager
def alone(monkeypatch):
    """Without variables of ragkv's, without ranks; and what a start leaves is cleared away."""
    for name in list(os.environ):
        if name.startswith("RAGKV_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda: 0)
    before = [lifecycle.signal.getsignal(number) for number in lifecycle.SIGNALS]
    yield
    for number, handler in zip(lifecycle.SIGNALS, before, strict=True):
        lifecycle.signal.signal(number, handler)
    gc.collect()  # descriptors of what was never finished


class Backend:
    """Writes K and V as FlashAttention does: [B, H, N, 2D]."""

    def do_kv_cache_update(self, layer, key, value, cache, slots):
        cache[slots // TOKENS, :, slots % TOKENS, :DIM] = key
        cache[slots // TOKENS, :, slots % TOKENS, DIM:] = value


class Engine:
    """A start of vLLM, as far as connectors see it, and its settings."""

    def __init__(self, folder, ranks=1, **extra):
        self.config = config(tensor_parallel_size=ranks)
        self.config.shutdown_timeout = 20
        usual = {"memory": {"capacity": "1MiB"}, "fusion": {"enabled": True}}
        if folder is not None:
            usual |= {"disk": {"path": str(folder / "kv")}, "trace": {"file": str(folder / "trace")}}
            usual |= {"redis": {"url": "redis://127.0.0.1:9"}}
        self.config.kv_transfer_config = KVTransferConfig(
            kv_connector=NAME, kv_role="kv_both", kv_connector_extra_config=usual | extra
        )
        layers = {f"layer.{n}": SimpleNamespace(impl=Backend()) for n in range(LAYERS)}
        self.config.compilation_config = SimpleNamespace(static_forward_context=layers)
        self.config.model_config.get_hidden_size = lambda: 32
        self.config.model_config.skip_tokenizer_init = True
        self.caches = caches(spec(block_size=TOKENS, num_kv_heads=HEADS, head_size=DIM))
        self.caches.num_blocks = BLOCKS
        self.tensors = {each: torch.zeros(BLOCKS, HEADS, TOKENS, 2 * DIM, dtype=torch.bfloat16) for each in layers}

    def start(self):
        """Scheduler's and worker's connector, after the handshake."""
        scheduler, worker = self.scheduler(), self.worker()
        word = worker.get_handshake_metadata()
        scheduler.set_xfer_handshake_metadata({} if word is None else {0: word})
        return scheduler, worker

    def scheduler(self):
        """The scheduler's connector, which has heard of no worker yet."""
        return RagKVConnector(self.config, KVConnectorRole.SCHEDULER, self.caches)

    def worker(self, *, registered=True):
        """A worker's connector, that of rank 0."""
        made = RagKVConnector(self.config, KVConnectorRole.WORKER, self.caches)
        if registered:
            made.register_kv_caches(self.tensors)
        return made

    @property
    def segment(self):
        return segment.FOLDER / f"{segment.PREFIX}{self.config.kv_transfer_config.engine_id}"


def fresh_factory(monkeypatch):
    """vLLM's factory of connectors, to which ragkv's plug-in is new. (vLLM has no way to take a name back.)"""
    known = {name: each for name, each in KVConnectorFactory._registry.items() if name != NAME}
    find_class = KVConnectorFactory.get_connector_class
    monkeypatch.setattr(KVConnectorFactory, "_registry", known)
    monkeypatch.setattr(KVConnectorFactory, "get_connector_class", getattr(find_class, "__wrapped__", find_class))
    return KVConnectorFactory


def refusals(caplog):
    """Why the engine runs without reuse, a line each."""
    return [text for r in caplog.records if ASIDE in (text := r.getMessage())]


def serves(scheduler, worker):
    """Every method of both can be called; one that stands aside offers nothing and keeps nothing."""
    for connector in (scheduler, worker):
        if connector.scheduler_side is None and connector is scheduler:
            assert connector.get_num_new_matched_tokens(MagicMock(), 0) == (0, False)
            assert connector.build_connector_meta(MagicMock()) == StepOrders()
            assert connector.request_finished(MagicMock(), [1]) == (False, None)
        if connector.scheduler_side is None and connector.worker_side is None:
            for name, method in vars(RagKVConnector).items():
                if not name.startswith("_") and callable(method) and name != "shutdown":
                    count = getattr(method, "__wrapped__", method).__code__.co_argcount
                    getattr(connector, name)(*(MagicMock() for _ in range(count - 1)))
    worker.shutdown(), scheduler.shutdown()
