"""What is tried with one version of vLLM; run by test_versions.py in that version's environment.

A tiny Llama with random weights in float32: a prompt comes back whole, its last request's blocks are freed,
documents that changed places are fused, and all comes back from disk after a restart. Writes what it finds to the
file that it is given, step by step.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from ragkv.benchmarks.engine import Engine, EngineOptions
from ragkv.benchmarks.internal.fusion_measure import ask as ask_with_hints
from ragkv.connectors.vllm.doctor_probe import MODEL

LENGTH = 700


def tokens(seed: int, length: int) -> list[int]:
    pick = random.Random(seed)
    return [pick.randrange(3, 250) for _ in range(length)]


def engine(model: Path, disk: Path) -> Engine:
    settings = {"memory": {"capacity": "64MiB"}, "placement": {"gate": False}, "disk": {"path": str(disk)}}
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "max_num_seqs": 4}
    return Engine(EngineOptions(model, settings, "float32", 2048, options))


def hit(running: Engine, prompt: list[int]) -> int:
    """Tokens of a prompt that come from ragkv; afterwards vLLM's own cache is emptied, which shows that no block
    is held any more."""
    (answer,) = running.ask([prompt], 4, detokenize=False)
    running.evict()
    return answer.cached_tokens


def whole_hit(running: Engine, _: Path) -> None:
    prompt = tokens(1, LENGTH)
    first, second = hit(running, prompt), hit(running, prompt)
    assert (first, second) == (0, LENGTH - 1), f"{first}, then {second} of {LENGTH} tokens"


def one_token_answer_is_stored(running: Engine, _: Path) -> None:
    """The store of a request that ends at once is carried out without another step."""
    prompt = tokens(2, LENGTH)
    found = []
    for _turn in range(2):
        (answer,) = running.ask([prompt], 1, detokenize=False)
        running.evict()
        found.append(answer.cached_tokens)
    assert found == [0, LENGTH - 1], f"hits: {found}"


def fusion(running: Engine, _: Path) -> None:
    one, two, tail = tokens(3, 300), tokens(4, 300), tokens(5, 40)
    spans = [{"id": name, "start": start, "end": start + 300} for name, start in (("a", 0), ("b", 300))]
    hints = {"fuse": True, "documents": spans}
    ask_with_hints(running, [*one, *two, *tail], 1, hints)
    running.evict()
    told = ask_with_hints(running, [*two, *one, *tail], 4, hints).told
    running.evict()
    decisions = [each["decision"] for each in told["documents"]]
    assert decisions == ["moved"] * 2, f"decisions: {decisions}"


def restart(running: Engine, _: Path) -> None:
    found = hit(running, tokens(1, LENGTH))
    assert found == LENGTH - 1, f"{found} of {LENGTH} tokens from disk"


def tried(step: Callable[[Engine, Path], None], running: Engine, folder: Path) -> str:
    try:
        step(running, folder)
    except Exception as error:  # whatever it is, it is the finding
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "ok"


def main() -> None:
    result, found = Path(sys.argv[1]), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(MODEL | {"max_position_embeddings": 2048}))
        for steps in ((whole_hit, one_token_answer_is_stored, fusion), (restart,)):
            with engine(folder, folder / "kv") as running:
                for step in steps:
                    found[step.__name__.replace("_", " ")] = "no end"
                    result.write_text(json.dumps(found))
                    found[step.__name__.replace("_", " ")] = tried(step, running, folder)
                    result.write_text(json.dumps(found))
    sys.exit(any(said != "ok" for said in found.values()))


if __name__ == "__main__":
    main()
