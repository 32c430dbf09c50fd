"""One validated model of every setting, and where each value came from."""

from ragkv.config.settings import Settings
from ragkv.config.sources import Loaded, check_shared_memory, load

__all__ = ["Loaded", "Settings", "check_shared_memory", "load"]
