"""rms_norm_logits on CUDA: csrc/cuda/rms_norm_logits.cu."""

from __future__ import annotations

from torch import Tensor

from s1kernels.backends.cuda.launch import Kernel, Launch
from s1kernels.backends.cuda.support import UNSTAGED, ceil_div, run, staging, supports, vectorized
from s1kernels.registry import implement

_FIELDS = {
    "pointers": "x norm_weight weight logits normed",
    "ints": "rows dim out_dim group x_stride logits_stride",
    "floats": "eps",
}
TILE = Kernel("rms_norm_logits", "rms_norm_logits_tile", block=128, **_FIELDS)
PLAIN = Kernel("rms_norm_logits", "rms_norm_logits_plain", block=256, **_FIELDS)
ROWS = {TILE: 16, PLAIN: 8}  # output rows of a block


def launches(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    eps: float,
    logits: Tensor,
    normed: Tensor | None,
    *,
    pdl: bool = True,
) -> list[Launch]:
    """The op as launches to be enqueued in this order. With `pdl` the weights may be read before earlier kernels of
    the stream have ended: they must not write them. Rows of `x` and `logits` may be any distance apart."""
    (rows, dim), out_dim = x.shape, weight.shape[0]
    kernel = TILE if vectorized(dim, x, norm_weight, weight) and x.stride(0) % 8 == 0 else PLAIN
    staged = staging(rows, dim, parts=2, loads=16) if kernel is TILE else UNSTAGED
    return [
        kernel.bind(
            x.dtype, x.device, pdl=pdl, grid=ceil_div(out_dim, ROWS[kernel]), x=x, norm_weight=norm_weight,
            weight=weight, logits=logits, normed=normed, rows=rows, dim=dim, out_dim=out_dim, x_stride=x.stride(0),
            logits_stride=logits.stride(0), eps=eps, **staged,
        )
    ]  # fmt: skip


@implement("rms_norm_logits", backend="cuda", supports=supports)
def rms_norm_logits(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, out: tuple[Tensor, Tensor]) -> None:
    run(launches(x, norm_weight, weight, eps, *out, pdl=False), x.device)
