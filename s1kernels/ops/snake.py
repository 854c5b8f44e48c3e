"""snake: the codec's activation, a periodic one, and the windows of the convolution behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s1kernels.contract import Arguments, Op, Result, nbytes
from s1kernels.ops._math import wide
from s1kernels.registry import define


def reference(
    x: Tensor,
    bias: Tensor | None,
    alpha: Tensor | None,
    past_cache: Tensor,
    turn: Tensor,
    taps: int,
    dilation: int,
    stride: int,
) -> Tensor:
    """out[i, k] = a[i * stride + k * dilation], where a is past_cache[turn] and, behind it, y + sin(alpha y)^2 /
    (alpha + 1e-9) of y = x + bias; past_cache[1 - turn] = the last P steps of a.

    A convolution is the product of `out` with its weight [C', taps * C]. Given the steps of a signal chunk by chunk,
    with `turn` alternating, chunks have the windows of the whole; zeros in past_cache pad its beginning.

    Args:
        x: [T, C], T steps of C channels; T a multiple of stride.
        bias: [C], what is added to x, or None for nothing.
        alpha: [C], radians per unit of y, or None: y is not activated.
        past_cache: [2, P, C], P = (taps - 1) * dilation + 1 - stride; the half that is read is not written.
        turn: [1] int32; its lowest bit counts.
        taps: steps in a window.
        dilation: steps from tap to tap.
        stride: steps from window to window, (taps - 1) * dilation + 1 at most.
    Returns:
        [T / stride, taps * C], dtype of x, the earliest tap first.
    Raises:
        ValueError, TypeError: a shape, dtype, device or stride differs; the message names the argument.
    Numerics: in float32 from x to y's activation, which is rounded once; what is kept of it is not rounded again.
    Source: dac/nn/layers.py of descript-audio-codec, snake; Ziyin, Hartwig and Ueda, "Neural Networks Fail to Learn
        Periodic Functions and How to Fix It" (2020).

    >>> past, turn = torch.zeros(2, 1, 1), torch.tensor([0], dtype=torch.int32)
    >>> reference(torch.tensor([[0.0], [1.0]]), None, torch.tensor([torch.pi / 2]), past, turn, 2, 1, 1)
    tensor([[0.0000, 0.0000],
            [0.0000, 1.6366]])
    >>> past.flatten()
    tensor([0.0000, 1.6366])
    """
    y = wide(x) if bias is None else wide(x) + wide(bias)
    if alpha is not None:
        y = y + torch.sin(wide(alpha) * y).square() / (wide(alpha) + 1e-9)
    half = int(turn) & 1
    a = torch.cat((past_cache[half], y.to(x.dtype)))
    past_cache[1 - half] = a[x.shape[0] :]
    return a.unfold(0, (taps - 1) * dilation + 1, stride)[..., ::dilation].transpose(1, 2).flatten(1)


def check(args: Arguments) -> None:
    for name in ("taps", "dilation", "stride"):
        args.require(getattr(args, name) >= 1, name, "at least 1", getattr(args, name), "choose another")
    reach = (args.taps - 1) * args.dilation + 1 - args.stride
    args.require(reach >= 0, "stride", "(taps - 1) * dilation + 1 at most", args.stride, "choose another")
    args.tensor("x", "T", "C")
    whole = args["T"] > 0 and args["T"] % args.stride == 0
    expected = f"[T, C] with T a multiple of stride={args.stride}"
    args.require(whole, "x", expected, list(args.x.shape), "pass whole strides")
    args.optional("bias", "C")
    args.optional("alpha", "C")
    args.tensor("past_cache", 2, reach, "C")
    args.tensor("turn", 1, dtype=torch.int32)


def results(args: Arguments) -> tuple[Result, ...]:
    return (((args["T"] // args.stride, args.taps * args["C"]), args.x.dtype),)


def bytes_moved(args: Arguments) -> int:
    windows = args.taps * (args["T"] // args.stride) * args["C"] * args.x.element_size()
    return nbytes(args.x, args.bias, args.alpha, args.past_cache, args.turn) + windows


def inputs(
    make: Any, *, T: int, C: int, taps: int = 1, dilation: int = 1, stride: int = 1, turn: int = 0, bias: bool = True,
    alpha: bool = True, scale: float = 1.0,
) -> tuple:  # fmt: skip
    past = make(2, (taps - 1) * dilation + 1 - stride, C)
    x = make(T, C, scale=scale)
    return (
        x, make(C) if bias else None, make(C) if alpha else None, past, make.ints(1, low=turn, high=turn + 1), taps,
        dilation, stride,
    )  # fmt: skip


CASES = {
    "s1_first_raise": dict(T=100, C=1536, taps=2),
    "s1_last_wide": dict(T=2048, C=96, taps=7, dilation=9),
    "s1_last_narrow": dict(T=2048, C=96),
    "s1_out": dict(T=2048, C=96, taps=14, stride=8),
    "many_periods": dict(T=64, C=16, taps=3, turn=1, scale=300),
    "fewer_than_kept": dict(T=5, C=24, taps=7, dilation=9, turn=1),
    "windows_alone": dict(T=19, C=32, taps=7, bias=False, alpha=False),
    "reduce": dict(T=48, C=40, taps=16, stride=8, turn=3),
    "odd": dict(T=37, C=7, taps=5, dilation=3, turn=1),
    "past_a_block": dict(T=3, C=2049, taps=2, bias=False),
    "minimal": dict(T=1, C=1),
}

snake = define(
    Op(
        "snake",
        "(Tensor x, Tensor? bias, Tensor? alpha, Tensor(a!) past_cache, Tensor turn, int taps, int dilation, "
        "int stride, Tensor(b!) out) -> ()",
        reference,
        check,
        results,
        inputs,
        CASES,
        bytes_moved,
    )
)
