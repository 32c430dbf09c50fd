"""Real backends that become full: files and a quota, Redis in every topology. What is new is kept all the same."""

import contextlib
import errno
import os
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from hand_lanes import Bench, Lower, key, redis
from ragkv.benchmarks.internal.redis_server import HOST, SERVICE, Cluster, Server, wait_until
from ragkv.kvstore import metrics as m
from ragkv.kvstore.budget import LOOK_SECONDS, there
from ragkv.kvstore.stores import disk
from ragkv.kvstore.stores.contract import Room
from ragkv.kvstore.stores.disk import DiskStore
from ragkv.kvstore.stores.redis import RedisStore
from redis_server import Relay, certificate, needs_openssl, needs_server

KIB, MIB = 1 << 10, 1 << 20


def bench_of(lower):
    bench = Bench(lower)
    bench.number = 0
    return bench


def write(bench, size):
    """A new value, and time for what follows; whether it is kept."""
    bench.number += 1
    bench.clock.now += 1
    bench.tier.tick()
    bench.write(key(bench.number), os.urandom(size))
    bench.settle()
    return bench.lower.values.contains([key(bench.number)]) == [True]


# --- files ---


@pytest.fixture
def lines():
    return []


@pytest.fixture
def on_disk(tmp_path, lines):
    with contextlib.closing(DiskStore(tmp_path / "kv")) as store:
        yield bench_of(Lower(values=store, capacity=64 * MIB, queue=MIB, say=lines.append))


def taken(folder):
    return sum(path.stat().st_size for path in folder.glob("*.kv"))


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.ENOSPC])
def test_no_room_in_the_middle_of_a_write(on_disk, lines, tmp_path, monkeypatch, number):
    """As a quota, of which the file system's figures say nothing."""
    writev, folder = os.writev, tmp_path / "kv"

    def limited(descriptor, parts):
        left = 20 * KIB - taken(folder)
        if sum(map(len, parts)) <= left:
            return writev(descriptor, parts)
        writev(descriptor, [memoryview(parts[0])[: max(0, left)]])
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(disk.os, "writev", limited)
    kept = [write(on_disk, KIB) for _ in range(100)]
    assert sum(kept) > 90 and all(kept[:20]) and taken(folder) > 15 * KIB
    assert len(lines) == 1 and "disk tier: room for" in lines[0]
    assert not list(folder.glob("*.tmp")) and on_disk.index.used == taken(folder)


def test_figures_that_cannot_be_had_at_first(on_disk, lines, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSYS, "Function not implemented")

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "fstatvfs", fail)
        bench = bench_of(Lower(values=on_disk.lower.values, capacity=64 * MIB, queue=MIB, say=lines.append))
        assert all(write(bench, KIB) for _ in range(30))
        assert (m.FREE_BYTES, "disk") not in bench.metrics.gauges and not bench.metrics.counted[m.TIER_ERRORS]
    full = SimpleNamespace(f_bavail=0, f_frsize=KIB, f_blocks=200, f_files=0, f_favail=0)
    monkeypatch.setattr(disk.os, "fstatvfs", lambda descriptor: full)
    bench.clock.now += LOOK_SECONDS
    bench.tier.tick(), bench.settle()
    assert bench.index.used == bench.index.capacity == 20 * KIB and len(lines) == 1


@given(*[st.integers(0, 1 << 70)] * 6)
def test_whatever_figures_a_file_system_tells(free, total, files, all_files, held, values):
    size, most = there(Room(free, total, files, all_files), held, values)
    assert 0 <= size <= held + free and 0 <= most < max(1, values + files)


# --- Redis ---


@contextlib.contextmanager
def alone(folder):
    with Server() as server:
        yield server.url, [server]


@contextlib.contextmanager
def tls(folder):
    paths = certificate(folder, "server")
    with Server() as server, Relay(server.port, tls=paths) as relay:
        yield f"rediss://{HOST}:{relay.port}/0?ssl_ca_certs={paths[0]}", [server]


@contextlib.contextmanager
def sentinel(folder):
    with Server() as server, Server(sentinel_of=server) as watcher:
        yield f"redis+sentinel://{HOST}:{watcher.port}/{SERVICE}", [server]


@contextlib.contextmanager
def cluster(folder):
    with Cluster() as nodes:
        yield nodes.url, nodes.servers


def allow(servers, more, policy):
    """At run time: so much more than a server uses now."""
    for server in servers:
        server.ask("CONFIG", "SET", "maxmemory", server.ask("INFO", "memory")["used_memory"] + more)
        server.ask("CONFIG", "SET", "maxmemory-policy", policy)


TOPOLOGIES = [
    alone,
    pytest.param(tls, marks=needs_openssl),
    pytest.param(sentinel, marks=pytest.mark.slow),
    pytest.param(cluster, marks=pytest.mark.slow),
]


@needs_server
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_full_redis_goes_on(tmp_path, lines, topology):
    with topology(tmp_path) as (url, servers), contextlib.closing(RedisStore(url, timeout_seconds=10)) as store:
        bench = bench_of(redis(values=store, queue=MIB, say=lines.append))
        assert all(write(bench, 64 * KIB) for _ in range(10)) and not lines
        allow(servers, 2 * MIB, "allkeys-lru")
        assert all(write(bench, 64 * KIB) for _ in range(150)) and not lines, "the server evicts"
        allow(servers, MIB, "noeviction")
        assert all(write(bench, 64 * KIB) for _ in range(100)), "and where it does not, ragkv does"
        assert lines == ["redis tier: full, and evicts nothing by itself: what was not used for long is removed"]
        assert bench.metrics.get(m.EVICTED_CHUNKS, "redis", m.CAPACITY) > 10
        allow(servers, -MIB // 2, "noeviction")  # less than it holds
        kept = [write(bench, 64 * KIB) for _ in range(100)]
        assert sum(kept) > 60 and all(kept[-10:])
        allow(servers, 8 * MIB, "noeviction")
        before = sum(server.ask("DBSIZE") for server in servers)
        assert all(write(bench, 64 * KIB) for _ in range(20))
        assert sum(server.ask("DBSIZE") for server in servers) == before + 20 and len(lines) == 1


@needs_server
def test_a_redis_that_others_have_filled_rests_and_comes_back(lines):
    with Server() as server, contextlib.closing(RedisStore(server.url, timeout_seconds=10)) as store:
        bench = bench_of(redis(values=store, queue=MIB, say=lines.append))
        server.ask("SET", "theirs", bytes(8 * MIB))
        allow([server], -MIB, "noeviction")
        assert not any(write(bench, KIB) for _ in range(10)) and not lines
        assert bench.tier.resting == ("writing",) and server.ask("EXISTS", "theirs")
        server.ask("DEL", "theirs")
        wait_until(lambda: server.ask("INFO", "memory")["used_memory"] < 8 * MIB, "it is free")
        assert sum(write(bench, KIB) for _ in range(60)) > 25
