"""What the fuzzer of engines runs in the process of an engine: operations, and injected faults."""

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ragkv.benchmarks.internal.engine_fuzz_plan import Abort, Ask, Operation, Reset, Step, Tokens
from ragkv.errors import RagKVError

TOP = 4  # log probabilities of each token, the likeliest first
STUCK_SECONDS = 60.0
SETTLE_STEPS = 500  # until vLLM has the blocks back of requests that ended, once their stores are done
REFUSED = "Failed to reset KV cache"

_injected: Counter[str] = Counter()  # in the engine's process


@dataclass(frozen=True)
class Output:
    """One answer, and for each of its tokens the log probabilities of the likeliest."""

    tokens: Tokens
    tops: tuple[dict[int, float], ...]


@dataclass
class Played:
    """What came of some operations: answers and cached tokens by the name of the request, and counts."""

    outputs: dict[str, list[Output]] = field(default_factory=dict)
    cached: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)  # ended, but not by their length
    aborted: int = 0  # that had not ended
    resets: int = 0
    refused: int = 0  # resets, since blocks were in use


def play(llm: Any, operations: Sequence[Operation]) -> Played:
    """Carry out operations one by one, then run all requests to their end. RagKVError: the engine is stuck."""
    player = _Player(llm.llm_engine)
    for operation in operations:
        player.do(operation)
    player.steps(None)
    return player.played


def injected(llm: Any) -> Counter[str]:
    """Faults so far, by kind."""
    return _injected


class _Player:
    def __init__(self, engine: Any) -> None:
        self.played = Played()
        self._engine = engine
        self._running: set[str] = set()
        self._ended = time.monotonic()  # the last time that a request did

    def do(self, operation: Operation) -> None:
        if isinstance(operation, Ask):
            self._add(operation)
        elif isinstance(operation, Step):
            self.steps(operation.count)
        elif isinstance(operation, Abort):
            self._engine.abort_request([operation.name])
            if operation.name in self._running:
                self._running.discard(operation.name)
                self.played.aborted += 1
        else:
            self._reset(operation)

    def steps(self, most: int | None) -> None:
        """So many, or until no request runs."""
        done = 0
        self._ended = time.monotonic()
        while self._running and (most is None or done < most):
            for output in self._engine.step():
                self._take(output)
            if time.monotonic() - self._ended > STUCK_SECONDS:
                raise RagKVError(f"stuck: no request has ended for {STUCK_SECONDS:.0f} s: {sorted(self._running)}")
            done += 1

    def _add(self, ask: Ask) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # vLLM takes n > 1 only where it samples; of one candidate it samples the likeliest.
        greedy = {"temperature": 0} if ask.copies == 1 else {"temperature": 1, "top_k": 1, "n": ask.copies}
        sampling = SamplingParams(
            **greedy,
            max_tokens=ask.tokens,
            logprobs=TOP,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt: dict[str, Any] = {"prompt_token_ids": list(ask.prompt)}
        if ask.salt is not None:
            prompt["cache_salt"] = ask.salt
        self._engine.add_request(ask.name, prompt, sampling)
        self._running.add(ask.name)

    def _take(self, output: Any) -> None:
        name = output.request_id
        if not output.finished or name not in self._running:
            return  # an aborted one ends too
        self._running.discard(name)
        self._ended = time.monotonic()
        if any(each.finish_reason != "length" for each in output.outputs):
            self.played.failed.append(name)
            return
        self.played.cached[name] = output.num_cached_tokens or 0
        self.played.outputs[name] = [
            Output(
                tuple(each.token_ids),
                tuple({token: found.logprob for token, found in top.items()} for top in each.logprobs),
            )
            for each in output.outputs
        ]

    def _reset(self, reset: Reset) -> None:
        for _ in range(1 if self._running else SETTLE_STEPS):
            if self._try_to_reset(reset):
                self.played.resets += 1
                return
            if not self._running:
                self._engine.step()
        self.played.refused += 1

    def _try_to_reset(self, reset: Reset) -> bool:
        try:
            return bool(self._engine.reset_prefix_cache(reset.running, reset.connector))
        except RuntimeError as error:
            if REFUSED not in str(error):
                raise
            return False  # all are preempted, but a connector has blocks still: a server goes on


@dataclass(frozen=True)
class Faults:
    """Which share of the calls of a lower tier's store go wrong, and of the copies between the memory tier and the
    engine. Call it in the engine's process before the engine starts."""

    seed: int
    store: float = 0.0
    copy: float = 0.0

    def __call__(self) -> None:
        if self.store:
            self._break_stores()
        if self.copy:
            self._break_copies()

    def _break_stores(self) -> None:
        from ragkv.benchmarks.internal.faulty_stores import Fault, FaultyStore, now_and_then
        from ragkv.connectors.vllm import builder
        from ragkv.kvstore.stores.disk import DiskStore

        chosen = now_and_then(self.store, self.seed)

        def plan(method: str, number: int) -> Fault | None:
            fault = chosen(method, number)
            if fault is not None:
                _injected[f"{method}: {fault.value}"] += 1
            return fault

        class FaultyDisk(FaultyStore):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                store = DiskStore(*args, **kwargs)
                super().__init__(store, plan)
                self.warning = store.warning

        setattr(builder, "DiskStore", FaultyDisk)  # noqa: B010 (mypy: not exported)

    def _break_copies(self) -> None:
        from ragkv.connectors.vllm.transfer import DirectMover

        chance = random.Random(self.seed)

        def breaking(kind: str, move: Callable[..., Any]) -> Callable[..., Any]:
            def moved(*args: Any, **kwargs: Any) -> Any:
                if chance.random() < self.copy:
                    _injected[f"{kind} copy: fail"] += 1
                    raise OSError("injected")
                return move(*args, **kwargs)

            return moved

        for kind in ("load", "store"):
            setattr(DirectMover, kind, breaking(kind, getattr(DirectMover, kind)))
