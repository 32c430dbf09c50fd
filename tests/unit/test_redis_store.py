"""The Redis store against a real server: names, times to live, bounds, refusals, threads and forks."""

import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from ragkv.benchmarks.internal.redis_server import SERVICE, Cluster, Server, wait_until
from ragkv.benchmarks.server import HOST
from ragkv.errors import StoreError
from ragkv.kvstore.stores import redis as module
from ragkv.kvstore.stores.redis import RedisStore
from ragkv.kvstore.stores.redis_url import parse_location
from ragkv.testing.stores import run_threads
from redis_server import fails, key, name, needs_server

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "redis.md"
SECRET = "s3cr3t/%?"
QUOTED = "s3cr3t%2F%25%3F"


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


@pytest.fixture
def raw(server):
    with server.client() as client:
        client.flushall()
        client.config_resetstat()
        yield client


@pytest.fixture
def make(server):
    made = []

    def make_store(url=server.url, **options):
        made.append(RedisStore(url, timeout_seconds=10, **options))
        return made[-1]

    yield make_store
    for store in made:
        store.close()


def calls(raw, command):
    return raw.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"]


@needs_server
def test_names_and_times_to_live(make, raw):
    make(ttl_seconds=1000).put(key(1), [b"one"])
    assert raw.keys() == [name(1).encode()]
    assert 0 < raw.ttl(name(1)) <= 1000
    assert calls(raw, "set") == 1 and calls(raw, "expire") == 0
    make(prefix="other:").put(key(1), [b"two"])
    assert raw.get(name(1, "other:")) == b"two" and raw.ttl(name(1, "other:")) == -1
    assert raw.get(name(1)) == b"one"


@needs_server
def test_a_touch_begins_the_time_anew(make, raw):
    lasting, passing = make(), make(ttl_seconds=1000)
    passing.put_many([(key(1), [b"one"]), (key(2), [b"two"])])
    raw.expire(name(1), 10)
    raw.expire(name(2), 10)
    passing.touch([key(1), key(3)])
    lasting.touch([key(2)])
    assert raw.ttl(name(1)) > 10 >= raw.ttl(name(2))
    assert not raw.exists(name(3))


@needs_server
def test_an_expired_value_is_a_miss(make, raw):
    store = make(ttl_seconds=1000)
    store.put(key(1), [b"one"])
    raw.pexpireat(name(1), 1)
    assert store.get(key(1)) is None
    assert store.contains([key(1)]) == [False]


@needs_server
def test_a_value_that_is_too_large_is_never_sent(make, raw):
    store = make(max_value_bytes=10)
    with fails("too_large", "11 bytes are more than 10"):
        store.put_many([(key(1), [b"small"]), (key(2), [bytes(5), bytes(6)])])
    assert calls(raw, "set") == 0
    store.put(key(2), [bytes(5), bytes(5)])
    assert raw.strlen(name(2)) == 10


@needs_server
def test_batches_of_any_size_are_cut_to_what_is_bounded(make, raw, monkeypatch):
    for bound in ("GETS_AT_ONCE", "KEYS_AT_ONCE"):
        monkeypatch.setattr(module, bound, 3)
    monkeypatch.setattr(module, "BYTES_AT_ONCE", 50)
    store = make()
    items = [(key(number), [bytes([number]) * (number * 7)]) for number in range(20)]
    keys = [each for each, _ in items]
    store.put_many(items)
    assert store.get_many(keys) == [parts[0] for _, parts in items]
    assert store.contains([*keys, key(99)]) == [True] * 20 + [False]
    assert {entry.key for entry in store.scan()} == set(keys)
    assert store.delete(keys) == 20
    assert store.get_many(keys) == [None] * 20


@needs_server
def test_scan_finds_what_is_ours(make, raw):
    store = make(prefix="odd*[a-c]?\\^:")
    store.put_many([(key(number), [bytes(1000 * number)]) for number in range(1, 5)])
    make(prefix="oddity-a-x\\^:").put(key(9), [b"theirs"])
    raw.set("odd*[a-c]?\\^:" + "x" * 32, "not hexadecimal")
    raw.set("odd*[a-c]?\\^:" + key(0xAB).hex().upper(), "of another case")
    raw.set("odd*[a-c]?\\^:" + "\xe4" * 16, "not ASCII")
    raw.set("odd*[a-c]?\\^:abcd", "short")
    raw.rpush("odd*[a-c]?\\^:" + key(8).hex(), "a list")
    found = {entry.key: entry.size for entry in store.scan()}
    assert set(found) == {key(number) for number in range(1, 5)}
    assert all(1000 * number <= found[key(number)] < 1500 * number for number in range(1, 5))


