"""The Redis store when servers die, hang, trickle, move and lie: bounded, honest about it, and well after it."""

import contextlib
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from redis.crc import key_slot

from ragkv.benchmarks.internal.redis_server import HOST, SERVICE, Cluster, Server, wait_until
from ragkv.kvstore.io_pool import Completions, Lane, Wanted
from ragkv.kvstore.metrics import Metrics
from ragkv.kvstore.storage_tier import StorageTier
from ragkv.kvstore.stores.redis import RedisStore
from ragkv.policies.admission import Always
from ragkv.testing.stores import CALLS, noise, run_threads
from redis_server import Relay, certificate, fails, key, name, needs_openssl, needs_server, runs

# What hangs would hang for minutes: the limit is what tells it from what is merely slow.
pytestmark = [needs_server, pytest.mark.timeout(60)]
PATIENT = 10.0
QUICK = 0.5


@contextlib.contextmanager
def opened(url, timeout_seconds=PATIENT, **options):
    store = RedisStore(url, timeout_seconds=timeout_seconds, **options)
    try:
        yield store
    finally:
        store.close()


@pytest.fixture
def server():
    with Server() as running:
        yield running


def test_down_at_start_and_up_later(server):
    server.kill()
    with opened(server.url, ttl_seconds=60) as store:
        for call in CALLS.values():
            with fails("gone", "refused"):
                call(store)
        server.restart()
        store.put(key(1), [b"one"])
        assert store.get(key(1)) == b"one"


def test_the_first_call_after_a_restart_succeeds(server):
    with opened(server.url) as store:
        store.put(key(1), [b"one"])
        server.restart()
        assert store.get(key(1)) is None
        server.restart()
        store.put(key(1), [b"two"])
        assert store.get(key(1)) == b"two"


def test_killed_sessions_are_replaced(server):
    with opened(server.url) as store, server.client() as raw:
        store.put(key(1), [b"one"])
        for _ in range(3):
            raw.client_kill_filter(_type="normal", skipme=True)
            assert store.get(key(1)) == b"one"


@pytest.mark.parametrize("unix", [False, True])
def test_a_server_that_hangs(unix):
    with Server(unix=unix) as server, opened(server.url, QUICK) as store:
        values = [noise(1000 + number) for number in range(4)]
        keys = [key(number) for number in range(4)]
        store.put_many([(each, [value]) for each, value in zip(keys, values, strict=True)])
        server.stop()
        for call in (
            lambda: store.get_many(keys),
            lambda: store.put(key(9), [noise(1 << 24)]),
            lambda: list(store.scan()),
        ):
            with fails("timeout"):
                call()
        server.cont()
        wait_until(lambda: server.ask("PING"), "the server is itself again")
        for order in (keys, keys[::-1]):
            assert store.get_many(order) == [values[keys.index(each)] for each in order]


def test_a_server_that_pauses_answers_no_later_question_with_an_earlier_answer(server):
    with opened(server.url, QUICK) as store, server.client() as raw:
        store.put_many([(key(1), [b"one"]), (key(2), [b"two"])])
        raw.client_pause(60_000, all=False)
        with fails("timeout"):
            store.put(key(1), [b"new"])
        assert store.get(key(2)) == b"two"
        raw.execute_command("CLIENT", "UNPAUSE")
        store.put(key(1), [b"newer"])
        assert store.get_many([key(1), key(2)]) == [b"newer", b"two"]


def test_waiting_for_a_connection_ends_too(server):
    with opened(server.url, QUICK, max_connections=1) as store, server.client() as raw:
        raw.client_pause(60_000, all=False)

        def put(_):
            with fails("timeout"):
                store.put(key(1), [b"one"])

        run_threads(put, count=4)
        raw.execute_command("CLIENT", "UNPAUSE")
        store.put(key(1), [b"two"])


def test_a_tier_does_not_wait_for_an_answer_that_trickles(server):
    """A byte every hundredth of a second: no wait of the client is long, and all together would last for hours."""
    with Relay(server.port, trickle=True) as relay, opened(f"redis://{HOST}:{relay.port}") as store:
        with opened(server.url) as direct:
            direct.put(key(1), [noise(1 << 20)])
        completions = Completions()
        lanes = [Lane(name, 1, completions) for name in ("reads", "writes")]
        options = {"through": True, "queue_bytes": 1 << 20, "asks": True}
        tier = StorageTier(store, None, Always(), *lanes, time.monotonic, Metrics(), print, **options)
        tier.read([Wanted(key(1), bytes)], pytest.fail)
        for _ in range(3):
            assert tier.readable
            tier.late()  # what a request says whose deadline has passed
        assert tier.resting == ("reading",)
        tier.close(0.0)


def test_an_answer_cut_short_is_asked_for_again(server):
    value = noise(1 << 20)
    with Relay(server.port, cut_after=1 << 19) as relay, opened(f"redis://{HOST}:{relay.port}") as store:
        with opened(server.url) as direct:
            direct.put(key(1), [value])
        assert store.get(key(1)) == value
        assert relay.connections == 2


