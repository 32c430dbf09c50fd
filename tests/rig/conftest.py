"""CUDA's default engine on a CPU: see `rig.plugin`. One engine a combination of runner and scheduling, shared by
all tests; each test takes prompts that no other has."""

import random
import zlib

import pytest

from rig import faults
from rig.engines import COMBINATIONS, SETTINGS, plain_engine, rig_engine
from rig.tiny import VOCABULARY, tiny_llama


def pytest_collection_modifyitems(items):
    for item in items:
        if "/tests/rig/" in str(item.path):
            item.add_marker(pytest.mark.rig)
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Where tests run beside one another (`pytest tests/rig -n 2 --dist loadscope`), those of one engine stay in
    one process."""
    from xdist.scheduler import LoadScopeScheduling

    class ByEngine(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return next((name for name in map(str, COMBINATIONS) if name in nodeid), "others")

    return ByEngine(config, log) if config.getvalue("dist") == "loadscope" else None


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def plain(tiny_model):
    with plain_engine(tiny_model) as plain:
        yield plain


@pytest.fixture(scope="session", params=COMBINATIONS, ids=str)
def combination(request):
    return request.param


@pytest.fixture(scope="session")
def shared_rig(combination, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"rig-{combination}")
    settings = SETTINGS | {"disk": {"path": str(folder / "disk")}}
    with rig_engine(tiny_model, folder, combination, settings) as engine:
        engine.call(faults.wrap_stores)
        yield engine


@pytest.fixture
def rig(shared_rig):
    """The engine, with nothing in vLLM's own cache."""
    shared_rig.call(faults.forget_failures)
    shared_rig.evict()
    return shared_rig


@pytest.fixture
def fresh(request):
    """Makes random tokens; the same ones for the same test, in every combination."""
    chance = random.Random(zlib.crc32(request.node.originalname.encode()))

    def fresh(length):
        return tuple(chance.randrange(VOCABULARY) for _ in range(length))

    return fresh
