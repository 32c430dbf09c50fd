"""`ragkv doctor`: every check, in the order in which things depend on one another."""

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ragkv.checks import (
    SPEED_BYTES,
    Finding,
    check_disk,
    check_files,
    check_memory,
    check_policies,
    check_redis,
    check_settings,
)
from ragkv.errors import RagKVError
from ragkv.scrape import Snapshot, scrape

TRYOUT = "ragkv.connectors.vllm.doctor_probe"
TRYOUT_SECONDS = 600.0
DRIVER_SECONDS = 30.0
DRIVER = ("nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader")


def examine(file: Path | None, url: str | None, quick: bool, environ: Mapping[str, str]) -> list[Finding]:
    """All findings for the settings of `file` and the environment, and the running server at `url`.

    `quick` starts no engine and measures no disk. Where a server runs well no engine is started either, and that
    memory is short is no failure: both are the server's. Nothing is raised for what is wrong: that is found.
    """
    server = check_server(url) if url is not None else []
    serves = bool(server) and server[0].status == "ok"
    findings = [check_versions(), *check_vllm(quick or serves, environ)]
    found, settings = check_settings(file, environ)
    findings.append(found)
    if settings is not None:
        memory = check_memory(settings)
        findings.append(replace(memory, status="warn") if serves and memory.status == "fail" else memory)
        findings += check_disk(settings, 0 if quick else SPEED_BYTES)
        findings += check_redis(settings)
        findings += check_files(settings)
        findings += check_policies(settings)
    return findings + server


def check_versions() -> Finding:
    """Of what vLLM runs on; no judgement."""
    parts = [f"Python {platform.python_version()}", f"ragkv {_version('ragkv')}", f"torch {_version('torch')}"]
    if shutil.which(DRIVER[0]):
        cards = _cards()
        if not cards:
            return Finding("versions", "warn", f"{', '.join(parts)}; nvidia-smi fails", "look at the GPU's driver")
        names = ", ".join(
            f"{sum(c[1] == name for c in cards)} x {name}" for name in dict.fromkeys(c[1] for c in cards)
        )
        parts.append(f"driver {cards[0][0]} ({names})")
    return Finding("versions", "ok", ", ".join(parts))


def check_vllm(quick: bool, environ: Mapping[str, str], seconds: float = TRYOUT_SECONDS) -> list[Finding]:
    """Version, connector interface and KV layout of this environment's vLLM, tried in a process of its own."""
    command = [sys.executable, "-m", TRYOUT, *(["--quick"] if quick else [])]
    clean = {name: value for name, value in environ.items() if not name.startswith("RAGKV_")}
    status, out, errors = _run_alone(command, clean, seconds)
    findings = _read(out)
    if status is None:
        findings.append(Finding("vllm", "fail", f"no answer within {seconds:g} s", "look at what holds it up"))
    elif status:
        last = (errors.strip().splitlines() or ["without a word"])[-1][:300]
        todo = "start the same vLLM without ragkv: where that fails too, the cause lies there"
        findings.append(Finding("vllm", "fail", f"trying it ended with {_end(status)}: {last}", todo))
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


def check_server(url: str) -> list[Finding]:
    """A server that runs: whether ragkv is in it, and at work."""
    try:
        seen = scrape(url)
    except RagKVError as error:
        return [Finding("server", "fail", str(error), "start it, or name the right address with --url")]
    findings = [judge_server(url, seen)]
    for tier in sorted({labels["tier"] for labels, state in seen.samples("ragkv_tier_state") if state == 2}):
        reasons = ", ".join(seen.by("ragkv_tier_errors_total", "reason", tier=tier)) or "not told"
        todo = "mend it: the tier is tried again by itself"
        findings.append(Finding("server", "warn", f"tier {tier} rests after errors ({reasons})", todo))
    errors = seen.by("ragkv_errors_total", "kind")
    if sum(errors.values()):
        kinds = ", ".join(f"{kind} {count:g}" for kind, count in errors.items() if count)
        findings.append(
            Finding("server", "warn", f"faults treated as misses: {kinds}", "look into the server's log")
        )
    return findings


def judge_server(url: str, seen: Snapshot) -> Finding:
    """Whether a server's metrics say that ragkv serves KV there."""
    if not seen.knows("ragkv_lookups"):
        todo = "start it with `ragkv serve`, or with --kv-transfer-config as in the README"
        return Finding("server", "fail", f"{url} is a server without ragkv", todo)
    asked = seen.total("vllm:request_success_total")
    if asked and not seen.total("ragkv_capacity_bytes"):
        said = f"{url} answered {asked:g} requests and ragkv stood aside"
        return Finding("server", "fail", said, "its log says why: 'this engine runs without KV reuse'")
    hit = seen.total("ragkv_hit_tokens_total") + seen.total("ragkv_fused_tokens_total", kind="reused")
    prompt = seen.total("vllm:prompt_tokens_total")
    share = f", {hit / prompt:.0%} of {prompt:,.0f} prompt tokens from ragkv" if prompt else ""
    return Finding("server", "ok", f"{url}: {asked:g} requests{share}")


def _cards() -> list[list[str]]:
    """Driver and name of every GPU; none where nvidia-smi cannot tell."""
    try:
        asked = subprocess.run(DRIVER, capture_output=True, text=True, check=False, timeout=DRIVER_SECONDS)
    except subprocess.TimeoutExpired:
        return []
    cards = [line.split(", ", 1) for line in asked.stdout.strip().splitlines()]
    return [] if asked.returncode or any(len(card) < 2 for card in cards) else cards


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "?"


def _read(text: str) -> list[Finding]:
    return [Finding(**json.loads(line)) for line in text.splitlines()]


def _end(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"
