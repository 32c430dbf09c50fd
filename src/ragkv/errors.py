"""The errors that ragkv raises on purpose.

    RagKVError
    ├── ConfigError      (also a ValueError)  invalid settings: names key, value and what is allowed
    ├── LayoutError      the engine's cache layout cannot be proven, or is of a kind that is not supported
    ├── SegmentError     shared memory is not available, or too small
    ├── FusionError      keys of this model cannot be moved to another position; exact reuse still works
    ├── PayloadError     bytes that are not a complete, undamaged payload of this version
    ├── StoreError       a storage backend cannot answer: gone, full, slow, refusing
    └── AnswerError      (in ragkv.fetch)  a server cannot be reached, refuses, or gives another kind of answer

Misses, full tiers and refused stores are results, not errors.
"""


class RagKVError(Exception):
    """Root of the tree. Its text is one line for people."""


class ConfigError(RagKVError, ValueError):
    """Invalid settings. The text names every faulty key, its value, and what is allowed."""


class LayoutError(RagKVError):
    """A KV-cache layout that ragkv cannot prove; the engine then runs without reuse."""


class SegmentError(RagKVError):
    """The shared segment cannot be made or opened."""


class FusionError(RagKVError):
    """A model, or a setting, that fusion does not support; the engine then runs with exact reuse."""


class PayloadError(RagKVError):
    """Bytes that are not a complete, undamaged payload of this version. `reason`: one word for the metrics."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class StoreError(RagKVError):
    """A storage backend could not answer. `reason`: one word for the metrics ("timeout", "full", "refused",
    "gone", "closed", "too_large", "io")."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason
