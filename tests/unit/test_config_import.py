"""`ragkv config import`: LMCache's settings, old and new, as ours; and what is said of the others."""

import json
import os
import re
import stat
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from ragkv.cli import app
from ragkv.config import load
from ragkv.config.settings import keys
from ragkv.errors import ConfigError
from ragkv.lmcache_import import RULES, read
from ragkv.lmcache_keys import UNKNOWN, reason

# All keys of LMCache 0.5.6's engine, its aliases for older ones, and some flags of its multiprocess server.
THEIRS = re.findall(
    r"\w+",
    """
chunk_size local_cpu max_local_cpu_size local_cpu_use_hugepages reserve_local_cpu_size local_disk
local_disk_path_sharding max_local_disk_size remote_url remote_serde use_layerwise save_decode_cache
pre_caching_hash_algorithm enable_blending blend_recompute_ratios blend_thresholds blend_check_layers
blend_min_tokens blend_special_str retrieve_locations store_location enable_p2p p2p_host p2p_init_ports
p2p_lookup_ports mp_host mp_port enable_controller lmcache_instance_id controller_pull_url
controller_reply_url lmcache_worker_ports lmcache_worker_ids lmcache_worker_heartbeat_time enable_pd
pd_role pd_buffer_size pd_peer_host transfer_channel nixl_backends nixl_buffer_size nixl_buffer_device
gds_path gds_buffer_size maru_path use_gds gds_backend audit_actual_remote_url internal_api_server_host
extra_config save_unfull_chunk blocking_timeout_secs external_lookup_client py_enable_gc cache_policy
numa_mode enable_async_loading internal_api_server_enabled priority_limit runtime_plugin_locations
storage_plugins remote_storage_plugins lookup_timeout_ms min_retrieve_tokens hit_miss_ratio
lookup_server_worker_ids enable_scheduler_bypass_lookup script_allowed_imports run_script_api_enabled
enable_lazy_memory_allocator lazy_memory_initial_ratio enable_chunk_statistics chunk_statistics_strategy
enable_kv_events use_gpu_connector_v3 pin_timeout_sec pin_check_interval_sec remote_config_url app_id
enable_hidden_state_cache max_hidden_state_cpu_size hidden_state_layers hidden_states_retrieve_mode
enable_xpyd nixl_peer_host nixl_role controller_url lmcache_worker_port plugin_locations external_backends
local_device max_cache_size max_local_cache_size pipelined_backend blend_recompute_ratio blend_separator
blend_add_special_in_precomp ec_local_cpu host port max_workers hash_algorithm engine_type
supported_transfer_mode shm_name l1_size_gb l1_use_lazy eviction_policy eviction_ratio l2_adapter
l2_store_policy worker_reap_timeout_seconds grpc_server_workers
""",
)


@pytest.fixture
def given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "lmcache.yaml"

    def given(text="", **values):
        path.write_text(text or yaml.safe_dump(values))
        return path

    return given


def values(found):
    return {key: each.value for key, each in found.taken.items()}


