"""What ragkv needs of a machine, checked by trying it. A check returns findings and raises nothing.

`ragkv doctor` and `ragkv config check` show the same findings about settings; the doctor adds vLLM and a server.
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ragkv.config import Settings
from ragkv.config.settings import rough_size
from ragkv.errors import ConfigError, RagKVError, StoreError
from ragkv.kvstore.budget import there
from ragkv.kvstore.segment import FOLDER as SHARED_MEMORY
from ragkv.kvstore.segment import available_bytes
from ragkv.kvstore.stores.contract import KEY_BYTES, Room, Store
from ragkv.kvstore.stores.disk import DiskStore
from ragkv.kvstore.stores.installed import make_store
from ragkv.kvstore.stores.redis_url import Location, parse_location
from ragkv.policies import POLICIES, make_policy
from ragkv.preflight import check_room, read_settings, read_token

MIB = 1 << 20
SPEED_BYTES = 64 * MIB
QUESTIONS = 20
SLOW_SECONDS = 0.01
FEW_FILES = 10_000
DOCTOR_PROBE = "ragkv.connectors.vllm.doctor_probe"
PROBE_SECONDS = 600.0


@dataclass(frozen=True)
class Finding:
    """What a check found: `said` in one line, and where something is to be done, `todo` in another."""

    check: str
    status: Literal["ok", "warn", "fail"]
    said: str
    todo: str = ""


def examine_settings(
    file: Path | None, environ: Mapping[str, str], speed_bytes: int = 0, *, beside_server: bool = False
) -> list[Finding]:
    """The findings about the settings of `file` and the variables, on this machine.

    `speed_bytes` are written to the disk tier's folder to measure it. `beside_server`: an engine with these
    settings runs here and holds its memory, so too little free memory is a warning.
    """
    found, settings = check_settings(file, environ)
    if settings is None:
        return [found]
    memory = check_memory(settings)
    if beside_server and memory.status == "fail":
        memory = replace(memory, status="warn")
    return [
        found,
        memory,
        *check_disk(settings, speed_bytes),
        *check_redis(settings),
        *check_store(settings),
        *check_files(settings),
        *check_policies(settings),
    ]


def check_settings(file: Path | None, environ: Mapping[str, str]) -> tuple[Finding, Settings | None]:
    """Whether the settings hold, apart from any machine; and the settings."""
    try:
        loaded = read_settings(environ=environ, file=file)
    except ConfigError as error:
        todo = "set what is named to what is allowed; `ragkv config show` lists every setting"
        return Finding("settings", "fail", str(error).removeprefix("ragkv: "), todo), None
    origins = sorted({origin for key, origin in loaded.origins.items() if "." in key})
    return Finding("settings", "ok", f"from {', '.join(origins)}" if origins else "all defaults"), loaded.settings


def check_memory(settings: Settings) -> Finding:
    """Room for the memory tier in shared memory, and memory to back it, by the rule that stops a start."""
    try:
        check_room(settings)
        free = available_bytes()
    except ConfigError as error:
        todo = (
            f"set memory.capacity to what is allowed, or give {SHARED_MEMORY} more room (containers: --ipc=host "
            "or --shm-size; Kubernetes: an emptyDir of medium Memory); what engines that run here hold is taken "
            "already"
        )
        return Finding("shared memory", "fail", str(error).removeprefix("ragkv: "), todo)
    except (RagKVError, OSError) as error:
        return Finding("shared memory", "fail", str(error), f"mount a tmpfs at {SHARED_MEMORY}")
    said = f"{SHARED_MEMORY}: {rough_size(free)} free, {rough_size(settings.memory.capacity)} wanted"
    return Finding("shared memory", "ok", said)


def check_disk(settings: Settings, speed_bytes: int = SPEED_BYTES) -> list[Finding]:
    """The disk tier's folder: whether values can be kept there, and how quickly; nothing is left behind."""
    if settings.disk.path is None:
        return [Finding("disk", "ok", "no disk tier (disk.path is not set)")]
    path = Path(settings.disk.path)
    todo = f"give the engine's user a folder that it may write to, or set disk.path to another than {path}"
    try:
        path = path.expanduser()
        with _stand_in(path) as folder:
            store = DiskStore(folder)
            sizes, room = [entry.size for entry in store.scan()], store.room()
            wrote, read = _speeds(folder, speed_bytes)
    except (StoreError, OSError, RuntimeError, ValueError) as error:  # the last: of the name of a folder
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return [Finding("disk", "fail", f"{path} cannot be written to: {text}", todo)]
    said = f"{path}: {'unknown' if room is None else rough_size(room.free)} free, {rough_size(sum(sizes))} kept"
    if speed_bytes:
        said += f", writes {rough_size(int(wrote))}/s, reads {rough_size(int(read))}/s"
    findings = [Finding("disk", "ok", said)]
    if store.warning and folder == path:
        findings.append(Finding("disk", "warn", store.warning, f"chmod 700 {path}, owned by the engine's user"))
    return findings if room is None else findings + _disk_limits(path, settings.disk.capacity, room, sizes)


