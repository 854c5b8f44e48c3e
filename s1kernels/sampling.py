"""How tokens are drawn, from which rows of the head, and what repetition control remembers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s1kernels.model.config import Line

WINDOW = {"s1": 16, "2.0": 10}
"""Frames that repetition control looks back on (upstream's win_size and RAS_WIN_SIZE)."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; `s1kernels.ops.sample_token` has the meaning. `top_k` 0 means no limit."""

    temperature: float = 0.8
    top_p: float = 0.8
    repetition_penalty: float = 1.1
    top_k: int = 0

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 <= self.top_p <= 1, "in [0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "positive"),
            ("top_k", self.top_k >= 0, "at least 0 (0: no limit)"),
        ):
            if not holds:
                raise ValueError(
                    f"Sampling: {name} must be {expected}, got {getattr(self, name)}; choose another value"
                )


@dataclass(frozen=True)
class Rows:
    """The rows of the head that are sampled: all of them, or those that `ids` names."""

    head: Tensor  # [V, C]
    ids: Tensor | None = None  # [V] int32, ascending
    bias: Tensor | None = None  # [V] float32, added to the logits


def remember(line: Line, previous: Tensor, codes: Tensor, index: int) -> Tensor:
    """The window after frame number `index`. The S1 line fills it from the left, then shifts; the 2.0 line shifts."""
    if line == "s1" and index < previous.shape[1]:
        previous[:, index] = codes
        return previous
    return torch.cat([previous[:, 1:], codes[:, None]], dim=1)


def repetition_windows(line: Line, previous: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """What `sample_token` looks at, from the window [N+1, W] as upstream keeps it: ([1, W'] main, [1, N-1, W] fast).

    The S1 line penalises, for the main token, the window's first column (a whole frame, its codes included), as it
    does upstream. The 2.0 line looks at the main tokens only.
    """
    if previous is None:
        return None, None
    previous = previous.to(torch.int32)
    if line == "s1":
        return previous[None, :, 0].contiguous(), previous[None, 2:].contiguous()
    return previous[None, 0].contiguous(), None
