"""What can be read in an evening: files and functions of everything but the tests stay short."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("benchmarks", "config", "connectors", "examples", "kvstore", "policies", "scripts", "src/ragkv")
FILE_LINES, FUNCTION_LINES = 400, 50


def test_no_file_and_no_function_is_too_long():
    files = {file.resolve() for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")}
    assert len(files) > 150
    found = []
    for file in sorted(files):
        text = file.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > FILE_LINES:
            found.append(f"{file}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES:
                    found.append(f"{file}:{node.lineno}: {node.name} has {lines} lines")
    assert not found
