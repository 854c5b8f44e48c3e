"""What the CUDA kernels can take, and the choices that several of them share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s1kernels.backends.cuda.launch import Launch, capability, current_stream

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)

TILE_ROWS = 8  # rows of a weight in a tile, as in csrc/cuda/device/gemv.cuh
SLICE = 32  # columns that a warp's load covers
STAGED_BYTES = 40 * 1024  # of vectors in shared memory at most
WARPS = 4  # of a tile kernel's block

UNSTAGED: dict[str, Any] = {"group": 0, "shared": 0}
"""What `staging` is to a kernel that stages nothing."""


def supports(*args: Any) -> str | None:
    """Why the kernels cannot take these arguments, or None."""
    for tensor in tensors_of(args):
        if tensor.device.type != "cuda":
            return f"a tensor is on {tensor.device}; these kernels are for CUDA devices"
        if reason := unfit(tensor):
            return reason
    return None


def unfit(tensor: Tensor) -> str | None:
    """Why no kernel for GPUs takes the tensor's dtype where it is, or None."""
    if tensor.is_floating_point() and tensor.dtype not in DTYPES:
        return f"a tensor is {tensor.dtype}; the kernels take float32, bfloat16 and float16"
    if tensor.is_cuda and tensor.dtype == torch.bfloat16 and capability(tensor.device) < (8, 0):
        return "bfloat16 needs a GPU of compute capability 8.0 or later; convert the model to float16"
    return None


def tensors_of(args: Any) -> list[Tensor]:
    """Every tensor among the arguments, those in lists too."""
    found = []
    for arg in args:
        found += tensors_of(arg) if isinstance(arg, (list, tuple)) else [arg] if isinstance(arg, Tensor) else []
    return found


def vectorized(dim: int, *tensors: Tensor | None) -> bool:
    """Whether the tile kernels serve: 16-bit values, `dim` columns in whole slices, addresses aligned to 16 bytes."""
    given = [tensor for tensor in tensors if tensor is not None]
    aligned = all(tensor.dtype in HALVES and tensor.data_ptr() % 16 == 0 for tensor in given)
    return aligned and dim % SLICE == 0 and _vector_bytes(dim, parts=2) <= STAGED_BYTES


def staging(rows: int, dim: int, *, parts: int, loads: int, warps: int = WARPS) -> dict[str, Any]:
    """`group` and `shared` of a tile kernel: how many vectors are staged at once, and the bytes of shared memory.

    `parts` is 2 for normalised vectors, which are kept as a high and a low part; `loads` the 16-byte copies of weights
    that a thread has under way.
    """
    each = _vector_bytes(dim, parts)
    group = max(1, min(rows, 8, (STAGED_BYTES if loads <= 16 else STAGED_BYTES // 4) // each))
    return {"group": group, "shared": group * each + loads * warps * 32 * 16}


def run(launches: list[Launch], device: torch.device) -> None:
    """Enqueue launches on the device's current stream."""
    stream = current_stream(device)
    for launch in launches:
        launch.enqueue(stream)


def _vector_bytes(dim: int, parts: int) -> int:
    return 2 * parts * (dim + 32 if dim % 64 == 0 else dim)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
