"""What the tests of the settings share: the pinned list of keys, and what is said of faulty ones."""

import pytest

from ragkv.config import load
from ragkv.errors import ConfigError

GIB = 2**30
EXTRA = "kv_connector_extra_config"

# A new key is a conscious act: add it here, to the documentation and to the presets.
PINNED = {
    "memory.capacity": 4 * GIB,
    "memory.page_tokens": 16,
    "memory.policy": "lru",
    "memory.admission": "always",
    "memory.priorities": 1,
    "device.capacity": 0,
    "device.policy": "lru",
    "device.after": 2,
    "disk.path": None,
    "disk.capacity": 64 * GIB,
    "disk.policy": "lru",
    "disk.admission": "always",
    "disk.write": "through",
    "disk.fsync": False,
    "disk.shared": False,
    "redis.url": None,
    "redis.prefix": "ragkv",
    "redis.ttl": 0,
    "redis.timeout": 1.0,
    "redis.max_value": 64 * 2**20,
    "redis.admission": "always",
    "redis.write": "through",
    "store.name": None,
    "store.options": {},
    "store.capacity": 64 * GIB,
    "store.policy": "lru",
    "store.admission": "always",
    "store.write": "through",
    "placement.deadline": 2.0,
    "placement.queue": 256 * 2**20,
    "placement.gate": True,
    "placement.flush": 5.0,
    "chunks.min_tokens": 32,
    "chunks.average_tokens": 128,
    "chunks.max_tokens": 256,
    "transfer.staging": 64 * 2**20,
    "transfer.step": 0,
    "fusion.enabled": False,
    "fusion.selection": "query",
    "fusion.recompute_ratio": 0.15,
    "fusion.min_tokens": 48,
    "fusion.keep": False,
    "fusion.documents": 200,
    "hints.allow": "all",
    "trace.file": None,
    "control.listen": None,
    "control.token_file": None,
}
SECTIONS = list(dict.fromkeys(key.split(".")[0] for key in PINNED))
POLICY_KEYS = [key for key in PINNED if key.endswith(".policy")]
ADMISSION_KEYS = [key for key in PINNED if key.endswith(".admission")]
SIZE_KEYS = [key for key in PINNED if key.split(".")[1] in ("capacity", "max_value", "queue", "staging", "step")]


def fault(extra=None, environ=None, file=None):
    with pytest.raises(ConfigError) as caught:
        load(extra, environ or {}, file)
    text = str(caught.value)
    assert text.startswith("ragkv: ") and "\n" not in text
    return text
