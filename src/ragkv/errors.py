"""The errors that ragkv raises on purpose.

    RagKVError
    ├── ConfigError      (also a ValueError)  a setting that cannot be: names key, value and what is allowed
    ├── LayoutError      the engine's cache layout cannot be proven, or is of a kind that is not supported
    └── SegmentError     shared memory cannot be had or does not fit

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
