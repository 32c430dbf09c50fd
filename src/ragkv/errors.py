"""The errors that ragkv raises on purpose.

    RagKVError
    ├── ConfigError      (also a ValueError)  a setting that cannot be: names key, value and what is allowed
    ├── LayoutError      the engine's cache layout cannot be proven, or is of a kind that is not supported
    ├── SegmentError     shared memory cannot be had or does not fit
    ├── FusionError      a model whose keys cannot be moved to another position; exact reuse goes on
    ├── PayloadError     bytes that are not a whole, unharmed payload of this version
    └── StoreError       a storage backend cannot answer: gone, full, slow, refusing

Misses, full tiers and refused stores are results, not errors.
"""


class RagKVError(Exception):
    """Root of the tree; its text is one line meant for people."""


class ConfigError(RagKVError, ValueError):
    """Settings that cannot be. The text names every faulty key, its value, and what is allowed."""


class LayoutError(RagKVError):
    """A KV-cache layout that ragkv cannot prove; the engine then runs without reuse."""


class SegmentError(RagKVError):
    """The shared segment cannot be made or opened."""


class FusionError(RagKVError):
    """A model, or a setting, that fusion cannot serve; the engine then runs with exact reuse."""


class PayloadError(RagKVError):
    """Bytes that are not a whole, unharmed payload of this version. `reason`: one word for the metrics."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class StoreError(RagKVError):
    """A storage backend could not answer. `reason`: one word for the metrics ("timeout", "full", "refused",
    "gone", "closed", "too_large", "io")."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason
