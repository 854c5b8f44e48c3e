"""rms_norm_logits: the final norm and the rows of the head that can be sampled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s1kernels.contract import Arguments, Op, Result, nbytes
from s1kernels.ops._math import normalize, project
from s1kernels.registry import define


def reference(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """logits = weight @ rms_norm(x); normed = rms_norm(x), which some models feed to the fast transformer.

    Args:
        x: [B, C] hidden states.
        norm_weight: [C].
        weight: [V, C]: the head, or those of its rows that can be sampled.
        eps: added to the mean square.
    Returns:
        logits [B, V] float32 (float64 when x is), and normed [B, C], dtype of x.
    Raises:
        ValueError, TypeError: a shape, dtype, device or stride differs; the message names the argument.
    Numerics: the logits come from the norm before it is rounded, are summed in float32 and stay float32.
    Source: fish_speech/models/text2semantic/llama.py, BaseTransformer.forward_generate (norm, output).

    >>> logits, normed = reference(torch.ones(1, 2), torch.ones(2), torch.ones(3, 2), 0.0)
    >>> logits, normed
    (tensor([[2., 2., 2.]]), tensor([[1., 1.]]))
    """
    n = normalize(x, norm_weight, eps)
    return project(n, weight), n.to(x.dtype)


def check(args: Arguments) -> None:
    args.tensor("x", "B", "C")
    args.tensor("norm_weight", "C")
    args.tensor("weight", "V", "C")


def results(args: Arguments) -> tuple[Result, ...]:
    wide = torch.promote_types(args.x.dtype, torch.float32)
    return ((args["B"], args["V"]), wide), ((args["B"], args["C"]), args.x.dtype)


def bytes_moved(args: Arguments) -> int:
    return nbytes(args.x, args.norm_weight, args.weight, args.x) + args["B"] * args["V"] * 4


def inputs(make: Any, *, B: int, C: int, V: int) -> tuple:
    return make(B, C), make(C), make(V, C, scale=C**-0.5), 1e-6


CASES = {
    "s1_sampled_rows": dict(B=1, C=1024, V=4097),
    "s1_fast": dict(B=1, C=1024, V=1024),
    "batch_8": dict(B=8, C=256, V=130),
    "odd": dict(B=3, C=40, V=7),
    "past_a_block": dict(B=1, C=1025, V=257),
    "minimal": dict(B=1, C=2, V=1),
}

rms_norm_logits = define(
    Op(
        "rms_norm_logits",
        "(Tensor x, Tensor norm_weight, Tensor weight, float eps, Tensor(a!) out_logits, Tensor(b!) out_normed) -> ()",
        reference,
        check,
        results,
        inputs,
        CASES,
        bytes_moved,
    )
)
