"""Samples of a model's weights, compared with what they were: whether somebody changed them behind vLLM's back.

A round compares some elements of every tensor; the next round compares others. So whatever changes all tensors,
as a training step does, is found by the first round after it; a change of few elements may not be found at all. A
round is spread over PARTS steps, unless these compute much or nothing. Nothing is fetched from a device in the
step that asks for it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ragkv.connectors.vllm.error_boundary import Faults, in_words, logger
from ragkv.connectors.vllm.fingerprint import fingerprint_model
from ragkv.connectors.vllm.messages import Question, StepReport, WeightsLook, WeightsSample
from ragkv.connectors.vllm.streams import Event, Stream
from ragkv.connectors.vllm.tiles import RAW

PARTS = 32  # of a round: a step has less than 1% more to do
PASSES = 8  # rounds until the same elements have their turn again
LINES, LINE = 8, 16  # of a tensor in a round: so many runs of so many elements, spread over it
LONG_STEP = 512  # tokens of a step which is so long that a whole round is nothing beside it


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a module keeps a tensor, and where that lies in memory."""

    owner: dict[str, Any]
    key: str
    tensor: torch.Tensor
    address: int

    @property
    def replaced(self) -> bool:
        """Whether the module has another tensor now, or the tensor another memory."""
        now = self.owner.get(self.key)
        return now is not self.tensor or now.data_ptr() != self.address


@dataclass(frozen=True, slots=True)
class _Part:
    """Some tensors; for each pass the elements (views) and what they were, by size of element."""

    places: list[_Place]
    passes: list[list[tuple[list[torch.Tensor], torch.Tensor]]]


class Sampler:
    """Of one worker, for `model` as it is now. `stream`: the device's compute stream. Keeps up to 2 KiB (for
    elements of two bytes) of the device's memory a tensor."""

    @torch.no_grad()
    def __init__(self, model: Any, device: torch.device, stream: Stream) -> None:
        self._stream = stream
        self._rounds = 0
        self._due = 0  # parts of this round that have not had their turn
        self._replaced = False  # some tensor is not where it was
        self._flag = torch.zeros((), dtype=torch.bool, device=device)
        self._host = torch.zeros((), dtype=torch.bool, pin_memory=device.type == "cuda")
        self._fetched: Event | None = None
        places = list(_places(model, device))
        count = len(places)
        self._parts = [_part(places[count * n // PARTS : count * (n + 1) // PARTS]) for n in range(PARTS)]
        self.tensors = count
        self.bytes = sum(known.nbytes for part in self._parts for _, known in part.passes[0])  # of a round

    def begin(self) -> None:
        """A round begins; one under way is given up."""
        self._rounds += 1
        self._due = PARTS
        self._fetched = None

    def go_on(self, *, whole: bool) -> bool | None:
        """A step passes; `whole`: it has time for all that is left of the round. True: the round is over, and
        found nothing; False: something differs; None: no round is under way, or its answer is still to come."""
        if self._due:
            for _ in range(self._due if whole else 1):
                self._compare(self._parts[PARTS - self._due])
                self._due -= 1
            if not self._due:
                self._stream.submit(self._fetch)
                self._fetched = self._stream.record()
            if self._replaced:
                return False
        if self._fetched is None or not self._fetched.query():
            return None
        self._fetched = None
        return not self._replaced and not bool(self._host)

    def _fetch(self) -> None:
        self._host.copy_(self._flag, non_blocking=True)

    def _compare(self, part: _Part) -> None:
        self._replaced = self._replaced or any(place.replaced for place in part.places)
        if self._replaced:  # the views show memory that no module uses
            return
        groups, flag = part.passes[self._rounds % PASSES], self._flag

        def work() -> None:  # of integers: autograd has nothing to be kept out of, which would cost as much again
            for views, known in groups:
                _note_difference(flag, _gather(views), known)

        self._stream.submit(work)


class WeightsObserver:
    """What one worker sees of its model's weights, when the scheduler side asks. `model`: None where it is not
    known; `rank`: the worker's. The rest is as for `Sampler`."""

    def __init__(self, model: Any, device: torch.device, stream: Stream, rank: int, faults: Faults) -> None:
        self._model, self._device, self._stream = model, device, stream
        self._rank, self._faults = rank, faults
        self._sampler: Sampler | None = None
        self._round = 0  # under way

    def observe(self, asked: Question, tokens: int, report: StepReport) -> None:
        """A step begins, of so many `tokens`: look at the weights, or go on with a round of samples, and report
        what is known. To be called before the forward, which computes by the weights that are seen here."""
        if asked.look:
            report.looks.append(WeightsLook(asked.look, self._rank, self.look()))
            return
        if asked.give_up:
            self._round = 0
        if asked.sample:
            self._round = asked.sample
            if self._sampler is not None:
                self._sampler.begin()
        same = self._go_on(whole=asked.at_once or not 0 < tokens < LONG_STEP) if self._round else None
        if same is not None:
            report.samples.append(WeightsSample(self._round, self._rank, same))
            self._round = 0

    def look(self) -> bytes | None:
        """A fingerprint of the model's weights as they are now, with which samples are compared from now on; None
        where that cannot be had."""
        self._sampler, self._round = None, 0
        if self._model is None:
            return None
        try:
            found = fingerprint_model(self._model)
        except Exception as error:  # a model may be of any kind: what cannot be looked at is not known
            logger.debug("ragkv: the weights cannot be looked at", exc_info=error)
            return None
        try:
            self._sampler = Sampler(self._model, self._device, self._stream)
        except Exception as error:  # of memory, or a model of an unknown kind
            logger.warning("ragkv: weights that change are noticed only where vLLM tells: %s", in_words(error))
        return found

    def close(self) -> None:
        """Let the model go."""
        self._model = self._sampler = None

    def _go_on(self, *, whole: bool) -> bool | None:
        """As `Sampler.go_on`. Without a sampler nothing can be found."""
        if self._sampler is None:
            return True
        try:
            return self._sampler.go_on(whole=whole)
        except Exception as error:  # a tensor that is gone, or freed: not what it was
            self._faults.note("weights", error)
            return False


def _places(model: Any, device: torch.device) -> Iterator[_Place]:
    """All parameters and buffers on the device that have elements, each memory once."""
    seen = set()
    for module in model.modules():
        for owner in (module._parameters, module._buffers):
            for key, tensor in owner.items():
                if tensor is None or not tensor.numel() or tensor.device != device or not _can_be_viewed(tensor):
                    continue
                known = tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
                if known not in seen:
                    seen.add(known)
                    yield _Place(owner, key, tensor, tensor.data_ptr())


def _can_be_viewed(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.element_size() in RAW and not tensor.is_conj()


def _part(places: Sequence[_Place]) -> _Part:
    views = [_elements(place.tensor) for place in places]
    return _Part(list(places), [_gathered([each[p] for each in views]) for p in range(PASSES)])


def _elements(tensor: torch.Tensor) -> list[torch.Tensor]:
    """For each pass a view of at most LINES * LINE elements, spread over the whole tensor, as integers."""
    plain: torch.Tensor = tensor.detach().as_subclass(torch.Tensor)
    plain = plain.view(RAW[tensor.element_size()])
    rows = plain.permute(sorted(range(plain.dim()), key=lambda dim: plain.stride(dim), reverse=True))
    if rows.is_contiguous():
        flat = rows.view(-1)
        if len(flat) <= LINES * LINE:
            return [flat] * PASSES
        lines = flat[: len(flat) // LINE * LINE].view(-1, LINE)
        between = -(-len(lines) // LINES)  # lines of which one is taken
        first = [p % between if between < PASSES else p * between // PASSES for p in range(PASSES)]
        views = [lines[start::between] for start in first]
        rest = flat[len(lines) * LINE :]  # fewer than LINE elements
        return [*views[:-1], views[-1] if not len(rest) else flat[-LINE * LINES :].view(-1, LINE)]
    most = max(1, int((LINES * LINE) ** (1 / plain.dim())))
    every = [-(-size // most) for size in plain.shape]
    return [plain[tuple(slice(p * step // PASSES, None, step) for step in every)] for p in range(PASSES)]


def _gathered(views: list[torch.Tensor]) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
    """Views by what one call can gather, with what they hold now."""
    kinds = dict.fromkeys(map(_kind, views))
    groups = [[view for view in views if _kind(view) == kind] for kind in kinds]
    return [(group, _gather(group).clone()) for group in groups]


def _note_difference(flag: torch.Tensor, now: torch.Tensor, known: torch.Tensor) -> None:
    """Set the flag where any element differs. A device is not waited for; on a CPU one call does for three."""
    if flag.device.type != "cpu":
        flag.logical_or_((now != known).any())
    elif not torch.equal(now, known):
        flag.fill_(True)


def _kind(view: torch.Tensor) -> tuple[torch.dtype, bool]:
    return view.dtype, view.dim() == 2 and view.shape[1] == LINE


def _gather(views: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(views if _kind(views[0])[1] else [view.reshape(-1) for view in views])
