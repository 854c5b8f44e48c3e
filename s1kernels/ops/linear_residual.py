"""linear_residual: a projection back into the residual stream (attention's wo, the feed-forward's w2)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from s1kernels.contract import Arguments, Op, Result, nbytes
from s1kernels.ops._math import project, wide
from s1kernels.registry import define


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """out = weight @ x + bias + residual.

    Args:
        x: [B, J].
        weight: [C, J].
        bias: [C], or None.
        residual: [B, C], or None for a plain projection. `out` may be `residual` itself.
    Returns:
        [B, C], dtype of x.
    Raises:
        ValueError, TypeError: a shape, dtype, device or stride differs; the message names the argument.
    Numerics: sums in float32; the result, residual included, is rounded once.
    Source: fish_speech/models/text2semantic/llama.py, TransformerBlock.forward.

    >>> reference(torch.ones(1, 2), torch.eye(2), None, torch.tensor([[1.0, 2.0]]))
    tensor([[2., 3.]])
    """
    y = project(wide(x), weight, bias)
    return (y if residual is None else y + wide(residual)).to(x.dtype)


def check(args: Arguments) -> None:
    args.tensor("x", "B", "J")
    args.tensor("weight", "C", "J")
    args.optional("bias", "C")
    args.optional("residual", "B", "C")


def results(args: Arguments) -> tuple[Result, ...]:
    return (((args["B"], args["C"]), args.x.dtype),)


def bytes_moved(args: Arguments) -> int:
    return nbytes(args.x, args.weight, args.bias, args.residual) + args["B"] * args["C"] * args.x.element_size()


def inputs(make: Any, *, B: int, J: int, C: int, bias: bool = False, residual: bool = True) -> tuple:
    return make(B, J), make(C, J, scale=J**-0.5), make(C) if bias else None, make(B, C) if residual else None


CASES = {
    "s1_wo_slow": dict(B=1, J=2048, C=1024),
    "s1_wo_fast_pair": dict(B=2, J=1024, C=1024),
    "s1_w2": dict(B=1, J=3072, C=1024),
    "plain_bias": dict(B=1, J=64, C=96, bias=True, residual=False),
    "batch_8": dict(B=8, J=256, C=128, bias=True),
    "odd_bias": dict(B=3, J=33, C=40, bias=True),
    "past_a_block": dict(B=1, J=1025, C=257),
    "minimal": dict(B=1, J=1, C=1),
}

linear_residual = define(
    Op(
        "linear_residual",
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor(a!) out) -> ()",
        reference,
        check,
        results,
        inputs,
        CASES,
        bytes_moved,
    )
)
