"""linear_residual in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from s1kernels.backends.triton.pdl import let_next_start, wait_for_inputs
from s1kernels.backends.triton.project import load_tile, load_vector, my_outs, project, store, tiling
from s1kernels.backends.triton.support import launch, supports
from s1kernels.registry import implement


@triton.jit
def linear_residual_kernel(
    x, weight, bias, residual, out, B, width, C, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, WHOLE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out = weight @ x + bias + residual, where out may be residual. Mapping: project.py. Memory: the weight once."""
    let_next_start(PDL)
    outs, columns = my_outs(BLOCK_O), tl.arange(0, BLOCK_C)
    tile = load_tile(weight, outs, columns, width, C)
    if bias is not None:
        plus = load_vector(bias, outs, width)
    wait_for_inputs(PDL)
    for _ in range(B):
        y, _z = project(x, None, None, weight, tile, None, None, outs, columns, width, C, 0.0, BLOCK_C, WHOLE)
        if bias is not None:
            y += plus
        if residual is not None:
            y += load_vector(residual, outs, width)
            residual += width
        store(out, outs, width, y)
        x += C
        out += width


def enqueue(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor, *, pdl: bool = False
) -> None:
    """The op. With `pdl` the weight and the bias may be read before earlier kernels of the stream have ended."""
    (B, C), width = x.shape, weight.shape[0]
    grid, options = tiling(weight)
    if B:
        launch(linear_residual_kernel, grid, x.device, x, weight, bias, residual, out, B, width, C, pdl=pdl, **options)


@implement("linear_residual", backend="triton", supports=supports)
def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
    enqueue(x, weight, bias, residual, out)
