"""swiglu: the gate of the feed-forward over many rows, whose matrix products are the framework's."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from s1kernels.contract import Arguments, Op, Result, nbytes
from s1kernels.ops._math import wide
from s1kernels.registry import define


def reference(gate: Tensor, up: Tensor) -> Tensor:
    """out = silu(gate) * up, where silu(a) = a / (1 + exp(-a)).

    Args:
        gate: [B, F].
        up: [B, F].
    Returns:
        [B, F], dtype of gate.
    Raises:
        ValueError, TypeError: a shape, dtype, device or stride differs; the message names the argument.
    Numerics: in float32 from gate and up to the result, which is rounded once.
    Source: fish_speech/models/text2semantic/llama.py, FeedForward; Shazeer, "GLU Variants Improve Transformer" (2020).

    >>> reference(torch.tensor([[0.0, 40.0]]), torch.tensor([[5.0, 2.0]]))
    tensor([[ 0., 80.]])
    """
    return (F.silu(wide(gate)) * wide(up)).to(gate.dtype)


def check(args: Arguments) -> None:
    args.tensor("gate", "B", "F")
    args.tensor("up", "B", "F")


def results(args: Arguments) -> tuple[Result, ...]:
    return (((args["B"], args["F"]), args.gate.dtype),)


def bytes_moved(args: Arguments) -> int:
    return 2 * nbytes(args.gate) + nbytes(args.up)


def inputs(make: Any, *, B: int, F: int) -> tuple:
    return make(B, F), make(B, F)


CASES = {
    "s1_prompt": dict(B=200, F=3072),
    "odd": dict(B=7, F=37),
    "past_a_block": dict(B=65, F=1025),
    "minimal": dict(B=1, F=1),
}

swiglu = define(
    Op(
        "swiglu",
        "(Tensor gate, Tensor up, Tensor(a!) out) -> ()",
        reference,
        check,
        results,
        inputs,
        CASES,
        bytes_moved,
    )
)
