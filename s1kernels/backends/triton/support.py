"""Whether Triton can serve, what its kernels can take, and how they are launched."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch

from s1kernels.backends.cuda import support as cuda
from s1kernels.backends.cuda.launch import programmatic as cuda_programmatic

OLDEST = (3, 2)
"""The oldest release of Triton whose language the kernels keep to."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton reads this when a kernel is defined: then it runs in Python, on any device, and is for tests."""


@cache
def available() -> str | None:
    """Why Triton cannot serve on this machine, or None."""
    try:
        import triton
    except ImportError as error:
        if not isinstance(error, ModuleNotFoundError) or error.name != "triton":
            return f"Triton is broken: {error}; install it again"
        return "Triton is not installed; pip install triton, on Windows triton-windows"
    except Exception as error:  # whatever a broken package does when it is imported
        return f"Triton is broken: {type(error).__name__}: {error}; install it again"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST:
        return f"Triton is {triton.__version__}; the kernels need {OLDEST[0]}.{OLDEST[1]} or later"
    if not INTERPRETED and not torch.cuda.is_available():
        return "there is no CUDA device; TRITON_INTERPRET=1 runs the kernels in Python, for tests"
    return None


def supports(*args: Any) -> str | None:
    """Why the kernels cannot take these arguments, or None."""
    if not INTERPRETED:
        return cuda.supports(*args)
    return next((reason for tensor in cuda.tensors_of(args) if (reason := cuda.unfit(tensor))), None)


def programmatic(device: torch.device) -> bool:
    """Whether a kernel may be launched with PDL: to start, and load its weights, before its predecessor ends."""
    from s1kernels.backends.triton.pdl import LANGUAGE_HAS_IT

    return device.type == "cuda" and LANGUAGE_HAS_IT and cuda_programmatic(device)


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, pdl: bool | None = None, **options: Any
) -> None:
    """Enqueue a kernel on the device's current stream. An empty grid is nothing to do.

    Args:
        pdl: the kernel's PDL, and with it how it is launched; None for a kernel that has none.
    """
    if 0 in grid:
        return
    if pdl is not None:
        options["PDL"] = pdl
    if pdl:
        options["launch_pdl"] = True
    enqueue(kernel, grid, device, args, options)


def enqueue(
    kernel: Any, grid: tuple[int, ...], device: torch.device, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Hand a launch to Triton."""
    if device.type != "cuda":
        kernel[grid](*args, **options)
        return
    with torch.cuda.device(device):
        kernel[grid](*args, enable_fp_fusion=True, **options)


def power_of_2(n: int) -> int:
    """The least power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()
