"""What the programs write and say: the demonstration's report and picture, the plan benchmark, `ragkv config`."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from ragkv.benchmarks.demo import Turn, draw, show, summarize
from ragkv.benchmarks.engine import Answer
from ragkv.benchmarks.internal.plan import run as run_plan
from ragkv.benchmarks.report import reusable_tokens


def turn(number, plain, ours, tokens=(1, 2), cached=0):
    def answer(ttft, given, hits):
        return Answer(ttft, tuple(given), "", sum(hits.values()), hits)

    hits = {"host": cached} if cached else {}
    return Turn(
        "NORTHWIND",
        number,
        [7] * 100,
        90,
        answer(plain, (1, 2), {}),
        answer(0.2, (1, 2), {}),
        answer(ours, tokens, hits),
    )


def test_the_demonstrations_report_and_picture(tmp_path):
    turns = [turn(1, 5.0, 5.5), turn(2, 5.0, 0.1, cached=81), turn(3, 7.0, 0.3, cached=90)]
    assert turns[1].as_json() == {
        "filing": "NORTHWIND",
        "turn": 2,
        "prompt_tokens": 100,
        "hit_tokens": {"host": 81},
        "ttft_s": 0.1,
        "plain_ttft_s": 5.0,
    }
    summary = summarize(turns)
    assert summary == {
        "cold_ttft_s": 5.5,
        "plain_cold_ttft_s": 5.0,
        "warm_ttft_s": pytest.approx(0.2),
        "prefix_hit_ttft_s": 0.2,
        "hit_fraction": pytest.approx(171 / 180),
        "outputs_equal": True,
    }
    assert not summarize([*turns, turn(4, 1.0, 1.0, tokens=(1, 3))])["outputs_equal"]
    draw(turns, summary, tmp_path / "out" / "demo.png")
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_demonstrations_table_fits_80_columns():
    console = Console(width=80, file=io.StringIO())
    long = dataclasses.replace(turn(2, 5.0, 0.1, cached=81), filing="NORTHWIND MARITIME HOLDINGS INCORPORATED")
    show(console, [turn(1, 5.0, 5.5), long], summarize([turn(1, 5.0, 5.5), long]))
    text = console.file.getvalue()
    assert all(cell in text for cell in ("81 host", "5000 ms", "100 ms", "50.0x")) and "…" not in text


def test_reusable_tokens_leave_out_the_last():
    assert reusable_tokens([1, 2, 3], [[1, 2, 9], [1, 5]]) == 2
    assert reusable_tokens([1, 2, 3], [[1, 2, 3, 4]]) == 2
    assert reusable_tokens([1, 2, 3], []) == 0


def test_the_plan_benchmark_writes_its_figures(tmp_path):
    file = tmp_path / "plan.json"
    report = run_plan(2000, 1000, file)
    assert json.loads(file.read_text()) == report
    assert report["chunks"] >= 1000 and report["plan_hit_s"] > 0 and report["plan_miss_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("check", "good.yaml"), 0, ("good.yaml", "Nothing to do.")),
        (("check", "bad.yaml"), 1, ("memory.capacity", "'lots'", "GiB")),
        (("check", "large.yaml"), 1, ("memory.capacity = 900TiB: allowed: at most what shared", "--shm-size")),
        (("check", "--config", "good.yaml"), 0, ("from RAGKV_MEMORY_POLICY, good.yaml", "Nothing to do.")),
        (("check", "good.yaml", "--config", "bad.yaml"), 1, ("allowed: one file",)),
        (("check", "disk.yaml"), 1, ("/dev/null/kv cannot be written to", "disk.path")),
        (("show", "--config", "good.yaml"), 0, ("memory.capacity", "2MiB", "RAGKV_MEMORY_POLICY")),
        (("show", "--file", "good.yaml"), 0, ("memory.capacity", "2MiB", "RAGKV_MEMORY_POLICY")),
        (("show", "--extra", "[]"), 1, ("--extra", "a JSON object")),
        (("show", "--extra", '{"redis": {"url": "redis://:hunter2@host"'), 1, ("--extra", "***@host")),
        (("show", "--extra", '{"redis": {"url": "redis://u:hunter2@host"}}'), 0, ("redis://u:***@host",)),
        (("show", "--extra", '{"redis": {"password": "hunter2"}}'), 1, ("redis.password = ***", "redis.url")),
        (("check", "redis.yaml"), 1, ("redis.yaml", "Connection refused", "redis: start the server")),
        (("check", "badredis.yaml"), 1, ("redis.url = ['redis://:***@host']",)),
    ],
)
def test_config_commands(tmp_path, arguments, code, words):
    for name, size in (("good", "2MiB"), ("bad", "lots"), ("large", "900TiB")):
        (tmp_path / f"{name}.yaml").write_text(f"memory: {{capacity: {size}}}\n")
    (tmp_path / "disk.yaml").write_text("memory.capacity: 2MiB\ndisk.path: /dev/null/kv\n")
    for name, url in (("redis", "redis://:hunter2@127.0.0.1:1"), ("badredis", "['redis://:hunter2@host']")):
        (tmp_path / f"{name}.yaml").write_text(f"memory: {{capacity: 2MiB}}\nredis:\n  url: {url}\n")
    program = Path(sys.executable).parent / "ragkv"
    done = subprocess.run(
        [str(program), "config", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
        | {"RAGKV_MEMORY_POLICY": "lfu", "COLUMNS": "200"},
    )
    assert done.returncode == code
    assert all(word in done.stdout + done.stderr for word in words), done
    assert "hunter2" not in done.stdout + done.stderr
