"""Sizes that both sides must agree on: what a page is, and how many of them each tier has."""

import torch

from ragkv.config import Settings
from ragkv.connectors.vllm.identity import Shape
from ragkv.errors import LayoutError
from ragkv.kvstore.pages import PageShape

STEP_ON_CPU, STEP_BESIDE = 32 << 20, 256 << 20  # bytes


def page_shape(settings: Settings, shape: Shape) -> PageShape:
    """The pages of an engine's memory tier."""
    geometry = shape.geometry
    return PageShape(
        shape.ranks,
        geometry.layers,
        settings.memory.page_tokens,
        geometry.heads * geometry.head_dim,
        geometry.itemsize,
        str(shape.dtype).removeprefix("torch."),
        geometry.kinds,
    )


def memory_pages(settings: Settings, page: PageShape) -> int:
    """Pages that the memory tier has. LayoutError: not even one chunk would fit."""
    memory = settings.memory
    pages, least = memory.capacity // page.page_bytes, -(-settings.chunks.max_tokens // memory.page_tokens)
    if pages < least:
        raise LayoutError(
            f"memory.capacity = {memory.capacity} holds {pages} pages of {page.page_bytes} bytes; "
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
