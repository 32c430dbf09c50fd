"""Registration by name, and the early look at the settings."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from ragkv.config import Loaded, Settings
from ragkv.connectors.vllm import NAME
from ragkv.connectors.vllm.error_boundary import in_words, logger
from ragkv.connectors.vllm.model import watch_workers
from ragkv.connectors.vllm.multi import EXTRA, ROOM_CHECKED, note_rivals, our_entry, split_marks
from ragkv.errors import ConfigError
from ragkv.preflight import check_room, read_settings


def install() -> None:
    """Register the connector. Safe to call twice (plugins may be loaded more than once a process).

    vLLM first shows a connector its settings when the weights are loaded, minutes too late for a typing
    error. Every path to an engine asks the factory for the connector's class before that, so the settings are
    checked there, once, and ConfigError stops the start.
    """
    with _serving_all_the_same("the plug-in is not at work"):  # in engines too that have nothing to do with ragkv
        if NAME in KVConnectorFactory._registry:
            return
        KVConnectorFactory.register_connector(NAME, "ragkv.connectors.vllm.connector", NAME)
        find_class = KVConnectorFactory.get_connector_class

        @functools.wraps(find_class)
        def checked(kv_transfer_config: Any) -> Any:
            with _serving_all_the_same("the settings could not be looked at early"):
                if kv_transfer_config.kv_connector == NAME:
                    check_settings(kv_transfer_config)
                elif (entry := our_entry(kv_transfer_config)) is not None:
                    _check_child(kv_transfer_config, entry, find_class)
            return find_class(kv_transfer_config)

        KVConnectorFactory.get_connector_class = checked
        watch_workers()


@contextlib.contextmanager
def _serving_all_the_same(what: str) -> Iterator[None]:
    """Whatever is met, ConfigError excepted, is told in a line and stops nothing."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        logger.warning("ragkv: %s: %s", what, in_words(error))


def _check_room(settings: Settings) -> None:
    with _serving_all_the_same("the room for the memory tier could not be looked at"):
        check_room(settings)


def check_settings(kv_transfer_config: Any) -> Loaded:
    """The settings of an engine to be. ConfigError: they cannot be, or not on this machine.

    Room in shared memory is looked at once: the mark on the configuration goes with it into every process of
    the engine, where the room may be taken already, by the engine itself.
    """
    extra, marks = split_marks(kv_transfer_config.kv_connector_extra_config)
    loaded = read_settings(extra)
    if not getattr(kv_transfer_config, ROOM_CHECKED, False) and not marks.get(ROOM_CHECKED, False):
        _check_room(loaded.settings)
        object.__setattr__(kv_transfer_config, ROOM_CHECKED, True)
    return loaded


def _check_child(kv_transfer_config: Any, entry: dict[str, Any], find_class: Any) -> None:
    """As `check_settings`, for ragkv inside a MultiConnector; the mark goes with the entry. And a failed load of
    ragkv's is a miss there too: vLLM reads the policy of the whole configuration, not of the child's."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    extra, marks = split_marks(entry[EXTRA])
    settings = read_settings(extra).settings
    if not marks.get(ROOM_CHECKED, False):
        _check_room(settings)
        entry[EXTRA][ROOM_CHECKED] = True
    note_rivals(kv_transfer_config, KVConnectorBase_V1, find_class)
    kv_transfer_config.kv_load_failure_policy = "recompute"
