"""The Grafana dashboard, panel by panel.

    python -m ragkv.dashboard config/observe/dashboard.json

Every query picks model, server and engine by the dashboard's variables, and answers 0 where nothing has happened
yet; quantiles and ratios of nothing are left out.
"""

import sys
from pathlib import Path
from typing import Any

from ragkv.grafana import Panel, Query, Variable, dashboard, text_of
from ragkv.promql import counts, grown, grown_or_new, or_zero, pick, quantile, quantiles, rate, so_far, total

DEFAULT_PRICE = 1.0
TOKEN_RATE = "si:tok/s"
TOP = 20


def stat(title: str, unit: str, text: str, expression: str, **more: Any) -> Panel:
    """One number."""
    return Panel(title, unit, text, [Query(expression)], width=3, kind="stat", **more)


REUSED = 'kind="reused"'
TTFT = "vllm:time_to_first_token_seconds"
PROMPT = rate("vllm:prompt_tokens_total")
OWN_HITS = rate("vllm:prefix_cache_hits_total")
FUSED = or_zero(rate("ragkv_fused_tokens_total", REUSED))
SAVED = f"({or_zero(rate('ragkv_hit_tokens_total'))} + {FUSED})"
SAVED_IN_RANGE = f"({grown('ragkv_hit_tokens_total')} + {grown('ragkv_fused_tokens_total', REUSED)})"
COMPUTED = f"clamp_min({PROMPT} - {OWN_HITS} - {SAVED}, 0)"
AT_REST = f"count(max by (instance, engine, tier) ({pick('ragkv_tier_state')}) == 2)"
BY_TURN = " / ".join(rate(f"ragkv_turn_{kind}_tokens_total", by="turn") for kind in ("reused", "prompt"))
FILL = f"{total('ragkv_used_bytes', 'tier')} / ({total('ragkv_capacity_bytes', 'tier')} > 0)"
DOCUMENT_HITS = total("ragkv_document_hits_total", "document")
TOP_DOCUMENTS = f"topk({TOP}, {total('ragkv_document_saved_tokens_total', 'document')})"
BUSIEST = f"topk(10, {rate('ragkv_document_hits_total', by='document')})"
ANSWERS = 'sum by (status) (rate(http_requests_total{instance=~"$instance"}[$__rate_interval]))'


def overview() -> list[Panel]:
    """What must be seen at once, on one screen."""
    return [
        stat("Requests", "reqps", "That ended, a second.", rate("vllm:request_success_total")),
        stat("TTFT, median", "s", "Time to first token of half the requests at most.", quantile(0.5, TTFT)),
        stat("TTFT, p99", "s", "Of 99 in 100 requests at most.", quantile(0.99, TTFT), red_from=5),
        stat(
            "Prompt reused",
            "percentunit",
            "Prompt tokens that were not computed: their KV was in vLLM's own cache or in ragkv.",
            f"clamp_max(({OWN_HITS} + {SAVED}) / {PROMPT}, 1)",
        ),
        stat(
            "… from ragkv",
            "percentunit",
            "What vLLM's own cache lacked, fused too.",
            f"clamp_max({SAVED} / {PROMPT}, 1)",
        ),
        stat(
            "Saved by ragkv",
            "currencyUSD",
            "Prompt tokens not computed in this time range, beyond vLLM's own hits, at the price above.",
            f"{SAVED_IN_RANGE} / 1e6 * $price",
            once=True,
            decimals=2,
        ),
        stat(
            "Faults",
            "short",
            "In this time range, caught and treated as a miss. The server's log has each kind once.",
            grown_or_new("ragkv_errors_total"),
            once=True,
            red_from=1,
            decimals=0,
        ),
        stat("Tiers at rest", "short", "They failed, and are left alone.", or_zero(AT_REST), red_from=1),
        Panel(
            "Time to first token",
            "s",
            "Of all requests, hits and misses, with the wait in the queue.",
            quantiles(TTFT, 0.5, 0.95, 0.99),
        ),
        Panel(
            "Where prompt tokens came from",
            TOKEN_RATE,
            "As shares. The tier is where the KV lay when the request came.",
            [
                Query(OWN_HITS, "vLLM's own cache"),
                counts("ragkv_hit_tokens_total", "tier", "ragkv: "),
                Query(FUSED, "ragkv: fused"),
                Query(COMPUTED, "computed"),
            ],
            stacking="percent",
        ),
        Panel(
            "Reused, by turn of the conversation",
            "percentunit",
            "Of the prompt tokens of first, second, … turns, vLLM's own hits too.",
            [Query(BY_TURN, "turn {{turn}}")],
        ),
        Panel(
            "Requests",
            "reqps",
            "That ended, by how.",
            [counts("vllm:request_success_total", "finished_reason")],
            stacking="normal",
        ),
        Panel(
            "Tokens",
            TOKEN_RATE,
            "Of all selected servers.",
            [
                Query(COMPUTED, "prompt, computed"),
                Query(f"{OWN_HITS} + {SAVED}", "prompt, reused"),
                Query(rate("vllm:generation_tokens_total"), "generated"),
            ],
        ),
        Panel(
            "Saved by ragkv, an hour",
            "currencyUSD",
            "Prompt tokens not computed, beyond vLLM's own hits, at the price above.",
            [Query(f"{SAVED} * 3600 / 1e6 * $price", "saved")],
        ),
    ]


