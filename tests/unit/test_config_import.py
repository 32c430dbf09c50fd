"""`ragkv config import`: LMCache's settings, old and new, as ours; and every other key named."""

import json
import os
import stat
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from ragkv.cli import app
from ragkv.cli.lmcache import RULES, read
from ragkv.config import load
from ragkv.config.settings import keys
from ragkv.errors import ConfigError


@pytest.fixture
def given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "lmcache.yaml"

    def given(text="", **values):
        path.write_text(text or yaml.safe_dump(values))
        return path

    return given


def test_a_file_of_today(given):
    found = read(
        given(
            """
chunk_size: 512
local_cpu: true
max_local_cpu_size: 2.5
local_disk: file:///mnt/a/,/mnt/b
max_local_disk_size: "100"
remote_url: rediss://:hunter2@cache:6380/3
remote_serde: cachegen
cache_policy: lfu
enable_blending: True
blend_recompute_ratios: [0.25, 0.1]
blend_min_tokens: 300
blocking_timeout_secs: 3
save_decode_cache: false
enable_p2p: null
colour: blue
"""
        )
    )
    assert found.settings == {
        "chunks.max_tokens": 512,
        "chunks.min_tokens": 64,
        "chunks.average_tokens": 256,
        "memory.capacity": "2560MiB",
        "memory.policy": "lfu",
        "disk.path": "/mnt/a/ragkv",
        "disk.capacity": "100GiB",
        "disk.policy": "lfu",
        "redis.url": "rediss://:hunter2@cache:6380/3",
        "fusion.enabled": True,
        "fusion.recompute_ratio": 0.25,
        "fusion.min_tokens": 300,
        "placement.deadline": 3.0,
    }
    assert found.left == [
        *("local_cpu", "local_disk: all folders but the first", "remote_serde"),
        *("blend_recompute_ratios: all ratios but the first", "save_decode_cache", "enable_p2p", "colour"),
    ]


@pytest.mark.parametrize("size", [1, 16, 17, 64, 100_000])
def test_every_chunk_size_becomes_settings_that_hold(given, size):
    loaded = load(read(given(chunk_size=size)).sections(), {})
    assert loaded.settings.chunks.max_tokens == min(max(size, 17), 65536)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cpu", {"memory.capacity": "20GiB"}),
        (None, {"memory.capacity": "20GiB"}),
        ("cuda", {"device.capacity": "20GiB"}),
        ("file:///var/kv/", {"disk.path": "/var/kv/ragkv", "disk.capacity": "20GiB"}),
    ],
)
@pytest.mark.parametrize("name", ["max_cache_size", "max_local_cache_size"])
def test_files_of_older_releases(given, device, expected, name):
    found = read(given(**{"local_device": device, name: 20, "pipelined_backend": True}))
    assert found.settings == expected
    assert "pipelined_backend" in found.left and ("local_device" in found.left) == ("disk.path" not in expected)


def test_a_relative_folder_is_seen_from_here(given, tmp_path):
    found = read(given(local_device="file://local_disk/"))
    assert found.settings == {"disk.path": str(tmp_path / "local_disk" / "ragkv")}


@pytest.mark.parametrize(
    "disk",
    [{"local_disk": "/mnt/a"}, {"local_disk": "/mnt/a", "max_local_disk_size": 0}, {"max_local_disk_size": 1}],
)
def test_a_disk_without_a_size_was_none_and_a_size_without_a_disk_is_none(given, disk):
    found = read(given(chunk_size=256, cache_policy="LRU", **disk))
    assert found.settings == {"chunks.max_tokens": 256, "memory.policy": "lru"}
    assert set(found.left) == set(disk)


@pytest.mark.parametrize(
    ("given_url", "url"),
    [
        ("redis://cache:6379", "redis://cache:6379"),
        ("redis-sentinel://:pw@a:26379,b:26379", "redis+sentinel://:pw@a:26379,b:26379/redismaster"),
        ("redis-cluster://a:7000,b:7001", "redis+cluster://a:7000,b:7001"),
        ("resp://cache:6379", "redis://u%40x:p%2Fw@cache:6379"),
        ("lm://cache:65432", None),
        ("mooncakestore://cache:50051", None),
        ("", None),
    ],
)
def test_remote_urls(given, given_url, url):
    extra = {"username": "u@x", "password": "p/w", "other": 1}
    found = read(given(chunk_size=256, remote_url=given_url, extra_config=extra))
    assert found.settings.get("redis.url") == url and ("remote_url" in found.left) == (url is None)
    assert "extra_config: all but what a Redis server needs" in found.left


