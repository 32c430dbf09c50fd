"""The load of `internal soak` on a real server with all tiers, for half a minute: everything that users do."""

import functools
import json

from ragkv.benchmarks.internal import soak
from ragkv.benchmarks.serve_systems import PLAIN, RAGKV


def test_a_server_with_all_tiers_stays_as_it_is(server, disk_folder, model, monkeypatch):
    monkeypatch.setattr(soak, "DISK", 64 << 30)  # what this server may keep
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    player = soak.Player(server, "llama", vocabulary, functools.partial(soak.read_tiers, disk_folder, None))
    for _ in range(6):
        player.play(5)
    server.wake()
    last = player.readings[-1]
    assert not player.complaints and last.requests > 20 and last.files > 0
    itself = {PLAIN: player.readings, RAGKV: player.readings}  # in half a minute memory grows; a longer run tells
    assert soak.judge(itself) == []
