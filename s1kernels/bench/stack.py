"""Plain transformer stacks of the sizes that the project began with, by every system: a sequence, or one step."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from s1kernels import registry
from s1kernels.bench import models, onnx, timing
from s1kernels.bench.timing import Refused, Wrong
from s1kernels.decoder import Chosen
from s1kernels.model import torch_ops
from s1kernels.model.config import DualARConfig, StackConfig
from s1kernels.model.dual_ar import DualAR
from s1kernels.ops import references
from s1kernels.testing import rel_error


@dataclass(frozen=True)
class Size:
    table: str
    dim: int
    heads: int
    layers: int
    positions: int

    def __str__(self) -> str:
        return f"{self.table} {self.dim}/{self.heads}/{self.layers}/{self.positions}".replace(" ", "_")


SIZES = [
    *(Size("Simple Transformer", *size) for size in ((512, 8, 4, 64), (1024, 16, 4, 128), (1024, 16, 8, 256))),
    *(Size("S1-mini-like", 1536, 24, 8, positions) for positions in (128, 256)),
    *(Size("WSL2 + Triton", 1024, 16, layers, positions) for layers in (8, 16) for positions in (128, 256)),
]
"""Width, heads, layers, positions. The feed-forward width is 8/3 of the width, for its three matrices."""

MODES = ("sequence", "step")
"""All positions at once; or the last one alone, after the others."""

SYSTEMS = ("PyTorch eager", "torch.compile", "CUDA graph", "ONNX Runtime", "s1kernels")


class Stack:
    """One size in one mode: its model and inputs, and the truth in float64."""

    def __init__(self, size: Size, mode: str, dtype: torch.dtype, device: torch.device) -> None:
        self.size, self.mode, self.device = size, mode, device
        self.config = _config(size)
        self.weights = models.weights(self.config, dtype, device)
        generator, T = torch.Generator().manual_seed(2), size.positions
        self.x = torch.randn(T, size.dim, generator=generator).to(device, dtype)
        exact = DualAR(self.config, self.weights.to(torch.float64), references)
        k, v = self._caches(torch.float64)
        with torch.inference_mode():
            self.truth = exact.read(self.x.double(), 0, k, v)
        self.past = [[cache.float() for cache in kept] for kept in (k, v)]
        if mode == "step":
            self.x, self.truth = self.x[-1:].contiguous(), self.truth[-1:]

    def measure(self, system: str, ceiling: float, count: int) -> dict[str, Any]:
        """A system's row: its error and the time of one pass, or why it has none."""
        row = describe(self.size, self.mode, system)
        try:
            run, facts = self.ready(system)
            row |= facts | timing.summary(timing.rounds(run, count, self.device, warm_up=3))
        except Exception as error:  # whatever a system fails by belongs in its row
            return row | {"refused": timing.why(error)}
        moved = sum(t.nbytes for layer in self.weights.slow for t in vars(layer).values() if isinstance(t, Tensor))
        return row | timing.rates(row, moved, ceiling) | {"positions_per_second": self.x.shape[0] / row["seconds"]}

    def ready(self, system: str) -> tuple[Callable[[], Tensor], dict[str, Any]]:
        """One pass of a system, checked, and facts for its row. Raises Wrong, or Refused if it cannot run here."""
        make = getattr(self, "_" + system.replace(" ", "_").replace(".", "_").lower())
        with torch.inference_mode():
            run, facts = make()
        run = torch.inference_mode()(run)
        error = rel_error(run(), self.truth)
        allowed = models.LIMIT[getattr(torch, facts.get("dtype", str(self.x.dtype)[6:]))]
        if not error <= allowed:
            raise Wrong(f"refused, for it is wrong: relative error {error:.1e}, allowed {allowed:.0e}")
        return run, {"dtype": str(self.x.dtype)[6:], "error": error} | facts

    def _pytorch_eager(self) -> tuple[Callable[[], Tensor], dict[str, Any]]:
        return self._pass(torch_ops), {}

    def _torch_compile(self) -> tuple[Callable[[], Tensor], dict[str, Any]]:
        torch.compiler.reset()  # or the sizes before would use up the times that a function may be compiled
        return torch.compile(self._pass(torch_ops), dynamic=False, fullgraph=True), {}

    def _cuda_graph(self) -> tuple[Callable[[], Tensor], dict[str, Any]]:
        return self._captured(self._pass(torch_ops)), {}

    def _s1kernels(self) -> tuple[Callable[[], Tensor], dict[str, Any]]:
        ops = SimpleNamespace(**{name: Chosen(op, "auto") for name, op in registry.OPS.items()})
        run = self._pass(ops)
        run()
        facts = {"backends": {name: op.impl.backend for name, op in vars(ops).items() if op.impl is not None}}
        return self._captured(run) if self.device.type == "cuda" else run, facts

    def _onnx_runtime(self) -> tuple[Callable[[], Tensor], dict[str, Any]]:
        dtype, provider = onnx.dtype_for(self.x.dtype, self.device), onnx.best(self.device)
        weights, rows = self.weights.to(dtype), self.x.shape[0]
        with tempfile.TemporaryDirectory() as directory:
            step = onnx.Step(
                self.config, weights, "block", provider, Path(directory), capacity=self.size.positions,
                layers=self.size.layers, rows=rows,
            )  # fmt: skip
        step.inputs["x"].copy_(self.x)
        step.inputs["position"].copy_(torch.arange(self.size.positions - rows, self.size.positions))
        for caches, values in zip(step.caches, self.past, strict=True):
            for cache, value in zip(caches, values, strict=True):
                cache.copy_(value)

        def run() -> Tensor:
            step()
            return step.outputs["y"]

        return run, {"dtype": str(dtype)[6:], "providers": step.providers}

    def _pass(self, ops: Any) -> Callable[[], Tensor]:
        model = DualAR(self.config, self.weights, ops)
        k, v = ([cache.to(self.x.dtype, copy=True) for cache in kept] for kept in self.past)
        if self.mode == "sequence":
            return lambda: model.read(self.x, 0, k, v)
        position = torch.tensor([self.size.positions - 1], dtype=torch.int32, device=self.device)
        layers, table = self.weights.slow, self.weights.cos_sin
        return lambda: model.stack(self.x, layers, table, position, k, v)

    def _captured(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if self.device.type != "cuda":
            raise Refused("it needs a CUDA device")
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(side):
            run()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=side):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    def _caches(self, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        stack = self.config.slow
        shape = (1, stack.kv_heads, self.size.positions, stack.head_dim)
        k, v = ([torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(stack.layers)] for _ in range(2))
        return k, v


def describe(size: Size, mode: str, system: str) -> dict[str, Any]:
    """What names a row."""
    return asdict(size) | {"mode": mode, "system": system}


def _config(size: Size) -> DualARConfig:
    hidden = -(-8 * size.dim // 3 // 256) * 256
    plain = StackConfig(size.layers, size.dim, size.heads, size.heads, size.dim // size.heads, hidden)
    least = StackConfig(1, size.dim, 1, 1, 2, 1)
    return DualARConfig(
        slow=plain, fast=least, vocab_size=8, codebooks=2, codebook_size=2, max_positions=size.positions, norm_eps=1e-6,
        rope_base=1e4, tie_embeddings=True, scale_codebook_embeddings=False, norm_fast_input=False, semantic_begin=0,
        semantic_end=1, end_token=2, line="s1",
    )  # fmt: skip
