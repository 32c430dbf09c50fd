"""vLLM's CPU platform with CUDA's attention backend (Triton's, interpreted) and, on demand, CUDA's scheduling."""

import os

import torch
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from rig.interpreter import launch_few_programs, patch_language_once
from rig.plugin import ASYNC

HOPPER = DeviceCapability(9, 0)

torch.cuda.get_device_capability = lambda *_, **__: tuple(HOPPER)
patch_language_once()


class RigPlatform(CpuPlatform):
    """Only what differs from `CpuPlatform`."""

    @classmethod
    def get_device_capability(cls, device_id=0):
        return HOPPER

    @classmethod
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
        launch_few_programs()
        return AttentionBackendEnum.TRITON_ATTN.get_path()

    @classmethod
    def check_and_update_config(cls, vllm_config):
        super().check_and_update_config(vllm_config)
        vllm_config.scheduler_config.async_scheduling = bool(os.environ.get(ASYNC))
