"""A fuzzer of engines: thousands of short prompts, on an engine with ragkv in which everything is evicted and
preempted all the time, against plain vLLM without any cache. Tokens and log probabilities must be the same.

Float32 on one thread: the noise between two ways to compute one prompt is below 1e-5, and one wrong token in a
prompt moves log probabilities by 0.01 and more. An answer is a *near tie* where it differs in a token and both
engines give both candidates nearly the same log probability; everything else that differs is *wrong*.
"""

import contextlib
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ragkv.benchmarks.engine import SOURCES, Engine, EngineError, EngineOptions
from ragkv.benchmarks.internal.engine_fuzz_plan import (
    LONGEST_ANSWER,
    LONGEST_PROMPT,
    WAVE_ASKS,
    WAVES,
    Ask,
    Episode,
    Operation,
    Shares,
    Tokens,
    asks_of,
)
from ragkv.benchmarks.internal.engine_fuzz_play import Faults, Output, Played, injected, play
from ragkv.benchmarks.model import tiny_gemma, tiny_llama
from ragkv.benchmarks.report import reusable_tokens
from ragkv.errors import RagKVError
from ragkv.kvstore import metrics as m

TOLERANCE = 1e-3  # of log probabilities
PATIENCE = 300.0  # seconds for one wave
MOST_DEAD, MOST_WRONG = 3, 20
DISTINCT = 0.5  # of the right answers, at least: else the comparison says nothing

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # with one thread, since two wait for each other on a model so small
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
# Room for one of the longest requests and a little more; prompts in steps of 96 tokens.
SMALL = {"block_size": 32, "num_gpu_blocks_override": 14, "max_num_batched_tokens": 96, "max_num_seqs": 6}
BLOCKS_OF_TWO = 26  # where layers of two kinds have a table each
PLAIN = {"block_size": 32, "num_gpu_blocks_override": 700, "max_num_seqs": 32, "enable_prefix_caching": False}
SETTINGS: dict[str, Any] = {
    "memory": {"capacity": "3MiB", "page_tokens": 8},  # 2,048 tokens
    "chunks": {"min_tokens": 16, "average_tokens": 24, "max_tokens": 48},
    "placement": {"gate": False},
}
DISK = "12MiB"
FUSION = {"enabled": True, "recompute_ratio": 1.0, "min_tokens": 16}

Verdict = Literal["equal", "near tie", "wrong"]


@dataclass(frozen=True)
class FuzzOptions:
    """What to run. `only`: this episode alone. `store_faults`, `copy_faults`: shares. `fusion`: passages are
    moved, and all of their tokens computed again. `windows`: a model some of whose layers have windows. `llm`,
    `environment`, `settings`: more for the tested engine; `prepare`: called in its process before it starts."""

    prompts: int = 1000
    seed: int = 0
    only: int | None = None
    store_faults: float = 0.02
    copy_faults: float = 0.0
    fusion: bool = False
    windows: bool = False
    shares: Shares = field(default_factory=Shares)
    llm: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[], None] | None = None


@dataclass(frozen=True)
class Wrong:
    """An answer that cannot be, or a request that failed, and the operations of its wave."""

    episode: int
    wave: int
    request: str
    what: str
    operations: tuple[Operation, ...]


@dataclass
class Findings:
    """What came out."""

    prompts: int = 0
    outputs: Counter[str] = field(default_factory=Counter)  # by verdict
    aborted: int = 0
    failed: int = 0
    resets: int = 0
    refused_resets: int = 0
    dead: list[str] = field(default_factory=list)
    wrong: list[Wrong] = field(default_factory=list)
    noise: float = 0.0  # largest difference of log probabilities in an answer that is not wrong
    faults: Counter[str] = field(default_factory=Counter)
    engine: Counter[str] = field(default_factory=Counter)  # its own counts
    answers: set[Tokens] = field(default_factory=set)
    distinct_prompts: int = 0

    @property
    def bad(self) -> int:
        """How many things went wrong."""
        return len(self.dead) + len(self.wrong)


@dataclass(frozen=True)
class Engines:
    """Both, and how to start the second one again."""

    plain: Engine
    start: Callable[[], Engine]


