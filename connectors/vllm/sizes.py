"""Sizes that both sides must agree on: what a page is, and how many of them each tier has."""

from collections.abc import Sequence

import torch

from ragkv.config import Settings
from ragkv.connectors.vllm.identity import Shape
from ragkv.errors import LayoutError
from ragkv.kvstore.pages import PageShape, frame_bytes
from ragkv.kvstore.planes import Plane

STATE_PAGE = 1 << 16  # bytes of a page, where there is nothing but states
STEP_ON_CPU, STEP_BESIDE = 32 << 20, 256 << 20  # bytes


def page_shapes(settings: Settings, shape: Shape) -> list[PageShape]:
    """The pages of an engine's memory tier, of each plane: of windows as many tokens as take no more room than
    `memory.page_tokens` of plane 0, but one at least; of plane 0 as many as fill that room; a state takes as many
    pages as it fills. Where plane 0 has no layers, a page has room for one token of the largest windows (or for
    `STATE_PAGE`), and a page of plane 0 is for a whole chunk: the less is lost."""
    most, sizes = settings.memory.page_tokens, [plane.geometry.token_bytes for plane in shape.planes]
    windows = [size for plane, size in zip(shape.planes[1:], sizes[1:], strict=True) if not plane.state]
    room = most * sizes[0] or max(windows, default=0)
    filled = max((max(1, room // size) * size for size in windows), default=room)
    tokens = min(most, -(-filled // sizes[0])) if sizes[0] else settings.chunks.max_tokens
    room, found = shape.ranks * room or STATE_PAGE, []
    for number, plane in enumerate(shape.planes):
        each, dtype = plane.geometry, str(shape.dtype).removeprefix("torch.")
        if plane.state:
            spread = -(-each.token_bytes // room)
            found.append(PageShape(shape.ranks, 1, 1, each.token_bytes, 1, "uint8", 1, spread))
            continue
        count = max(1, room // (shape.ranks * each.token_bytes)) if number else tokens
        row = each.heads * each.head_dim
        found.append(PageShape(shape.ranks, each.layers, count, row, each.itemsize, dtype, each.kinds))
    return found


def planes(shape: Shape, pages: Sequence[PageShape]) -> list[Plane]:
    """All planes but the first."""
    return [
        Plane(page, each.window, each.span, each.geometry.block_tokens, bool(each.state))
        for page, each in zip(pages[1:], shape.planes[1:], strict=True)
    ]


def memory_pages(settings: Settings, shapes: Sequence[PageShape]) -> int:
    """Pages that the memory tier has. LayoutError: not even one chunk would fit, with a state."""
    memory, size = settings.memory, frame_bytes(shapes)
    states = sum(shape.pages(1) for shape in shapes if shape.spread)
    pages, least = memory.capacity // size, shapes[0].pages(settings.chunks.max_tokens) + states
    if pages < least:
        also = " and a state" if states else ""
        raise LayoutError(
            f"memory.capacity = {memory.capacity} holds {pages} pages of {size} bytes; "
            f"one chunk of chunks.max_tokens{also} needs {least}"
        )
    return pages


def device_pages(settings: Settings, page: PageShape) -> int:
    """Pages of the device tier; each worker holds its rank's share of every page, within `device.capacity`."""
    return settings.device.capacity * page.ranks // page.page_bytes


def step_bytes(settings: Settings, device: torch.device) -> int:
    """Most bytes that a worker copies in a step in which other requests compute. Copies of a CPU's cache take the
    time of the forward itself; an accelerator's run beside it."""
    return settings.transfer.step or (STEP_ON_CPU if device.type == "cpu" else STEP_BESIDE)
