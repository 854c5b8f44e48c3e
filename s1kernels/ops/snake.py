"""snake: the codec's activation, a periodic one, over channels of samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s1kernels.contract import Arguments, Op, Result, nbytes
from s1kernels.ops._math import wide
from s1kernels.registry import define


def reference(x: Tensor, alpha: Tensor) -> Tensor:
    """out = x + sin(alpha x)^2 / (alpha + 1e-9).

    Args:
        x: [B, C, T], C channels of T samples.
        alpha: [C], radians per unit of x.
    Returns:
        [B, C, T], dtype of x.
    Raises:
        ValueError, TypeError: a shape, dtype, device or stride differs; the message names the argument.
    Numerics: in float32 from x to the result, which is rounded once.
    Source: dac/nn/layers.py of descript-audio-codec, snake; Ziyin, Hartwig and Ueda, "Neural Networks Fail to Learn
        Periodic Functions and How to Fix It" (2020).

    >>> reference(torch.tensor([[[0.0, 1.0]]]), torch.tensor([torch.pi / 2]))
    tensor([[[0.0000, 1.6366]]])
    """
    rate = wide(alpha)[:, None]
    return (wide(x) + torch.sin(rate * wide(x)).square() / (rate + 1e-9)).to(x.dtype)


def check(args: Arguments) -> None:
    args.tensor("x", "B", "C", "T")
    args.tensor("alpha", "C")


def results(args: Arguments) -> tuple[Result, ...]:
    return (((args["B"], args["C"], args["T"]), args.x.dtype),)


def bytes_moved(args: Arguments) -> int:
    return 2 * nbytes(args.x) + nbytes(args.alpha)


def inputs(make: Any, *, B: int, C: int, T: int, scale: float = 1.0) -> tuple:
    return make(B, C, T, scale=scale), make(C)


CASES = {
    "s1_first_block": dict(B=1, C=1536, T=16),
    "s1_last_block": dict(B=1, C=96, T=2048),
    "many_periods": dict(B=1, C=16, T=1024, scale=300),
    "odd": dict(B=3, C=7, T=37),
    "past_a_block": dict(B=2, C=3, T=2049),
    "minimal": dict(B=1, C=1, T=1),
}

snake = define(
    Op(
        "snake",
        "(Tensor x, Tensor alpha, Tensor(a!) out) -> ()",
        reference,
        check,
        results,
        inputs,
        CASES,
        bytes_moved,
    )
)