@needs_server
def test_scanning_and_asking_do_not_count_as_use(make, raw):
    store = make()
    store.put(key(1), [b"one"])
    raw.execute_command("RESTORE", name(2), 0, raw.dump(name(1)), "IDLETIME", 1000)
    assert store.contains([key(2)]) == [True] and len(list(store.scan())) == 2
    assert raw.object("idletime", name(2)) >= 1000


@needs_server
def test_somebodys_list_is_a_miss_and_gives_way(make, raw):
    store = make()
    raw.rpush(name(1), "theirs")
    store.put(key(2), [b"two"])
    assert store.get_many([key(1), key(2)]) == [None, b"two"]
    store.put(key(1), [b"one"])
    assert store.get(key(1)) == b"one"


@needs_server
def test_what_the_server_drops_is_a_miss(make, raw):
    store = make()
    store.put(key(1), [b"one"])
    raw.flushall()
    assert store.get(key(1)) is None and store.delete([key(1)]) == 0
    with Server(maxmemory=8 << 20, policy="allkeys-lru") as small:
        evicting = make(small.url)
        keys = [key(number) for number in range(20)]
        for each in keys:
            evicting.put(each, [bytes(1 << 20)])
        found = evicting.get_many(keys)
        assert found[-1] == bytes(1 << 20) and None in found
        assert evicting.contains(keys) == [value is not None for value in found]


@needs_server
def test_a_full_server(make):
    with Server(maxmemory=8 << 20) as small:
        store = make(small.url)
        store.put(key(0), [b"zero"])
        with fails("full"):
            store.put_many([(key(number), [bytes(1 << 20)]) for number in range(1, 20)])
        assert store.get(key(0)) == b"zero"
        assert store.delete([key(number) for number in range(20)]) > 0
        store.put(key(0), [b"new"])


@needs_server
def test_refusals_and_no_word_of_the_password(make, caplog):
    users = ("user reader on >p1 ~ragkv:1:* +get +exists", f"user mute on >{SECRET} ~other:* +@all")
    with Server(*users, password="p2") as closed:
        address = closed.url.partition("@")[2]
        for user, reason in {f":{QUOTED}": "refused", f"nobody:{QUOTED}": "refused", "": "refused"}.items():
            with fails(reason) as caught:
                make(f"redis://{user}@{address}" if user else f"redis://{address}").get(key(1))
            assert SECRET not in str(caught.value)
        make(f"redis://:p2@{address}").put(key(1), [b"one"])
        reader = make(f"redis://reader:p1@{address}")
        assert reader.get(key(1)) == b"one"
        for forbidden in (lambda: reader.put(key(1), [b"two"]), lambda: list(reader.scan())):
            with fails("refused", "(?i)permission"):
                forbidden()
        mute = make(f"redis://mute:{QUOTED}@{address}")
        with fails("refused") as caught:
            mute.get(key(1))
        location = parse_location(f"redis://mute:{QUOTED}@{address}")
        shown = [repr(mute), str(caught.value), repr(caught.value), repr(location), caplog.text]
        assert all(secret not in text for text in shown for secret in (SECRET, QUOTED))
        assert address in repr(mute)


def rights(*more):
    """What the guide gives a user, as arguments of ACL SETUSER; `more`: what it names beside, for some."""
    text = GUIDE.read_text()
    line = next(line for line in text.splitlines() if "user ragkv on" in line).strip()
    assert all(f"`{each}`" in text for each in more)
    return [*line.removeprefix("user ").replace(">...", ">p").split(), *" ".join(more).split()]


def do_all(store):
    keys = [key(number) for number in range(1, 9)]  # on all nodes of a cluster
    for each in keys:
        store.put(each, [b"value"])
    store.touch(keys)
    assert store.get_many(keys) == [b"value"] * 8 and store.contains(keys) == [True] * 8
    assert {entry.key for entry in store.scan()} == set(keys)
    assert store.make_room(keys[0], 1) == 1
    assert store.delete(keys) == 7


@needs_server
@pytest.mark.parametrize(("database", "more"), [(0, ()), (3, ("+select",)), (0, ("+object|idletime",))])
def test_the_rights_that_suffice(make, database, more):
    with Server(f"user {' '.join(rights(*more))}", password="p2") as server:
        url = f"redis://ragkv:p@{server.url.partition('@')[2]}"
        do_all(make(f"{url.rpartition('/')[0]}/{database}", ttl_seconds=1000))
        if database:
            server.client().execute_command("ACL", "SETUSER", "ragkv", "-select")
            with fails("refused", "select"):
                make(f"{url.rpartition('/')[0]}/{database}").get(key(1))


@needs_server
def test_the_rights_that_suffice_on_a_unix_socket(make):
    with Server(f"user {' '.join(rights('+select'))}", unix=True, password="p2") as server:
        do_all(make(f"unix://ragkv:p@{server.socket}?db=2", ttl_seconds=1000))


