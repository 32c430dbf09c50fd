"""Stores that installed packages bring: entry points of the group `ragkv.stores`.

An entry point's value is called with the options of the setting `store.options` as keyword arguments, and gives a
`Store`. It is imported only where the setting `store.name` names it.
"""

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from ragkv.kvstore.stores.contract import Capabilities, Store

GROUP = "ragkv.stores"


def store_names() -> list[str]:
    """Names that `make_store` knows."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def make_store(name: str, options: Mapping[str, Any]) -> Store:
    """A store of that name. ValueError: no installed package has one, or what it has is no store. Whatever else
    goes wrong in that package is raised as it is."""
    point = next(iter(entry_points(group=GROUP, name=name)), None)
    if point is None:
        raise ValueError(f"store: {name!r} is not one of {', '.join(store_names()) or 'none that are installed'}")
    made = point.load()(**options)
    if not isinstance(made, Store) or not isinstance(getattr(made, "capabilities", None), Capabilities):
        raise ValueError(
            f"store: {name!r} ({point.value}) makes a {type(made).__name__}, no Store with capabilities"
        )
    return made
