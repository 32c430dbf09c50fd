"""The shell commands that README and docs show, and whether `ragkv` knows what they ask it for.

A command stands in a block (indented or fenced) or, for ragkv's own, between backquotes in the text. In a block in
which any line begins with a known program, every line but comments must. A command that no test can run says so
in a comment at its end, or in a comment line at the head of its block: `# needs a GPU`, `# needs Docker`.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import typer

from ragkv.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = {
    *("ragkv", "vllm", "lmcache", "make", "python", "pip", "uv", "git", "cd", "source", "export"),
    *("curl", "docker", "kubectl", "prometheus", "promtool", "printf", "env"),
}
MARK = re.compile(r"#.*\bneeds (a GPU|Docker|the network|a server started)")
_ASSIGNMENT = re.compile(r"[A-Z_][A-Z0-9_]*=")
_FENCE = re.compile(r"^( *)(```+|~~~+)")
SHELL = ("sh", "bash", "shell", "console")


@dataclass(frozen=True)
class Command:
    """`text` without its comment. `marked`: it says what it needs that no test has. `inline`: from the text."""

    page: str
    line: int
    text: str
    marked: bool = False
    inline: bool = False

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"

    @property
    def words(self) -> list[str]:
        """Its words, without variables before it."""
        words = shlex.split(self.text)
        while words and _ASSIGNMENT.match(words[0]):
            words.pop(0)
        return words

    @property
    def variables(self) -> list[str]:
        """Names of the variables that it sets."""
        return [word.split("=")[0] for word in shlex.split(self.text) if _ASSIGNMENT.match(word)]


def commands(path: Path) -> list[Command]:
    """All of a page."""
    found = []
    lines = path.read_text(encoding="utf-8").splitlines()
    inside = set()
    for start, language, block in _blocks(lines):
        inside.update(range(start, start + len(block)))
        found += _of_block(path.name, start, language, block)
    for number, line in enumerate(lines):
        if number not in inside:
            for text in re.findall(r"`(ragkv [^`]+)`", line):
                found.append(Command(path.name, number + 1, text, inline=True))
    return found


def _blocks(lines: list[str]) -> list[tuple[int, str, list[str]]]:
    """First line (from 0), language and lines of every block of code."""
    blocks, number = [], 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        start = number
        if fence:
            language = lines[number].strip("`~ ")
            number += 1
            while number < len(lines) and not lines[number].strip().startswith(fence[2]):
                number += 1
            blocks.append((start + 1, language, lines[start + 1 : number]))
        elif lines[number].startswith("    ") and (number == 0 or not lines[number - 1].strip()):
            while number < len(lines) and (lines[number].startswith("    ") or not lines[number].strip()):
                number += 1
            blocks.append((start, "", lines[start:number]))
            continue
        number += 1
    return blocks


def _of_block(page: str, start: int, language: str, block: list[str]) -> list[Command]:
    if language and language not in SHELL:
        return []
    texts, number = [], 0
    while number < len(block):
        line, text = number, block[number].strip()
        while text.endswith("\\") and number + 1 < len(block):
            number += 1
            text = f"{text[:-1].rstrip()} {block[number].strip()}"
        texts.append((start + line + 1, text))
        number += 1
    if language not in SHELL and not any(_program(text) in PROGRAMS for _, text in texts):
        return []
    whole = any(text.startswith("#") and MARK.search(text) for _, text in texts[:1])
    return [
        Command(page, line, _without_comment(text), whole or bool(MARK.search(text)))
        for line, text in texts
        if text and not text.startswith("#")
    ]


def _program(text: str) -> str:
    words = [word for word in text.split() if not _ASSIGNMENT.match(word)]
    return words[0] if words and not text.startswith("#") else ""


def _without_comment(text: str) -> str:
    """Up to a # that stands behind a space and outside quotes."""
    quote = ""
    for at, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter == "#" and at and text[at - 1].isspace():
            return text[:at].rstrip()
    return text


def unknown(words: list[str]) -> str | None:
    """What ragkv does not know of a command line's words, of its commands and options; None: all is well.
    A synopsis may stand there too: [--option VALUE], and `ls | show KEY` for commands of one group."""
    words = [word if word.startswith(("{", "[{")) else word.strip("[]") for word in words]
    rest = words[1:]
    group = command = typer.main.get_command(app)
    while rest:
        word, *rest = rest
        if word == "|" and hasattr(group, "commands"):
            command = group
        elif hasattr(command, "commands") and not word.startswith("-"):
            if word not in command.commands:
                return f"no command {word!r}, only {', '.join(command.commands)}"
            group, command = command, command.commands[word]
        elif word == "--":
            return None
        elif word.startswith("--"):
            names = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
            passed_on = command.context_settings.get("ignore_unknown_options")
            if word.split("=")[0] not in names | {"--help"} and not passed_on:
                return f"no option {word!r}"
    return None
