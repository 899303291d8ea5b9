"""The class of fake_cuda.py; apart, because vLLM's own modules are imported here."""

from __future__ import annotations

import os

from vllm.platforms.cuda import NonNvmlCudaPlatform
from vllm.platforms.interface import DeviceCapability


class FakeCuda(NonNvmlCudaPlatform):
    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        return DeviceCapability(*map(int, os.environ["FAKE_CAPABILITY"].split(".")))

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "fake GPU"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return 32 << 30

    @classmethod
    def is_fully_connected(cls, physical_device_ids: list[int]) -> bool:
        return False
