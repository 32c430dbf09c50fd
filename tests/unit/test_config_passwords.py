"""Passwords in the settings are shown nowhere."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from ragkv.config import load
from ragkv.config.sources import hide_password
from ragkv.errors import ConfigError

SECRET = "hunter2"


def shown(url):
    return {key: text for key, text, _ in load({"redis": {"url": url}}, {}).rows()}["redis.url"]


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("redis://:hunter2@host:6379/1", "redis://:***@host:6379/1"),
        ("rediss://user:hunter2@host", "rediss://user:***@host"),
        ("redis://user:x@hunter2@host", "redis://user:***@host"),
        ("redis://us@er:hunter2@host", "redis://us@er:***@host"),
        ("redis://a/b:hunter2@host", "redis://a/b:***@host"),
        ("redis://:a hunter2@host", "redis://:***@host"),
        ("redis://hunter2@host:6379", "redis://***@host:6379"),
        ("redis+sentinel://u:hunter2@a:1,b:2/main", "redis+sentinel://u:***@a:1,b:2/main"),
        ("unix://u:hunter2@/run/redis.sock?db=1", "unix://u:***@/run/redis.sock?db=1"),
        ("redis://host?password=hunter2", "redis://host?password=***"),
        ("redis://host?sentinel_password='hunter2&db=3", "redis://host?sentinel_password=***&db=3"),
        (
            "rediss://host?ssl_password=hunter2&ssl_cert_reqs=none",
            "rediss://host?ssl_password=***&ssl_cert_reqs=none",
        ),
        ("redis://host:6379/0", "redis://host:6379/0"),
    ],
)
def test_a_password_is_not_shown(url, text):
    assert shown(url) == text


def test_options_of_a_store_are_shown_by_name():
    loaded = load({"store": {"options": {"bucket": "kv", "secret_key": "hunter2"}}}, {})
    assert loaded.settings.store.options == {"bucket": "kv", "secret_key": "hunter2"}
    (text,) = (text for key, text, _ in loaded.rows() if key == "store.options")
    assert text == "{'bucket': '***', 'secret_key': '***'}"


@given(st.text(st.characters(exclude_characters="\r\n"), min_size=1), st.text("abc", max_size=3))
def test_no_password_is_ever_shown(password, user):
    assert hide_password(f"redis://{user}:{password}@host") == f"redis://{user}:***@host"


@pytest.mark.parametrize(
    ("extra", "environ"),
    [
        ({"redis": {"url": "redis://:hunter2@host", "size": 1}}, {}),
        ({"redis": {"url": ["redis://:hunter2@host"]}}, {}),
        ({"redis": "redis://:hunter2@host"}, {}),
        ({"redis": ["redis://a:x@y", "redis://:hunter2@host"]}, {}),
        ({"rediss": {"url": "redis://:hunter2@host"}}, {}),
        ({"redis": {"uri": "redis://:p@hunter2@host"}}, {}),
        ({"redis": {"password": "hunter2"}}, {}),
        ({"rediss": {"Password": "hunter2", "port": 1}}, {}),
        ({"redis": [{"passwd": 'hun"ter2 hunter2'}]}, {}),
        ({"redis": {"prefix": "redis://:hunter2@host" + "x" * 64}}, {}),
        ({"disk": {"path": "redis://:hunter2@host"}}, {}),
        ({}, {"RAGKV_REDIS_PASSWORD": "hunter2"}),
        ({}, {"RAGKV_STORE_OPTIONS": "{'secret_key': 'hunter2'}"}),
        ({"store": {"options": ["hunter2"]}}, {}),
        ({"store": {"options": {"secret-key": "hunter2"}}}, {}),
        ({"store": {"optoins": {"secret_key": "hunter2"}}}, {}),
        ({"store": {"optoins": '{"secret_key": "hunter2"}'}}, {}),
        ({"store": {"optoins": [["secret_key", "hunter2"]]}}, {}),
        ({"store.optoins": {"secret_key": "hunter2"}}, {}),
        ({"stor": {"options": {"secret_key": "hunter2"}}}, {}),
        ({"store": [{"options": {"secret_key": "hunter2"}}]}, {}),
        ({"store": '{"options": {"secret_key": "hunter2"}}'}, {}),
        ({"config": {"store": {"options": {"secret_key": "hunter2"}}}}, {}),
        ({}, {"RAGKV_STORE_OPTOINS": ' {"secret_key": "hunter2"}'}),
        ({}, {"RAGKV_REDIS_URI": "redis://:hunter2@host"}),
        ({}, {"RAGKV_DISK_PATH": "redis://:hunter2@host", "RAGKV_MEMORY_POLICY": "a@b"}),
    ],
)
def test_no_error_tells_a_password(extra, environ):
    with pytest.raises(ConfigError) as caught:
        load(extra, environ)
    assert SECRET not in str(caught.value) and "allowed: " in str(caught.value)


def test_an_unknown_key_with_a_mapping_is_told_by_its_name_alone():
    with pytest.raises(ConfigError) as caught:
        load({"store": {"optoins": {"secret_key": "hunter2"}, "optoin": 5}}, {"RAGKV_STORE_OPTOINS": "{}"})
    message = str(caught.value)
    meant = "unknown key; did you mean store.options? allowed: store.name"
    assert f"store.optoins (from kv_connector_extra_config): {meant}" in message
    assert f"store.optoin = 5 (from kv_connector_extra_config): {meant}" in message
    assert (
        "environment variable RAGKV_STORE_OPTOINS names no setting; did you mean RAGKV_STORE_OPTIONS?" in message
    )


@pytest.mark.parametrize(
    "text",
    [
        "redis: {url: redis://:hunter2@host",
        "redis:\n  url: 'redis://:hunter2@host\n",
        "redis:\n\turl: redis://u:hunter2@host\n",
        "redis: {password: hunter2",
        "- redis://:hunter2@host",
        "redis:\n  url: redis://:hunter2@host\n  ttl: much\n",
    ],
)
def test_no_faulty_file_tells_a_password(tmp_path, text):
    file = tmp_path / "ragkv.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load({}, {}, file)
    assert SECRET not in str(caught.value) and str(file) in str(caught.value)