def tiers() -> list[Panel]:
    """What the tiers hold, and what leaves them."""
    return [
        Panel(
            "Fill",
            "percentunit",
            "Bytes in use, of the budget. A full cache is as it should be. Redis keeps its own books.",
            [Query(FILL, "{{tier}}")],
        ),
        Panel(
            "Bytes",
            "bytes",
            "In use, pinned, and free on the file system of the disk tier.",
            [
                Query(total("ragkv_used_bytes", "tier"), "{{tier}}"),
                Query(total("ragkv_pinned_bytes"), "pinned in memory"),
                Query(total("ragkv_tier_free_bytes", "tier"), "free beside {{tier}}"),
            ],
        ),
        Panel("Chunks", "short", "Stored now.", [Query(total("ragkv_stored_chunks", "tier"), "{{tier}}")]),
        Panel(
            "Evicted", "cps", "Chunks that left a tier.", [counts("ragkv_evicted_chunks_total", "tier, reason")]
        ),
        Panel(
            "Not taken",
            "cps",
            "Chunks that a tier did not take. throttled: writing does not keep up.",
            [
                counts("ragkv_refused_chunks_total", "reason", "memory: "),
                counts("ragkv_tier_unwritten_chunks_total", "tier, reason"),
            ],
        ),
        Panel(
            "Into memory",
            TOKEN_RATE,
            "Tokens whose KV came from the engine, and from lower tiers.",
            [
                Query(or_zero(rate("ragkv_stored_tokens_total")), "stored"),
                counts("ragkv_promoted_tokens_total", "tier", "from "),
            ],
        ),
    ]


def times() -> list[Panel]:
    """How long loads and stores take."""
    slow = [(kind, quantile(0.95, f"ragkv_tier_{kind}_seconds", by="tier")) for kind in ("read", "write")]
    return [
        Panel(
            "Loads",
            "s",
            "Time of a worker on one step's loads, into the engine's cache.",
            quantiles("ragkv_load_seconds", 0.5, 0.95),
        ),
        Panel(
            "Stores",
            "s",
            "Time of a worker on one step's stores, out of it.",
            quantiles("ragkv_store_seconds", 0.5, 0.95),
        ),
        Panel(
            "Waits for lower tiers",
            "s",
            "Of requests; placement.deadline bounds them.",
            quantiles("ragkv_wait_seconds", 0.5, 0.95),
        ),
        Panel(
            "Lower tiers: times",
            "s",
            "Of one batch read, and of one write.",
            [Query(expression, f"{{{{tier}}}}: {kind}, p95") for kind, expression in slow],
        ),
        Panel(
            "Lower tiers: bytes",
            "Bps",
            "Read and written.",
            [
                counts("ragkv_tier_read_bytes_total", "tier", "read, "),
                counts("ragkv_tier_written_bytes_total", "tier", "written, "),
            ],
        ),
        Panel(
            "Waiting to be written",
            "bytes",
            "At placement.queue, chunks are left unwritten (throttled).",
            [Query(or_zero(total("ragkv_tier_queued_bytes", "tier"), "tier"), "{{tier}}")],
        ),
    ]


def judgement() -> list[Panel]:
    """The load gate, and the breakers."""
    state = f"max by (instance, engine, tier, side) ({pick('ragkv_tier_state')})"
    declining = pick("ragkv_gate_state")
    return [
        Panel(
            "Gate",
            "cps",
            "Loads judged against prefill. decline: computing is quicker; small: too few tokens to matter.",
            [counts("ragkv_gate_decisions_total", "tier, decision")],
        ),
        Panel(
            "Gate: declining",
            "short",
            "1: loads of some size take longer than prefill: all but 1 in 16 are computed. The log has more.",
            [
                Query(
                    or_zero(f"max by (instance, engine, tier) ({declining})"), "{{instance}} {{engine}}: {{tier}}"
                )
            ],
            kind="state-timeline",
            states={0: ("loading", "green"), 1: ("declining", "yellow")},
        ),
        Panel(
            "Requests that waited",
            "reqps",
            "For lower tiers, by outcome.",
            [counts("ragkv_waits_total", "result")],
            stacking="normal",
        ),
        Panel(
            "Breakers",
            "short",
            "Of lower tiers, for reading and for writing.",
            [Query(state, "{{instance}} {{engine}}: {{tier}}, {{side}}")],
            kind="state-timeline",
            states={0: ("in use", "green"), 1: ("on trial", "yellow"), 2: ("at rest", "red")},
        ),
        Panel(
            "Failed operations",
            "short",
            "Of lower tiers, since the servers started.",
            [so_far("ragkv_tier_errors_total", "tier, reason")],
        ),
        Panel(
            "Bad payloads",
            "short",
            "Read from a lower tier, found wrong, never served; since the servers started. expired: too old.",
            [so_far("ragkv_tier_rejected_payloads_total", "tier, reason")],
        ),
    ]