def test_names_that_resolve(server):
    with opened(f"redis://localhost:{server.port}") as store:
        store.put(key(1), [b"one"])
        assert store.get(key(1)) == b"one"


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x15\x03\x01\x00\x02", b""])
def test_something_else_listens_there(greeting):
    with socket.create_server((HOST, 0)) as listener:

        def greet():
            with contextlib.suppress(OSError):
                while True:
                    with listener.accept()[0] as taken:
                        taken.recv(1)
                        taken.sendall(greeting)

        thread = threading.Thread(target=greet)
        thread.start()
        with opened(f"redis://{HOST}:{listener.getsockname()[1]}") as store, fails("io" if greeting else "gone"):
            store.get(key(1))
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def test_close_lets_calls_end_that_are_on_their_way(server):
    with opened(server.url) as store, server.client() as raw:
        store.put(key(1), [b"one"])
        before = len(raw.client_list())
        raw.client_pause(60_000, all=False)
        thread = threading.Thread(target=store.put, args=(key(1), [b"two"]))
        thread.start()
        wait_until(lambda: raw.info("clients")["blocked_clients"] == 1, "the put waits")
        store.close()
        raw.execute_command("CLIENT", "UNPAUSE")
        thread.join(30)
        assert raw.get(name(1)) == b"two"
        wait_until(lambda: len(raw.client_list()) == before - 1, "its connection is closed")


@needs_openssl
def test_tls(server, tmp_path):
    good, key_file = certificate(tmp_path, "good")
    other, _ = certificate(tmp_path, "other")
    elsewhere = certificate(tmp_path, "elsewhere", "DNS:elsewhere.invalid")
    with Relay(server.port, (good, key_file)) as relay, Relay(server.port, elsewhere) as wrong:
        address = f"rediss://{HOST}:{relay.port}"
        with opened(f"{address}?ssl_ca_certs={good}") as store:
            store.put(key(1), [noise(1 << 20)])
            assert store.get_many([key(1), key(2)]) == [noise(1 << 20), None]
        with opened(f"{address}?ssl_cert_reqs=none") as store:
            assert store.contains([key(1)]) == [True]
        for url in (
            address,
            f"{address}?ssl_ca_certs={other}",
            f"rediss://{HOST}:{wrong.port}?ssl_ca_certs={elsewhere[0]}",
        ):
            with opened(url) as store, fails("refused", "CERTIFICATE_VERIFY_FAILED"):
                store.get(key(1))
        with opened(f"rediss://{HOST}:{server.port}", QUICK) as store, fails("timeout"):  # it waits for a line
            store.get(key(1))
        with opened(f"redis://{HOST}:{relay.port}") as store, fails("gone"):
            store.get(key(1))


def test_sentinel_leads_to_another_master(server):
    """The old one lives on as a replica, and says so only when written to."""
    with Server() as other, Server(sentinel_of=server) as watcher, Server() as hung:
        hung.stop()
        with opened(f"redis+sentinel://{HOST}:{hung.port},{HOST}:{watcher.port}/{SERVICE}/0", 4 * QUICK) as store:
            store.put(key(1), [b"one"])
            assert server.ask("EXISTS", name(1)) == 1
            watcher.ask("SENTINEL", "REMOVE", SERVICE)
            watcher.ask("SENTINEL", "MONITOR", SERVICE, HOST, other.port, 1)
            server.ask("REPLICAOF", HOST, other.port)
            store.put(key(2), [b"two"])
            assert other.ask("EXISTS", name(2)) == 1


@pytest.mark.slow
def test_sentinel_leads_to_the_successor_of_a_dead_master(server):
    def promoted():
        (found,) = watcher.client().sentinel_masters().values()
        return found["port"] == replica.port and found["is_master"] and replica.ask("ROLE")[0] == b"master"

    with Server(replica_of=server) as replica:
        wait_until(lambda: replica.ask("INFO")["master_link_status"] == "up", "the replica follows")
        with Server(sentinel_of=server) as watcher:
            wait_until(lambda: len(watcher.ask("SENTINEL", "REPLICAS", SERVICE)) == 1, "the replica is known")
            with opened(f"redis+sentinel://{HOST}:{watcher.port}/{SERVICE}") as store:
                store.put(key(1), [b"one"])
                wait_until(lambda: replica.ask("EXISTS", name(1)) == 1, "the replica has it")
                server.kill()
                with fails("gone"):
                    store.get(key(1))
                wait_until(promoted, "the replica is master")
                store.put(key(2), [b"two"])
                assert store.get_many([key(1), key(2)]) == [b"one", b"two"]


