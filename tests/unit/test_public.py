"""Tests use what is public: none reaches into a private member, of ragkv or of what it stands on."""

import ast
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
OWN = ("self", "cls", "super()")
NAMED = ("setattr", "delattr", "getattr", "hasattr", "object", "multiple")  # what takes a member's name
ALLOWED = {
    "_replace": "a public method of Python's named tuples",
    "_registry": "vLLM's factory of connectors has no way to take a name back",
    "_get_tile_size": "vLLM's attention kernel takes its tiles from nowhere else",
    "_patch_lang": "Triton's interpreter patches its language by it alone",
    "_LangPatchScope": "what that returns",
    "_python_dispatch": "torch's documented TorchDispatchMode has no other home",
    "_is_mkldnn_bf16_supported": "torch answers that nowhere else",
}


def is_private(name):
    return name.startswith("_") and name != "_" and not name.startswith("__")


def private_members(tree):
    """(line, name) of every private member that is used, patched or imported, but those of a class of its own."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in OWN:
            names = [node.attr]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [each.name for each in node.names] + [getattr(node, "module", None) or ""]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in NAMED:
            names = [each.value for each in node.args if isinstance(each, ast.Constant)]
            names += [each.arg or "" for each in node.keywords]
        for name in (part for each in names if isinstance(each, str) for part in each.split(".")):
            if is_private(name):
                yield node.lineno, name


def test_no_test_reaches_into_a_private_member():
    found, used = [], set()
    files = sorted(TESTS.rglob("*.py"))
    assert len(files) > 150
    for file in files:
        for line, name in private_members(ast.parse(file.read_text(encoding="utf-8"))):
            used.add(name)
            if name not in ALLOWED:
                found.append(f"{file.relative_to(TESTS)}:{line}: {name}")
    assert not found
    assert used == set(ALLOWED), "what is not needed any more is not allowed any more"
