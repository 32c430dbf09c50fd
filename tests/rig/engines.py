"""Engines of the rig, and the plain one that they are compared with."""

import contextlib
import sys
from dataclasses import dataclass

from ragkv.benchmarks.engine import EngineOptions, Resting
from rig import beside
from rig.beside import Ask
from rig.interpreter import KERNEL
from rig.plugin import ASYNC, plugin_folder

BLOCK = 16
BLOCKS = 40
LONGEST = 320
STEP = 128  # tokens a step takes
NEAR = 1e-3  # between log probabilities; float32 gives 1e-5
ONE_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # other engines run beside
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # its compiler takes the interpreted Triton for a real one
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions that run in the workers
}
SHAPE = {
    "skip_tokenizer_init": True,
    "max_num_seqs": 8,
    "max_num_batched_tokens": STEP,
    "generation_config": "vllm",
}
SETTINGS = {
    "memory": {"capacity": "2MiB"},  # about 1,365 tokens
    "device": {"capacity": "512KiB", "after": 2},
    "chunks": {"min_tokens": 16, "average_tokens": 32, "max_tokens": 64},
    "fusion": {"min_tokens": 16},
    "placement": {"gate": False},
}


@dataclass(frozen=True)
class Combination:
    """A model runner and a way of scheduling."""

    runner: int
    asynchronous: bool

    def __str__(self):
        return f"v{self.runner}-{'async' if self.asynchronous else 'sync'}"

    @property
    def environment(self):
        """What makes an engine such a one, in one process, so that faults can be made in all of its parts."""
        chosen = {ASYNC: "1"} if self.asynchronous else {}
        chosen |= {KERNEL: "1"} if self.runner == 2 and self.asynchronous else {}  # as on CUDA
        return {
            "TRITON_INTERPRET": "1",
            "VLLM_USE_V2_MODEL_RUNNER": str(self.runner - 1),
            **ONE_PROCESS,
            **chosen,
        }


COMBINATIONS = [Combination(runner, asynchronous) for runner in (1, 2) for asynchronous in (False, True)]


class RigEngine(Resting):
    """An engine that is asked with `Ask`s."""

    def answers(self, asks, fault=None):
        """Answers to requests that run together. With a fault: it must have struck."""
        found, struck = self.call(beside.ask, list(asks), fault)
        assert fault is None or struck, f"{fault} never struck"
        return found

    def answer(self, prompt, fault=None, **more):
        """One answer."""
        return self.answers([Ask(prompt, **more)], fault)[0]

    def evict(self, *, ragkv_too=False):
        """Empty vLLM's own prefix cache."""
        assert not ragkv_too
        self.call(beside.evict)

    def rest(self):
        """Let ragkv do what it still has to do."""
        self.call(beside.rest)

    def count(self, name):
        """One of the engine's metrics."""
        return self.call(beside.metrics).get(name, 0.0)


class Plain:
    """Plain vLLM on the same model, on the CPU's own kernels: what every answer must be. Asked once for each."""

    def __init__(self, engine):
        self._engine, self._known = engine, {}

    def answers(self, asks):
        """As of `RigEngine`; tenants and hints make no difference to plain vLLM."""
        keys = [Ask(tuple(each.prompt), each.tokens, 1, each.scored, adapter=each.adapter) for each in asks]
        new = [key for key in dict.fromkeys(keys) if key not in self._known]
        if new:
            self._known |= zip(new, self._engine.call(beside.ask, new, None)[0], strict=True)
        return [self._known[key] for key in keys]

    def answer(self, prompt, **more):
        """One answer."""
        return self.answers([Ask(prompt, **more)])[0]

    def clearest(self, prompts):
        """The prompt in whose answer the best token is farthest ahead."""
        return max(prompts, key=lambda prompt: self.answer(prompt).margin)

    def check(self, asks, found, near=NEAR):
        """Answers, all and in each of their texts, are plain vLLM's."""
        assert [*differences(self.answers(asks), found, near)] == []


def check_preempted(rig, plain, asks):
    """Requests that run together, four of them known, are preempted, and answers are plain vLLM's."""
    rig.answers(asks[:4])
    rig.evict()
    before = rig.count("vllm:num_preemptions_total")
    plain.check(asks, rig.answers(asks))
    assert rig.count("vllm:num_preemptions_total") > before


def differences(wanted, found, near=NEAR):
    """What is wrong with some answers, in words. `near`: by how much log probabilities may differ; if that is more
    than rounding, another token may be the best where it was about as good."""
    for number, (want, got) in enumerate(zip(wanted, found, strict=True)):
        for text, logprobs in zip(got.texts, got.logprobs, strict=True):
            if text != want.tokens and NEAR < near > want.margin:
                continue
            if text != want.tokens:
                yield f"answer {number}: {text} instead of {want.tokens} (cached {got.cached})"
            elif (off := farthest(want.logprobs[0], logprobs)) > near:
                yield f"answer {number}: log probabilities are off by {off:.4f} (cached {got.cached})"
        if farthest(want.scores, got.scores) > NEAR:
            yield f"answer {number}: the prompt's log probabilities differ"


def farthest(ones, others):
    """The largest difference of two rows of numbers of one length."""
    return max((abs(one - other) for one, other in zip(ones, others, strict=True)), default=0.0)


@contextlib.contextmanager
def rig_engine(model, folder, combination, settings, **llm):
    """An engine of the rig. `settings`: of ragkv; `llm`: other arguments of `vllm.LLM`."""
    place = str(plugin_folder(folder / "plugin"))
    shape = SHAPE | {"block_size": BLOCK, "num_gpu_blocks_override": BLOCKS} | llm
    options = EngineOptions(
        model, settings, "float32", max_model_len=LONGEST, llm=shape, environment=combination.environment
    )
    sys.path.insert(0, place)  # the engine's process is given the path that holds when it is started
    try:
        engine = RigEngine(options)
    finally:
        sys.path.remove(place)
    with engine:
        yield engine.wait()


@contextlib.contextmanager
def plain_engine(model):
    """Plain vLLM, as it is on a CPU."""
    shape = SHAPE | {"enable_prefix_caching": False, "max_num_batched_tokens": LONGEST}
    options = EngineOptions(model, None, "float32", max_model_len=LONGEST, llm=shape, environment=ONE_PROCESS)
    with RigEngine(options) as engine:
        yield Plain(engine.wait())
