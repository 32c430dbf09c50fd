"""The doctor's probe: tries whether this vLLM can be served, by its connector interface and a small engine.

It is a program of its own, `python -m ragkv.connectors.vllm.doctor_probe`, so that a crash is a finding too. Each
finding is a line of JSON on standard output as soon as it is known; everything else goes to standard error.
"""

import contextlib
import inspect
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ragkv.checks import Finding
from ragkv.connectors.vllm import NAME
from ragkv.connectors.vllm.error_boundary import in_words, logger
from ragkv.versions import NEWEST, OLDEST

TOKENS = 300
INSTALL = "install vLLM into this environment, such as by pip install 'ragkv[vllm]'"
TODO = f"use a vLLM from {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}, with which ragkv is known to work"
WITHOUT = "start the same vLLM without ragkv: where that fails too, the cause lies there"
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
NEEDED = (
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "update_connector_output",
    "request_finished",
    "register_kv_caches",
    "get_handshake_metadata",
    "set_xfer_handshake_metadata",
    "bind_connector_metadata",
    "start_load_kv",
    "wait_for_save",
    "get_finished",
    "get_block_ids_with_load_errors",
    "build_connector_worker_meta",
)


def judge_version(version: str) -> Finding:
    """Whether ragkv is known to work with that version of vLLM."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        return Finding("vllm", "warn", f"vLLM {version}: a build without a version", TODO)
    number = int(match[1]), int(match[2])
    if number < OLDEST:
        return Finding("vllm", "fail", f"vLLM {version} is too old", TODO)
    if number > NEWEST:
        return Finding("vllm", "warn", f"vLLM {version} is newer than what ragkv was tried with", TODO)
    return Finding("vllm", "ok", f"vLLM {version}")


def judge_interface(base: type, ours: type) -> Finding:
    """Whether what vLLM calls by `base` can be called of `ours` in the same way."""
    faults = sorted(getattr(ours, "__abstractmethods__", ()))
    said = f"vLLM asks connectors for {', '.join(faults)}, which ragkv does not know" if faults else ""
    for name, method in vars(ours).items():
        theirs = getattr(base, name, None)
        if said or not inspect.isfunction(method) or not inspect.isfunction(theirs) or name == "__init__":
            continue
        try:
            positional, named = _call_of(theirs)
            inspect.signature(method).bind(*positional, **named)
        except TypeError as error:
            said = f"vLLM calls {name}{inspect.signature(theirs)}, unlike ragkv: {error}"
    missing = [name for name in NEEDED if not hasattr(base, name)]
    if missing:
        said = said or f"vLLM's connectors have no {', '.join(missing)}, which ragkv needs"
    if said:
        return Finding("interface", "fail", said, TODO)
    return Finding("interface", "ok", "vLLM's connector interface is as ragkv knows it")


def judge_engine(refusals: list[str], hit_tokens: int) -> Finding:
    """What a small engine showed: the connector's own refusal, and how much of a known prompt came from ragkv."""
    if refusals:
        todo = (
            "ragkv cannot prove where this attention backend keeps KV, and would stand aside: try another "
            "(--attention-backend), and tell ragkv's makers"
        )
        return Finding("layout", "fail", f"unknown KV layout: {refusals[0]}", todo)
    if hit_tokens < TOKENS - 1:
        said = f"of a known prompt of {TOKENS} tokens only {hit_tokens} came back"
        return Finding("layout", "fail", said, "look at what the engine says of ragkv in its log")
    return Finding(
        "layout", "ok", "a small engine's KV layout was proven, and a known prompt came back from memory"
    )


def try_engine() -> Finding:
    """Start a small engine of an invented model, ask one prompt twice, and judge."""
    from vllm import LLM, SamplingParams

    refusals: list[str] = []
    prompt: Any = {"prompt_token_ids": [number % 200 + 3 for number in range(TOKENS)]}
    sampling = SamplingParams(max_tokens=1, detokenize=False)
    with tempfile.TemporaryDirectory() as folder, _listening(refusals):
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        engine = LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=512,
            max_num_seqs=2,
            gpu_memory_utilization=0.02,
            kv_cache_memory_bytes=32 << 20,
            kv_transfer_config={
                "kv_connector": NAME,
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"memory": {"capacity": "16MiB"}},
            },
        )
        hit = 0
        for _ in range(2):
            hit = engine.generate(prompt, sampling, use_tqdm=False)[0].num_cached_tokens or 0
            engine.reset_prefix_cache()
    return judge_engine(refusals, hit)


@contextlib.contextmanager
def _listening(refusals: list[str]) -> Iterator[None]:
    """Collect why the connector stood aside. By a filter: vLLM sets up logging anew, which drops handlers."""

    def hear(record: logging.LogRecord) -> bool:
        _, stood_aside, why = record.getMessage().partition("runs without KV reuse: ")
        if stood_aside:
            refusals.append(why)
        return True

    logger.addFilter(hear)
    try:
        yield
    finally:
        logger.removeFilter(hear)


def _call_of(method: Any) -> tuple[list[None], dict[str, None]]:
    """Arguments that fill every parameter of a method."""
    positional: list[None] = []
    named: dict[str, None] = {}
    for name, parameter in inspect.signature(method).parameters.items():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            positional.append(None)
        elif parameter.kind is parameter.KEYWORD_ONLY:
            named[name] = None
    return positional, named


def _version() -> Finding:
    try:
        import vllm
    except ModuleNotFoundError as error:
        if error.name == "vllm":
            return Finding("vllm", "fail", "vLLM is not installed in this environment", INSTALL)
        return Finding("vllm", "fail", f"vLLM lacks what it needs: {in_words(error)}", INSTALL)
    return judge_version(str(getattr(vllm, "__version__", "unknown")))


def _interface() -> Finding:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    if NAME not in KVConnectorFactory._registry:
        said = f"vLLM does not load ragkv's plugin (VLLM_PLUGINS = {os.environ.get('VLLM_PLUGINS', '')!r})"
        return Finding(
            "interface", "fail", said, "unset VLLM_PLUGINS, or name ragkv in it; else install ragkv anew"
        )
    from ragkv.connectors.vllm.connector import RagKVConnector

    return judge_interface(KVConnectorBase_V1, RagKVConnector)


def main() -> None:
    """Try one thing after the other, until one fails; `--quick` starts no engine."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    elsewhere = "vLLM's connector interface is not where ragkv looks for it"
    steps: list[tuple[str, Callable[[], Finding], str, str]] = [
        ("vllm", _version, "vLLM cannot be imported", "reinstall vLLM"),
        ("interface", _interface, elsewhere, TODO),
        ("layout", try_engine, "a small engine with ragkv did not start", WITHOUT),
    ]
    for check, attempt, failed, todo in steps[: 2 if "--quick" in sys.argv else None]:
        try:
            found = attempt()
        except Exception as error:  # what does not fit may fail in any way: that is the finding
            found = Finding(check, "fail", f"{failed}: {in_words(error)}", todo)
        print(json.dumps(asdict(found)), file=out, flush=True)
        if found.status == "fail":
            break
    out.flush()
    os._exit(0)  # what an engine leaves running shall not hold up its end


if __name__ == "__main__":
    main()
