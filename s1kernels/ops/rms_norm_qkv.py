"""rms_norm_qkv: the norm before attention and the q, k and v projections, in one pass over the weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from s1kernels.contract import Arguments, Op, Result, nbytes
from s1kernels.ops._math import normalize, project
from s1kernels.registry import define


def reference(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """out = weight @ rms_norm(x) + bias, where rms_norm(x) = x / sqrt(mean(x^2) + eps) * norm_weight.

    Args:
        x: [B, C] hidden states.
        norm_weight: [C].
        weight: [(H + 2G) * D, C]; rows in the order q | k | v, head by head.
        bias: [(H + 2G) * D], or None.
        eps: added to the mean square.
    Returns:
        [B, (H + 2G) * D], dtype of x.
    Raises:
        ValueError, TypeError: a shape, dtype, device or stride differs; the message names the argument.
    Numerics: the norm is not rounded in between; sums in float32; the result is rounded once.
    Source: fish_speech/models/text2semantic/llama.py, TransformerBlock.attention_norm and Attention.wqkv.

    >>> reference(torch.ones(1, 4), torch.ones(4), torch.eye(4)[:3], None, 0.0)
    tensor([[1., 1., 1.]])
    """
    return project(normalize(x, norm_weight, eps), weight, bias).to(x.dtype)


def check(args: Arguments) -> None:
    args.tensor("x", "B", "C")
    args.tensor("norm_weight", "C")
    args.tensor("weight", "O", "C")
    args.optional("bias", "O")


def results(args: Arguments) -> tuple[Result, ...]:
    return (((args["B"], args["O"]), args.x.dtype),)


def bytes_moved(args: Arguments) -> int:
    return nbytes(args.x, args.norm_weight, args.weight, args.bias) + args["B"] * args["O"] * args.x.element_size()


def inputs(make: Any, *, B: int, C: int, O: int, bias: bool = False) -> tuple:  # noqa: E741
    return make(B, C), make(C), make(O, C, scale=C**-0.5), make(O) if bias else None, 1e-6


CASES = {
    "s1_slow": dict(B=1, C=1024, O=4096),
    "s1_fast": dict(B=1, C=1024, O=2048),
    "s1_fast_pair": dict(B=2, C=1024, O=2048),
    "batch_8": dict(B=8, C=256, O=384),
    "odd_bias": dict(B=3, C=40, O=70, bias=True),
    "past_a_block": dict(B=1, C=1025, O=129, bias=True),
    "minimal": dict(B=1, C=2, O=6),
}

rms_norm_qkv = define(
    Op(
        "rms_norm_qkv",
        "(Tensor x, Tensor norm_weight, Tensor weight, Tensor? bias, float eps, Tensor(a!) out) -> ()",
        reference,
        check,
        results,
        inputs,
        CASES,
        bytes_moved,
    )
)
