"""Weights that lie in files: known by all of their bytes, never by samples or names of them."""

import hashlib
import json
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Stamp = tuple[int, int, int, int, int]  # device, inode, size, mtime and ctime in ns
ADAPTER_FILES = ("adapter_*", "new_embeddings*")
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
LOADED_FROM_FILES = frozenset({"auto", "hf", "safetensors", "pt", "gguf", "mistral"})
NOT_THE_ADAPTER = frozenset({"base_model_name_or_path", "revision", "peft_version"})
CONFIG = "adapter_config.json"


class Files:
    """Hashes of files, each read once for as long as its stamp is the same."""

    def __init__(self) -> None:
        self._known: dict[Stamp, bytes] = {}

    def fingerprint(self, files: Iterable[Path]) -> str | None:
        """Hex digest over the names and all bytes of files. None: there are none, or one changed
        while it was read. An adapter's configuration counts by its values, without the names in it. OSError:
        reading failed."""
        found = sorted(files)
        stamps = [stamp(file) for file in found]
        parts = [(file.name, self._content(file, known).hex()) for file, known in zip(found, stamps, strict=True)]
        if not found or [stamp(file) for file in found] != stamps:
            return None
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def _content(self, file: Path, known: Stamp) -> bytes:
        if known not in self._known:
            if file.name == CONFIG:
                self._known[known] = hashlib.blake2b(_meaning(file.read_bytes())).digest()
            else:
                with file.open("rb") as stream:
                    self._known[known] = hashlib.file_digest(stream, "blake2b").digest()
        return self._known[known]


def stamp(file: Path) -> Stamp:
    """What tells whether a file is still the same. OSError: it is gone, or no regular file."""
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{file}: not a regular file")
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def adapter_files(path: str) -> list[Path]:
    """The files of an adapter in a local folder, as vLLM takes its path; none where it is not in one: what a hub's
    id will stand for when vLLM loads it, nobody knows before."""
    folder = Path(path).expanduser() if path.startswith("~") else Path(path)
    return sorted({file for pattern in ADAPTER_FILES for file in folder.glob(pattern) if file.is_file()})


def model_files(model_config: Any, load_format: str) -> list[Path]:
    """The weight files of a model that vLLM has just loaded, from a local folder or a hub's; none where they are
    not known."""
    if load_format.lower() not in LOADED_FROM_FILES:
        return []
    folder = Path(model_config.model)
    if not folder.exists():
        from huggingface_hub import snapshot_download

        try:
            revision = getattr(model_config, "revision", None)
            folder = Path(snapshot_download(model_config.model, revision=revision, local_files_only=True))
        except Exception:  # whatever it is: not known
            return []
    return [folder] if folder.is_file() else sorted(f for p in WEIGHT_FILES for f in folder.glob(p))


def _meaning(text: bytes) -> bytes:
    """An adapter's configuration without names, in one order; as it is where it is none."""
    try:
        config = json.loads(text)
    except ValueError:
        return text
    if not isinstance(config, dict):
        return text
    kept = {key: value for key, value in config.items() if key not in NOT_THE_ADAPTER}
    return json.dumps(kept, sort_keys=True).encode()
