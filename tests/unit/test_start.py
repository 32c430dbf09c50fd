"""Settings that cannot be stop a start of vLLM before the weights load, with one line."""

import json
import os
import subprocess
import sys

import pytest

from ragkv.benchmarks.model import ensure_model

CASES = {
    "no size": ({"memory": {"capacity": "lots"}}, {}, ("memory.capacity", "'lots'", "GiB")),
    "no key": ({"capacity": "1GiB"}, {}, ("capacity", "unknown key", "memory.capacity")),
    "no room": ({"memory": {"capacity": "900TiB"}}, {}, ("memory.capacity", "900TiB", "has free")),
    "no page": ({}, {"RAGKV_MEMORY_PAGE_TOKENS": "1000"}, ("memory.page_tokens", "1000", "chunks.max_tokens")),
}
# What every way to an engine does first, for one case after the other: importing vLLM takes a while.
PROGRAM = """
import json, os, sys
from vllm.engine.arg_utils import EngineArgs

for name, (extra, environment, _) in json.loads(sys.argv[2]).items():
    os.environ.update(environment)
    transfer = {"kv_connector": "RagKVConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    try:
        EngineArgs(model=sys.argv[1], kv_transfer_config=transfer).create_engine_config()
    except Exception as error:
        print("told", json.dumps([name, str(error)]), file=sys.stderr)
"""


@pytest.mark.slow
def test_bad_settings_stop_the_start_before_the_weights():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(ensure_model()), json.dumps(CASES)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    told = dict(json.loads(line[5:]) for line in done.stderr.splitlines() if line.startswith("told "))
    assert told.keys() == CASES.keys(), done.stderr[-3000:]
    for name, (_, _, words) in CASES.items():
        assert any(all(word in line for word in words) for line in told[name].splitlines()), told[name]
