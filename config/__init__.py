"""One validated model of every setting, and where each value came from."""

from ragkv.config.settings import Settings
from ragkv.config.sources import Loaded, cache_folder, check_shared_memory, load

__all__ = ["Loaded", "Settings", "cache_folder", "check_shared_memory", "load"]
