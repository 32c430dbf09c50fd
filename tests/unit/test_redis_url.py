"""Redis URLs and settings: what they say, what cannot be, and no word of a password. No server is needed."""

import pytest

from ragkv.errors import ConfigError
from ragkv.kvstore.stores.redis import RedisStore
from ragkv.kvstore.stores.redis_url import parse_location


@pytest.mark.parametrize(
    ("url", "kind", "transport", "addresses", "options"),
    [
        ("redis://h", "single", "tcp", [("h", 6379)], {"db": 0}),
        ("redis://:p%40@h:1/2", "single", "tcp", [("h", 1)], {"password": "p@", "db": 2}),
        ("redis://u:p/@h", "single", "tcp", [("h", 6379)], {"username": "u", "password": "p/", "db": 0}),
        ("redis://[::1]:7", "single", "tcp", [("::1", 7)], {"db": 0}),
        (
            "rediss://h/?ssl_cert_reqs=none",
            "single",
            "tls",
            [("h", 6379)],
            {"db": 0, "ssl_cert_reqs": "none", "ssl_check_hostname": False},
        ),
        ("unix:///run/a%20b?db=3", "single", "unix", [("/run/a b", 0)], {"db": 3}),
        ("unix://:p@/run/s", "single", "unix", [("/run/s", 0)], {"password": "p"}),
        ("redis+sentinel://a,b:2/main/4", "sentinel", "tcp", [("a", 26379), ("b", 2)], {"db": 4}),
        ("rediss+cluster://a:1,b", "cluster", "tls", [("a", 1), ("b", 6379)], {}),
    ],
)
def test_urls(url, kind, transport, addresses, options):
    found = parse_location(url)
    assert (found.kind, found.transport, [*found.addresses]) == (kind, transport, addresses)
    assert found.options == options
    assert found.service == ("main" if kind == "sentinel" else "")


def test_sentinels_have_a_password_and_the_tls_of_their_own():
    found = parse_location("rediss+sentinel://u:p@h/s?sentinel_password=q&ssl_cert_reqs=none")
    tls = {"ssl_cert_reqs": "none", "ssl_check_hostname": False}
    assert found.options == {"username": "u", "password": "p", "db": 0, **tls}
    assert found.sentinel_options == {"password": "q", **tls}


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("", "redis://, rediss://, unix://"),
        ("s3cr3t", "redis+cluster://"),
        ("http://u:s3cr3t@h", "redis+sentinel://"),
        ("redis://u:s3cr3t?@h", "%3F"),
        ("redis://s3cr3t@h", "user:password"),
        ("redis://u:s3cr3t@", "host:port"),
        ("redis://u:s3cr3t@h:0", "from 1 to 65535"),
        ("redis://u:s3cr3t@h:65536", "from 1 to 65535"),
        ("redis://u:s3cr3t@a,b", "one host only"),
        ("redis://u:s3cr3t@h/one", "database number"),
        ("redis://u:s3cr3t@h?timeout=s3cr3t", "'timeout', only none"),
        ("rediss://u:s3cr3t@h?ssl_keyfil=1", "ssl_keyfile"),
        ("rediss://u:s3cr3t@h?ssl_ca_certs=/no/file", "ssl_ca_certs = '/no/file' is not an existing file"),
        ("rediss://h?ssl_password=s3cr3t&ssl_cert_reqs=some", "none, optional, required"),
        ("unix://u:s3cr3t@run/socket", "absolute path"),
        ("unix://u:s3cr3t@/run/socket?db=x", "database number"),
        ("redis+sentinel://u:s3cr3t@h", "/service"),
        ("redis+sentinel://h/s?sentinel_password=s3cr3t@", "%40"),
        ("redis+cluster://u:s3cr3t@h/1", "database 0"),
    ],
)
def test_a_url_that_cannot_be(url, allowed):
    with pytest.raises(ConfigError) as caught:
        RedisStore(url)
    assert allowed in str(caught.value)
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"ttl_seconds": 0},
        {"ttl_seconds": 1.5},
        {"max_value_bytes": 0},
        {"max_value_bytes": 1 << 30},
        {"timeout_seconds": 0},
        {"timeout_seconds": float("nan")},
        {"prefix": ""},
        {"prefix": "a b"},
        {"prefix": "{a}"},
        {"max_connections": 0},
    ],
)
def test_settings_that_cannot_be(options):
    with pytest.raises(ConfigError, match=next(iter(options))) as caught:
        RedisStore("redis://localhost", **options)
    assert repr(next(iter(options.values()))) in str(caught.value)
