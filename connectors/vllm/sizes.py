"""Sizes that both sides must agree on: what a page is, and how many of them each tier has."""

from collections.abc import Sequence

import torch

from ragkv.config import Settings
from ragkv.connectors.vllm.identity import Shape
from ragkv.errors import LayoutError
from ragkv.kvstore.pages import PageShape, frame_bytes
from ragkv.kvstore.planes import Plane

STEP_ON_CPU, STEP_BESIDE = 32 << 20, 256 << 20  # bytes


def page_shapes(settings: Settings, shape: Shape) -> list[PageShape]:
    """The pages of an engine's memory tier, of each plane. All take the same room: `memory.page_tokens` tokens of
    the plane whose tokens take most, and as many of the others as fit."""
    most = max(plane.geometry.token_bytes for plane in shape.planes)
    return [
        PageShape(
            shape.ranks,
            each.layers,
            settings.memory.page_tokens * most // each.token_bytes,
            each.heads * each.head_dim,
            each.itemsize,
            str(shape.dtype).removeprefix("torch."),
            each.kinds,
        )
        for each in (plane.geometry for plane in shape.planes)
    ]


def planes(shape: Shape, pages: Sequence[PageShape]) -> list[Plane]:
    """All planes but the first."""
    return [
        Plane(page, each.window, each.span, each.geometry.block_tokens)
        for page, each in zip(pages[1:], shape.planes[1:], strict=True)
    ]


def memory_pages(settings: Settings, shapes: Sequence[PageShape]) -> int:
    """Pages that the memory tier has. LayoutError: not even one chunk would fit."""
    memory, size = settings.memory, frame_bytes(shapes)
    pages, least = memory.capacity // size, -(-settings.chunks.max_tokens // shapes[0].page_tokens)
    if pages < least:
        raise LayoutError(
            f"memory.capacity = {memory.capacity} holds {pages} pages of {size} bytes; "
            f"one chunk of chunks.max_tokens needs {least}"
        )
    return pages


def device_pages(settings: Settings, page: PageShape) -> int:
    """Pages of the device tier; each worker holds its rank's share of every page, within `device.capacity`."""
    return settings.device.capacity * page.ranks // page.page_bytes


def step_bytes(settings: Settings, device: torch.device) -> int:
    """Most bytes that a worker copies in a step in which other requests compute. Copies of a CPU's cache take the
    time of the forward itself; an accelerator's run beside it."""
    return settings.transfer.step or (STEP_ON_CPU if device.type == "cpu" else STEP_BESIDE)
