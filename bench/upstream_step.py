"""Upstream's function for one frame, compiled by torch or captured as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

AS_UPSTREAM = "reduce-overhead"
"""torch.compile's mode in upstream's init_model."""


def compiled(inference: Any, device: torch.device, mode: str | None = AS_UPSTREAM) -> Callable[..., Tensor]:
    """The step as upstream's init_model compiles it, or in another mode; None is torch's default."""
    cuda = device.type == "cuda"
    return torch.compile(
        inference.decode_one_token_ar,
        backend="inductor" if cuda else "aot_eager",
        mode=mode if cuda else None,
        fullgraph=True,
    )


class Captured:
    """Upstream's step as it is, captured as a CUDA graph at its first call."""

    def __init__(self, inference: Any) -> None:
        self._step, self._graph = inference.decode_one_token_ar, torch.cuda.CUDAGraph()
        self._given: dict[str, Any] = {}
        self._out: Any = None

    def __call__(self, **given: Any) -> Tensor:
        if self._out is None:
            self._given = {key: value.clone() if isinstance(value, Tensor) else value for key, value in given.items()}
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                self._step(**self._given)  # compiles and loads what it needs
            torch.cuda.synchronize()
            with torch.cuda.graph(self._graph, stream=side):
                self._out = self._step(**self._given)
        for key, value in given.items():
            if isinstance(value, Tensor):
                self._given[key].copy_(value)
        self._graph.replay()
        return self._out
