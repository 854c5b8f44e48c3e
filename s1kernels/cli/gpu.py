"""What the commands ask about the device that they run on."""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from s1kernels.backends.cuda import driver, providers, sources
from s1kernels.backends.cuda.device import capability, multiprocessors
from s1kernels.registry import BackendError


def default_device() -> str:
    """A GPU if torch finds one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def require(device: str) -> torch.device:
    """The device by its name. Raises BackendError for a GPU where there is none."""
    found = torch.device(device)
    if found.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"--device {device} needs a GPU: {providers.unavailable() or 'torch finds none'}")
    return found


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def never_waiting() -> Iterator[None]:
    """A torch call that waits for a GPU raises a RuntimeError here. So may what is about to be captured: a capture that
    fails for it leaves torch's allocator, up to torch 2.11, unable to free memory or to capture again."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def free(device: torch.device) -> None:
    """Give back what nothing refers to any more, torch's reserve on a GPU too."""
    gc.collect()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """A GPU, its driver and who provides the CUDA kernels; nothing for other devices."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "compute_capability": "{}.{}".format(*capability(device)),
        "multiprocessors": multiprocessors(device),
        "memory_bytes": properties.total_memory,
        "driver": driver_version(),
        "provider": provider(device),
    }


def provider(device: torch.device) -> str:
    """The provider of the CUDA kernels (several, if each has some of them), or why there is none."""
    if reason := providers.unavailable():
        return f"none: {reason}"
    try:
        return ", ".join(sorted({providers.provider(name, torch.float32, device) for name in sources.names()}))
    except BackendError as error:
        return f"none: {error}"


def driver_version() -> str:
    """The NVIDIA driver's own version, else the CUDA version that it is for."""
    if said := nvidia_smi("driver_version"):
        return said[0]
    try:
        return "for CUDA {}.{}".format(*driver.driver().version)
    except BackendError as error:
        return str(error)


def nvidia_smi(fields: str, *options: str) -> list[str]:
    """What nvidia-smi says of these fields, a line a GPU; nothing if it fails."""
    command = ["nvidia-smi", *options, f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return said.strip().splitlines()
