"""redis-py's clients for a location: one server, the master that Sentinel names, or a cluster."""

from collections.abc import Mapping, Sequence
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.retry import Retry
from redis.sentinel import Sentinel

from ragkv.kvstore.stores.redis_url import Location

Client = redis.Redis | RedisCluster
Command = tuple[Any, ...]  # to a cluster's client, the second word is the key


def connect(location: Location, seconds: float, connections: int) -> Client:
    """A client with up to `connections` connections a server, each of which waits for at most `seconds` for the
    next bytes. It retries nothing by itself. A cluster's client connects at once, and raises what `ask` does."""
    options: dict[str, Any] = {
        **location.options,
        "protocol": 2,
        "socket_timeout": seconds,
        "socket_connect_timeout": seconds,
        "socket_keepalive": True,
        "max_connections": connections,
    }
    if location.transport == "tls":
        options["ssl"] = True
    if location.kind == "cluster":
        nodes = [ClusterNode(host, port) for host, port in location.addresses]
        return RedisCluster(startup_nodes=nodes, require_full_coverage=False, retry=_no_retry(), **options)
    if location.kind == "sentinel":
        return _sentinel(location, seconds, options)
    host, port = location.addresses[0]
    where = {"host": host, "port": port} if port else {"unix_socket_path": host}
    return redis.Redis(**where, **options, retry=_no_retry())


def ask(client: Client, commands: Sequence[Command]) -> list[Any]:
    """The answers to commands, sent together; a `redis.ResponseError` is an answer too. What was lost because a
    connection broke, or because its server is no master any more, is sent once more; to a cluster, after its nodes
    were asked again which of them serves which slot. `redis.RedisError`, OSError, RedisClusterException: nothing
    is known."""
    if not commands:
        return []
    try:
        return _send(client, commands)
    except redis.AuthenticationError:
        raise
    except (redis.ConnectionError, redis.exceptions.SlotNotCoveredError):
        if isinstance(client, RedisCluster):
            client.nodes_manager.initialize()
        return _send(client, commands)


def masters(client: Client) -> list[redis.Redis]:
    """A client for each server that holds keys."""
    if isinstance(client, RedisCluster):
        return [client.get_redis_connection(node) for node in client.get_primaries()]
    return [client]


def holder(client: Client, key: bytes) -> redis.Redis:
    """A client for the server that holds a key."""
    if isinstance(client, RedisCluster):
        return client.get_redis_connection(client.get_node_from_key(key))
    return client


def disconnect(client: Client) -> None:
    """Close the connections that are not in use."""
    clients: list[Any] = [client]
    if isinstance(client, RedisCluster):
        clients = [node.redis_connection for node in client.get_nodes() if node.redis_connection is not None]
    for each in clients:
        each.connection_pool.disconnect(inuse_connections=False)
        sentinel = getattr(each.connection_pool, "sentinel_manager", None)
        for watcher in sentinel.sentinels if sentinel is not None else ():
            watcher.connection_pool.disconnect(inuse_connections=False)


def _sentinel(location: Location, seconds: float, options: Mapping[str, Any]) -> redis.Redis:
    """Each Sentinel is asked in turn, for its share of the time."""
    share = seconds / len(location.addresses)
    asking = {"protocol": 2, "socket_timeout": share, "socket_connect_timeout": share, "retry": _no_retry()}
    tls = {"ssl": True} if location.transport == "tls" else {}
    sentinel = Sentinel(location.addresses, sentinel_kwargs={**location.sentinel_options, **asking, **tls})
    master: redis.Redis = sentinel.master_for(location.service, **options, retry=_no_retry())
    return master


def _no_retry() -> Retry:
    return Retry(NoBackoff(), 0)


def _send(client: Client, commands: Sequence[Command]) -> list[Any]:
    if isinstance(client, RedisCluster):
        return _send_by_node(client, commands)
    pipeline: Any = client.pipeline(transaction=False)
    for command in commands:
        pipeline.execute_command(*command)
    answers: list[Any] = pipeline.execute(raise_on_error=False)
    return answers


def _send_by_node(cluster: RedisCluster, commands: Sequence[Command]) -> list[Any]:
    """Not by redis-py's cluster pipeline: where a node does not answer, that asks it again for each command."""
    answers: list[Any] = [None] * len(commands)
    places: dict[ClusterNode, list[int]] = {}
    for place, command in enumerate(commands):
        places.setdefault(cluster.get_node_from_key(command[1]), []).append(place)
    for node, some in places.items():
        client = cluster.get_redis_connection(node)
        for place, answer in zip(some, _send(client, [commands[place] for place in some]), strict=True):
            answers[place] = answer
    for place, answer in enumerate(answers):
        if isinstance(answer, redis.exceptions.AskError):  # MOVED too: the client follows, and learns
            answers[place] = cluster.execute_command(*commands[place])
    return answers
