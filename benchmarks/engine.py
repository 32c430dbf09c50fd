"""A real vLLM engine in a process of its own, so that two can stand side by side, each with its own metrics.

The engine's chatter goes to a log file. Times are vLLM's own: from the arrival of a request to its first token.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ragkv.benchmarks.model import natural_dtype
from ragkv.errors import RagKVError

START_SECONDS = 600
EVICT_TRIES = 200
SOURCES = "vllm:prompt_tokens_cached_by_source"


class EngineError(RagKVError):
    """An engine did not start, or died."""


@dataclass(frozen=True)
class Answer:
    """One greedy answer. `hit_tokens`: prompt tokens that were not computed, by source, for the whole batch."""

    ttft_s: float
    tokens: tuple[int, ...]
    text: str
    cached_tokens: int
    hit_tokens: Mapping[str, int]


@dataclass(frozen=True)
class EngineOptions:
    """How to start an engine. `ragkv`: its `kv_connector_extra_config`, or None for plain vLLM; `llm`: more
    arguments for `vllm.LLM`; `environment`: more variables; `prepare`: called in the engine's process before it
    starts, picklable; `patience`: seconds that a call may take, for engines that may hang; `one_process`: with
    vLLM's core and worker in the same process, which starts in half the time."""

    model: Path
    ragkv: Mapping[str, Any] | None = None
    dtype: str = "auto"
    max_model_len: int = 8192
    llm: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[], None] | None = None
    patience: float | None = None
    one_process: bool = False