@needs_server
@pytest.mark.slow
def test_the_rights_that_suffice_behind_sentinels(make):
    with Server(f"user {' '.join(rights('+select'))}") as server, Server(sentinel_of=server) as watcher:
        guide = rights("+sentinel|masters")[-1]
        watcher.ask("ACL", "SETUSER", "scout", "on", ">q", guide)
        watcher.ask("ACL", "SETUSER", "default", "off")
        where = f"ragkv:p@{HOST}:{watcher.port}/{SERVICE}"
        do_all(make(f"redis+sentinel://{where}?sentinel_username=scout&sentinel_password=q", ttl_seconds=1000))
        do_all(make(f"redis+sentinel://{where}/4?sentinel_username=scout&sentinel_password=q", ttl_seconds=1000))


@needs_server
@pytest.mark.slow
def test_the_rights_that_suffice_in_a_cluster(make):
    with Cluster() as cluster:
        for server in cluster.servers:
            server.ask("ACL", "SETUSER", *rights("+cluster|slots +command +asking"))
        do_all(make(cluster.url.replace("://", "://ragkv:p@"), ttl_seconds=1000))


@needs_server
@pytest.mark.parametrize("policy", ["noeviction", "volatile-lru"])
def test_room_is_made_on_a_server_that_evicts_nothing(make, policy):
    """Values go on being kept: the longer unused go, and never those of others."""
    with Server(maxmemory=20 << 20, policy=policy) as server, server.client() as raw:
        raw.set("theirs", b"x" * (1 << 20))
        store, size = make(server.url), 1 << 20
        for number in range(60):
            try:
                store.put(key(number), [bytes(size)])
            except StoreError as error:
                assert error.reason == "full"
                assert store.make_room(key(number), size) > 0
                store.put(key(number), [bytes(size)])
        assert store.get(key(59)) == bytes(size) and raw.get("theirs") == b"x" * (1 << 20)
        assert 8 < raw.dbsize() < 20


@needs_server
def test_no_room_is_made_where_nothing_is_ours(make):
    with Server(maxmemory=20 << 20) as server, server.client() as raw:
        raw.mset({f"theirs:{number}": bytes(1 << 16) for number in range(50)})
        assert make(server.url).make_room(key(1), 1 << 20) == 0
        assert raw.dbsize() == 50


@needs_server
def test_unix_sockets_and_databases(make):
    with Server(unix=True, password="p") as server:
        first, second = make(server.url), make(f"{server.url}?db=1")
        first.put(key(1), [b"one"])
        assert first.get(key(1)) == b"one" and second.get(key(1)) is None


@needs_server
def test_eight_threads_share_three_connections(make, raw):
    store = make(max_connections=3)
    before = raw.info("clients")["connected_clients"]

    def work(number):
        for turn in range(30):
            value = bytes([number]) * (turn * 1000)
            store.put(key(number), [value])
            assert store.get_many([key(number), key(100)]) == [value, None]

    run_threads(work)
    assert 0 < raw.info("clients")["connected_clients"] - before <= 3


@needs_server
def test_close_leaves_nothing_behind(make, raw):
    raw.ping()

    def resources():
        return len(os.listdir("/proc/self/fd")), threading.active_count()  # noqa: PTH208

    before = resources()
    stores = [make() for _ in range(5)]
    assert resources() == before
    for store in stores:
        store.put(key(1), [b"one"])
    assert resources() > before
    for store in stores:
        store.close()
    assert resources() == before


def _in_child(store, pipe):
    try:
        pipe.send((store.get(key(1)), store.contains([key(1), key(2)])))
        store.close()
    except StoreError as error:
        pipe.send(error.reason)


@needs_server
def test_a_fork_uses_connections_of_its_own(make, raw):
    """Even where the parent's only one is in use just then."""
    store = make(max_connections=1)
    store.put(key(1), [b"one"])
    clients = {client["id"] for client in raw.client_list()}
    raw.client_pause(60_000, all=False)
    thread = threading.Thread(target=store.put, args=(key(2), [b"two"]))
    thread.start()
    wait_until(lambda: raw.info("clients")["blocked_clients"] == 1, "the put waits")
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_in_child, args=(store, theirs))
    child.start()
    assert ours.poll(30) and ours.recv() == (b"one", [True, False])
    child.join()
    raw.execute_command("CLIENT", "UNPAUSE")
    thread.join()
    assert store.get_many([key(1), key(2)]) == [b"one", b"two"]
    assert {client["id"] for client in raw.client_list()} == clients


def test_nothing_asked_is_nothing_done():
    store = RedisStore("redis://127.0.0.1:1")
    store.put_many([])
    assert (store.get_many([]), store.contains([]), store.delete([])) == ([], [], 0)
    store.touch([])
    store.close()
