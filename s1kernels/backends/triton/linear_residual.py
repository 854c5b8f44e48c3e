"""linear_residual in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from s1kernels.backends.triton.project import load_outs, my_outs, my_rows, project, store, tiling
from s1kernels.backends.triton.support import launch, supports
from s1kernels.registry import implement


@triton.jit
def linear_residual_kernel(
    x, weight, bias, residual, out, B, width, C, ROWS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr
):
    """out = weight @ x + bias + residual, where out may be residual. Mapping: project.py. Memory: the weight once for 8
    rows of x."""
    rows, outs = my_rows(ROWS), my_outs(BLOCK_O)
    y = project(x, None, weight, rows, outs, B, width, C, 0.0, ROWS, BLOCK_O, BLOCK_C)
    if bias is not None:
        y += load_outs(bias, outs, width)
    if residual is not None:
        at = rows.to(tl.int64)[:, None] * width + outs[None, :]
        y += tl.load(residual + at, mask=(rows < B)[:, None] & (outs < width)[None, :], other=0.0).to(tl.float32)
    store(out, rows, outs, B, width, y)


@implement("linear_residual", backend="triton", supports=supports)
def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
    (B, C), width = x.shape, weight.shape[0]
    grid, options = tiling(B, width, C)
    launch(linear_residual_kernel, grid, x.device, x, weight, bias, residual, out, B, width, C, **options)
