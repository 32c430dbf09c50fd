"""A vLLM platform plugin for the tests: CUDA's default engine on a CPU.

vLLM finds it by an entry point of the group `vllm.platform_plugins`, which `plugin_folder` writes to a folder of
its own: engines that do not have that folder on their path are ordinary CPU engines.
"""

import os

ASYNC = "RIG_ASYNC"  # in the environment: asynchronous scheduling
ENTRY_POINT = "[vllm.platform_plugins]\nragkv-rig = rig.plugin:register\n"
METADATA = "Metadata-Version: 2.1\nName: ragkv-rig\nVersion: 0\n"


def plugin_folder(folder):
    """Make `folder` a place on the path by which vLLM finds the plugin."""
    info = folder / "ragkv_rig-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(ENTRY_POINT)
    return folder


def register():
    """Called by vLLM: where the platform's class is.

    vLLM takes Triton to be usable where a Triton backend has an active driver; the interpreter needs none.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.backends

    class Driver:
        @staticmethod
        def is_active():
            return True

    class Backend:
        compiler, driver = None, Driver

    triton.backends.backends.setdefault("cpu", Backend)
    return "rig.cuda_like.RigPlatform"