def test_sentinels_that_cannot_help(server):
    with Server(sentinel_of=server) as watcher:
        with opened(f"redis+sentinel://{HOST}:{watcher.port}/nobody") as store, fails("gone", "'nobody'"):
            store.get(key(1))
        watcher.kill()
        with opened(f"redis+sentinel://{HOST}:{watcher.port}/{SERVICE}") as store:
            with fails("gone"):
                store.get(key(1))
            watcher.restart()
            store.put(key(1), [b"one"])
    assert server.ask("EXISTS", name(1)) == 1


@pytest.fixture(scope="module")
def cluster():
    with Cluster() as running:
        yield running


def holding(cluster, number):
    """The server that a key's slot lies on, and its place."""
    place = next(index for index in range(3) if key_slot(name(number).encode()) < 16384 * (index + 1) // 3)
    return cluster.servers[place], place


def test_a_clusters_keys_lie_on_all_its_nodes(cluster):
    keys = [key(number) for number in range(100)]
    with opened(cluster.url, ttl_seconds=1000) as store:
        store.put_many([(each, [each]) for each in keys])
        assert store.get_many(keys) == keys
        assert all(int(server.ask("DBSIZE")) > 10 for server in cluster.servers)
        assert sum(int(server.ask("DBSIZE")) for server in cluster.servers) == 100
        assert store.contains([*keys, key(999)]) == [True] * 100 + [False]
        assert {entry.key for entry in store.scan()} == set(keys)
        store.touch(keys)
        assert store.delete(keys) == 100


def test_a_slot_that_moves(cluster):
    """Asked for on its way (ASK), and after it has moved (MOVED), by a store that knew its old place."""
    number, other = 7, 8
    slot = key_slot(name(number).encode())
    source, place = holding(cluster, number)
    target = cluster.servers[(place + 1) % 3]
    ids = {server: server.ask("CLUSTER", "MYID").decode() for server in (source, target)}
    with opened(cluster.url) as store:
        store.put(key(other), [b"other"])
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
        assert store.get_many([key(other), key(number)]) == [b"other", None]
        store.put_many([(key(number), [b"moved"]), (key(other), [b"again"])])
        assert store.get_many([key(other), key(number)]) == [b"again", b"moved"]
        assert [int(server.ask("CLUSTER", "COUNTKEYSINSLOT", slot)) for server in (source, target)] == [0, 1]
        for server in (target, source, cluster.servers[(place + 2) % 3]):
            server.ask("CLUSTER", "SETSLOT", slot, "NODE", ids[target])
        assert store.get_many([key(number), key(other)]) == [b"moved", b"again"]
        assert store.delete([key(number), key(other)]) == 2


def test_a_slot_that_nobody_served_is_found_once_somebody_does(cluster):
    number = 11
    slot = key_slot(name(number).encode())
    owner, _ = holding(cluster, number)
    identity = owner.ask("CLUSTER", "MYID").decode()
    for server in cluster.servers:
        server.ask("CLUSTER", "DELSLOTS", slot)
    with opened(cluster.url) as store:
        with fails("gone"):
            store.get(key(number))
        owner.ask("CLUSTER", "ADDSLOTS", slot)
        for server in cluster.servers:
            if server is not owner:
                server.ask("CLUSTER", "SETSLOT", slot, "NODE", identity)
        store.put(key(number), [b"back"])
        assert store.get(key(number)) == b"back"
        store.delete([key(number)])


@pytest.mark.slow
def test_a_cluster_with_a_hanging_and_then_a_dead_node():
    with Cluster() as cluster, opened(cluster.url, 3 * QUICK) as store:
        keys = [[key(n) for n in range(30) if holding(cluster, n)[1] == place] for place in range(3)]
        values = [[b"x"] * len(each) for each in keys]
        store.put_many([(each, [b"x"]) for some in keys for each in some])
        cluster.servers[0].stop()
        with fails("timeout"):
            store.get_many(keys[0])
        assert store.get_many(keys[1] + keys[2]) == values[1] + values[2]
        cluster.servers[0].cont()
        wait_until(lambda: cluster.servers[0].ask("PING"), "the node is itself again")
        assert store.get_many(keys[0]) == values[0]
        cluster.servers[1].kill()
        for _ in range(2):
            with fails("gone"):
                store.get_many(keys[1])
        assert store.get_many(keys[0] + keys[2]) == values[0] + values[2]


ABANDON = """
import os, signal
from ragkv.benchmarks.internal.redis_server import Server
server = Server()
server.stop()
print(server.pid, server.folder, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_test_leaves_no_server_behind():
    done = subprocess.run([sys.executable, "-c", ABANDON], capture_output=True, text=True)
    pid, folder = done.stdout.split()
    wait_until(lambda: not runs(pid), "the server is gone")
    wait_until(lambda: not Path(folder).exists(), "its folder is gone")


def test_no_cluster_there(server):
    with opened(f"redis+cluster://{HOST}:{server.port}") as store, fails("gone", "Cluster mode is not enabled"):
        store.get(key(1))
