"""Hints of a request: `kv_transfer_params["ragkv"]`, all optional, never a reason to fail.

    {"ragkv": {"documents": [{"id": "10-K 2023", "start": 12, "end": 3012}]}}

`start` and `end` are token positions in the prompt; chunks end at both, so that a document is cut alike in
every prompt that names it.
"""

from reprlib import repr as short
from typing import Any

KEY = "ragkv"
ALLOWED = frozenset({"documents"})


def named_boundaries(params: Any) -> tuple[list[int], str | None]:
    """Positions, ascending, at which chunks must end, and what is wrong with the hints, if anything."""
    hints = params.get(KEY) if isinstance(params, dict) else None
    if hints is None:
        return [], None
    if not isinstance(hints, dict):
        return [], f"{KEY} = {short(hints)}; allowed: a mapping with {', '.join(sorted(ALLOWED))}"
    problem = None
    if unknown := sorted(str(key) for key in hints.keys() - ALLOWED):
        problem = f"{KEY}.{short(unknown[0])} is unknown; allowed: {', '.join(sorted(ALLOWED))}"
    spans = hints.get("documents", [])
    if not isinstance(spans, list) or not all(_is_span(span) for span in spans):
        return (
            [],
            f"{KEY}.documents = {short(spans)}; allowed: a list of maps with start < end, token positions",
        )
    return sorted({span[edge] for span in spans for edge in ("start", "end")} - {0}), problem


def _is_span(span: Any) -> bool:
    if not isinstance(span, dict):
        return False
    start, end = span.get("start"), span.get("end")
    return type(start) is int and type(end) is int and 0 <= start < end