def reasons(found):
    return {each.key: each.reason for each in found.left}


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
enable_p2p: false
colour: blue
"""
        )
    )
    assert values(found) == {
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
    left = {each.key: (each.value, each.reason) for each in found.left}
    assert left.keys() == {
        *("local_cpu", "local_disk", "remote_serde", "save_decode_cache", "enable_p2p", "colour"),
        "blend_recompute_ratios",
    }
    assert left["local_disk"][0] == "/mnt/b" and left["blend_recompute_ratios"][0] == "[0.1]"
    assert left["save_decode_cache"] == ("false", "off there; answers are always stored")
    assert left["colour"] == ("blue", UNKNOWN)
    assert "not compressed" in left["remote_serde"][1]


def test_the_defaults_of_chunks_are_left_alone(given):
    assert values(read(given(chunk_size=256))) == {"chunks.max_tokens": 256}


@pytest.mark.parametrize("size", [1, 16, 17, 64, 100_000])
def test_every_chunk_size_becomes_settings_that_hold(given, size):
    loaded = load(read(given(chunk_size=size)).settings(), {})
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
    assert values(found) == expected
    assert reasons(found)["pipelined_backend"] == reason("pipelined_backend")
    assert ("local_device" in reasons(found)) == ("disk.path" not in expected)


def test_a_relative_folder_is_seen_from_here(given, tmp_path):
    found = read(given(local_device="file://local_disk/"))
    assert values(found) == {"disk.path": str(tmp_path / "local_disk" / "ragkv")}
    assert "seen from where this was imported" in found.taken["disk.path"].origin


@pytest.mark.parametrize("size", [{}, {"max_local_disk_size": 0}])
def test_a_disk_without_a_size_was_none(given, size):
    found = read(given(local_disk="/mnt/a", chunk_size=256, **size))
    assert "disk.path" not in values(found)
    assert "keeps nothing on disk" in reasons(found)["local_disk"]


def test_a_size_without_a_disk_is_said(given):
    found = read(given(local_disk=None, max_local_disk_size=10))
    assert reasons(found) == {"local_disk": "not set", "max_local_disk_size": "no folder is named for it"}


@pytest.mark.parametrize(
    ("given_url", "url"),
    [
        ("redis://cache:6379", "redis://cache:6379"),
        ("redis-sentinel://:pw@a:26379,b:26379", "redis+sentinel://:pw@a:26379,b:26379/redismaster"),
        ("redis-cluster://a:7000,b:7001", "redis+cluster://a:7000,b:7001"),
        ("resp://cache:6379", "redis://u%40x:p%2Fw@cache:6379"),
        ("lm://cache:65432", None),
        ("mooncakestore://cache:50051", None),
        ("redis://user@cache:6379", None),
        ("", None),
    ],
)
def test_remote_urls(given, given_url, url):
    found = read(
        given(
            chunk_size=256, remote_url=given_url, extra_config={"username": "u@x", "password": "p/w", "other": 1}
        )
    )
    assert values(found).get("redis.url") == url
    assert ("remote_url" in reasons(found)) == (url is None)
    login = {f"extra_config.{name}" for name in ("username", "password")}
    assert (login & reasons(found).keys() == set()) == ("resp" in given_url)
    assert "extra_config.other" in reasons(found)
    assert not any("p/w" in each.value for each in found.left)


@pytest.mark.parametrize(
    ("extra", "url", "ttl"),
    [
        ({}, "redis://cache:6379", None),
        ({"valkey_mode": "cluster", "tls_enable": "true"}, "rediss+cluster://cache:6379", None),
        ({"valkey_database": 2, "valkey_ttl_sec": 60}, "redis://cache:6379/2", None),
        ({"valkey_enable_ttl": True, "valkey_ttl_sec": 60}, "redis://cache:6379", 60),
    ],
)
def test_valkey(given, extra, url, ttl):
    found = values(read(given(remote_url="valkey://cache:6379", extra_config=extra)))
    assert (found["redis.url"], found.get("redis.ttl")) == (url, ttl)


def test_flags_of_the_server(given):
    found = read(given("--chunk-size: 128\nl1-size-gb: 3\neviction-policy: ARC\nengine-type: blend\nport: 5555\n"))
    assert values(found) == {
        "chunks.max_tokens": 128,
        "chunks.min_tokens": 16,
        "chunks.average_tokens": 64,
        "memory.capacity": "3GiB",
        "memory.policy": "arc",
        "fusion.enabled": True,
    }
    assert reasons(found) == {"port": reason("port")}


def test_of_two_keys_that_mean_the_same_one_is_taken(given):
    found = read(given("max_local_cpu_size: 1\nl1_size_gb: 3\nchunk_size: 256\nchunk-size: 128\n"))
    assert values(found) == {"memory.capacity": "1GiB", "chunks.max_tokens": 256}
    assert "already set, by max_local_cpu_size: 1" in reasons(found)["l1_size_gb"]
    assert "chunk-size" in reasons(found)


def test_a_policy_that_is_not_here(given):
    found = read(given(cache_policy="MRU", chunk_size=256))
    assert "memory.policy" not in values(found) and reasons(found)["cache_policy"] == reason("cache_policy")


def test_without_a_disk_there_is_no_policy_for_it(given):
    assert values(read(given(cache_policy="FIFO"))) == {"memory.policy": "lru"}


@pytest.mark.parametrize("name", THEIRS)
def test_every_key_has_a_rule_or_a_reason(name):
    assert name in RULES or reason(name) != UNKNOWN


@pytest.mark.parametrize("name", THEIRS)
def test_no_key_of_the_file_is_lost(given, name):
    found = read(given(**{name: None, "local_cpu": True}))
    assert reasons(found) == {name: "not set", "local_cpu": reason("local_cpu")} | (
        {"local_cpu": reason("local_cpu")} if name == "local_cpu" else {}
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("chunk_size: many", "chunk_size = 'many'; allowed: a whole number"),
        ("chunk_size: 0", "chunk_size = 0; allowed"),
        ("chunk_size: true", "chunk_size = True; allowed"),
        ("chunk_size: 1.5", "chunk_size = 1.5; allowed"),
        ("max_local_cpu_size: -1", "max_local_cpu_size = -1; allowed: a number of GB"),
        ("max_local_cpu_size: .nan", "max_local_cpu_size = nan; allowed"),
        ("enable_blending: perhaps", "enable_blending = 'perhaps'; allowed: true or false"),
        ("local_disk: [1]\nmax_local_disk_size: 1", "local_disk = [1]; allowed: a text"),
        ("blend_recompute_ratios: [much]", "blend_recompute_ratios = ['much']; allowed: numbers from 0 to 1"),
        ("blend_recompute_ratio: 2", "fusion.recompute_ratio = 2.0 (from "),
        ("colour: blue", "no key of LMCache's is in it"),
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
    assert "not taken over: save_decode_cache = true: answers are always stored" in done.stderr
    written = tmp_path / "ours.yaml"
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    loaded = load({}, {}, written)
    assert loaded.settings.redis.url == "redis://u:hunter2@cache:6379"
    assert loaded.origins.keys() == read(source).taken.keys()
    text = written.read_text()
    assert "# remote_url: redis://u:***@cache:6379" in text or "# remote_url: redis://***@cache" in text
    assert "#   save_decode_cache: true: answers are always stored" in text
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
extra_config: {password: 7654321, auth: hunter2, headers: {Authorization: hunter2}, blend_tokens: 48}
"""