def _disk_limits(path: Path, capacity: int, room: Room, sizes: Sequence[int]) -> list[Finding]:
    """Where the tier will keep to less than was set, as the engine reckons it."""
    most, files = there(room, sum(sizes), len(sizes))
    findings = []
    if most < capacity:
        said = f"{path} has room for {rough_size(most)}, less than disk.capacity = {rough_size(capacity)}"
        todo = f"make room, or set disk.capacity to at most {most // MIB}MiB: the engine keeps to that anyway"
        findings.append(Finding("disk", "warn", said, todo))
    if files < FEW_FILES:
        said = f"{path} has room for {files} files, and every chunk is one"
        todo = "use a file system with more inodes; the engine keeps to these"
        findings.append(Finding("disk", "warn", said, todo))
    return findings


def check_files(settings: Settings) -> list[Finding]:
    """The files that settings name beside the tiers: whether the engine could read and write them."""
    findings = []
    if settings.control.listen is not None and settings.control.token_file is not None:
        try:
            read_token(Path(settings.control.token_file))
        except (OSError, RuntimeError, ValueError) as error:
            said = f"control.token_file: {error}; the engine would run without control"
            findings.append(Finding("control", "fail", said, "write a token there, for the engine's user to read"))
    if settings.trace.file is not None:
        file = Path(settings.trace.file).expanduser()
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            said = f"trace.file: {file} cannot be written to; no trace would be written"
            findings.append(Finding("trace", "fail", said, "give the engine's user a file that it may write to"))
    return findings


def check_policies(settings: Settings) -> list[Finding]:
    """Eviction policies that other packages bring: whether each can be made. Ours always can."""
    findings = []
    for section in ("memory", "device", "disk", "store"):
        name = getattr(settings, section).policy
        if name in POLICIES:
            continue
        try:
            make_policy(name)
        except Exception as error:  # of the package, which may do anything
            said = f"{section}.policy = {name!r}: {type(error).__name__}: {error}"
            todo = "repair the package that brings it, or name another policy; the engine would run without reuse"
            findings.append(Finding("policy", "fail", said, todo))
    return findings


def check_redis(settings: Settings) -> list[Finding]:
    """The Redis tier's server: reached as the engine would reach it, written to, and asked for its limits."""
    from ragkv.kvstore.stores.redis import RedisStore

    redis = settings.redis
    if redis.url is None:
        return [Finding("redis", "ok", "no Redis tier (redis.url is not set)")]
    location = parse_location(redis.url)
    prefix = f"{redis.prefix}:doctor:"
    store = RedisStore(redis.url, ttl_seconds=60, timeout_seconds=redis.timeout, prefix=prefix)
    key = os.urandom(KEY_BYTES)
    try:
        store.contains([key])
        median = statistics.median(_seconds(lambda: store.contains([key])) for _ in range(QUESTIONS))
        kept = _keeps(store)
    except StoreError as error:
        return [Finding("redis", "fail", str(error).removeprefix("redis: "), _redis_todo(error.reason))]
    finally:
        store.close()
    said = f"{location.text}: answers in {median * 1e3:.2f} ms (median of {QUESTIONS})"
    if not kept:
        return [Finding("redis", "fail", f"{said}, but does not keep what is written", "look at its eviction")]
    findings = [Finding("redis", "ok", said)]
    if median > SLOW_SECONDS:
        todo = "use a server nearer by: loading from this one will seldom be quicker than computing"
        findings = [Finding("redis", "warn", f"{said}, which is slow", todo)]
    return findings + _redis_limits(location, redis.timeout)


def check_store(settings: Settings) -> list[Finding]:
    """The store that an installed package brings: whether it can be made, and keeps what is written."""
    name, options = settings.store.name, settings.store.options
    if name is None:
        return []
    todo = "look at store.options, and at the package that brings it; the engine would run without this tier"
    try:
        with contextlib.closing(make_store(name, options)) as store:
            kept = _keeps(store)
    except Exception as error:  # of the package, which may do anything
        return [Finding("store", "fail", f"store.name = {name!r}: {type(error).__name__}: {error}", todo)]
    if not kept:
        return [Finding("store", "fail", f"store.name = {name!r}: it does not keep what is written", todo)]
    return [Finding("store", "ok", f"{name}: keeps what is written")]


