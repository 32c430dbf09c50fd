"""`ragkv simulate` from end to end: its report, table and picture, and one clear line for bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ragkv.benchmarks.compared import COMPARED
from ragkv.benchmarks.simulate import run
from ragkv.benchmarks.simulate_plan import make_plan
from ragkv.errors import ConfigError
from ragkv.kvstore.trace import TraceWriter
from ragkv.policies import ADMISSIONS


@pytest.fixture
def mooncake(tmp_path):
    """Three requests over ten unique blocks; two blocks could hit."""
    path = tmp_path / "mooncake.jsonl"
    requests = [[0, 1, 2, 3, 4], [0, 5, 6], [0, 7, 8, 9]]
    path.write_text("".join(json.dumps({"timestamp": 0, "hash_ids": ids}) + "\n" for ids in requests))
    return path


@pytest.fixture
def recorded(tmp_path):
    """What an engine recorded: two unique chunks of 300 tokens together."""
    path = tmp_path / "recorded.jsonl"
    writer = TraceWriter(path)
    for _ in range(4):
        writer.record(0.0, [(b"a" * 16, 100), (b"b" * 16, 200)])
    writer.close()
    return path


def plan(source, *, policies=None, sizes=None, admissions="always", semantics="prefix", tiers=None, block=None):
    return make_plan(str(source), policies, sizes, admissions, semantics, tiers, block)


def test_the_report(mooncake, tmp_path):
    report = run(str(mooncake), policies="lru,lfu", sizes="50%,10", json_file=tmp_path / "out" / "report.json")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    results = report.pop("results")
    assert report == {"trace": str(mooncake), "requests": 3, "unique_blocks": 10}
    found = [(each["policy"], each["admission"], each["size"], each["hit_rate"]) for each in results]
    assert found == [
        (policy, admission, size, pytest.approx(2 / 12))
        for policy, admission in (("lru", "always"), ("lfu", "always"), ("clairvoyant", "bypass"))
        for size in ("50%", "10")
    ]
    assert [each["capacity"] for each in results] == [5, 10] * 3
    assert all(each["semantics"] == "prefix" and each["unit"] == "blocks" for each in results)
    assert all(("references_per_s" in each) == (each["policy"] != "clairvoyant") for each in results)


def test_every_admission_has_its_own_results(mooncake):
    everything = run(str(mooncake), sizes="50%")["results"]
    assert {each["policy"] for each in everything} == {*COMPARED, "clairvoyant"}, (
        "all policies where none is named"
    )
    names = sorted(ADMISSIONS)
    results = run(str(mooncake), policies="lru", sizes="50%", admissions=",".join(names))["results"]
    assert [each["admission"] for each in results] == [*names, "bypass"]


def test_content_semantics(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"hash_ids": [1, 2]}\n{"hash_ids": [2, 1]}\n')
    for semantics, unique, rate in (("prefix", 4, 0.0), ("content", 2, 0.5)):
        report = run(str(path), policies="lru", sizes="100%", semantics=semantics)
        assert report["unique_blocks"] == unique
        assert [each["hit_rate"] for each in report["results"]] == [rate, rate]


def test_sizes_of_a_recorded_trace_are_tokens(recorded):
    report = run(str(recorded), policies="lru", sizes="100%,299,34%")
    assert report["unique_blocks"] == 2
    lru = report["results"][:3]
    assert [(each["capacity"], each["unit"], each["hit_rate"]) for each in lru] == [
        (300, "tokens", 6 / 8),
        (299, "tokens", 3 / 8),
        (102, "tokens", 3 / 8),
    ]


def test_tiers(mooncake, tmp_path, capsys):
    picture = tmp_path / "tiers.png"
    tiers = "memory=50%,disk=100%:lfu"
    report = run(str(mooncake), policies="lru,lfu", tiers=tiers, picture=picture)
    first, second, bound = report["results"]
    assert [each["policy"] for each in (first, second, bound)] == ["lru/lfu", "lfu", "clairvoyant"]
    assert {each["size"] for each in report["results"]} == {tiers}
    assert [(each["tier"], each["policy"], each["size"], each["capacity"]) for each in first["tiers"]] == [
        ("memory", "lru", "50%", 5),
        ("disk", "lfu", "100%", 10),
    ]
    for each in (first, second):
        assert sum(tier["hit_rate"] for tier in each["tiers"]) == pytest.approx(each["hit_rate"])
    assert bound["capacity"] == 15 and bound["hit_rate"] == pytest.approx(2 / 12)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "all tiers" in capsys.readouterr().out


def test_tiers_that_all_name_their_policies_run_once(mooncake):
    report = run(str(mooncake), tiers="memory=5:lru,disk=10:lru")
    assert [each["policy"] for each in report["results"]] == ["lru", "clairvoyant"]


@pytest.mark.parametrize(
    ("text", "block", "units"),
    [("15%", None, 1), ("99.9%", None, 9), ("100%", None, 10), ("7", None, 7), ("2KiB", "1KiB", 2)],
)
def test_sizes(mooncake, text, block, units):
    assert plan(mooncake, sizes=text, block=block).sizes[0].units == units


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sizes": "0"}, r"--sizes = '0'; allowed: up to 100%, a number of blocks \(100% is 10\)"),
        ({"sizes": "5%"}, "--sizes = '5%'; .*at least one of the blocks"),
        ({"sizes": "101%"}, "--sizes = '101%'; allowed"),
        ({"sizes": "-5"}, "--sizes = '-5'; allowed"),
        ({"sizes": "1.5"}, "--sizes = '1.5'; allowed"),
        ({"sizes": "50%,,9"}, "--sizes = ''; allowed"),
        ({"sizes": "4GiB"}, "--sizes = '4GiB'; allowed: .*--block-bytes"),
        ({"sizes": "4GoB", "block": "1KiB"}, "--sizes = '4GoB'; allowed"),
        ({"sizes": "1KiB", "block": "4KiB"}, "--sizes = '1KiB'; allowed: .*at least one"),
        ({"block": "much"}, "--block-bytes = 'much'; allowed: at least one byte"),
        ({"block": "0"}, "--block-bytes = '0'; allowed: at least one byte"),
        ({"policies": "lru,mru"}, "--policy = 'mru'; allowed: .*lfu, lru.*clairvoyant"),
        ({"policies": ""}, "--policy = ''; allowed"),
        ({"admissions": "never"}, "--admission = 'never'; allowed: .*always"),
        ({"semantics": "both"}, "semantics = 'both'; allowed: prefix, content"),
        ({"tiers": "memory"}, "--tiers = 'memory'; allowed: NAME=SIZE or NAME=SIZE:POLICY"),
        ({"tiers": "=5"}, "--tiers = '=5'; allowed"),
        ({"tiers": "a=5,a=6"}, "--tiers = 'a=6'; allowed: .*names differ"),
        ({"tiers": "a=5,b=0"}, "--tiers b = '0'; allowed: up to 100%"),
        ({"tiers": "a=5:mru"}, "--tiers a = 'mru'; allowed: .*lru"),
        ({"tiers": "a=5", "sizes": "5"}, "--sizes and --tiers"),
        ({"tiers": ""}, "--tiers = ''; allowed"),
    ],
)
def test_bad_input_is_one_clear_line(mooncake, options, words):
    with pytest.raises(ConfigError, match=words) as caught:
        plan(mooncake, **options)
    assert "\n" not in str(caught.value)


def test_a_report_that_cannot_be_written_is_one_clear_line(mooncake, capsys):
    for option in ("json_file", "picture"):
        with pytest.raises(ConfigError, match=r"mooncake\.jsonl.*; allowed: files that can be written"):
            run(str(mooncake), policies="lru", sizes="50%", **{option: mooncake / "report"})
        assert "clairvoyant" in capsys.readouterr().out, "the table is there all the same"


def test_names_are_not_read_as_markup(mooncake, capsys):
    odd = mooncake.rename(mooncake.with_name("[bold].jsonl"))
    run(str(odd), policies="lru", tiers="[red]=50%")
    out = capsys.readouterr().out
    assert "[bold].jsonl" in out and "[red]" in out


def test_the_command(tmp_path):
    def simulate(*arguments):
        program = [str(Path(sys.executable).parent / "ragkv"), "simulate", *arguments]
        return subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, env={"COLUMNS": "200"})

    files = ("--json", "out.json", "--plot", "out.png")
    done = simulate("generated:scan:7", "--policy", "lru,lfu", "--sizes", "1%,5%", *files)
    assert done.returncode == 0 and done.stderr == "", done
    assert all(word in done.stdout for word in ("generated:scan:7", "4,000 requests", "lru", "lfu", "clairvoyant"))
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    wanted = [(policy, size) for policy in ("lru", "lfu", "clairvoyant") for size in ("1%", "5%")]
    assert [(each["policy"], each["size"]) for each in results] == wanted
    assert all(0 < each["hit_rate"] < 1 for each in results)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    done = simulate("nowhere.jsonl")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "trace = nowhere.jsonl: No such file or directory; allowed: a file of JSON lines\n"
