"""`ragkv doctor`: whether ragkv works here, and if not, why."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ragkv.checks import SPEED_BYTES, Finding, check_vllm, examine_settings
from ragkv.errors import RagKVError
from ragkv.options import ConfigOption, JsonFlag, print_json
from ragkv.scrape import Snapshot, scrape
from ragkv.shown import printable

EPILOG = """Examples:\n
  ragkv doctor\n
  ragkv doctor --config ragkv.yaml --url http://localhost:8000\n
  ragkv doctor --quick --json\n
Exit status: 1 when something prevents reuse, 0 when nothing does; warnings do not count."""
MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "bold red")}
DRIVER = ("nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader")
DRIVER_SECONDS = 30.0


def doctor(
    config: ConfigOption = None,
    url: Annotated[str | None, typer.Option(help="Look at this running server too.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Start no small engine, measure no disk.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Check by trying: vLLM, its KV layout, shared memory, disk, Redis; and say what to do."""
    with Console(stderr=True).status("checking" if quick else "checking, with a small engine: a minute or less"):
        findings = examine(config, url, quick, os.environ)
    if as_json:
        print_json([asdict(each) for each in findings])
    else:
        show(findings)
    if any(each.status == "fail" for each in findings):
        raise typer.Exit(1)


def show(findings: Sequence[Finding]) -> None:
    """Print what was found, then what is to be done."""
    console = Console()
    table = Table.grid(padding=(0, 2))
    for each in findings:
        mark, style = MARKS[each.status]
        table.add_row(Text(mark, style), each.check, Text(printable(each.said)))
    console.print(table)
    todo = [each for each in findings if each.status != "ok" and each.todo]
    console.print("\nTo do:" if todo else "\nNothing to do.")
    for each in todo:
        console.print(Text(printable(f"{each.check}: {each.todo}"), MARKS[each.status][1]), soft_wrap=True)


def examine(file: Path | None, url: str | None, quick: bool, environ: Mapping[str, str]) -> list[Finding]:
    """All findings for the settings of `file` and the environment, and for the running server at `url`.

    `quick` starts no engine and measures no disk. Where a server runs well, no engine is started either, and too
    little free memory is a warning, since the server holds it. Faults are findings: nothing is raised for them.
    """
    server = check_server(url) if url is not None else []
    serves = bool(server) and server[0].status == "ok"
    return [
        check_versions(),
        *check_vllm(quick or serves, environ),
        *examine_settings(file, environ, 0 if quick else SPEED_BYTES, beside_server=serves),
        *server,
    ]


def check_versions() -> Finding:
    """What vLLM runs on; the only fault is a GPU driver that does not answer."""
    parts = [f"Python {platform.python_version()}", *(f"{name} {_version(name)}" for name in ("ragkv", "torch"))]
    if shutil.which(DRIVER[0]):
        cards = _cards()
        if not cards:
            return Finding("versions", "warn", f"{', '.join(parts)}; nvidia-smi fails", "look at the GPU's driver")
        counts = Counter(name for _, name in cards)
        parts.append(f"driver {cards[0][0]} ({', '.join(f'{count} x {name}' for name, count in counts.items())})")
    return Finding("versions", "ok", ", ".join(parts))


def check_server(url: str) -> list[Finding]:
    """A server that runs: whether ragkv is in it, and at work."""
    try:
        seen = scrape(url)
    except RagKVError as error:
        return [Finding("server", "fail", str(error), "start it, or name the right address with --url")]
    findings = [judge_server(url, seen)]
    for tier in sorted({labels["tier"] for labels, state in seen.samples("ragkv_tier_state") if state == 2}):
        reasons = ", ".join(seen.by("ragkv_tier_errors_total", "reason", tier=tier)) or "not told"
        todo = "repair it: the tier is tried again by itself"
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
