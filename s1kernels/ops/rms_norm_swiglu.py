"""rms_norm_swiglu: the norm before the feed-forward, its gate and up projections, and their product."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from s1kernels.contract import Arguments, Op, Result, nbytes
from s1kernels.ops._math import normalize, project
from s1kernels.registry import define


def reference(x: Tensor, norm_weight: Tensor, w1: Tensor, w3: Tensor, eps: float) -> Tensor:
    """out = silu(w1 @ n) * (w3 @ n), where n = rms_norm(x) and silu(a) = a / (1 + exp(-a)).

    Args:
        x: [B, C] hidden states.
        norm_weight: [C].
        w1: [F, C], the gate.
        w3: [F, C], the up projection.
        eps: added to the mean square.
    Returns:
        [B, F], dtype of x.
    Raises:
        ValueError, TypeError: a shape, dtype, device or stride differs; the message names the argument.
    Numerics: neither the norm nor the projections are rounded in between; sums in float32; rounded once.
    Source: fish_speech/models/text2semantic/llama.py, FeedForward; Shazeer, "GLU Variants Improve Transformer" (2020).

    >>> reference(torch.ones(1, 2), torch.ones(2), torch.zeros(3, 2), torch.ones(3, 2), 0.0)
    tensor([[0., 0., 0.]])
    """
    n = normalize(x, norm_weight, eps)
    return (F.silu(project(n, w1)) * project(n, w3)).to(x.dtype)


def check(args: Arguments) -> None:
    args.tensor("x", "B", "C")
    args.tensor("norm_weight", "C")
    args.tensor("w1", "F", "C")
    args.tensor("w3", "F", "C")


def results(args: Arguments) -> tuple[Result, ...]:
    return (((args["B"], args["F"]), args.x.dtype),)


def bytes_moved(args: Arguments) -> int:
    return nbytes(args.x, args.norm_weight, args.w1, args.w3) + args["B"] * args["F"] * args.x.element_size()


def inputs(make: Any, *, B: int, C: int, F: int) -> tuple:
    return make(B, C), make(C), make(F, C, scale=C**-0.5), make(F, C, scale=C**-0.5), 1e-6


CASES = {
    "s1": dict(B=1, C=1024, F=3072),
    "s1_fast_pair": dict(B=2, C=1024, F=3072),
    "batch_8": dict(B=8, C=256, F=160),
    "odd": dict(B=3, C=40, F=33),
    "past_a_block": dict(B=1, C=1025, F=257),
    "minimal": dict(B=1, C=2, F=1),
}

rms_norm_swiglu = define(
    Op(
        "rms_norm_swiglu",
        "(Tensor x, Tensor norm_weight, Tensor w1, Tensor w3, float eps, Tensor(a!) out) -> ()",
        reference,
        check,
        results,
        inputs,
        CASES,
        bytes_moved,
    )
)