@pytest.mark.parametrize(
    ("extra", "url", "ttl"),
    [
        ({}, "redis://cache:6379/0", None),
        ({"valkey_mode": "cluster", "tls_enable": "true"}, "rediss+cluster://cache:6379", None),
        ({"valkey_database": 2, "valkey_ttl_sec": 60}, "redis://cache:6379/2", None),
        ({"valkey_enable_ttl": True, "valkey_ttl_sec": 60}, "redis://cache:6379/0", 60),
    ],
)
def test_valkey(given, extra, url, ttl):
    found = read(given(remote_url="valkey://cache:6379", extra_config=extra)).settings
    assert (found["redis.url"], found.get("redis.ttl")) == (url, ttl)


def test_flags_of_the_server(given):
    found = read(given("--chunk-size: 128\nl1-size-gb: 3\neviction-policy: ARC\nengine-type: blend\nport: 5555\n"))
    assert found.settings == {
        "chunks.max_tokens": 128,
        "chunks.min_tokens": 16,
        "chunks.average_tokens": 64,
        "memory.capacity": "3GiB",
        "memory.policy": "arc",
        "fusion.enabled": True,
    }
    assert found.left == ["port"]


def test_of_two_keys_that_mean_the_same_the_first_is_taken_and_no_policy_that_is_not_here(given):
    found = read(given("max_local_cpu_size: 1\nl1_size_gb: 3\nchunk_size: 256\nchunk-size: 128\n"))
    assert found.settings == {"memory.capacity": "1GiB", "chunks.max_tokens": 256}
    assert found.left == ["l1_size_gb", "chunk-size"]
    found = read(given(cache_policy="MRU", chunk_size=256))
    assert "memory.policy" not in found.settings and found.left == ["cache_policy"]


@pytest.mark.parametrize("name", [*RULES, "pd_role", "nixl_role"])
def test_no_key_of_the_file_is_lost(given, name):
    other = "chunk_size" if name == "blend_min_tokens" else "blend_min_tokens"
    found = read(given(**{other: 256, name: None}))
    assert [each.partition(":")[0] for each in found.left] == [name]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("chunk_size: many", "chunk_size = 'many'; allowed: a whole number"),
        ("chunk_size: 0", "chunk_size = 0; allowed"),
        ("chunk_size: true", "chunk_size = True; allowed"),
        ("chunk_size: 1.5", "chunk_size = 1.5; allowed"),
        ("max_local_cpu_size: -1", "max_local_cpu_size = -1; allowed: a number of GB"),
        ("max_local_cpu_size: .nan", "max_local_cpu_size = nan; allowed"),
        ("max_local_cpu_size: {a: 1}", "max_local_cpu_size = {'a': 1}; allowed"),
        ("enable_blending: perhaps", "enable_blending = 'perhaps'; allowed: true or false"),
        ("local_disk: [1]\nmax_local_disk_size: 1", "local_disk = [1]; allowed: a text"),
        ("local_device: [1]\nmax_cache_size: 1", "local_device = [1]; allowed: a text"),
        ("remote_url: valkey://a\nextra_config: [1]", "remote_url = 'valkey://a'; allowed: with it, extra_config"),
        ("blend_recompute_ratios: [much]", "blend_recompute_ratios = ['much']; allowed: numbers from 0 to 1"),
        ("blend_recompute_ratio: 2", "fusion.recompute_ratio = 2.0 (from "),
        ("remote_url: redis://user@cache:6379", "redis.url"),
        ("colour: blue", "no key in it has a counterpart in ragkv"),
        ("- chunk_size", "allowed: a YAML file with LMCache's keys"),
        ("", "allowed: a YAML file with LMCache's keys"),
        ("a: [", "is not YAML"),
    ],
)
def test_what_cannot_be_is_one_line(given, text, said):
    path = given(text or "\n")
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert "kv_connector_extra_config" not in str(caught.value)


