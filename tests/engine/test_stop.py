"""A server that is asked to stop: what only its memory held lies in the disk tier's folder afterwards."""

import json
import os
import signal
import sys
import threading
import urllib.request
from pathlib import Path

import yaml
from typer.testing import CliRunner

from engine_tools import room, segments, wait_until_gone
from ragkv.benchmarks.engine import Engine, EngineOptions, descendants
from ragkv.benchmarks.server import Server, free_port
from ragkv.cli import app

ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1"}
END_SECONDS = 90
LOST = "all that only memory holds is lost; to have it written, start vLLM with"  # said at start


def settings(model, folder):
    """A disk tier that is given nothing before the end."""
    return {
        "memory": {"capacity": room(model, 5800)},
        "disk": {"path": str(folder / "kv"), "write": "back"},
        "placement": {"gate": False, "flush": 5},
    }


def serve(model, folder, *options):
    file, port = folder / "ragkv.yaml", free_port()
    file.write_text(yaml.safe_dump(settings(model, folder)))
    command = [
        *(str(Path(sys.executable).with_name("ragkv")), "serve", str(model), "--config", str(file)),
        *("--served-model-name", "llama", "--port", str(port), "--max-model-len", "8192", "--enforce-eager"),
        *("--dtype", "float32", *options),
    ]
    return Server(command, port, folder / "log", ENVIRONMENT)


def complete(server, tokens, answer_tokens, **more):
    body = {"model": "llama", "prompt": tokens, "max_tokens": answer_tokens, "temperature": 0, **more}
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=120)


def stop(server):
    """SIGTERM to the first process alone, as a supervisor does; until its engine has ended. (Python's resource
    tracker ends with the first process.)"""
    engine = [pid for pid in descendants(server.pid) if b"resource_tracker" not in command_of(pid)]
    os.kill(server.pid, signal.SIGTERM)
    wait_until_gone(engine, END_SECONDS)


def command_of(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def kept(folder):
    """Tokens that lie in the folder, all of them sound."""
    verified = CliRunner().invoke(app, ["store", "verify", str(folder)])
    assert verified.exit_code == 0, verified.output
    listed = CliRunner().invoke(app, ["store", "ls", str(folder), "--limit", "0", "--json"])
    assert listed.exit_code == 0, listed.output
    return sum(each["tokens"] for each in json.loads(listed.output))


def test_what_waits_is_written_down_and_the_next_engine_hits_it(smollm2, filings, tmp_path):
    """On SmolLM2."""
    prompt = filings[0][:1500]
    with serve(smollm2, tmp_path) as server:
        server.wait()
        with complete(server, prompt, 2) as answer:
            json.load(answer)
        assert not list((tmp_path / "kv").glob("**/*.kv")), "nothing is written before the end"
        stop(server)
        wait_until_gone([server.pid], END_SECONDS)
    log = (tmp_path / "log").read_text()
    assert LOST not in log and "kills the engine" not in log and "not all was written" not in log
    assert kept(tmp_path / "kv") >= 1500 and not segments()
    options = EngineOptions(smollm2, settings(smollm2, tmp_path), "float32", 4096, one_process=True)
    with Engine(options) as engine:
        (answer,) = engine.ask([prompt])
        assert sum(answer.hit_tokens.values()) == 1499
        assert engine.log.read_text().count(LOST) == 1, "vLLM alone gives it no time at the end"


def test_a_running_answer_does_not_use_up_the_time(model, filings, tmp_path):
    """vLLM waits for it until its timeout, and then kills the engine: what waits is written before that."""
    prompt = filings[1][:1500]
    with serve(model, tmp_path, "--shutdown-timeout", "12") as server:
        server.wait()
        stream = complete(server, prompt, 6500, stream=True, ignore_eos=True)
        assert stream.readline()
        reader = threading.Thread(target=drain, args=(stream,))  # it goes away only after the engine has
        reader.start()
        stop(server)
    reader.join()
    log = (tmp_path / "log").read_text()
    assert "force killing remaining process EngineCore" in log, "else the answer ended, and nothing was tested"
    assert kept(tmp_path / "kv") >= 1500


def drain(stream):
    try:
        while stream.readline():
            pass
    except OSError:
        pass  # the server was killed
