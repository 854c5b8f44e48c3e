"""snake in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from s1kernels.backends.cuda.support import ceil_div
from s1kernels.backends.triton.support import launch, power_of_2, supports
from s1kernels.registry import implement

BLOCK = 1024


@triton.jit(do_not_specialize=["steps"])
def snake_kernel(
    x, bias, alpha, past_cache, turn, out, steps, C, reach, TAPS: tl.constexpr, DILATION: tl.constexpr,
    STRIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Windows of past_cache[turn] and, behind it, y + sin(alpha y)^2 / (alpha + 1e-9), y = x + bias; its last `reach`
    steps go to past_cache[1 - turn]. Mapping: a program has COLUMNS channels of ROWS of the reach + steps steps. The
    halves of past_cache change places from call to call, so that no program reads what another one writes."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < reach + steps) & (c < C)
    half = tl.load(turn) & 1
    past, kept = past_cache + half.to(tl.int64) * reach * C, past_cache + (1 - half).to(tl.int64) * reach * C
    v = tl.load(x + (row - reach).to(tl.int64) * C + c, mask=inside & (row >= reach), other=0.0).to(tl.float32)
    if bias is not None:
        v += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    if alpha is not None:
        a = tl.load(alpha + c, mask=c < C, other=0.0).to(tl.float32)
        sine = tl.sin(a * v)
        v += sine * sine / (a + 1e-9)
    earlier = tl.load(past + row.to(tl.int64) * C + c, mask=inside & (row < reach), other=0.0)
    v = tl.where(row < reach, earlier, v.to(out.dtype.element_ty))
    for k in tl.static_range(TAPS):
        first = row - k * DILATION
        i = first // STRIDE
        whole = inside & (first >= 0) & (i * STRIDE == first) & (i < steps // STRIDE)
        tl.store(out + (i.to(tl.int64) * TAPS + k) * C + c, v, mask=whole)
    tl.store(kept + (row - steps).to(tl.int64) * C + c, v, mask=inside & (row >= steps))


@implement("snake", backend="triton", supports=supports)
def snake(
    x: Tensor, bias: Tensor | None, alpha: Tensor | None, past_cache: Tensor, turn: Tensor, taps: int, dilation: int,
    stride: int, out: Tensor,
) -> None:  # fmt: skip
    (steps, C), reach = x.shape, past_cache.shape[1]
    columns = min(power_of_2(C), BLOCK)
    grid = ceil_div(reach + steps, BLOCK // columns), ceil_div(C, columns)
    launch(
        snake_kernel, grid, x.device, x, bias, alpha, past_cache, turn, out, steps, C, reach, TAPS=taps,
        DILATION=dilation, STRIDE=stride, ROWS=BLOCK // columns, COLUMNS=columns,
    )  # fmt: skip
