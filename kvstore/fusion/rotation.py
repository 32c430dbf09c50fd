"""Keys at another position: rotary embeddings turn pairs of a key's elements by angles linear in the position, so
keys computed at p become those of p + d by turning them further by d (RoFormer, section 3.2.2; CacheBlend,
section 4.3)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ragkv.errors import FusionError

_RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_TRIED_TOKENS, _TRIED_HEADS = 32, 2


def _linear(module: Any) -> torch.Tensor:
    factors = list(module.scaling_factors)
    if len(factors) != 1:
        raise FusionError(f"LinearScalingRotaryEmbedding with {len(factors)} scaling factors; supported: 1")
    return _base(module) / float(factors[0])


def _base(module: Any) -> torch.Tensor:
    return _float64(module._compute_inv_freq(module.base))


def _yarn(module: Any) -> torch.Tensor:
    return _float64(module._compute_inv_freq(module.scaling_factor))


def _float64(frequencies: torch.Tensor) -> torch.Tensor:
    return frequencies.to("cpu", torch.float64)


# What each of vLLM's classes turns by. Their subclasses may have a forward of their own, and are other names.
_SCHEMES: dict[str, Callable[[Any], torch.Tensor]] = {
    "RotaryEmbedding": _base,
    "LinearScalingRotaryEmbedding": _linear,
    "Llama3RotaryEmbedding": _base,
    "NTKScalingRotaryEmbedding": _base,
    "YaRNScalingRotaryEmbedding": _yarn,
}


@dataclass(frozen=True, slots=True)
class Rotation:
    """How far each pair of a key's elements turns from one position to the next.

    `frequencies`: radians a position, one a pair; the first 2 * len(frequencies) elements of a head turn.
    `is_neox_style`: a pair is (i, i + rotary_dim / 2); otherwise (2i, 2i + 1), as in GPT-J.
    """

    frequencies: tuple[float, ...]
    is_neox_style: bool

    @classmethod
    def of(cls, module: Any) -> "Rotation":
        """The rotation of a rotary module of vLLM. FusionError: its class is none of the supported ones.

        The frequencies are the module's own in float32, on its device: the table it keeps may be bfloat16."""
        name = type(module).__name__
        scheme = _SCHEMES.get(name)
        if scheme is None:
            raise FusionError(f"keys cannot be moved under {name}; supported: {', '.join(_SCHEMES)}")
        with torch.device(module.cos_sin_cache.device):
            frequencies = scheme(module)
        if 2 * len(frequencies) != module.rotary_dim:
            raise FusionError(f"{name} has {len(frequencies)} frequencies for rotary_dim = {module.rotary_dim}")
        return cls(tuple(frequencies.tolist()), bool(module.is_neox_style))

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that turn; the rest stay."""
        return 2 * len(self.frequencies)

    def turn(self, keys: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
        """`keys` [tokens, heads, head_dim], of float32, bfloat16, float16 or an 8-bit float, moved by `shifts`
        int64 [tokens] positions, on the keys' or any other device: a new tensor, alike in shape, dtype and device.

        Rows with shift 0 come back bit by bit. Lengths do not change: what a scheme multiplies its tables with
        (YaRN's attention factor) and a scale of 8-bit keys are in the keys already. 8-bit keys saturate.
        """
        return self.prepare(shifts)(keys)

    def prepare(self, shifts: torch.Tensor) -> "Turning":
        """`turn` for these shifts, to be applied to the keys of many layers."""
        return Turning(self, shifts.cpu())

    def pairs(self, elements: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the first and the second elements of all pairs: [..., head_dim] as twice [..., pairs]."""
        half = len(self.frequencies)
        if self.is_neox_style:
            return elements[..., :half], elements[..., half : 2 * half]
        return elements[..., : 2 * half : 2], elements[..., 1 : 2 * half : 2]


class Turning:
    """Moves keys [..., tokens, heads, head_dim] as `Rotation.turn` does, by shifts that are given once. Sines and
    cosines are computed when it is made, on the CPU, and sent to a device at its first use there."""

    def __init__(self, rotation: Rotation, shifts: torch.Tensor) -> None:
        """`shifts`: int64 [tokens], on the CPU."""
        self._rotation = rotation
        distinct, which = torch.unique(shifts, return_inverse=True)  # a document has one shift, or a few
        angles = distinct[:, None] * torch.tensor(rotation.frequencies, dtype=torch.float64)
        still = (shifts == 0).to(torch.int64)
        self._some_stay = bool(still.any())
        self._host = angles.cos().float(), angles.sin().float(), which, still
        self._sent: dict[torch.device, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def __call__(self, keys: torch.Tensor) -> torch.Tensor:
        """A new tensor, alike in shape, dtype and device. The host waits for nothing."""
        cos, sin, still = self._tables(keys.device)
        wide = keys.to(torch.float32, copy=True)
        first, second = self._rotation.pairs(wide)
        turned = first * cos - second * sin, second * cos + first * sin
        first.copy_(turned[0])
        second.copy_(turned[1])
        if keys.element_size() == 1:
            wide.clamp_(torch.finfo(keys.dtype).min, torch.finfo(keys.dtype).max)
        narrow = wide.to(keys.dtype)
        if not self._some_stay:
            return narrow
        raw = _RAW[keys.element_size()]
        return torch.where(still, keys.view(raw), narrow.view(raw)).view(keys.dtype)

    def _tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cosines and sines [tokens, 1, pairs], and which tokens stay, [tokens, 1, 1]."""
        if device not in self._sent:
            cos, sin, which, still = (_send(each, device) for each in self._host)
            self._sent[device] = cos[which, None], sin[which, None], still.bool()[:, None, None]
        return self._sent[device]


def _send(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device; a copy from memory that is not pinned would hold up the host."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


@torch.inference_mode()
def check(module: Any, rotation: Rotation) -> None:
    """Prove `rotation` on a rotary module of vLLM: keys that its `forward_native` made at random positions must,
    turned, be those it makes at other positions. FusionError, naming the class, if not.

    Runs in the dtype of the module's table, so that the module neither converts nor replaces it."""
    table = module.cos_sin_cache
    start, end = tried_positions(table.shape[0])
    signs = torch.randint(2, (len(start), _TRIED_HEADS * module.head_size), generator=_generator())
    keys = (2 * signs - 1).to(table.device, table.dtype)
    before, after = (
        module.forward_native(positions.to(table.device), keys.clone(), keys.clone())[1]
        for positions in (start, end)
    )
    heads = (len(start), _TRIED_HEADS, module.head_size)
    compare(rotation, before.view(heads), after.view(heads), start, end, type(module).__name__)


def tried_positions(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of positions below `count`, int64 [tokens], to prove a rotation on: the longest ways, forth and
    back, and random ones."""
    start, end = torch.randint(count, (2, _TRIED_TOKENS), generator=_generator())
    start[:2] = torch.tensor([0, count - 1])
    end[:2] = torch.tensor([count - 1, 0])
    return start, end


def compare(
    rotation: Rotation,
    before: torch.Tensor,
    after: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    name: str,
) -> None:
    """FusionError, naming `name`, unless keys `before` of positions `start`, turned, are those `after` of `end`.

    Keys [tokens, heads, head_dim] of the engine's dtype. Every pair is judged by itself, in root mean squares: it
    may be off by the rounding of that dtype and of the engine's angles, which are float32: a frequency that
    passes is wrong by less than they are.
    """
    shifts, wanted = end - start, after.float()
    error = rotation.turn(before.float(), shifts) - wanted
    rounding = 4 * torch.finfo(before.dtype).eps
    reach = float(torch.maximum(start, end).max())
    frequencies = torch.tensor(rotation.frequencies, dtype=torch.float32, device=wanted.device)
    off = [_power(rotation, error) / _power(rotation, wanted).clamp(min=1e-30)]
    allowed = [rounding + reach * frequencies * 2**-22]
    still = slice(rotation.rotary_dim, None)
    off.append(_rms(error[..., still]) / _rms(wanted[..., still]).clamp(min=1e-30))
    allowed.append(torch.full_like(off[1], rounding))
    fits = torch.cat(off) <= torch.cat(allowed)
    if not bool(fits.all()):
        wrong = int((~fits).sum())
        raise FusionError(
            f"{name}: {wrong} of {len(fits)} parts of a key turned to another position are not "
            f"what the engine computes there; worst: off by {float(torch.cat(off).max()):.2g} of its length"
        )


def _power(rotation: Rotation, keys: torch.Tensor) -> torch.Tensor:
    first, second = rotation.pairs(keys)
    return torch.hypot(_rms(first), _rms(second))


def _rms(elements: torch.Tensor) -> torch.Tensor:
    return elements.square().mean((0, 1)).sqrt()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)