def judge(right: Output, given: Output) -> tuple[Verdict, str, float]:
    """The verdict, what differs first, and the largest difference of log probabilities up to there."""
    worst = 0.0
    for at, (token, got) in enumerate(zip(right.tokens, given.tokens, strict=False)):
        ours, theirs = given.tops[at], right.tops[at]
        common = ours.keys() & theirs.keys()
        difference = max((abs(ours[each] - theirs[each]) for each in common), default=float("inf"))
        if not {token, got} <= common:
            return "wrong", f"token {at} is {got}, not {token}, which is none of the likeliest", difference
        if difference > TOLERANCE:
            return "wrong", f"log probabilities of token {at} are off by {difference:.2g}", difference
        worst = max(worst, difference)
        if token != got:  # both say so, within the tolerance, of both candidates
            return "near tie", f"token {at} is {got}, not {token}", worst
    return "equal", "", worst


class Judge:
    """Compares waves with the right answers, and counts."""

    def __init__(self, findings: Findings, leaks: bool) -> None:
        """`leaks`: whether more cached tokens than the tenant has ever asked for is an error."""
        self._findings, self._leaks = findings, leaks
        self._asked: dict[str | None, list[Tokens]] = {}

    def next_episode(self) -> None:
        """Nothing that comes shares a prefix with what came."""
        self._asked.clear()

    def wave(
        self, place: tuple[int, int], operations: list[Operation], right: dict[Tokens, Output], got: Played
    ) -> None:
        """Count what came of a wave."""
        findings, asks = self._findings, asks_of(operations)
        findings.prompts += len(asks)
        findings.aborted += got.aborted
        findings.failed += len(got.failed)
        findings.resets += got.resets
        findings.refused_resets += got.refused

        def wrong(ask: Ask, what: str) -> None:
            findings.wrong.append(Wrong(*place, str(ask), what, tuple(operations)))

        for ask in asks:
            if ask.name in got.failed:
                wrong(ask, "the request failed")
            self._outputs(ask, right[ask.prompt], got.outputs.get(ask.name, []), wrong)
        if self._leaks:
            self._look_for_leaks(asks, right, got, wrong)

    def _outputs(self, ask: Ask, right: Output, outputs: list[Output], wrong: Callable[[Ask, str], None]) -> None:
        for output in outputs:
            verdict, what, difference = judge(right, output)
            self._findings.outputs[verdict] += 1
            if verdict == "wrong":
                wrong(ask, what)
            else:
                self._findings.noise = max(self._findings.noise, difference)

    def _look_for_leaks(
        self, asks: list[Ask], right: dict[Tokens, Output], got: Played, wrong: Callable[[Ask, str], None]
    ) -> None:
        for ask in asks:
            self._asked.setdefault(ask.salt, []).append(ask.prompt + right[ask.prompt].tokens)
        for ask in asks:
            if (cached := got.cached.get(ask.name, 0)) > 1:  # prompts of two episodes may share a token
                others = [each for each in self._asked[ask.salt] if each[: len(ask.prompt)] != ask.prompt]
                same = len(self._asked[ask.salt]) - len(others)
                most = len(ask.prompt) - 1 if same > 1 or ask.copies > 1 else reusable_tokens(ask.prompt, others)
                if cached > most:
                    wrong(ask, f"{cached} tokens were cached, but the tenant has asked for {most} of them")


def fuzz(options: FuzzOptions, say: Callable[[int], None] = lambda done: None) -> Findings:
    """Play until so many prompts were asked. `say`: is told how many were. RagKVError: it would prove nothing."""
    findings = Findings()
    with tempfile.TemporaryDirectory(prefix="ragkv-fuzz-") as folder:
        model = (tiny_gemma if options.windows else tiny_llama)(Path(folder) / "model")
        with _engines(model, options, Path(folder) / "disk") as engines:
            _play_all(engines, options, findings, say)
    if options.only is None and len(findings.answers) < DISTINCT * findings.distinct_prompts:
        raise RagKVError("fuzz: the right answers hardly depend on the prompts, so that equal ones prove nothing")
    return findings