def fusion() -> list[Panel]:
    """What became of requests that asked for it."""
    return [
        Panel(
            "Documents",
            "cps",
            "Of requests that asked for fusion, by what became of them.",
            [counts("ragkv_fusion_decisions_total", "decision")],
            stacking="normal",
        ),
        Panel(
            "Tokens",
            TOKEN_RATE,
            "Of fused requests. recomputed: moved and mended; gap: between passages.",
            [counts("ragkv_fused_tokens_total", "kind")],
            stacking="normal",
        ),
        Panel("Time", "s", "Of a worker, on one request's fusion.", quantiles("ragkv_fusion_seconds", 0.5, 0.95)),
    ]


def documents() -> list[Panel]:
    """Which of them pay."""
    return [
        Panel(
            "Documents that save most",
            "short",
            "By the ids in requests' hints, since the servers started.",
            [
                Query(TOP_DOCUMENTS),
                Query(f"{DOCUMENT_HITS} and on (document) {TOP_DOCUMENTS}"),
                Query(f"{TOP_DOCUMENTS} / 1e6 * $price"),
            ],
            width=16,
            kind="table",
            once=True,
            columns=[("Tokens saved", "short"), ("Requests", "short"), ("Money saved", "currencyUSD")],
            rows="document",
        ),
        Panel(
            "Busiest documents",
            "reqps",
            "Requests that reused their KV.",
            [Query(or_zero(BUSIEST, "document"), "{{document}}")],
        ),
    ]


def engine() -> list[Panel]:
    """vLLM itself, and the GPU."""
    gpu = "From NVIDIA's DCGM exporter; empty without one."
    return [
        Panel(
            "vLLM's KV cache",
            "percentunit",
            "In use by requests that run.",
            [Query(pick("vllm:kv_cache_usage_perc"), "{{instance}} {{engine}}")],
        ),
        Panel(
            "Requests under way",
            "short",
            "Now; and those preempted, a second.",
            [
                Query(total("vllm:num_requests_running"), "running"),
                Query(total("vllm:num_requests_waiting"), "waiting"),
                Query(rate("vllm:num_preemptions_total"), "preempted"),
            ],
        ),
        Panel("Time between tokens", "s", "Of answers.", quantiles("vllm:inter_token_latency_seconds", 0.5, 0.95)),
        Panel(
            "Whole requests",
            "s",
            "From arrival to the last token.",
            quantiles("vllm:e2e_request_latency_seconds", 0.5, 0.95, 0.99),
        ),
        Panel("GPU utilisation", "percent", gpu, [Query("DCGM_FI_DEV_GPU_UTIL", "{{Hostname}} {{gpu}}")]),
        Panel("GPU memory", "decmbytes", gpu, [Query("DCGM_FI_DEV_FB_USED", "{{Hostname}} {{gpu}}")]),
    ]


def errors() -> list[Panel]:
    """What went wrong, and for whom."""
    return [
        Panel(
            "Faults of ragkv",
            "short",
            "Since the servers started; each is a miss to its request. hints: of requests, for what cannot be.",
            [so_far("ragkv_errors_total", "kind")],
            width=12,
        ),
        Panel(
            "HTTP answers",
            "reqps",
            "Of the servers.",
            [Query(ANSWERS, "{{status}}")],
            width=12,
            stacking="normal",
        ),
    ]


ROWS = {
    "Overview": overview,
    "Tiers": tiers,
    "Loads and stores": times,
    "Gate and breakers": judgement,
    "Fusion": fusion,
    "Documents": documents,
    "Engine and GPU": engine,
    "Errors": errors,
}
SERVERS = "vllm:num_requests_running"  # every engine has it from its start


def build(price: float = DEFAULT_PRICE) -> dict[str, Any]:
    """The dashboard in Grafana's JSON model. `price`: of a million prompt tokens, at first."""
    variables = [
        Variable("model_name", "Model", f"label_values({SERVERS}, model_name)"),
        Variable("instance", "Server", f'label_values({SERVERS}{{model_name=~"$model_name"}}, instance)'),
        Variable("engine", "Engine", f'label_values({SERVERS}{{instance=~"$instance"}}, engine)'),
        Variable("price", "Price of a million prompt tokens", default=f"{price:g}"),
    ]
    return dashboard("ragkv", "ragkv", [(title, panels()) for title, panels in ROWS.items()], variables)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(text_of(build()), encoding="utf-8")
