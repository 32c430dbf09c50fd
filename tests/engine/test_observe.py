"""Dashboard, rules and documentation against a real server under load, scraped by a real Prometheus."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from observe_load import DOCUMENTS, drive
from prometheus_tools import Prometheus, filled_in, needs_prometheus
from ragkv.cli import app, observe
from ragkv.scrape import scrape

ROOT = Path(__file__).resolve().parents[2]
PANELS = {
    f"{panel.row} / {panel.title}": panel
    for panel in observe.panels(json.loads(observe.shipped()["dashboard.json"]))
}
NEED_A_GPU = {"Engine and GPU / GPU utilisation", "Engine and GPU / GPU memory"}


@dataclass
class Watched:
    """A Prometheus that has seen a server under load, which began `since` (seconds, monotonic)."""

    prometheus: Prometheus
    since: float

    def values(self, panel):
        """For each query of a panel its series: labels, and the values that are numbers."""
        seconds = time.monotonic() - self.since
        window = math.ceil(seconds)
        for query in PANELS[panel].queries:
            found = self.prometheus.series(filled_in(query, window), seconds)
            yield [(labels, [value for value in values if math.isfinite(value)]) for labels, values in found]

    def most(self, panel, query=0, **labels):
        """The greatest value of a panel's series of these labels."""
        found = list(self.values(panel))[query]
        return max(max(values) for has, values in found if values and labels.items() <= has.items())


@pytest.fixture(scope="module")
def watched(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("watch")
    said = CliRunner().invoke(app, ["observe", "up", str(folder), "--target", server.url.removeprefix("http://")])
    assert said.exit_code == 0, said.output
    with Prometheus(folder, tmp_path_factory.mktemp("data")) as prometheus:
        since = time.monotonic()
        prometheus.wait_for_scrapes()
        drive(server.url)
        prometheus.wait_for_scrapes()
        yield Watched(prometheus, since)


def test_the_server_has_what_dashboard_and_rules_ask_for(server):
    said = CliRunner().invoke(app, ["observe", "check", "--url", server.url])
    assert said.exit_code == 0, said.output


def test_the_server_has_what_the_documentation_names(server):
    texts = [path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    names = {name for text in texts for name in observe.metrics_in(text)}
    assert len(names) > 30
    found = scrape(server.url)
    assert [name for name in observe.missing(found, names) if not name.startswith(observe.GPU_PREFIX)] == []


@needs_prometheus
@pytest.mark.parametrize("panel", PANELS)
def test_every_query_of_a_panel_has_data(watched, panel):
    for query, series in zip(PANELS[panel].queries, watched.values(panel), strict=True):
        if panel in NEED_A_GPU:
            assert "DCGM" in query and not series
        else:
            assert any(values for _, values in series), query


@needs_prometheus
def test_what_was_done_is_seen(watched):
    assert 0 < watched.most("Overview / TTFT, median") <= watched.most("Overview / TTFT, p99")
    assert 0.3 < watched.most("Overview / Reused from ragkv") < watched.most("Overview / Prompt reused") < 1
    assert watched.most("Overview / Saved by ragkv") > 0
    assert watched.most("Overview / Faults") > 0.9, "hints that cannot be"
    for tier in ("memory", "disk"):
        assert watched.most("Overview / Prompt tokens by source", 1, tier=tier) > 0
    assert watched.most("Overview / Prompt tokens by source", 2) > 0, "fused"
    for turn in ("2", "3"):
        assert watched.most("Overview / Reuse by turn of the conversation", turn=turn) > 0.5
    assert watched.most("Tiers / Removed chunks", tier="memory", reason="capacity") > 0
    assert watched.most("Fusion / Tokens by kind", kind="recomputed") > 0
    names = {
        labels["document"] for labels, _ in next(watched.values("Documents / Documents with the largest savings"))
    }
    assert names >= {f"filing {number}" for number in range(DOCUMENTS)}


@needs_prometheus
def test_prometheus_can_evaluate_the_rules(watched):
    watched.prometheus.wait_for("ragkv:reused:ratio30m")
    rules = watched.prometheus.rules()
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []
