"""How `ragkv top` looks, in 80 columns and in more."""

from collections.abc import Iterable, Mapping

from rich.bar import Bar
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ragkv.cli.top_figures import COMPUTED, OWN, Frame, TierFigures
from ragkv.config.settings import rough_size

WIDE = 110
BAR = 24
DOCUMENTS = 5
NAME = 28
SOURCES = {OWN: "vLLM's own cache", COMPUTED: "computed"}
STYLES = {OWN: "cyan", COMPUTED: "red"}
STATE_STYLES = {"at rest": "bold red", "on trial": "yellow"}
SMALL = 1 << 20


def render(frame: Frame, width: int) -> RenderableType:
    """The whole view."""
    lower: list[RenderableType] = [_turns(frame), _documents(frame)]
    parts: list[RenderableType] = [_head(frame), _load(frame), "", _sources(frame), "", _tiers(frame), ""]
    parts += (
        [Columns([Padding(each, (0, 3, 0, 0)) for each in lower])] if width >= WIDE else [lower[0], "", lower[1]]
    )
    return Group(*parts, "", *_notes(frame))


def trouble(url: str, text: str) -> RenderableType:
    """The view of a server that does not answer."""
    return Group(Text.assemble(("ragkv top ", "bold"), url), "", Text(text, "bold red"), "Trying again; q ends.")


def _head(frame: Frame) -> Text:
    if not frame.since_start:
        period = f"last {frame.seconds or 0:.0f} s"
    elif frame.seconds is None:
        period = "since its start"
    else:
        period = f"since its start, {frame.seconds:,.0f} s ago"
    return Text.assemble(("ragkv top ", "bold"), frame.url, "  ", (frame.model, "green"), f"  {period}")


def _load(frame: Frame) -> Table:
    grid = Table.grid(padding=(0, 3))
    ttft = [_seconds(frame.ttft_s[name]) for name in ("p50", "p95")]
    grid.add_row(
        f"requests {_number(frame.requests_per_s, 2)}/s",
        f"running {frame.running}",
        f"waiting {frame.waiting}",
        f"TTFT p50 {ttft[0]}",
        f"p95 {ttft[1]}",
    )
    grid.add_row(
        f"prompt {_number(frame.prompt_tokens_per_s)} tok/s",
        f"out {_number(frame.generated_tokens_per_s)} tok/s",
        f"KV {frame.kv_usage:.0%}",
        f"hits {_share(frame.hit_rate)}",
        f"by ragkv {_share(frame.ragkv_rate)}",
    )
    return grid


def _sources(frame: Frame) -> RenderableType:
    all_tokens = sum(frame.sources.values())
    table = _table("prompt tokens from", "", "share>", "tokens>")
    for source, tokens in frame.sources.items():
        if not tokens and source not in (OWN, COMPUTED, *frame.tiers):
            continue
        share = tokens / all_tokens if all_tokens else 0.0
        table.add_row(
            SOURCES.get(source, source),
            Bar(1.0, 0, share, width=BAR, color=STYLES.get(source, "green")),
            f"{share:.1%}" if all_tokens else "-",
            f"{tokens:,}",
        )
    return table


def _tiers(frame: Frame) -> RenderableType:
    if not frame.tiers:
        return Text("No tiers yet: they show with the first request.", "yellow")
    table = _table("tier", "fill", "used>", "of>", "chunks>", "evict/s>", "read", "write")
    for name, tier in frame.tiers.items():
        fill = tier.used_bytes / tier.capacity_bytes if tier.capacity_bytes else 0.0
        table.add_row(
            Text(name),
            Bar(1.0, 0, fill, width=10, color="yellow" if fill > 0.95 else "green"),
            _size(tier.used_bytes),
            _size(tier.capacity_bytes),
            f"{tier.chunks:,}" if tier.chunks else "-",
            _number(tier.evicted_per_s, 1),
            *(Text(state or "-", STATE_STYLES.get(state or "", "")) for state in (tier.read, tier.write)),
        )
    return table


def _turns(frame: Frame) -> RenderableType:
    table = _table("turn of a conversation", "requests>", "prompt tokens>", "reused>")
    for name, turn in frame.turns.items():
        share = turn.reused_tokens / turn.prompt_tokens if turn.prompt_tokens else None
        table.add_row(Text(name), f"{turn.requests:,}", f"{turn.prompt_tokens:,}", _share(share))
    if not frame.turns:
        table.add_row("none yet", "", "", "")
    return table


def _documents(frame: Frame) -> RenderableType:
    table = _table("busiest documents", "hits>", "tokens saved>")
    for name, document in list(frame.documents.items())[:DOCUMENTS]:
        shown = name if len(name) <= NAME else f"{name[: NAME - 1]}…"
        table.add_row(Text(shown), f"{document.hits:,}", f"{document.saved_tokens:,}")
    if not frame.documents:
        table.add_row("none hinted", "", "")
    return table


def _notes(frame: Frame) -> Iterable[Text]:
    for title, counts in (
        ("gate", frame.gate),
        ("waits for lower tiers", frame.waits),
        ("fused prompts' tokens", frame.fusion),
    ):
        if any(counts.values()):
            yield Text(f"{title}: {_counts(counts)}")
    for name, tier in frame.tiers.items():
        yield from _troubles(name, tier)
    if frame.errors:
        yield Text(f"faults treated as misses, since its start: {_counts(frame.errors)}", "yellow")


def _troubles(name: str, tier: TierFigures) -> Iterable[Text]:
    if tier.queued_bytes >= SMALL:
        yield Text(f"{name}: {_size(tier.queued_bytes)} wait to be written")
    if tier.errors:
        yield Text(f"{name}: errors since its start: {_counts(tier.errors)}", "yellow")


def _counts(counts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {count:,.0f}" for name, count in counts.items())


def _table(*columns: str) -> Table:
    """A table whose columns marked with > hold numbers."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left", no_wrap=True)
    return table


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.2f} s"


def _size(size: float) -> str:
    return rough_size(int(size)) if size else "-"
