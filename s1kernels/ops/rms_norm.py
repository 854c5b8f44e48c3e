"""rms_norm: the norm before a projection of many rows, whose matrix product is the framework's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from s1kernels.contract import Arguments, Op, Result, nbytes
from s1kernels.ops._math import normalize
from s1kernels.registry import define


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """out = x / sqrt(mean(x^2) + eps) * weight.

    Args:
        x: [B, C] hidden states.
        weight: [C].
        eps: added to the mean square.
    Returns:
        [B, C], dtype of x.
    Raises:
        ValueError, TypeError: a shape, dtype, device or stride differs; the message names the argument.
    Numerics: in float32 from x to the result, which is rounded once.
    Source: fish_speech/models/text2semantic/llama.py, RMSNorm; Zhang and Sennrich, "Root Mean Square Layer
        Normalization" (2019).

    >>> reference(torch.tensor([[3.0, -3.0]]), torch.tensor([1.0, 2.0]), 0.0)
    tensor([[ 1., -2.]])
    """
    return normalize(x, weight, eps).to(x.dtype)


def check(args: Arguments) -> None:
    args.tensor("x", "B", "C")
    args.tensor("weight", "C")


def results(args: Arguments) -> tuple[Result, ...]:
    return (((args["B"], args["C"]), args.x.dtype),)


def bytes_moved(args: Arguments) -> int:
    return 2 * nbytes(args.x) + nbytes(args.weight)


def inputs(make: Any, *, B: int, C: int) -> tuple:
    return make(B, C), make(C), 1e-6


CASES = {
    "s1_prompt": dict(B=200, C=1024),
    "odd": dict(B=7, C=37),
    "past_a_block": dict(B=65, C=1025),
    "minimal": dict(B=1, C=1),
}

rms_norm = define(
    Op(
        "rms_norm",
        "(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()",
        reference,
        check,
        results,
        inputs,
        CASES,
        bytes_moved,
    )
)
