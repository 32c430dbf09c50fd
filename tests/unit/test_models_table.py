"""The table of models in the documentation is the list of models that tests/models tries."""

from pathlib import Path

from models.kinds import KINDS, WAYS

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "models.md"


def test_the_table_of_models_is_what_the_tests_try():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    assert rows == [
        "| model | layers | reuse |",
        "|---|---|---|",
        *(f"| {kind.name} | {kind.layers} | {kind.reuse} |" for kind in KINDS),
        "| way | reuse |",
        "|---|---|",
        *(f"| {way.name} | {way.reuse} |" for way in WAYS),
    ]
    assert all((TESTS / way.test).is_file() for way in WAYS)
