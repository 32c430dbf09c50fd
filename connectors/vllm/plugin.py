"""Registration by name, and the early look at the settings."""

import functools
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from ragkv.config import Loaded
from ragkv.connectors.vllm import NAME
from ragkv.connectors.vllm.model import watch_workers
from ragkv.preflight import check_room, read_settings

ROOM_CHECKED = "_ragkv_room_checked"


def install() -> None:
    """Register the connector. Safe to call twice (plugins may be loaded more than once a process).

    vLLM first shows a connector its settings when the weights are loaded, minutes too late for a typing
    error. Every path to an engine asks the factory for the connector's class before that, so the settings are
    checked there, once, and ConfigError stops the start.
    """
    if NAME in KVConnectorFactory._registry:
        return
    KVConnectorFactory.register_connector(NAME, "ragkv.connectors.vllm.connector", NAME)
    find_class = KVConnectorFactory.get_connector_class

    @functools.wraps(find_class)
    def checked(kv_transfer_config: Any) -> Any:
        if kv_transfer_config.kv_connector == NAME:
            check_settings(kv_transfer_config)
        return find_class(kv_transfer_config)

    KVConnectorFactory.get_connector_class = checked
    watch_workers()


def check_settings(kv_transfer_config: Any) -> Loaded:
    """The settings of an engine to be. ConfigError: they cannot be, or not on this machine.

    Room in shared memory is looked at once: the mark on the configuration goes with it into every process of
    the engine, where the room may be taken already, by the engine itself.
    """
    loaded = read_settings(kv_transfer_config.kv_connector_extra_config)
    if not getattr(kv_transfer_config, ROOM_CHECKED, False):
        check_room(loaded.settings)
        object.__setattr__(kv_transfer_config, ROOM_CHECKED, True)
    return loaded
