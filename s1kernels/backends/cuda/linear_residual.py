"""linear_residual on CUDA: csrc/cuda/linear_residual.cu."""

from __future__ import annotations

from torch import Tensor

from s1kernels.backends.cuda.launch import Kernel, Launch
from s1kernels.backends.cuda.support import (
    SLICE,
    TILE_ROWS,
    UNSTAGED,
    WARPS,
    ceil_div,
    run,
    staging,
    supports,
    vectorized,
)
from s1kernels.registry import implement

_FIELDS = {"pointers": "x weight bias residual out", "ints": "rows dim out_dim group"}
TILES = {
    loads: Kernel("linear_residual", f"linear_residual_tile{loads}", block=128, **_FIELDS) for loads in (8, 16, 24)
}
PLAIN = Kernel("linear_residual", "linear_residual_plain", block=256, **_FIELDS)


def launches(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor, *, pdl: bool = True
) -> list[Launch]:
    """The op as launches to be enqueued in this order. With `pdl` the weights may be read before earlier kernels of
    the stream have ended: they must not write them."""
    (rows, dim), out_dim = x.shape, weight.shape[0]
    kernel, staged = PLAIN, UNSTAGED
    if vectorized(dim, x, weight):
        each = ceil_div(dim, SLICE * WARPS)  # slices that a warp gets; the fewest loads that hold them at once
        loads = next((n for n in TILES if n >= each), 24)
        kernel, staged = TILES[loads], staging(rows, dim, parts=1, loads=loads)
    return [
        kernel.bind(
            x.dtype, x.device, pdl=pdl, grid=ceil_div(out_dim, TILE_ROWS), x=x, weight=weight, bias=bias,
            residual=residual, out=out, rows=rows, dim=dim, out_dim=out_dim, **staged,
        )
    ]  # fmt: skip


@implement("linear_residual", backend="cuda", supports=supports)
def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
    run(launches(x, weight, bias, residual, out, pdl=False), x.device)