def _keeps(store: Store) -> bool:
    """Whether a value that is written can be read again; it is removed afterwards."""
    key, value = os.urandom(KEY_BYTES), os.urandom(64 << 10)
    store.put(key, [value])
    same = store.get(key)
    store.delete([key])
    return same is not None and bytes(same) == value


def _redis_todo(reason: str) -> str:
    return {
        "gone": "start the server, or set redis.url to where one listens",
        "timeout": "look at the network between, or raise redis.timeout",
        "refused": "look at user, password, rights and certificates in redis.url, and whether it is a replica",
        "full": "give the server maxmemory-policy allkeys-lru, or more maxmemory",
    }.get(reason, "look into the server's log")


def _redis_limits(location: Location, seconds: float) -> list[Finding]:
    """What one server says of its memory; others, and those that do not say, are not judged."""
    import redis

    from ragkv.kvstore.stores.redis_clients import connect

    if location.kind != "single":
        return []
    client = connect(location, seconds, 1)
    try:
        info = client.info("memory")
        most, policy = int(info["maxmemory"]), str(info.get("maxmemory_policy", ""))
    except (redis.RedisError, KeyError, ValueError):  # may not be asked, or says nothing
        return []
    finally:
        client.close()
    todo = "give the server maxmemory, and maxmemory-policy allkeys-lru"
    if most == 0:
        return [Finding("redis", "warn", "the server has no maxmemory: it grows until its machine is full", todo)]
    if policy == "noeviction":
        said = f"maxmemory {rough_size(most)} with policy noeviction: once full, ragkv removes chunks itself"
        return [Finding("redis", "warn", said, todo)]
    return [Finding("redis", "ok", f"maxmemory {rough_size(most)}, policy {policy}")]


@contextlib.contextmanager
def _stand_in(path: Path) -> Iterator[Path]:
    """The folder itself, or where there is none yet, one in the nearest that is there, removed afterwards."""
    if path.exists():
        yield path
        return
    parent = next(each for each in path.parents if each.exists() or each.is_symlink())
    with tempfile.TemporaryDirectory(prefix=".ragkv-doctor-", dir=parent) as folder:
        yield Path(folder)


def _speeds(folder: Path, size: int) -> tuple[float, float]:
    """Bytes a second written, down to the disk, and read from there again."""
    if not size:
        return 0.0, 0.0
    block = memoryview(os.urandom(min(size, MIB)))
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        descriptor = file.fileno()

        def write() -> None:
            for _ in range(size // len(block)):
                file.write(block)
            os.fsync(descriptor)

        def read() -> None:
            file.seek(0)
            while file.read(MIB):
                pass

        wrote = _seconds(write)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return size / wrote, size / _seconds(read)


def _seconds(work: Callable[[], object]) -> float:
    before = time.perf_counter()
    work()
    return time.perf_counter() - before


def check_vllm(quick: bool, environ: Mapping[str, str], seconds: float = PROBE_SECONDS) -> list[Finding]:
    """Version, connector interface and KV layout of this environment's vLLM, tried in a process of its own."""
    command = [sys.executable, "-m", DOCTOR_PROBE, *(["--quick"] if quick else [])]
    clean = {name: value for name, value in environ.items() if not name.startswith("RAGKV_")}
    status, out, errors = _run_alone(command, clean, seconds)
    findings = [Finding(**json.loads(line)) for line in out.splitlines()]
    if status is None:
        findings.append(Finding("vllm", "fail", f"no answer within {seconds:g} s", "look at what holds it up"))
    elif status:
        end = signal.Signals(-status).name if status < 0 else f"status {status}"
        last = (errors.strip().splitlines() or ["without a word"])[-1][:300]
        todo = "start the same vLLM without ragkv: where that fails too, the cause lies there"
        findings.append(Finding("vllm", "fail", f"trying it ended with {end}: {last}", todo))
    return findings


def _run_alone(command: Sequence[str], environ: Mapping[str, str], seconds: float) -> tuple[int | None, str, str]:
    """Exit status (None: it took longer), output and errors. What it leaves running is ended, and waited for by
    nobody: output goes to files, since a pipe ends only with the last that holds it."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, env=environ, start_new_session=True)
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        errors.seek(0)
        return status, out.read().decode(errors="replace"), errors.read().decode(errors="replace")
