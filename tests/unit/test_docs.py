"""The documentation says what the code says."""

from pathlib import Path

import pytest

from ragkv.config.settings import HINT_NAMES as ALLOWED
from ragkv.kvstore.metrics import METRICS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_every_metric_stands_in_the_table(metric):
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    row = f"| `{metric.name}` | {metric.kind} | {labels} | {metric.text} |"
    assert row in (ROOT / "docs" / "metrics.md").read_text().splitlines()


def test_the_table_has_no_other_metric():
    lines = (ROOT / "docs" / "metrics.md").read_text().splitlines()
    assert {line.split("`")[1] for line in lines if line.startswith("| `")} == METRICS.keys()


@pytest.mark.parametrize("hint", ALLOWED)
def test_every_hint_is_described(hint):
    assert f"`{hint}`" in (ROOT / "docs" / "tiers.md").read_text()
