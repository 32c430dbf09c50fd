"""Host memory registered with CUDA, so that copies run by DMA and beside the host.

A registration that fails leaves its error in CUDA's runtime, and the next kernel launch would raise it: so every
error is taken out where it arises. Memory that cannot be registered only makes copies slower.
"""

import ctypes
import logging
from pathlib import Path
from typing import Any, Protocol

import torch

logger = logging.getLogger("vllm.ragkv")

PIECE_BYTES = 64 << 30  # at most, of one registration: drivers refuse larger ones, or take very long
ALREADY_REGISTERED = 712


class Runtime(Protocol):
    """What is needed of CUDA's runtime library; each returns an error's number, 0 for none."""

    def cudaHostRegister(self, address: Any, size: Any, flags: Any) -> int:
        """Register host memory."""

    def cudaHostUnregister(self, address: Any) -> int:
        """Undo it."""

    def cudaGetLastError(self) -> int:
        """The last error of this thread, which is taken out."""


class Pinning:
    """Memory that was registered here. `ok`: all of it may be copied by DMA. Release it before the memory is
    unmapped."""

    def __init__(self, runtime: Runtime | None) -> None:
        self.ok = runtime is not None
        self._runtime, self._pieces = runtime, list[int]()

    def add(self, address: int, size: int) -> None:
        """Register one piece. Registered already, by whomever, is as good."""
        if self._runtime is None or not self.ok:
            return
        error = self._runtime.cudaHostRegister(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_uint(0))
        if error == 0:
            self._pieces.append(address)
            return
        self._runtime.cudaGetLastError()
        if error != ALREADY_REGISTERED:
            logger.warning("ragkv: shared memory could not be pinned (CUDA error %d): copies are slower", error)
            self.ok = False

    def release(self) -> None:
        """Undo every registration of ours. Safe to call twice."""
        pieces, self._pieces, self.ok = self._pieces, [], False
        for address in pieces:
            assert self._runtime is not None
            if self._runtime.cudaHostUnregister(ctypes.c_void_p(address)):
                self._runtime.cudaGetLastError()


def piece_pages(page_bytes: int) -> int:
    """Pages of a registered piece: no copy may reach over its end."""
    return max(1, PIECE_BYTES // page_bytes)


def pin(elements: torch.Tensor, page_bytes: int, runtime: Runtime | None = None) -> Pinning:
    """Register a segment of whole pages of so many bytes (of all ranks). `runtime`: for tests."""
    runtime = find_runtime() if runtime is None else runtime
    if runtime is None:
        logger.warning("ragkv: CUDA's runtime library was not found: shared memory is not pinned")
    pinning = Pinning(runtime)
    size, step = elements.numel() * elements.element_size(), piece_pages(page_bytes) * page_bytes
    for start in range(0, size, step):
        pinning.add(elements.data_ptr() + start, min(step, size - start))
    if not pinning.ok:  # a tier that is pinned in part would be slow now and then, for no visible reason
        pinning.release()
    return pinning


def find_runtime(maps: Path = Path("/proc/self/maps")) -> Any:
    """CUDA's runtime library, the very one that torch has loaded into this process; None where there is none."""
    try:
        lines = maps.read_text().splitlines()
    except OSError:
        return None
    paths = {line[line.index("/") :] for line in lines if "/" in line and "libcudart" in line}
    for path in sorted(paths):
        if Path(path).name.startswith("libcudart"):
            return ctypes.CDLL(path)
    return None
