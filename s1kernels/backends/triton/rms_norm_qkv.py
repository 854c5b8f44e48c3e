"""rms_norm_qkv in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from s1kernels.backends.triton.project import load_outs, my_outs, my_rows, project, store, tiling
from s1kernels.backends.triton.support import launch, supports
from s1kernels.registry import implement


@triton.jit
def rms_norm_qkv_kernel(
    x,
    norm_weight,
    weight,
    bias,
    out,
    B,
    width,
    C,
    eps,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = weight @ rms_norm(x) + bias. Mapping: project.py. Memory: the weight once for 8 rows of x."""
    rows, outs = my_rows(ROWS), my_outs(BLOCK_O)
    y = project(x, norm_weight, weight, rows, outs, B, width, C, eps, ROWS, BLOCK_O, BLOCK_C)
    if bias is not None:
        y += load_outs(bias, outs, width)
    store(out, rows, outs, B, width, y)


@implement("rms_norm_qkv", backend="triton", supports=supports)
def rms_norm_qkv(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor) -> None:
    (B, C), width = x.shape, weight.shape[0]
    grid, options = tiling(B, width, C)
    launch(rms_norm_qkv_kernel, grid, x.device, x, norm_weight, weight, bias, out, B, width, C, eps, **options)
