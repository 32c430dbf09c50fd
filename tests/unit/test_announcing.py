"""What the log says at INFO while all is well: the start, tiers that rest and return, the end."""

import logging

import pytest
import vllm

import ragkv
from hand_lanes import Lower
from ragkv.config import Settings
from ragkv.connectors.vllm.announcing import Announcer
from ragkv.connectors.vllm.error_boundary import logger
from ragkv.errors import StoreError
from toy_engine import Engine, text

NAMESPACE = bytes.fromhex("3f2a9c41" + "00" * 12)


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger=logger.name)

    def said():
        lines = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
        caplog.clear()
        return lines

    return said


def settings(**sections):
    return Settings.model_validate(sections)


def serve(engine, seed):
    engine.run(text(seed, 100))
    engine.settle()


def test_the_start_is_one_line(said):
    engine = Engine(lowers=[Lower()])
    given = settings(disk={"path": "/kv"}, fusion={"enabled": True}, placement={"gate": False})
    Announcer(given, engine.cache).started(NAMESPACE, 2, None)
    (line,) = said()
    start = f"ragkv: version {ragkv.__version__} on vLLM {vllm.__version__} reuses KV; namespace 3f2a9c41; memory "
    assert line.startswith(start)
    assert "; disk /kv of 1MiB (0 values, 0B found); " in line
    assert line.endswith("; layout proven by 2 workers; fusion on; gate off")


def test_a_second_engine_says_what_it_found(said):
    engine = Engine(lowers=[Lower()])
    serve(engine, 1)
    engine.restart()
    Announcer(settings(disk={"path": "/kv"}), engine.cache).started(NAMESPACE, 1, "MLA")
    (line,) = said()
    index = engine.lowers[0].index
    assert len(index) and f"({len(index):,} values, " in line and "KiB found)" in line
    assert "; layout proven by 1 worker; fusion not possible (MLA); gate on" in line


def test_passwords_and_redis_ask_for_care(said):
    engine = Engine(lowers=[Lower(name="redis", capacity=None)])
    given = settings(redis={"url": "redis://u:hunter2@cache:6379/0"})
    Announcer(given, engine.cache).started(NAMESPACE, 1, None)
    (line,) = said()
    assert "redis redis://" in line and "cache:6379" in line and "hunter2" not in line
    assert "fusion where a request asks for it" in line


def test_a_tier_that_rests_and_returns_is_told_once_each(said):
    lower = Lower()
    engine = Engine(lowers=[lower])
    lower.store.errors["put"] = StoreError("gone", "no such folder")
    announcer = Announcer(settings(), engine.cache)
    announcer.look()
    assert said() == [], "nothing to say while all is well"
    for seed in range(1, 4):
        serve(engine, seed)
        announcer.look()
    assert said() == ["ragkv: disk tier: writing rests after errors; it is tried again by itself"]
    del lower.store.errors["put"]
    for seed in range(4, 8):
        engine.clock.now += 100
        serve(engine, seed)
        announcer.look()
    assert said() == ["ragkv: disk tier: writing is in use again"]


@pytest.mark.parametrize("written", [True, False])
def test_the_end_is_one_line(said, written):
    engine = Engine(lowers=[Lower()])
    serve(engine, 1)
    Announcer(settings(), engine.cache).ended(written=written)
    (line,) = said()
    assert line.startswith(f"ragkv: ended, with {len(engine.memory)} chunks in memory")
    assert line.endswith("all that was to be kept is in disk") is written
