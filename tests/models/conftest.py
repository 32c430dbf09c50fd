"""An engine a model of each kind: see `models.kinds`."""

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if "/tests/models/" in str(item.path):
            item.add_marker(pytest.mark.models)
            item.add_marker(pytest.mark.slow)
