"""Upstream's function for one frame, compiled by torch or captured as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from s1kernels.cli import gpu

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


class NumbersStay(TorchFunctionMode):
    """Numbers that upstream's step copies from the host, which no capture may, are on the device before: a tensor of
    them is made once, and an element is filled."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor:
            key = repr((args, kwargs))
            if key not in self._made:
                self._made[key] = func(*args, **kwargs)
            return self._made[key]
        if func is Tensor.__setitem__ and isinstance(args[1], int) and isinstance(args[2], (bool, int, float)):
            return args[0].select(0, args[1]).fill_(args[2])
        return func(*args, **kwargs)


class Captured:
    """Upstream's step as it is, captured as a CUDA graph at its first call, and again when generate() has given the
    model new caches: a graph goes on with those that it has seen."""

    def __init__(self, inference: Any) -> None:
        self._step, self._graph = inference.decode_one_token_ar, torch.cuda.CUDAGraph()
        self._given: dict[str, Any] = {}
        self._numbers = NumbersStay()  # the graph reads them
        self._cache: Any = None
        self._out: Any = None

    def __call__(self, **given: Any) -> Tensor:
        cache = given["model"].fast_layers[0].attention.kv_cache  # all are made together
        if cache is not self._cache:
            self._given = {key: value.clone() if isinstance(value, Tensor) else value for key, value in given.items()}
            self._cache, self._out = cache, self._capture()
        for key, value in given.items():
            if isinstance(value, Tensor):
                self._given[key].copy_(value)
        self._graph.replay()
        return self._out

    def _capture(self) -> Tensor:
        self._graph.reset()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with self._numbers:
            with torch.cuda.stream(side):
                self._step(**self._given)  # compiles and loads what it needs
                with gpu.never_waiting():
                    self._step(**self._given)
            torch.cuda.synchronize()
            with torch.cuda.graph(self._graph, stream=side):
                return self._step(**self._given)
