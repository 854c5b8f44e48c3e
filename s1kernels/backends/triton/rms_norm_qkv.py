"""rms_norm_qkv in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from s1kernels.backends.triton.pdl import let_next_start, wait_for_inputs
from s1kernels.backends.triton.project import load_tile, load_vector, my_outs, project, store, tiling
from s1kernels.backends.triton.support import launch, supports
from s1kernels.registry import implement


@triton.jit
def rms_norm_qkv_kernel(
    x, norm_weight, weight, bias, out, B, width, C, eps, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
    WHOLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = weight @ rms_norm(x) + bias. Mapping: project.py. Memory: the weight once."""
    let_next_start(PDL)
    outs, columns = my_outs(BLOCK_O), tl.arange(0, BLOCK_C)
    tile = load_tile(weight, outs, columns, width, C)
    if bias is not None:
        plus = load_vector(bias, outs, width)
    norm = load_vector(norm_weight, columns, C)
    wait_for_inputs(PDL)
    for _ in range(B):
        y, _z = project(x, norm_weight, norm, weight, tile, None, None, outs, columns, width, C, eps, BLOCK_C, WHOLE)
        if bias is not None:
            y += plus
        store(out, outs, width, y)
        x += C
        out += width


def enqueue(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor, *, pdl: bool = False
) -> None:
    """The op. With `pdl` weights may be read before earlier kernels of the stream have ended."""
    (B, C), width = x.shape, weight.shape[0]
    grid, options = tiling(weight)
    if B:
        given = (x, norm_weight, weight, bias, out, B, width, C, eps)
        launch(rms_norm_qkv_kernel, grid, x.device, *given, pdl=pdl, **options)


@implement("rms_norm_qkv", backend="triton", supports=supports)
def rms_norm_qkv(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor) -> None:
    enqueue(x, norm_weight, weight, bias, eps, out)
