"""fp8 in the cache, on the rig."""

import pytest

from rig.engines import COMBINATIONS, SETTINGS, differences, rig_engine
from rig.faults import Fault


@pytest.fixture(scope="session", params=[COMBINATIONS[0], COMBINATIONS[-1]], ids=str)
def fp8(request, tiny_model, tmp_path_factory):
    combination = request.param
    folder = tmp_path_factory.mktemp(f"fp8-{combination}")
    with rig_engine(tiny_model, folder, combination, SETTINGS, kv_cache_dtype="fp8") as engine:
        yield engine


@pytest.mark.parametrize("fault", [None, Fault("load")], ids=["hit", "failed load"])
def test_fp8_in_the_cache(fp8, fresh, fault):
    """Compared with what the same engine computes without a hit: fp8 of other kernels is rounded elsewhere."""
    prompt = fresh(91 if fault else 90)[-90:]
    cold = fp8.answer(prompt)
    assert cold.cached == 0
    for each in (fault, None):
        fp8.evict()
        warm = fp8.answer(prompt, each)
        assert [*differences([cold], [warm])] == []
    assert warm.cached == 89
