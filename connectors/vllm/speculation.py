"""Speculation: drafters whose KV is kept with the model's.

A drafter's layers are among the engine's, and their KV is stored and loaded as all layers' is. vLLM checks what is
drafted, so that no answer depends on it. With EAGLE and MTP a token's KV depends on the next token too: of a
chunk's last token it is that of the first prompt that had it, as in vLLM's own cache.
"""

from typing import Any

from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from ragkv.errors import LayoutError

WITHOUT_KV = ("ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator")
DRAFTERS = ("draft_model", "eagle", "eagle3", "mtp")


def drafts(vllm_config: Any) -> bool:
    """Whether a drafter keeps KV of its own in the engine's cache."""
    speculative = getattr(vllm_config, "speculative_config", None)
    return speculative is not None and speculative.method in DRAFTERS


def refuse_speculation(vllm_config: Any) -> None:
    """LayoutError: speculation that is not served."""
    method = getattr(vllm_config.speculative_config, "method", None)
    if method is not None and method not in WITHOUT_KV + DRAFTERS:
        supported = ", ".join(WITHOUT_KV + DRAFTERS)
        raise LayoutError(f"speculative decoding by {method}; supported: {supported}")
    if drafts(vllm_config) and not hasattr(KVConnectorModelRunnerMixin, "finalize_kv_connector"):
        raise LayoutError(f"speculative decoding by {method}: KV is stored too early; supported from vLLM 0.32 on")
