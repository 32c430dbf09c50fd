"""What it costs to know a model's weights: a full look, at start and where vLLM says that something happened, and
the samples of a running engine. No engine; a step is taken for one product of every matrix by a vector, which is
the least that a step of an answer costs.
"""

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from ragkv.benchmarks.model import ensure_model
from ragkv.benchmarks.report import median_seconds, write_json
from ragkv.connectors.vllm.fingerprint import fingerprint_model
from ragkv.connectors.vllm.sampling import PARTS, Sampler
from ragkv.connectors.vllm.streams import Stream
from ragkv.connectors.vllm.weights import Rounds

LOOKS, REPEATS = 5, 40
SHARE = 0.01  # of a step, at most, that what a step does for samples may cost


def load(folder: Path) -> torch.nn.Module:
    """The weights of a model's folder, as tensors of one module."""
    model = torch.nn.Module()
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            model.register_buffer(name.replace(".", "_"), tensor)
    return model


def measure(model: torch.nn.Module) -> dict[str, float]:
    """Seconds and bytes. What a step or a round reads, another step has driven from the caches before."""
    tensors = list(model.buffers())
    matrices = [tensor for tensor in tensors if tensor.dim() == 2]
    vectors = [torch.ones(1, matrix.shape[1], dtype=matrix.dtype) for matrix in matrices]
    sampler = Sampler(model, torch.device("cpu"), Stream())

    def step() -> None:
        for matrix, vector in zip(matrices, vectors, strict=True):
            torch.nn.functional.linear(vector, matrix)

    def begin() -> None:
        step()
        sampler.begin()

    return {
        "tensors": len(tensors),
        "weight_bytes": sum(tensor.nbytes for tensor in tensors),
        "look_seconds": median_seconds(lambda: fingerprint_model(model), LOOKS),
        "step_seconds": median_seconds(step, REPEATS),
        "part_seconds": median_seconds(lambda: sampler.go_on(whole=False), REPEATS, begin),
        "round_seconds": median_seconds(lambda: sampler.go_on(whole=True), REPEATS, begin),
        "round_bytes": sampler.bytes,
    }


def run(model: Path | None, json_file: Path | None) -> None:
    """Print a table, and write the figures to a file if asked to."""
    folder = model if model is not None else ensure_model()
    found = measure(load(folder))
    table = Table(title=f"{folder.name}, {torch.get_num_threads()} threads")
    table.add_column("what")
    table.add_column("cost", justify="right")
    table.add_row("weights", f"{found['weight_bytes'] / 1e6:.0f} MB in {found['tensors']:.0f} tensors")
    table.add_row("a full look", f"{found['look_seconds']:.2f} s")
    table.add_row("a step that computes one token", f"{found['step_seconds'] * 1e3:.2f} ms, at least")
    table.add_row(f"samples in a step (1/{PARTS} of a round)", f"{found['part_seconds'] * 1e3:.3f} ms")
    table.add_row("their share of that step", f"{found['part_seconds'] / found['step_seconds']:.2%}")
    table.add_row(
        f"a round, after {Rounds.ENOUGH} computed tokens or {Rounds.EVERY} steps",
        f"{found['round_seconds'] * 1e3:.2f} ms, {found['round_bytes'] / 1e3:.0f} kB",
    )
    Console().print(table)
    write_json(json_file, found)
