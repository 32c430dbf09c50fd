"""vLLM's word for what an engine may do with a connector: `kv_role`."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Duties:
    """`stores`: keep what the engine computes, in memory and in lower tiers. `loads`: use what is kept."""

    stores: bool = True
    loads: bool = True


def duties_of(kv_transfer_config: Any) -> Duties:
    """A `kv_consumer` only loads, a `kv_producer` only stores, `kv_both` does both. Bringing values up from a
    lower tier into memory is part of loading."""
    role = getattr(kv_transfer_config, "kv_role", None)
    return Duties(stores=role != "kv_consumer", loads=role != "kv_producer")
