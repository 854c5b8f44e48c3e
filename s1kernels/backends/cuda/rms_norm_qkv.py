"""rms_norm_qkv on CUDA: csrc/cuda/rms_norm_qkv.cu."""

from __future__ import annotations

from torch import Tensor

from s1kernels.backends.cuda.launch import Kernel, Launch
from s1kernels.backends.cuda.support import UNSTAGED, ceil_div, run, staging, supports, vectorized
from s1kernels.registry import implement

_FIELDS = {"pointers": "x norm_weight weight bias out", "ints": "rows dim out_dim group", "floats": "eps"}
TILE = Kernel("rms_norm_qkv", "rms_norm_qkv_tile", block=128, **_FIELDS)
PLAIN = Kernel("rms_norm_qkv", "rms_norm_qkv_plain", block=256, **_FIELDS)
ROWS = {TILE: 16, PLAIN: 8}  # output rows of a block


def launches(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor, *, pdl: bool = True
) -> list[Launch]:
    """The op as launches to be enqueued in this order. With `pdl` the weights may be read before earlier kernels of
    the stream have ended: they must not write them."""
    (rows, dim), out_dim = x.shape, weight.shape[0]
    kernel = TILE if vectorized(dim, x, norm_weight, weight) else PLAIN
    staged = staging(rows, dim, parts=2, loads=16) if kernel is TILE else UNSTAGED
    return [
        kernel.bind(
            x.dtype, x.device, pdl=pdl, grid=ceil_div(out_dim, ROWS[kernel]), x=x, norm_weight=norm_weight,
            weight=weight, bias=bias, out=out, rows=rows, dim=dim, out_dim=out_dim, eps=eps, **staged,
        )
    ]  # fmt: skip


@implement("rms_norm_qkv", backend="cuda", supports=supports)
def rms_norm_qkv(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor) -> None:
    run(launches(x, norm_weight, weight, bias, eps, out, pdl=False), x.device)
