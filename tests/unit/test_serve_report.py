"""The serving report: which request counts where, percentiles, ratios of the same requests, table and picture."""

import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from ragkv.benchmarks import serve_picture
from ragkv.benchmarks.serve_report import percentiles, report, summarize, table
from serve_tools import as_report, played, sample


def test_percentiles_are_linear_and_say_of_how_many():
    assert percentiles([4.0, 1.0, 2.0, 3.0]) == pytest.approx({"p50": 2.5, "p95": 3.85, "p99": 3.97, "n": 4})
    assert percentiles([7.0]) == {"p50": 7.0, "p95": 7.0, "p99": 7.0, "n": 1}
    assert percentiles([]) == {"p50": None, "p95": None, "p99": None, "n": 0}


def test_each_kind_of_turn_counts_where_it_belongs():
    samples = [
        sample(turn=1, ttft=8.0, tpot=0.1),
        sample(turn=2, ttft=1.0, tpot=0.2),
        sample(turn=3, ttft=3.0, tpot=0.3, kind="passages"),
        sample(turn=4, ttft=50.0, tpot=0.4, kind="switch"),
        sample(turn=5, error="gone"),
        sample(session=1, turn=1, ttft=4.0, tokens=1, tpot=0.0),
    ]
    summary = summarize(played(samples=samples, wall=20.0, hits={"host": 300, "disk": 100}, memory=5))
    assert (summary["first_turn_ttft_s"]["p50"], summary["first_turn_ttft_s"]["n"]) == (6.0, 2)
    assert (summary["followup_ttft_s"]["p50"], summary["followup_ttft_s"]["n"]) == (2.0, 2)
    assert (summary["switch_ttft_s"]["p50"], summary["switch_ttft_s"]["n"]) == (50.0, 1)
    assert summary["tpot_s"]["n"] == summary["e2e_s"]["n"] == 5
    assert summary["e2e_s"]["p50"] == pytest.approx(4.2)  # 1.8, 4.0, 4.2, 8.4, 51.6
    assert (summary["requests"], summary["errors"]) == (6, 1)
    assert summary["requests_per_s"] == 5 / 20 and summary["output_tokens_per_s"] == 21 / 20
    assert summary["hit_tokens"] == {"host": 300, "disk": 100} and summary["hit_fraction"] == 0.4
    assert summary["peak_memory_bytes"] == 5
    assert len(summary["samples"]) == 6 and summary["samples"][4]["error"] == "gone"


def test_turns_are_told_by_number_without_switches():
    samples = [sample(session=n, turn=turn, ttft=n + turn, prompt=100 * turn) for n in (0, 1) for turn in (1, 2)]
    samples += [sample(session=2, turn=2, ttft=99.0, kind="switch"), sample(session=3, turn=2, error="gone")]
    turns = summarize(played(samples=samples))["turns"]
    assert list(turns) == ["1", "2"]
    assert (turns["1"]["ttft_s"]["p50"], turns["2"]["ttft_s"]["p50"]) == (1.5, 2.5)
    assert (turns["2"]["ttft_s"]["n"], turns["2"]["errors"], turns["2"]["prompt_tokens"]) == (2, 1, 200)
    assert turns["2"]["e2e_s"]["n"] == 2


def test_a_system_that_did_nothing_has_no_figures_and_no_faults():
    summary = summarize(played(samples=[], wall=0.0, hits={}, prompt_tokens=0))
    assert summary["hit_fraction"] is None and summary["requests_per_s"] is None
    assert summary["followup_ttft_s"]["n"] == summary["errors"] == 0