def run(*arguments):
    return CliRunner().invoke(app, ["config", "import", *map(str, arguments)])


def test_the_command_writes_a_file_that_holds(given, tmp_path):
    source = given(chunk_size=512, remote_url="redis://u:hunter2@cache:6379", save_decode_cache=True)
    before = os.umask(0)
    try:
        done = run(source, "--output", tmp_path / "ours.yaml")
    finally:
        os.umask(before)
    assert done.exit_code == 0 and "hunter2" not in done.stdout + done.stderr
    assert "not taken over: save_decode_cache" in done.stderr
    written = tmp_path / "ours.yaml"
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    loaded = load({}, {}, written)
    assert loaded.settings.redis.url == "redis://u:hunter2@cache:6379"
    assert loaded.origins.keys() == read(source).settings.keys()
    text = written.read_text()
    assert "# redis.url comes from remote_url" in text and "# not taken over: save_decode_cache" in text
    again = run(source, "--output", written)
    assert again.exit_code == 1 and "a file that is not there yet" in str(again.exception)
    assert written.read_text() == text


def test_without_output_no_password_is_shown(given):
    done = run(given(remote_url="redis://:hunter2@cache:6379"))
    assert done.exit_code == 0 and "hunter2" not in done.stdout + done.stderr
    assert yaml.safe_load(done.stdout) == {"redis": {"url": "redis://:***@cache:6379"}}
    assert "--output FILE keeps it" in done.stderr


SECRETS = """chunk_size: 256
storage_plugins: ["s3://key:hunter2@bucket", plain]
extra_config: {password: 7654321, auth: hunter2, headers: {Authorization: hunter2}}
"""


@pytest.mark.parametrize("options", [(), ("--json",), ("--output", "new.yaml")])
def test_values_of_keys_that_are_left_are_shown_nowhere(given, options):
    done = run(given(SECRETS), *options)
    new = Path("new.yaml").read_text() if "--output" in options else ""
    shown = done.output + new
    assert done.exit_code == 0 and "storage_plugins" in shown
    assert not any(secret in shown for secret in ("hunter2", "7654321", "plain"))


def test_as_json(given):
    source = given(max_local_cpu_size=1, remote_url="redis://:hunter2@cache:6379", pd_role="sender")
    done = run(source, "--json")
    assert done.exit_code == 0 and "hunter2" not in done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["settings"]["memory.capacity"] == {"value": "1GiB", "from": "max_local_cpu_size"}
    assert report["left"] == ["pd_role"] and report["output"] is None


def test_awkward_texts_survive_the_file(given, tmp_path):
    source = given(local_disk="/mnt/a: #1 'x'", max_local_disk_size=1)
    run(source, "--output", tmp_path / "ours.yaml")
    assert load({}, {}, tmp_path / "ours.yaml").settings.disk.path == "/mnt/a: #1 'x'/ragkv"


def test_check_and_show_as_json(tmp_path):
    file = tmp_path / "ours.yaml"

    def ask(text, *words):
        file.write_text(f"memory: {{capacity: {text}}}\n")
        done = CliRunner().invoke(app, ["config", *words, str(file), "--json"])
        assert "hunter2" not in done.stdout
        return done.exit_code, json.loads(done.stdout)

    status, told = ask("2MiB", "check")
    assert [each["check"] for each in told.pop("findings")] == ["settings", "shared memory", "disk", "redis"]
    assert (status, told) == (0, {"file": str(file), "good": True, "error": None, "variables": []})
    redis = "2MiB}\nredis: {url: 'redis://:hunter2@127.0.0.1:1'"
    status, told = ask(redis, "check")
    assert status == 1 and told["error"].startswith("redis: ")
    _, report = ask(redis, "show", "--file")
    assert list(report) == list(keys())
    assert report["memory.capacity"] == {"value": 2 * 2**20, "from": str(file)}
    assert report["disk.path"] == {"value": None, "from": "default"}
    status, told = ask("much", "check")
    assert (status, told["good"]) == (1, False) and "memory.capacity = 'much'" in told["error"]
