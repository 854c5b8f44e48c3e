"""snake in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from s1kernels.backends.cuda.support import ceil_div
from s1kernels.backends.triton.support import launch, power_of_2, supports
from s1kernels.registry import implement

BLOCK = 1024


@triton.jit
def snake_kernel(x, alpha, out, rows, C, T, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out = x + sin(alpha x)^2 / (alpha + 1e-9), elementwise. Mapping: a program has COLUMNS samples of ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    a = tl.load(alpha + row % C).to(tl.float32)
    inside = (row < rows) & (at < T)
    place = row.to(tl.int64) * T + at
    v = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    sine = tl.sin(a * v)
    tl.store(out + place, (v + sine * sine / (a + 1e-9)).to(out.dtype.element_ty), mask=inside)


@implement("snake", backend="triton", supports=supports)
def snake(x: Tensor, alpha: Tensor, out: Tensor) -> None:
    B, C, T = x.shape
    if x.numel():
        columns = min(power_of_2(T), BLOCK)
        grid = ceil_div(B * C, BLOCK // columns), ceil_div(T, columns)
        launch(snake_kernel, grid, x.device, x, alpha, out, B * C, C, T, ROWS=BLOCK // columns, COLUMNS=columns)
