"""Dashboard, rules, and the folder that `ragkv observe up` writes."""

import itertools
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import ragkv.config
from prometheus_tools import Prometheus, filled_in, needs_prometheus, needs_promtool, promtool
from ragkv.cli import app, observe
from ragkv.cli.top_figures import STATES
from ragkv.errors import RagKVError
from ragkv.kvstore.metrics import METRICS
from ragkv.scrape import parse

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = Path(ragkv.config.__file__).parent / "observe"
MODEL = json.loads((SHIPPED / "dashboard.json").read_text())
VARIABLES = {"datasource", "model_name", "instance", "engine", "price"}
BUILT_IN = {"__rate_interval", "__range"}
UNITS = {"bytes", "Bps", "cps", "currencyUSD", "decmbytes", "percent", "percentunit", "reqps", "s", "short"}
UNITS |= {"si:tok/s"}
COLUMNS = 24  # of Grafana's grid


def grids():
    """The panels of the first screen with all rows, and those of each closed row."""
    closed = [row for row in MODEL["panels"] if row["type"] == "row" and row["collapsed"]]
    return [MODEL["panels"], *(row["panels"] for row in closed)]


PANELS = [panel for grid in grids() for panel in grid if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
ALERTS = [
    rule
    for group in yaml.safe_load((SHIPPED / "rules.yml").read_text())["groups"]
    for rule in group["rules"]
    if "alert" in rule
]


def up(folder, *options):
    return CliRunner().invoke(app, ["observe", "up", str(folder), *options])


# --- the dashboard ---


def test_a_folder_of_default_values_holds_the_file_as_it_ships():
    assert observe.files()["dashboard.json"] == (SHIPPED / "dashboard.json").read_text()


def test_ids_are_unique():
    numbers = [panel["id"] for grid in grids() for panel in grid]
    assert len(numbers) == len(set(numbers)) > 40


@pytest.mark.parametrize("grid", grids())
def test_panels_lie_inside_the_grid_and_on_none_other(grid):
    for panel in grid:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= COLUMNS and place["w"] > 0 < place["h"]
    for one, other in itertools.combinations([panel["gridPos"] for panel in grid], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above


def test_a_screen_holds_what_is_open():
    opened = [panel for panel in MODEL["panels"] if panel["type"] != "row"]
    assert max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in opened) <= 24
    assert [row["collapsed"] for row in MODEL["panels"] if row["type"] == "row"] == [False, *[True] * 7]


def test_every_panel_says_what_it_shows():
    for panel in PANELS:
        assert panel["title"] and panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all(target["expr"] and target["datasource"] == panel["datasource"] for target in panel["targets"])
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0


def test_a_state_is_called_what_its_metric_means():
    """The gate's 1 was once called as a breaker's."""
    called = {}
    for panel in PANELS:
        for mapping in panel["fieldConfig"]["defaults"].get("mappings", ()):
            called[panel["title"]] = [shown["text"] for _, shown in sorted(mapping["options"].items())]
    assert called["Gate: declining"] == ["loading", "declining"]
    assert called["Breakers"] == list(STATES.values())


def test_queries_use_the_variables_there_are():
    assert {variable["name"] for variable in MODEL["templating"]["list"]} == VARIABLES
    used = {name for expression in EXPRESSIONS for name in re.findall(r"\$(\w+)", expression)}
    assert used == VARIABLES - {"datasource"} | BUILT_IN


def test_every_query_picks_the_servers():
    """Each selector, but for those of exporters that know no model or engine."""
    selectors = re.findall(r"((?:ragkv_|vllm:)\w+)(\{[^}]*\})?", " ".join(EXPRESSIONS))
    assert len(selectors) > 80
    for _, matchers in selectors:
        assert all(f'{name}=~"${name}"' in matchers for name in ("model_name", "instance", "engine"))


def test_the_dashboard_asks_for_metrics_that_exist():
    names = {name for expression in EXPRESSIONS for name in observe.metrics_in(expression)}
    assert {name for name in names if name.startswith("ragkv_")} <= METRICS.keys()
    unseen = METRICS.keys() - names
    assert unseen == {"ragkv_lookups_total", "ragkv_lookup_tokens_total", "ragkv_used_pages"} | {
        "ragkv_turn_requests_total"
    }, "a new metric belongs on the dashboard, or here"


SUM = re.compile(
    r"by \(([\w, ]+)\) \(\s*(?:(?:rate|increase|max_over_time)\()?"
    r"(ragkv_\w+?)(?:_bucket|_count)?(?:\{([^}]*)\})?[\[)\s]"
)


@pytest.mark.parametrize(
    "text", [" ".join(EXPRESSIONS), (SHIPPED / "rules.yml").read_text()], ids=["panels", "rules"]
)
def test_sums_and_matchers_name_labels_that_exist(text):
    """With a label that is not there a sum would still have a value: 0, or that of all."""
    sums = SUM.findall(text)
    for labels, name, matchers in sums:
        known = {*METRICS[name].labels, "model_name", "instance", "engine", "le"}
        asked = {*labels.split(", "), *re.findall(r"(\w+)[=!]", matchers)}
        assert asked <= known, (name, asked - known)
    assert len(sums) > 9
    for name, label, value in re.findall(r'(ragkv_\w+)\{[^}]*?(\w+)="(\w+)"', text):
        assert value in METRICS[name].text, (name, label, value)


def test_the_price_is_a_box_to_type_into():
    model = json.loads(observe.files(price=0.25)["dashboard.json"])
    (box,) = (each for each in model["templating"]["list"] if each["name"] == "price")
    assert box["type"] == "textbox" and box["current"]["value"] == box["query"] == "0.25"


# --- the rules ---


def test_the_rules_ask_for_metrics_that_exist():
    needed = observe.needed()
    asked = {name for name, who in needed.items() if any(each.startswith("alert") for each in who)}
    assert {name for name in asked if name.startswith("ragkv_")} <= METRICS.keys() and len(asked) > 8


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_says_what_is_wrong_and_what_to_do(alert):
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    assert "$labels.instance" in alert["annotations"]["summary"]
    assert alert["annotations"]["description"].endswith(".")
    assert f"| `{alert['alert']}` |" in (ROOT / "docs" / "dashboards.md").read_text()


@needs_promtool
def test_promtool_likes_rules_and_configuration(tmp_path):
    observe.write(tmp_path, observe.files(["a:1", "[::1]:2"], ["b:9400"]))
    for arguments in (
        ("check", "rules", "--lint=all", "--lint-fatal", "rules.yml"),
        ("check", "config", "prometheus.yml"),
    ):
        good, said = promtool(*arguments, folder=tmp_path)
        assert good, said


def rule_tests(folder, rules):
    shutil.copy(Path(__file__).with_name("observe_rules_test.yml"), folder)
    (folder / "rules.yml").write_text(rules)
    return promtool("test", "rules", "observe_rules_test.yml", folder=folder)


@needs_promtool
def test_alerts_fire_when_they_should_and_not_otherwise(tmp_path):
    good, said = rule_tests(tmp_path, (SHIPPED / "rules.yml").read_text())
    assert good, said


@needs_promtool
@pytest.mark.parametrize("change", ["vector(0) > 1", "({}) or vector(1)"], ids=["never", "always"])
def test_every_alert_is_tried(tmp_path, change):
    """Alerts that never fire, and alerts that always do, are found out, each of them."""
    rules = yaml.safe_load((SHIPPED / "rules.yml").read_text())
    for rule in (rule for group in rules["groups"] for rule in group["rules"] if "alert" in rule):
        rule["expr"] = change.format(rule["expr"])
    good, said = rule_tests(tmp_path, yaml.safe_dump(rules))
    assert not good
    assert {alert["alert"] for alert in ALERTS} == set(re.findall(r"alertname: ?(\w+)", said))


# --- the folder ---


def test_up_writes_a_folder_that_is_whole(tmp_path):
    folder = tmp_path / "watch"
    said = up(
        folder, "--target", "gpu1:8000", "--target", "gpu2:8000", "--gpu-target", "gpu1:9400", "--price", "0.5"
    )
    assert said.exit_code == 0, said.output
    assert f"docker compose -f {folder}/compose.yaml up -d" in said.output
    assert "ragkv observe check --url http://gpu2:8000" in said.output
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    shipped = {path.relative_to(SHIPPED).as_posix() for path in SHIPPED.rglob("*") if path.is_file()}
    assert written == shipped
    assert yaml.safe_load((folder / "targets.yml").read_text()) == [{"targets": ["gpu1:8000", "gpu2:8000"]}]
    assert yaml.safe_load((folder / "gpu_targets.yml").read_text()) == [{"targets": ["gpu1:9400"]}]
    assert json.loads((folder / "dashboard.json").read_text()) == json.loads(
        observe.files(price=0.5)["dashboard.json"]
    )


def test_what_is_mounted_is_there(tmp_path):
    observe.write(tmp_path, observe.files())
    compose = yaml.safe_load((tmp_path / "compose.yaml").read_text())
    mounts = [mount for service in compose["services"].values() for mount in service["volumes"]]
    own = [mount.split(":")[0] for mount in mounts]
    for source in own:
        assert (tmp_path / source).exists() if source.startswith("./") else source in compose["volumes"]
    assert {"./", "./dashboard.json", "./grafana/datasources.yml", "./grafana/dashboards.yml"} <= set(own)
    assert all(re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", each["image"]) for each in compose["services"].values())
    (source,) = yaml.safe_load((tmp_path / "grafana/datasources.yml").read_text())["datasources"]
    assert (
        f"--web.listen-address={source['url'].removeprefix('http://')}"
        in compose["services"]["prometheus"]["command"]
    )
    scrape = yaml.safe_load((tmp_path / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scrape


def test_what_was_changed_is_not_overwritten_unless_forced(tmp_path):
    assert up(tmp_path).exit_code == 0
    assert "0 of them written" in up(tmp_path).output
    (tmp_path / "rules.yml").write_text("groups: []\n")
    (tmp_path / "targets.yml").unlink()
    said = up(tmp_path)
    assert said.exit_code == 1 and isinstance(said.exception, RagKVError)
    assert str(said.exception) == f"ragkv: {tmp_path}: rules.yml: there, and different; --force replaces them"
    assert not (tmp_path / "targets.yml").exists(), "all or nothing"
    assert up(tmp_path, "--force").exit_code == 0
    assert (tmp_path / "rules.yml").read_text() == (SHIPPED / "rules.yml").read_text()


def test_others_may_read_the_folder_whatever_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        observe.write(tmp_path / "watch", observe.files())
    finally:
        os.umask(before)
    for path in (tmp_path / "watch", *(tmp_path / "watch").rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644)


def test_a_folder_that_was_there_keeps_its_mode(tmp_path):
    tmp_path.chmod(0o700)
    (tmp_path / "grafana").mkdir(mode=0o700)
    assert up(tmp_path).exit_code == 0
    assert {path.stat().st_mode & 0o777 for path in (tmp_path, tmp_path / "grafana")} == {0o700}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--target", "http://a:8000"), "ragkv: --target = 'http://a:8000'; allowed: HOST:PORT"),
        (("--target", "a"), "ragkv: --target = 'a'; allowed: HOST:PORT"),
        (("--target", "a:70000"), "ragkv: --target = 'a:70000'; allowed: HOST:PORT"),
        (("--gpu-target", "a:0"), "ragkv: --gpu-target = 'a:0'; allowed: HOST:PORT"),
        (("--price", "-1"), "ragkv: --price = -1.0; allowed: a number from 0 on"),
        (("--price", "nan"), "ragkv: --price = nan; allowed: a number from 0 on"),
    ],
)
def test_what_cannot_be_is_named(tmp_path, options, said):
    done = up(tmp_path / "watch", *options)
    assert done.exit_code == 1 and str(done.exception) == said
    assert not (tmp_path / "watch").exists()


# --- what a server must have ---


def page(names):
    return "".join(f"# HELP {name} x\n# TYPE {name} {kind}\n" for name, kind in names)


def kind(name):
    return "counter" if name.endswith("_total") else "gauge"


def test_missing_metrics_are_named_with_who_asks(tmp_path, monkeypatch):
    needed = observe.needed()
    assert len(needed) > 40 and not any(name.startswith("DCGM") for name in needed)
    there = [(name, kind(name)) for name in needed]
    assert observe.missing(parse(page(there), 0.0), needed) == []
    lacking = [each for each in there if each[0] != "ragkv_tier_state"]
    monkeypatch.setattr("ragkv.cli.observe.scrape", lambda url: parse(page(lacking), 0.0))
    said = CliRunner().invoke(app, ["observe", "check"])
    assert said.exit_code == 1
    assert "ragkv_tier_state: missing; asked for by panel Overview / Tiers at rest" in said.output
    assert "alert RagKVTierAtRest" in said.output
    told = json.loads(CliRunner().invoke(app, ["observe", "check", "--json"]).output)
    assert list(told["missing"]) == ["ragkv_tier_state"] and set(told["needed"]) == set(needed)
    monkeypatch.setattr("ragkv.cli.observe.scrape", lambda url: parse(page(there), 0.0))
    assert CliRunner().invoke(app, ["observe", "check"]).exit_code == 0


def test_what_counts_as_a_metric():
    text = 'rate(vllm:x_seconds_bucket{a="b"}[5m]) / ragkv_y_total + ragkv:recorded:ratio + DCGM_FI_DEV_GPU_UTIL'
    assert observe.metrics_in(text) == {"vllm:x_seconds", "ragkv_y_total", "DCGM_FI_DEV_GPU_UTIL"}


# --- with a real Prometheus, and nothing to scrape ---


@needs_prometheus
def test_prometheus_takes_the_folder_and_answers_every_query(tmp_path):
    """Queries about what is not there give 0 or nothing, and no error."""
    observe.write(tmp_path / "watch", observe.files(["127.0.0.1:9"]))
    with Prometheus(tmp_path / "watch", tmp_path / "data") as prometheus:
        loaded = {rule["name"] for rule in prometheus.rules()}
        assert loaded >= {alert["alert"] for alert in ALERTS} and len(loaded) == len(ALERTS) + 3
        for expression in EXPRESSIONS:
            prometheus.query(filled_in(expression))
        down = prometheus.wait_for('up{job="vllm"} == 0')
        assert [each["metric"]["instance"] for each in down] == ["127.0.0.1:9"]
        for panel in ("Tiers at rest", "Faults", "Saved by ragkv"):
            (expression,) = (
                target["expr"] for each in PANELS if each["title"] == panel for target in each["targets"]
            )
            assert [float(each["value"][1]) for each in prometheus.query(filled_in(expression))] == [0.0]