@contextlib.contextmanager
def _engines(model: Path, options: FuzzOptions, folder: Path) -> Iterator[Engines]:
    longest = LONGEST_PROMPT + LONGEST_ANSWER + 8
    fast = {"skip_tokenizer_init": True, "max_logprobs": 10}

    def start() -> Engine:
        settings = {**SETTINGS, "disk": {"path": str(folder), "capacity": DISK}}
        settings |= {"fusion": FUSION} if options.fusion else {}
        small = SMALL | ({"num_gpu_blocks_override": BLOCKS_OF_TWO} if options.windows else {})
        faults = Faults(options.seed, options.store_faults, options.copy_faults)
        return Engine(
            EngineOptions(
                model,
                settings | dict(options.settings),
                "float32",
                longest,
                fast | small | dict(options.llm),
                ENVIRONMENT | dict(options.environment),
                _Prepare((faults, *filter(None, [options.prepare]))),
                PATIENCE,
            )
        )

    plain = EngineOptions(model, None, "float32", longest, fast | PLAIN, ENVIRONMENT, patience=PATIENCE)
    with Engine(plain) as engine:
        yield Engines(engine, start)


@dataclass(frozen=True)
class _Prepare:
    steps: tuple[Callable[[], None], ...]

    def __call__(self) -> None:
        for step in self.steps:
            step()


Wave = tuple[int, int, list[Operation], dict[Tokens, Output]]


def _right_waves(plain: Engine, options: FuzzOptions, findings: Findings) -> Iterator[Wave]:
    """Episode, wave, operations, and right answers by prompt."""
    asked, number = 0, options.only or 0
    while asked < options.prompts:
        episode = Episode(options.seed, number, options.shares)
        right: dict[Tokens, Output] = {}
        for wave in range(WAVES):
            operations = episode.wave(WAVE_ASKS)
            new = sorted({ask.prompt for ask in asks_of(operations)} - right.keys())
            asks = [Ask(str(at), prompt, LONGEST_ANSWER) for at, prompt in enumerate(new)]
            outputs = plain.call(play, asks).outputs
            right |= {ask.prompt: outputs[ask.name][0] for ask in asks}
            episode.learn({ask.prompt: right[ask.prompt].tokens for ask in asks})
            findings.answers |= {right[ask.prompt].tokens for ask in asks}
            findings.distinct_prompts += len(asks)
            yield number, wave, operations, dict(right)
            asked += WAVE_ASKS
        if options.only is not None:
            return
        number += 1


def _one_ahead(waves: Iterator[Wave]) -> Generator[Wave, None, None]:
    """The same waves; while one is played, the next is made."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, waves, None)
        while (found := coming.result()) is not None:
            coming = pool.submit(next, waves, None)
            yield found


def _play_all(engines: Engines, options: FuzzOptions, findings: Findings, say: Callable[[int], None]) -> None:
    """All waves; an engine that dies is started again."""
    judge_ = Judge(findings, leaks=not options.fusion)
    engine, counts = engines.start(), _Counts()
    try:
        with contextlib.closing(_one_ahead(_right_waves(engines.plain, options, findings))) as waves:
            for episode, wave, operations, right in waves:
                if wave == 0:
                    judge_.next_episode()
                try:
                    judge_.wave((episode, wave), operations, right, engine.call(play, operations))
                    counts = _counts(engine)
                except EngineError as error:
                    findings.dead.append(f"episode {episode}, wave {wave}: {error}")
                    engine.kill()
                    engine.close()
                    if len(findings.dead) >= MOST_DEAD:
                        break
                    _add(findings, counts)
                    engine, counts = engines.start(), _Counts()
                say(findings.prompts)
                if len(findings.wrong) >= MOST_WRONG:
                    break
    finally:
        _add(findings, counts)
        engine.close()


@dataclass(frozen=True)
class _Counts:
    """What an engine has counted since it started."""

    engine: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)


def _counts(engine: Engine) -> _Counts:
    samples = engine.metrics()

    def total(name: str) -> int:  # over labels
        return int(sum(value for sample, value in samples.items() if sample.partition("{")[0] == name))

    found = {
        "hit_tokens": total(m.HIT_TOKENS),
        "hit_requests": int(samples.get(f'{m.LOOKUPS}{{result="hit"}}', 0)),
        "own_hit_tokens": int(samples.get(f'{SOURCES}_total{{source="device"}}', 0)),
        "preemptions": total("vllm:num_preemptions_total"),
        "fused_tokens": total(m.FUSED_TOKENS),
        "promoted_tokens": total(m.PROMOTED_TOKENS),
        "evicted_chunks": total(m.EVICTED_CHUNKS),
        "errors": total(m.ERRORS),
    }
    return _Counts(Counter(found), engine.call(injected))


def _add(findings: Findings, counts: _Counts) -> None:
    findings.engine += counts.engine
    findings.faults += counts.faults
