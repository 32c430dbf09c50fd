"""Grafana's JSON model of a dashboard, from rows of panels.

Written for Grafana 11 and 12, which bring older models up to date by themselves. Panels flow from left to right in
a grid of 24 columns; all rows but the first are closed, so that their queries wait until somebody opens them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

COLUMNS = 24
CHART_HEIGHT, STAT_HEIGHT = 8, 4  # a screen of 1080 lines shows about 24
SCHEMA = 39
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
LAST = {"calcs": ["lastNotNull"], "fields": "", "values": False}


class Query(NamedTuple):
    """An expression, and what its series are called: text with {{label}} in it."""

    expression: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """One panel, of `width` columns. `kind`: Grafana's name for it; `once`: asked for one value, not for a curve;
    `red_from`: a value is red from here on; `stacking`: "none", "normal" or "percent"; `states`: what each value
    of a state timeline is called, and its colour; `columns`: of a table, one for each query, with its unit; its
    rows are told apart by the label `rows`."""

    title: str
    unit: str
    text: str
    queries: Sequence[Query]
    width: int = 8
    kind: str = "timeseries"
    once: bool = False
    red_from: float | None = None
    stacking: str = "none"
    decimals: int | None = None
    states: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    columns: Sequence[tuple[str, str]] = ()
    rows: str = ""


class Variable(NamedTuple):
    """Chosen at the dashboard's top: from what `query` finds, all at first, or typed in where there is none."""

    name: str
    label: str
    query: str = ""
    default: str = ""


def dashboard(
    uid: str, title: str, rows: Sequence[tuple[str, Sequence[Panel]]], variables: Sequence[Variable]
) -> dict[str, Any]:
    """The whole."""
    panels: list[dict[str, Any]] = []
    y = number = 0
    for row, (name, members) in enumerate(rows):
        placed: list[dict[str, Any]] = []
        number += 1
        head = {"id": number, "type": "row", "title": name, "collapsed": row > 0, "panels": placed}
        panels.append({**head, "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": y}})
        y += 1
        for panel, place in zip(members, _places(members, y), strict=True):
            number += 1
            placed.append({"id": number, "gridPos": place, **_panel(panel)})
        if row == 0:
            y = max(each["gridPos"]["y"] + each["gridPos"]["h"] for each in placed)
            panels += placed
            placed.clear()
    return {
        "uid": uid,
        "title": title,
        "tags": ["vllm", "ragkv"],
        "schemaVersion": SCHEMA,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource(), *map(_variable, variables)]},
        "panels": panels,
    }


def text_of(model: dict[str, Any]) -> str:
    """As it is written into files."""
    return json.dumps(model, indent=2, ensure_ascii=False) + "\n"


def _places(panels: Sequence[Panel], y: int) -> list[dict[str, int]]:
    """Where each panel stands, from line `y` on: side by side, as long as there are columns."""
    places = []
    x = height = 0
    for panel in panels:
        if x + panel.width > COLUMNS:
            x, y, height = 0, y + height, 0
        tall = STAT_HEIGHT if panel.kind == "stat" else CHART_HEIGHT
        places.append({"h": tall, "w": panel.width, "x": x, "y": y})
        x, height = x + panel.width, max(height, tall)
    return places


def _panel(panel: Panel) -> dict[str, Any]:
    made: dict[str, Any] = {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": DATASOURCE,
        "targets": [_target(panel, index, query) for index, query in enumerate(panel.queries)],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _options(panel),
    }
    if panel.kind == "table":
        made["transformations"] = _joined(panel)
        made["fieldConfig"]["overrides"] = [_unit(name, unit) for name, unit in panel.columns]
    return made


def _target(panel: Panel, index: int, query: Query) -> dict[str, Any]:
    return {
        "refId": chr(ord("A") + index),
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": query.expression,
        "legendFormat": query.legend or "__auto",
        "format": "table" if panel.kind == "table" else "time_series",
        "instant": panel.once,
        "range": not panel.once,
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "text" if panel.kind == "stat" else "green", "value": None}]
    if panel.red_from is not None:
        steps.append({"color": "red", "value": panel.red_from})
    made: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.decimals is not None:
        made["decimals"] = panel.decimals
    if panel.kind == "timeseries":
        made["min"] = 0
        made["color"] = {"mode": "palette-classic"}
        made["custom"] = {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 10 if panel.stacking == "none" else 50,
            "showPoints": "auto",
            "stacking": {"mode": panel.stacking, "group": "A"},
        }
    elif panel.kind == "state-timeline":
        shown = {str(key): {"text": text, "color": color} for key, (text, color) in panel.states.items()}
        made["mappings"] = [{"type": "value", "options": shown}]
    elif panel.kind == "stat":
        made["color"] = {"mode": "thresholds"}
        made["noValue"] = "-"
    return made


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "stat":
        return {"reduceOptions": LAST, "graphMode": "none" if panel.once else "area", "colorMode": "value"}
    if panel.kind == "table":
        return {"showHeader": True, "sortBy": [{"displayName": panel.columns[0][0], "desc": True}]}
    legend = {"showLegend": True, "displayMode": "list", "placement": "bottom", "calcs": []}
    return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}


def _joined(panel: Panel) -> list[dict[str, Any]]:
    """The queries' tables side by side, with names for the columns and no times."""
    values = [f"Value #{chr(ord('A') + index)}" for index in range(len(panel.columns))]
    times = ["Time", *(f"Time {index + 1}" for index in range(len(panel.columns)))]
    names = dict(zip(values, (name for name, _ in panel.columns), strict=True))
    organize = {"excludeByName": dict.fromkeys(times, True), "renameByName": names}
    return [
        {"id": "joinByField", "options": {"byField": panel.rows, "mode": "inner"}},
        {"id": "organize", "options": organize},
    ]


def _unit(column: str, unit: str) -> dict[str, Any]:
    return {
        "matcher": {"id": "byName", "options": column},
        "properties": [{"id": "unit", "value": unit}],
    }


def _datasource() -> dict[str, Any]:
    named = {"name": "datasource", "label": "Prometheus", "type": "datasource"}
    return {**named, "query": "prometheus", "regex": "", "refresh": 1, "current": {}, "options": []}


def _variable(variable: Variable) -> dict[str, Any]:
    made: dict[str, Any] = {"name": variable.name, "label": variable.label}
    if not variable.query:
        value = {"text": variable.default, "value": variable.default}
        return {**made, "type": "textbox", "query": variable.default, "current": value, "options": [value]}
    return {
        **made,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": variable.query, "refId": variable.name},
        "definition": variable.query,
        "refresh": 2,  # whenever the time range changes
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }
