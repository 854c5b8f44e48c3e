"""sample_token: repetition control, top-k, top-p, temperature and the draw, with the randomness as an argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s1kernels.contract import Arguments, Op, Reason, Result, nbytes
from s1kernels.registry import define

RAS_TEMPERATURE, RAS_TOP_P = 1.0, 0.9
"""The second draw of repetition-aware sampling; upstream's RAS_HIGH_TEMP and RAS_HIGH_TOP_P."""


def reference(
    logits: Tensor,
    noise: Tensor,
    ras_noise: Tensor | None,
    window: Tensor | None,
    ids: Tensor | None,
    temperature: Tensor,
    top_p: Tensor,
    repetition_penalty: Tensor,
    top_k: Tensor,
    semantic_begin: int,
    semantic_end: int,
) -> Tensor:
    """Draw one token a row: argmax over the kept rows v of softmax(logits / temperature)[v] / noise[v].

    With noise ~ Exp(1) that is a draw from the kept distribution; noise of ones makes it greedy. Kept is, in descending
    order of logits (ties: lower row first), the longest prefix of at most top_k rows whose softmax(logits) sums to at
    most top_p; the first row always is. That softmax is not divided by the temperature.

    Two ways to control repetition. Without `ras_noise` (S1 line): before all else the logits of tokens in `window` are
    divided by repetition_penalty if positive, multiplied if negative, once a token. With `ras_noise` (2.0 line,
    repetition-aware sampling): if the drawn token is semantic and in `window`, it is drawn again from `ras_noise` with
    temperature 1.0 and top_p 0.9; the penalty is not used.

    Args:
        logits: [B, V] float32.
        noise: [B, V] float32, exponential with rate 1, positive.
        ras_noise: [B, V] float32, or None.
        window: [B, W] int32, tokens said lately, or None. Tokens that no row stands for are ignored.
        ids: [V] int32 ascending, the token that each row stands for; None: its number.
        temperature: [] float32; below 1e-5 counts as 1e-5.
        top_p: [] float32 in (0, 1]; 1 keeps all.
        repetition_penalty: [] float32, positive; 1 changes nothing.
        top_k: [] int32; 0 means no limit.
        semantic_begin, semantic_end: tokens in [semantic_begin, semantic_end] are semantic.
    Returns:
        [B] int32 tokens; -1 for a row whose logits hold NaN or +infinity, or nothing finite.
    Raises:
        ValueError, TypeError: a shape, dtype, device or stride differs; the message names the argument.
    Numerics: probabilities are summed in float64, so that their order does not matter.
    Source: fish_speech/models/text2semantic/inference.py, logits_to_probs and sample; for the second draw, Chen et al.,
        "VALL-E 2" (2024).

    >>> one, none = torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)
    >>> reference(torch.tensor([[0.0, 2.0, 1.0]]), torch.ones(1, 3), None, None, None, one, one, one, none, 0, 0)
    tensor([1], dtype=torch.int32)
    """
    tokens = torch.arange(logits.shape[1], device=logits.device) if ids is None else ids.long()
    rows = []
    for b, row in enumerate(logits.double()):
        if not row.max().isfinite():
            rows.append(-1)
            continue
        seen = torch.zeros_like(tokens, dtype=torch.bool) if window is None else torch.isin(tokens, window[b].long())
        if ras_noise is None:
            row = penalize(row, seen, repetition_penalty)
        v = int(scores(row, noise[b], temperature, top_p, top_k).argmax())
        if ras_noise is not None and seen[v] and semantic_begin <= tokens[v] <= semantic_end:
            hot, wide = row.new_tensor(RAS_TEMPERATURE), row.new_tensor(RAS_TOP_P)
            v = int(scores(row, ras_noise[b], hot, wide, top_k).argmax())
        rows.append(int(tokens[v]))
    return torch.tensor(rows, dtype=torch.int32, device=logits.device)


def penalize(row: Tensor, seen: Tensor, repetition_penalty: Tensor) -> Tensor:
    """[V] logits with those of seen tokens divided by the penalty if positive, multiplied if negative."""
    return torch.where(seen, torch.where(row < 0, row * repetition_penalty, row / repetition_penalty), row)


def scores(row: Tensor, noise: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """[V] float64: softmax(row / temperature) / noise where kept (up to a common factor), -1 elsewhere."""
    order = torch.sort(row, descending=True, stable=True).indices
    cumulative = torch.softmax(row, dim=-1)[order].cumsum(-1)
    rank = torch.arange(len(row), device=row.device)
    keep = (cumulative <= top_p) | (top_p >= 1)
    keep &= (rank < top_k) | (top_k <= 0)
    keep[0] = True
    kept = order[keep]
    result = torch.full_like(row, -1.0)
    result[kept] = torch.exp((row[kept] - row.max()) / temperature.clamp(min=1e-5)) / noise[kept].double()
    return result


def check(args: Arguments) -> None:
    args.tensor("logits", "B", "V")
    if args.logits.dtype not in (torch.float32, torch.float64):
        args.tensor("logits", "B", "V", dtype=torch.float32)
    args.tensor("noise", "B", "V", dtype=args.logits.dtype)
    args.optional("ras_noise", "B", "V", dtype=args.logits.dtype)
    args.optional("window", "B", "W", dtype=torch.int32)
    args.optional("ids", "V", dtype=torch.int32)
    for name in ("temperature", "top_p", "repetition_penalty"):
        args.tensor(name, dtype=args.logits.dtype)
    args.tensor("top_k", dtype=torch.int32)


def results(args: Arguments) -> tuple[Result, ...]:
    return (((args["B"],), torch.int32),)


def bytes_moved(args: Arguments) -> int:
    return nbytes(args.logits, args.noise, args.ras_noise, args.window, args.ids) + args["B"] * 4


def verdict(args: Arguments, result: Tensor, truth: Tensor) -> Reason:
    """Another token passes only where float32 cannot tell: its score is within 1e-4 of the best, or the nucleus edge is
    within 1e-5 of top_p. Repetition-aware rows must agree."""
    tokens = torch.arange(args["V"], device=args.logits.device) if args.ids is None else args.ids
    for b in (result != truth).nonzero().flatten().tolist():
        row = args.logits[b].double()
        if args.window is not None:
            row = penalize(row, torch.isin(tokens, args.window[b]), args.repetition_penalty)
        equal: list[int] = []
        for edge in (-1e-5, 0.0, 1e-5):
            s = scores(row, args.noise[b], args.temperature, args.top_p.double() + edge, args.top_k)
            equal += tokens[s >= s.max() * (1 - 1e-4)].tolist()
        if args.ras_noise is not None or int(result[b]) not in equal:
            return f"row {b}: drew {int(result[b])}, expected {int(truth[b])}"
    return None


def inputs(
    make: Any,
    *,
    B: int,
    V: int,
    W: int = 0,
    temperature: float = 0.8,
    top_p: float = 0.8,
    penalty: float = 1.1,
    top_k: int = 0,
    ids: bool = False,
    ras: bool = False,
    spread: float = 3.0,
) -> tuple:
    logits = make(B, V, scale=spread, dtype=torch.float32)
    noise = make.exponential(B, V)
    tokens = (make.ints(V, low=1, high=4).cumsum(0) + 5).int() if ids else None
    window = make.ints(B, W, high=V if tokens is None else int(tokens[-1]) + 1) if W else None
    if window is not None:
        likely = logits.argmax(1)
        window[:, 0] = likely if tokens is None else tokens[likely]
    scalars = (make.scalar(temperature), make.scalar(top_p), make.scalar(penalty), make.scalar(top_k, torch.int32))
    return logits, noise, make.exponential(B, V) if ras else None, window, tokens, *scalars, 3, 3 * V


CASES: dict[str, dict[str, Any]] = {
    "s1_main": dict(B=1, V=155776, W=11),
    "s1_main_flat": dict(B=1, V=155776, W=11, spread=0.02),
    "s1_fast": dict(B=1, V=1024, W=16),
    "s2_main": dict(B=1, V=4097, W=10, top_k=30, ids=True, ras=True),
    "s2_fast": dict(B=1, V=4096, top_k=30),
    "greedy": dict(B=4, V=1000, top_p=1e-6),
    "everything": dict(B=4, V=1000, top_p=1.0, temperature=1.5),
    "cold": dict(B=4, V=1000, top_p=0.95, temperature=0.0),
    "odd_ids": dict(B=3, V=41, W=5, top_p=0.6, ids=True),
    "odd_ras": dict(B=8, V=17, W=8, top_p=0.99, ras=True),
    "minimal": dict(B=1, V=1),
}

sample_token = define(
    Op(
        "sample_token",
        "(Tensor logits, Tensor noise, Tensor? ras_noise, Tensor? window, Tensor? ids, Tensor temperature, "
        "Tensor top_p, Tensor repetition_penalty, Tensor top_k, int semantic_begin, int semantic_end, "
        "Tensor(a!) out) -> ()",
        reference,
        check,
        results,
        inputs,
        CASES,
        bytes_moved,
        verdict,
    )
)
