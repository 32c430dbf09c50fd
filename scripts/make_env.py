"""Make .venv, or bring it up to date: this package, editable, with vLLM's CPU build and every tool.

Run by `make env`. Standard library and the syntax of Python 3.7, so that an old one can say what is wrong.
"""

from __future__ import annotations

import ast
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".stamp"
WANTED = ".[cpu,demo,dev]"
OLDEST = (3, 11)

# What pip has been told about where packages come from: uv's name for it, and what stands between values.
PIP_TO_UV = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "cert": ("SSL_CERT_FILE", " "),
}


def fail(message: str) -> NoReturn:
    sys.exit("make env: " + message)


def answer(*command: Path | str) -> str | None:
    """The output of a command; None where it is missing or fails."""
    words = [str(word) for word in command]
    try:
        return subprocess.check_output(words, stderr=subprocess.DEVNULL, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None


def step(label: str, *command: Path | str, env: dict[str, str] | None = None) -> None:
    """Run a command, print one line with its time; where it fails, show it and its last lines, and stop."""
    words = [str(word) for word in command]
    output: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    print(f"{label:<60} ", end="", flush=True)
    start = time.monotonic()
    done = subprocess.run(words, cwd=str(ROOT), env=env, **output)
    print(f"{time.monotonic() - start:6.1f} s", flush=True)
    if done.returncode != 0:
        last = "\n".join("    " + line for line in done.stdout.splitlines()[-20:])
        fail("this command failed, with these last lines:\n  " + " ".join(words) + "\n" + last)


def ensure_python() -> None:
    """Carry on under a newer Python on PATH where this one is too old."""
    if sys.version_info < OLDEST:
        for name in ("python3.12", "python3.11", "python3.13"):
            if answer(name, "-c", "") is not None:
                os.execvp(name, [name, *sys.argv])
        fail(f"Python 3.11 or newer is needed, not {sys.version.split()[0]}: make env PYTHON=...")


def ensure_venv() -> tuple[int, int]:
    """Create .venv unless a working one stands there, and say which Python it has, as (3, 11)."""
    asked = answer(PYTHON, "-c", "import sys; print(sys.version_info[:2])")
    version: tuple[int, int] = ast.literal_eval(asked or "(0, 0)")
    if version < OLDEST:
        version = sys.version_info[:2]
        command = [sys.executable, "-m", "venv", "--clear", str(VENV)]
        if answer(sys.executable, "-c", "import ensurepip") is None:
            command.append("--without-pip")  # Debian and Ubuntu package it apart, and uv needs no pip.
        step("environment: .venv with Python {}.{}".format(*version), *command)
    return version


def ensure_uv() -> Path:
    """The uv to install with: in .venv, else on PATH, else in a hidden folder."""
    inside, hidden = VENV / "bin" / "uv", ROOT / ".uv" / "bin" / "uv"
    pip_install = ("-m", "pip", "install", "--quiet")
    if not inside.exists() and answer(PYTHON, "-m", "pip", "--version"):
        step("installer: uv in .venv", PYTHON, *pip_install, "uv")
    if inside.exists():
        return inside
    if answer("uv", "--version"):
        return Path(shutil.which("uv") or "uv")
    if not hidden.exists():
        if not answer(sys.executable, "-m", "pip", "--version"):
            fail("this Python has neither ensurepip nor pip, and there is no uv: apt install python3-venv")
        step("installer: uv in .uv", sys.executable, *pip_install, "--target", ROOT / ".uv", "uv")
    return hidden


def pip_settings() -> dict[str, list[str]]:
    """pip's settings named in PIP_TO_UV, each a list of words; the environment goes before the files."""
    command = ("-m", "pip", "config", "list")
    listing = answer(PYTHON, *command) or answer(sys.executable, *command) or ""
    lines = dict(line.split("=", 1) for line in listing.splitlines() if "=" in line)
    settings = {}
    for section in ("global", "install", ":env:"):
        for name in PIP_TO_UV:
            if f"{section}.{name}" in lines:
                settings[name] = ast.literal_eval(lines[f"{section}.{name}"]).split()
    return settings


def local_torch(folders: list[str], version: tuple[int, int]) -> Path | None:
    """A wheel of torch that vLLM's CPU build can use, in pip's own folders of wheels; None where none is."""
    build = "torch-*" if sys.platform == "darwin" else "torch-*+cpu"
    pattern = "{}-cp{}{}-*_{}.whl".format(build, *version, platform.machine())
    for folder in folders:
        for wheel in Path(folder.replace("file://", "", 1)).expanduser().glob(pattern):
            return wheel
    return None


def installing() -> dict[str, str]:
    """Variables by which uv takes packages from where pip would."""
    settings = pip_settings()
    environment = {"UV_HTTP_TIMEOUT": "180"}
    for name, words in settings.items():
        variable, separator = PIP_TO_UV[name]
        environment[variable] = separator.join(words)
    if "extra-index-url" in settings:  # As pip does: the best version from any index that the user named.
        environment["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return environment


def main() -> None:
    ensure_python()
    start = time.monotonic()
    if not (ROOT / "src" / "ragkv" / "policies").is_dir():
        fail("this checkout has lost its symbolic links: git config core.symlinks true, then check out again")
    version = ensure_venv()
    STAMP.unlink(missing_ok=True)
    uv = ensure_uv()
    wheel = local_torch(pip_settings().get("find-links", []), version)
    install = ["pip", "install", "--python", str(PYTHON), "--editable", WANTED]
    if wheel:
        print(f"torch: local wheel {wheel.name} from pip's find-links")
        install.append("--no-sources")
    else:  # By [tool.uv.sources] in pyproject.toml, which takes torch alone from there.
        print("torch: CPU build from https://download.pytorch.org/whl/cpu")
    step("packages: " + WANTED, uv, *install, env={**installing(), **os.environ})
    STAMP.touch()
    print(f"ready: .venv, in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