class Engine:
    """Starts at once; use as a context manager, or `close` it. EngineError shows the end of the log."""

    def __init__(self, options: EngineOptions) -> None:
        handle, log = tempfile.mkstemp(prefix="ragkv-engine-", suffix=".log")
        os.close(handle)
        self.log = Path(log)
        context = _forking() if options.one_process else multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(options, log, theirs, dict(os.environ)))
        self._process.start()
        theirs.close()
        self._ready = False
        self._patience = options.patience

    def wait(self) -> "Engine":
        """Until the engine answers."""
        if not self._ready:
            self._receive(START_SECONDS)
            self._ready = True
        return self

    def ask(self, prompts: Sequence[Sequence[int]], max_tokens: int = 1, **sampling: Any) -> list[Answer]:
        """Greedy answers to prompts of token ids, all in one batch."""
        answers: list[Answer] = self.call(_ask, [list(prompt) for prompt in prompts], max_tokens, sampling)
        return answers

    def evict(self, *, ragkv_too: bool = False) -> None:
        """Empty vLLM's own prefix cache, as a busy server would; on demand, ragkv's too."""
        self.call(_evict, ragkv_too)

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics: name and labels (`name{label="value"}`, vLLM's own labels left out)."""
        found: dict[str, float] = self.call(_metrics)
        return found

    def dtype(self) -> str:
        """What the model computes in, as torch calls it: "bfloat16"."""
        return str(self.call(_dtype))

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(llm, *args)`, run beside the engine; it and its arguments must be picklable."""
        self.wait()
        self._pipe.send((function, args))
        return self._receive(self._patience)

    def kill(self) -> None:
        """End an engine that may hang; `close` it then."""
        self._process.kill()
        self._process.join()

    def close(self) -> None:
        """Stop the engine, and remove the log."""
        if self._process.is_alive():
            with contextlib.suppress(OSError):
                self._pipe.send(None)
            self._process.join(60)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
        self._pipe.close()
        self.log.unlink(missing_ok=True)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the process that holds the engine's front end."""
        assert self._process.pid is not None
        return self._process.pid

    def _receive(self, seconds: float | None) -> Any:
        try:
            if not self._pipe.poll(seconds):
                doing = "answer" if self._ready else "start"
                raise EngineError(f"the engine did not {doing} in {seconds} s; its log: {self.log}")
            good, value = self._pipe.recv()
        except (EOFError, ConnectionError):
            good, value = False, "the engine's process died"
        if not good:
            last = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
            raise EngineError(f"{value}\n{last}")
        return value


class Resting(Engine):
    """An engine that stands still between calls (SIGSTOP). An idle vLLM worker spins, and would take the time of
    another engine that is measured or tested."""

    def wait(self) -> "Resting":
        """Until the engine could answer."""
        if not self._ready:
            super().wait()
            self._signal(signal.SIGSTOP)
        return self

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """As an engine's, which runs meanwhile."""
        self.wait()
        self._signal(signal.SIGCONT)
        try:
            return super().call(function, *args)
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """Wake the engine, and stop it."""
        self._signal(signal.SIGCONT)
        super().close()

    def _signal(self, number: signal.Signals) -> None:
        for pid in (self.pid, *descendants(self.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def descendants(pid: int) -> list[int]:
    """All living processes that come from one."""
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found += [int(folder.name), *descendants(int(folder.name))]
    return found


def _forking() -> multiprocessing.context.ForkServerContext:
    """Processes forked from one that has imported vLLM already, which takes a third of an engine's start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ragkv.benchmarks.engine_imports"])
    return context


def _serve(options: EngineOptions, log: str, pipe: Connection, environment: Mapping[str, str]) -> None:
    """The engine's process. `environment`: the parent's, which a forked process does not see."""
    os.environ.clear()
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = open(descriptor, "w", buffering=1, closefd=False)  # noqa: SIM115
    cores = sorted(os.sched_getaffinity(0))
    defaults = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if options.one_process:
        defaults["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.update({k: v for k, v in defaults.items() if k not in os.environ} | dict(options.environment))
    try:
        if options.prepare is not None:
            options.prepare()
        llm = _start(options)
    except Exception as error:  # shown by the parent, with the end of the log
        traceback.print_exc()
        pipe.send((False, f"the engine did not start: {type(error).__name__}: {error}"))
        return
    try:
        pipe.send((True, None))
        while True:
            while options.one_process and not pipe.poll() and _step(llm):
                pass
            if (job := pipe.recv()) is None:
                break
            function, args = job
            pipe.send(_try(function, llm, args))
    except (EOFError, OSError):
        pass  # the parent is gone
    finally:
        llm.llm_engine.engine_core.shutdown()


def _try(function: Callable[..., Any], llm: Any, args: tuple[Any, ...]) -> tuple[bool, Any]:
    try:
        return True, function(llm, *args)
    except Exception as error:  # shown by the parent, with the end of the log
        traceback.print_exc()
        return False, f"{type(error).__name__}: {error}"


def _step(llm: Any) -> bool:
    """One step of an engine in this very process, if it has work. (Elsewhere it steps by itself.)"""
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is None or not core.scheduler.has_requests():
        return False
    llm.llm_engine.step()
    return True


def _start(options: EngineOptions) -> Any:
    from vllm import LLM
    from vllm.platforms import current_platform

    arguments: dict[str, Any] = {
        "model": str(options.model),
        "dtype": natural_dtype(options.dtype, current_platform.is_cpu()),
        "max_model_len": options.max_model_len,
        "enforce_eager": True,
        "disable_log_stats": False,
        "seed": 0,
        **options.llm,
    }
    if options.ragkv is not None:
        arguments["kv_transfer_config"] = {
            "kv_connector": "RagKVConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": dict(options.ragkv),
        }
    return LLM(**arguments)


def _ask(llm: Any, prompts: list[list[int]], max_tokens: int, sampling: dict[str, Any]) -> list[Answer]:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    extra = {name: sampling.pop(name) for name in ("lora_request",) if name in sampling}
    salt = sampling.pop("cache_salt", None)
    parameters = SamplingParams(temperature=0, max_tokens=max_tokens, **sampling)
    before = _by_source(llm)
    inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    for each in inputs:
        if salt is not None:
            each["cache_salt"] = salt
    outputs = llm.generate(inputs, parameters, use_tqdm=False, **extra)
    after = _by_source(llm)
    hits = {source: after[source] - before.get(source, 0) for source in after}
    hits = {source: count for source, count in hits.items() if count}
    return [
        Answer(
            output.metrics.first_token_latency,
            tuple(output.outputs[0].token_ids),
            output.outputs[0].text,
            output.num_cached_tokens or 0,
            hits,
        )
        for output in outputs
    ]


def _by_source(llm: Any) -> dict[str, int]:
    found = [metric for metric in llm.get_metrics() if metric.name == SOURCES]
    return {metric.labels["source"]: int(metric.value) for metric in found}


def _evict(llm: Any, ragkv_too: bool) -> None:
    """vLLM declines while blocks are in use: for a step or two after a request, until its last store is done."""
    for _ in range(EVICT_TRIES):
        if llm.reset_prefix_cache(reset_connector=ragkv_too):
            return
        _step(llm)
    raise EngineError("vLLM did not empty its prefix cache")


def _dtype(llm: Any) -> str:
    return str(llm.llm_engine.model_config.dtype).removeprefix("torch.")


def _metrics(llm: Any) -> dict[str, float]:
    from prometheus_client import REGISTRY

    found = {}
    for family in REGISTRY.collect():
        for sample in family.samples:
            own = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            labels = ",".join(f'{key}="{value}"' for key, value in own.items())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found
