"""rms_norm_swiglu on CUDA: csrc/cuda/rms_norm_swiglu.cu."""

from __future__ import annotations

from torch import Tensor

from s1kernels.backends.cuda.launch import Kernel, Launch
from s1kernels.backends.cuda.support import TILE_ROWS, UNSTAGED, ceil_div, run, staging, supports, vectorized
from s1kernels.registry import implement

_FIELDS = {"pointers": "x norm_weight w1 w3 out", "ints": "rows dim out_dim group", "floats": "eps"}
TILE = Kernel("rms_norm_swiglu", "rms_norm_swiglu_tile", block=128, **_FIELDS)
PLAIN = Kernel("rms_norm_swiglu", "rms_norm_swiglu_plain", block=256, **_FIELDS)


def launches(
    x: Tensor, norm_weight: Tensor, w1: Tensor, w3: Tensor, eps: float, out: Tensor, *, pdl: bool = True
) -> list[Launch]:
    """The op as launches to be enqueued in this order. With `pdl` the weights may be read before earlier kernels of
    the stream have ended: they must not write them."""
    (rows, dim), out_dim = x.shape, w1.shape[0]
    tiled = vectorized(dim, x, norm_weight, w1, w3)
    staged = staging(rows, dim, parts=2, loads=16) if tiled else UNSTAGED
    return [
        (TILE if tiled else PLAIN).bind(
            x.dtype, x.device, pdl=pdl, grid=ceil_div(out_dim, TILE_ROWS), x=x, norm_weight=norm_weight, w1=w1,
            w3=w3, out=out, rows=rows, dim=dim, out_dim=out_dim, eps=eps, **staged,
        )
    ]  # fmt: skip


@implement("rms_norm_swiglu", backend="cuda", supports=supports)
def rms_norm_swiglu(x: Tensor, norm_weight: Tensor, w1: Tensor, w3: Tensor, eps: float, out: Tensor) -> None:
    run(launches(x, norm_weight, w1, w3, eps, out, pdl=False), x.device)
