"""The arithmetic that several references share. Accumulates in at least float32; callers round once, at the end."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype that references accumulate in: float32, or float64 when `x` is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def normalize(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the last dimension, wide and not rounded; without a weight, `x` unchanged."""
    if weight is None:
        return wide(x)
    return wide(x) * torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps) * wide(weight)


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, wide and not rounded."""
    y = x @ wide(weight).T
    return y if bias is None else y + wide(bias)
