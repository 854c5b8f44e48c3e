"""swiglu in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from s1kernels.backends.cuda.support import ceil_div
from s1kernels.backends.triton.support import launch, supports
from s1kernels.registry import implement

BLOCK = 1024


@triton.jit
def gated(gate, up):
    """silu(gate) * up, in float32."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def swiglu_kernel(gate, up, out, count, BLOCK: tl.constexpr):
    """out = silu(gate) * up, elementwise. Mapping: a program has BLOCK elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    a = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, gated(a, b).to(out.dtype.element_ty), mask=inside)


@implement("swiglu", backend="triton", supports=supports)
def swiglu(gate: Tensor, up: Tensor, out: Tensor) -> None:
    count = gate.numel()
    launch(swiglu_kernel, (ceil_div(count, BLOCK),), gate.device, gate, up, out, count, BLOCK=BLOCK)
