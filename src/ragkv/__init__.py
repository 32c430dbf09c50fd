"""A KV-cache middleware for vLLM that knows about documents."""

__version__ = "0.1.0"
