"""What the launch path asks torch about a GPU."""

from __future__ import annotations

from functools import cache

import torch

from s1kernels.backends.cuda import driver
from s1kernels.backends.cuda.driver import Attribute


def index_of(device: torch.device) -> int:
    """The device's number; "cuda" alone is the current device."""
    return torch.cuda.current_device() if device.index is None else device.index


def current_stream(device: torch.device) -> int:
    """torch's current stream on the device, as a raw CUstream handle."""
    return torch._C._cuda_getCurrentRawStream(index_of(device))


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability, such as (8, 9)."""
    return _capability(index_of(device))


def multiprocessors(device: torch.device) -> int:
    return _multiprocessors(index_of(device))


def l2_bytes(device: torch.device) -> int:
    """What the second-level cache holds."""
    return _l2_bytes(index_of(device))


def memory_bandwidth(device: torch.device) -> float:
    """Bytes a second that the memory's pins carry."""
    return _memory_bandwidth(index_of(device))


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@cache
def _l2_bytes(index: int) -> int:
    return torch.cuda.get_device_properties(index).L2_cache_size


@cache
def _memory_bandwidth(index: int) -> float:
    kilohertz, bits = (driver.attribute(index, a) for a in (Attribute.MEMORY_CLOCK_RATE, Attribute.MEMORY_BUS_WIDTH))
    return 2 * kilohertz * 1e3 * bits / 8  # two transfers a clock
