"""fp8 in the cache, on the rig."""

import pytest

from rig.engines import SETTINGS, differences, rig_engine
from rig.faults import Fault


@pytest.fixture(scope="session")
def fp8(combination, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"fp8-{combination}")
    with rig_engine(tiny_model, folder, combination, SETTINGS, kv_cache_dtype="fp8") as engine:
        yield engine


def test_hits_and_failed_loads_in_fp8(fp8, fresh):
    """Compared with what the same engine computes without a hit: plain vLLM's own fp8 differs between kernels."""
    prompt = fresh(90)
    cold = fp8.answer(prompt)
    for fault in (None, Fault("load"), None):
        fp8.evict()
        warm = fp8.answer(prompt, fault)
        assert (cold.cached, warm.cached if fault is None else 0) == (0, 89 if fault is None else 0)
        assert [*differences([cold], [warm])] == []
