"""The errors that ragkv raises.

```text
RagKVError
├── ConfigError      (also a ValueError)  invalid settings: names key, value and what is allowed
├── LayoutError      the layout of the engine's cache cannot be proven, or is not supported
├── SegmentError     shared memory is not available, or is too small
├── FusionError      keys of this model cannot be moved to another position; exact reuse still works
├── PayloadError     the bytes are not a complete, undamaged payload of this version
├── StoreError       a storage backend cannot answer
└── AnswerError      (in ragkv.fetch)  a server cannot be reached, refuses, or gives another kind of answer
```

Misses, full tiers and declined stores are results, not errors.
"""


class RagKVError(Exception):
    """The root of all errors. Its text is one line, to be shown to users."""


class ConfigError(RagKVError, ValueError):
    """Invalid settings. The text names every invalid key, its value, and what is allowed."""


class LayoutError(RagKVError):
    """ragkv cannot prove the layout of the engine's KV cache. The engine runs without reuse."""


class SegmentError(RagKVError):
    """The segment of shared memory cannot be created or opened."""


class FusionError(RagKVError):
    """Fusion does not support the model or a setting. The engine runs with exact reuse."""


class PayloadError(RagKVError):
    """Bytes that are not a complete, undamaged payload of this version. `reason`: one word, a label of metrics."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class StoreError(RagKVError):
    """A storage backend could not answer. `reason`: one word, a label of metrics ("timeout", "full", "refused",
    "gone", "closed", "too_large", "io")."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason
