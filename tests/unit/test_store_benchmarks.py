"""`internal tiers` and `internal fuzz`: what they write and say, and that the fuzzer finds what there is."""

import dataclasses
import json

import pytest

from ragkv import cli
from ragkv.benchmarks.internal import fuzz, redis_server, tiers
from ragkv.benchmarks.internal.commands import app
from ragkv.errors import RagKVError, StoreError
from ragkv.kvstore import codec


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(tiers, "ROUND_BYTES", 1 << 20)
    monkeypatch.setattr(tiers, "ROUNDS", 3)
    monkeypatch.setattr(tiers, "TOKENS", (12, 24))


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["internal", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.run(app)
    return ended.value.code or 0


RATES = ["read_bytes_per_s", "raw_read_bytes_per_s", "write_bytes_per_s", "raw_write_bytes_per_s"]


def test_the_tiers_benchmark_writes_its_figures(tmp_path, monkeypatch, capsys, quick):
    names = ["disk", "redis"] if redis_server.find_server() else ["disk"]
    file = tmp_path / "out" / "tiers.json"
    assert run(monkeypatch, "tiers", "--folder", tmp_path, "--json", file) == 0
    report = json.loads(file.read_text())
    rows = report["tiers"]
    assert [row["tier"] for row in rows] == [name for name in names for _ in range(2)]
    for row in rows:
        assert row["value_bytes"] in range(12 * 23040, 24 * 23040 + 1000)
        assert all(row[rate] > 0 for rate in RATES)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"], "nothing is left behind"
    printed = capsys.readouterr().out
    assert "GB/s, medians of 3 rounds" in printed
    assert report["environment"]["dtype"] == "bfloat16"
    assert "the payloads are random, as SmolLM2-135M-Instruct's KV in bfloat16." in " ".join(printed.split())


def test_without_a_server_redis_is_left_out(tmp_path, monkeypatch, capsys, quick):
    monkeypatch.setattr(redis_server, "find_server", lambda: None)
    report = tiers.run(["disk", "redis"], tmp_path, None, None)
    assert {row["tier"] for row in report["tiers"]} == {"disk"}
    assert "redis: left out" in capsys.readouterr().out


def test_a_server_that_is_not_there_is_an_error(tmp_path, quick):
    with pytest.raises(StoreError):
        tiers.run(["redis"], tmp_path, f"redis://127.0.0.1:{redis_server.free_port()}/0", None)


@pytest.mark.parametrize("tier", ["tape", "disk,tape", ""])
def test_an_unknown_tier_is_refused(monkeypatch, capsys, tier):
    assert run(monkeypatch, "tiers", "--tier", tier) == 1
    assert capsys.readouterr().err == f"--tier = {tier!r}; allowed: disk, redis, or both with a comma\n"


def test_a_folder_that_is_not_there_is_refused(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "tiers", "--folder", tmp_path / "missing") == 1
    assert capsys.readouterr().err == f"--folder = '{tmp_path / 'missing'}'; allowed: a folder that is there\n"


def test_a_tier_that_gives_back_other_bytes_is_an_error(tmp_path, monkeypatch, quick):
    real = tiers.decode

    def wrong(value):
        header, raw = real(value)
        return dataclasses.replace(header, position=1), raw

    monkeypatch.setattr(tiers, "decode", wrong)
    with pytest.raises(RagKVError, match="disk: a value of 276480 bytes did not come back"):
        tiers.run(["disk"], tmp_path, None, None)


def test_the_fuzzer_writes_its_figures(tmp_path, monkeypatch, capsys):
    file = tmp_path / "fuzz.json"
    assert run(monkeypatch, "fuzz", "--inputs", 20_000, "--json", file) == 0
    report = json.loads(file.read_text())
    assert report["inputs"] == 20_000 == report["accepted"] + sum(report["refused"].values())
    assert report["failures"] == [] and report["accepted"] > 0
    assert report["refused"].keys() == {"truncated", "magic", "version", "header", "size", "checksum"}
    assert len(report["mutations"]) == len(fuzz.MUTATIONS)


def test_the_same_seed_gives_the_same_inputs():
    one, two, other = fuzz.fuzz(2000, 5), fuzz.fuzz(2000, 5), fuzz.fuzz(2000, 6)
    assert one.refused == two.refused != other.refused


def without_checksum(value):
    header, size = fuzz.read_header(value)
    return header, memoryview(value)[size - 16 - header.raw_bytes : size - 16]


def with_an_error_of_its_own(value):
    return codec.decode(value if len(value) > 100 else None)


def with_another_field(value):
    header, raw = codec.decode(value)
    return dataclasses.replace(header, position=0), raw


@pytest.mark.parametrize(
    "weaker, complaint",
    [
        (without_checksum, "the bytes are not what it holds"),
        (with_an_error_of_its_own, "TypeError"),
        (with_another_field, "the header is not what it says"),
    ],
)
def test_the_fuzzer_finds_what_is_wrong(tmp_path, monkeypatch, weaker, complaint):
    monkeypatch.setattr(fuzz, "decode", weaker)
    with pytest.raises(RagKVError, match=f"10 failures, the first: .*{complaint}"):
        fuzz.run(20_000, 0, tmp_path / "fuzz.json")
    failures = json.loads((tmp_path / "fuzz.json").read_text())["failures"]
    assert len(failures) == 10 and all(complaint in failure for failure in failures)
