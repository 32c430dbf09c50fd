"""Reading YAML files within bounds: of their size, and of the values that they and their aliases give."""

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 1 << 16
MOST_VALUES = 10_000  # an alias counts as all the values that it repeats


def read_yaml(path: Path) -> Any:
    """The value in a YAML file. OSError: the file cannot be read; yaml.YAMLError or ValueError: it is not YAML, or
    exceeds a bound of this module."""
    with path.open("rb") as file:
        raw = file.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise ValueError(f"larger than {MOST_BYTES} bytes")
    loader = yaml.SafeLoader(raw.decode("utf-8"))
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node)
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    finally:
        loader.dispose()


def _check(root: yaml.Node) -> None:
    """ValueError if there are too many nodes, or a key is given twice. (To PyYAML an alias is the node itself.)"""
    left, waiting = MOST_VALUES, [root]
    while waiting:
        node = waiting.pop()
        left -= 1
        if isinstance(node, yaml.SequenceNode):
            below = node.value
        elif isinstance(node, yaml.MappingNode):
            below = [each for pair in node.value for each in pair]
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            if twice := [key for key, count in keys.items() if count > 1]:
                raise ValueError(f"{twice[0]}: given twice")
        else:
            continue
        if len(below) + len(waiting) > left:
            raise ValueError(f"more than {MOST_VALUES} values, with what its aliases stand for")
        waiting += below