@pytest.mark.parametrize("options", [(), ("--json",), ("--output", "new.yaml")])
def test_secrets_of_keys_that_are_left_are_shown_nowhere(given, options):
    done = run(given(SECRETS), *options)
    new = Path("new.yaml").read_text() if "--output" in options else ""
    shown = done.output + new
    assert done.exit_code == 0 and "hunter2" not in shown and "7654321" not in shown
    assert "48" in shown and "plain" in shown


def test_as_json(given):
    source = given(max_local_cpu_size=1, remote_url="redis://:hunter2@cache:6379", pd_role="sender")
    done = run(source, "--json")
    assert done.exit_code == 0 and "hunter2" not in done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["settings"]["memory.capacity"]["value"] == "1GiB"
    assert report["settings"]["memory.capacity"]["from"].startswith("max_local_cpu_size: 1;")
    assert report["left"] == [{"key": "pd_role", "value": "sender", "reason": reason("pd_role")}]
    assert report["output"] is None


def test_awkward_texts_survive_the_file(given, tmp_path):
    source = given(local_disk="/mnt/a: #1 'x'", max_local_disk_size=1)
    run(source, "--output", tmp_path / "ours.yaml")
    assert load({}, {}, tmp_path / "ours.yaml").settings.disk.path == "/mnt/a: #1 'x'/ragkv"


def test_check_and_show_as_json(tmp_path):
    file = tmp_path / "ours.yaml"
    file.write_text("memory: {capacity: 2MiB}\n")
    good = CliRunner().invoke(app, ["config", "check", str(file), "--json"])
    told = json.loads(good.stdout)
    assert [each["check"] for each in told.pop("findings")] == ["shared memory", "disk", "redis"]
    wanted = {"file": str(file), "good": True, "error": None, "variables": []}
    assert (good.exit_code, told) == (0, wanted)
    file.write_text("memory: {capacity: 2MiB}\nredis: {url: 'redis://:hunter2@127.0.0.1:1'}\n")
    gone = CliRunner().invoke(app, ["config", "check", str(file), "--json"])
    assert gone.exit_code == 1 and json.loads(gone.stdout)["error"].startswith("redis: ")
    assert "hunter2" not in gone.stdout
    shown = CliRunner().invoke(app, ["config", "show", "--file", str(file), "--json"])
    report = json.loads(shown.stdout)
    assert list(report) == list(keys()) and "hunter2" not in shown.stdout
    assert report["memory.capacity"] == {"value": 2 * 2**20, "from": str(file)}
    assert report["disk.path"] == {"value": None, "from": "default"}
    file.write_text("memory: {capacity: much}")
    bad = CliRunner().invoke(app, ["config", "check", str(file), "--json"])
    assert bad.exit_code == 1
    assert (
        json.loads(bad.stdout)["good"] is False and "memory.capacity = 'much'" in json.loads(bad.stdout)["error"]
    )
