"""rms_norm_swiglu in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from s1kernels.backends.triton.pdl import let_next_start, wait_for_inputs
from s1kernels.backends.triton.project import load_tile, load_vector, my_outs, project, store, tiling
from s1kernels.backends.triton.support import launch, supports
from s1kernels.backends.triton.swiglu import gated
from s1kernels.registry import implement


@triton.jit
def rms_norm_swiglu_kernel(
    x, norm_weight, w1, w3, out, B, width, C, eps, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, WHOLE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out = silu(w1 @ n) * (w3 @ n), n = rms_norm(x). Mapping: project.py. Memory: both weights once."""
    let_next_start(PDL)
    outs, columns = my_outs(BLOCK_O), tl.arange(0, BLOCK_C)
    tile, second_tile = load_tile(w1, outs, columns, width, C), load_tile(w3, outs, columns, width, C)
    norm = load_vector(norm_weight, columns, C)
    wait_for_inputs(PDL)
    for _ in range(B):
        gate, up = project(
            x, norm_weight, norm, w1, tile, w3, second_tile, outs, columns, width, C, eps, BLOCK_C, WHOLE
        )
        store(out, outs, width, gated(gate, up))
        x += C
        out += width


def enqueue(
    x: Tensor, norm_weight: Tensor, w1: Tensor, w3: Tensor, eps: float, out: Tensor, *, pdl: bool = False
) -> None:
    """The op. With `pdl` weights may be read before earlier kernels of the stream have ended."""
    (B, C), width = x.shape, w1.shape[0]
    grid, options = tiling(w1, weights=2)
    if B:
        given = (x, norm_weight, w1, w3, out, B, width, C, eps)
        launch(rms_norm_swiglu_kernel, grid, x.device, *given, pdl=pdl, **options)


@implement("rms_norm_swiglu", backend="triton", supports=supports)
def rms_norm_swiglu(x: Tensor, norm_weight: Tensor, w1: Tensor, w3: Tensor, eps: float, out: Tensor) -> None:
    enqueue(x, norm_weight, w1, w3, eps, out)
