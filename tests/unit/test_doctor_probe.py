"""`ragkv doctor` tries a small engine of this vLLM: a layout that it knows, and one that it cannot know."""

import os

import pytest

from ragkv.checks import check_vllm

pytestmark = pytest.mark.slow

# Patches the backend of this platform, in whatever process imports it: V is written where K belongs.
BROKEN = """
import importlib.abc, importlib.machinery, sys

NAME = "vllm.v1.attention.backends.cpu_attn"

class Breaks(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != NAME:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        def broken(module):
            run(module)
            kind = module.CPUAttentionBackendImpl
            update = kind.do_kv_cache_update
            def swapped(self, layer, key, value, cache, slots):
                update(self, layer, value, value, cache, slots)
            kind.do_kv_cache_update = swapped
        spec.loader.exec_module = broken
        return spec

sys.meta_path.insert(0, Breaks())
"""


def test_a_layout_that_is_known():
    findings = check_vllm(False, os.environ)
    found = [(each.check, each.status) for each in findings]
    assert found == [("vllm", "ok"), ("interface", "ok"), ("layout", "ok")], findings


def test_a_layout_that_cannot_be_known(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("breaks the CPU's attention backend, and vLLM would use another")
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    *_, found = check_vllm(False, {**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (found.check, found.status) == ("layout", "fail"), found
    assert found.said == "unknown KV layout: elements and addresses do not match one to one"
    assert "attention backend" in found.todo and "\n" not in found.todo


def test_a_plugin_that_vllm_was_told_not_to_load():
    *_, found = check_vllm(True, {**os.environ, "VLLM_PLUGINS": "other"})
    assert (found.check, found.status) == ("interface", "fail"), found
    assert "VLLM_PLUGINS = 'other'" in found.said