def test_ratios_are_medians_of_the_same_requests_against_the_baseline():
    plain = [sample(session=n, turn=2, ttft=float(10 ** (n + 1))) for n in range(3)]
    ours = [sample(session=n, turn=2, ttft=10 ** (n + 1) * factor) for n, factor in enumerate((0.5, 0.1, 0.2))]
    ours += [sample(session=3, turn=2, ttft=5.0), sample(session=4, turn=2, error="gone")]
    plain += [sample(session=4, turn=2, ttft=5.0), sample(turn=1, ttft=5.0)]
    plain += [replace(sample(session=5, turn=2, ttft=9.0), error="late")]
    ours += [sample(session=5, turn=2, ttft=1.0)]
    systems = played("plain", plain), played("ragkv", reversed(ours))
    first, second = report({}, {}, systems)["systems"]
    assert second["ratios"]["followup_ttft"] == pytest.approx(0.2)
    assert second["ratios"]["first_turn_ttft"] is second["ratios"]["switch_ttft"] is None
    assert first["ratios"]["followup_ttft"] == first["ratios"]["first_turn_ttft"] == 1
    turned = report({}, {}, systems, "ragkv")
    assert turned["baseline"] == "ragkv"
    assert turned["systems"][0]["ratios"]["followup_ttft"] == pytest.approx(5.0)


def test_the_report_is_strict_json():
    made = as_report(
        played(), config={"rate": math.inf}, environment={"cores": 2}, skipped=[{"system": "x", "why": "y"}]
    )
    read = json.loads(json.dumps(made, allow_nan=False))
    assert read == made and read["config"]["rate"] is None
    assert set(read) == {"environment", "config", "baseline", "systems", "skipped"}
    assert read["skipped"] == [{"system": "x", "why": "y"}]


def shown(made):
    console = Console(width=120, record=True)
    with console.capture() as captured:
        console.print(table(made))
    return captured.get()


def test_the_table_shows_times_ratios_hits_errors_and_what_was_skipped():
    plain = played("plain", [sample(turn=1, ttft=4.0), sample(turn=2, ttft=8.0)], hits={})
    ours = played(
        "ragkv",
        [sample(turn=1, ttft=4.0), sample(turn=2, ttft=0.25), sample(turn=3, error="[x] gone")],
        hits={"host": 12345, "disk": 0},
        prompt_tokens=24690,
        memory=3 * 2**29,
    )
    lines = shown(as_report(plain, ours, skipped=[{"system": "lmcache", "why": "none [here]"}])).splitlines()
    (row,) = [line for line in lines if "ragkv" in line and "0.03 x" in line]
    assert row.count("0.250") == 3
    (work,) = [line for line in lines if "12,345" in line]
    assert all(text in work for text in ("host 12,345", "50.0%", "1.50 GiB", "1 of 3")) and "disk" not in work
    assert "skipped: lmcache: none [here]" in lines and "ragkv: 1 x [x] gone" in lines
    assert not any("switch" in line for line in lines)


def test_the_table_of_nothing_but_errors_stands():
    assert "1 of 1" in shown(as_report(played(samples=[sample(error="gone")])))


# --- the picture ---


def test_the_picture_is_a_png_of_every_system_that_answered(tmp_path):
    samples = [sample(session=n, turn=turn, ttft=1.0 / turn) for n in range(3) for turn in (1, 2, 3)]
    made = as_report(played("plain", samples), played("mine", samples), played("broken", [sample(error="gone")]))
    file = tmp_path / "deep" / "serve.png"
    serve_picture.draw(made, file)
    assert file.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"serve\.png: no request went well"):
        serve_picture.draw(as_report(played(samples=[sample(error="gone")])), file)


def test_the_lines_are_the_medians_and_the_whiskers_end_at_p95(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(serve_picture, "save_figure", lambda figure, path: drawn.append(figure))
    samples = [sample(session=n, turn=turn, ttft=(n + 1) / turn) for n in range(3) for turn in (1, 2)]
    serve_picture.draw(as_report(played("plain", samples), played("ragkv", samples)), tmp_path / "x.png")
    left, right = drawn[0].axes
    for lines in left.containers:
        data, _, (whiskers,) = lines.lines
        assert list(data.get_ydata()) == [2.0, 1.0]
        assert [segment[1][1] for segment in whiskers.get_segments()] == pytest.approx([2.9, 1.45])
    assert len(left.containers) == 2
    assert [text.get_text() for text in left.texts] == ["plain", "ragkv"]
    assert [bar.get_width() for bar in right.patches] == [0.6, 0.6]
