"""A model made ready by one system that decodes frame after frame: our engine, plain torch, or a CUDA graph of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from s1kernels import Engine, Sampling
from s1kernels.bench.timing import Refused
from s1kernels.cache import KVCache
from s1kernels.engine import PREFILL_FRAMES
from s1kernels.model import torch_ops
from s1kernels.model.config import DualARConfig
from s1kernels.model.dual_ar import DualAR
from s1kernels.model.weights import Weights

SAMPLING = Sampling(temperature=0.7, top_p=0.7, repetition_penalty=1.2)


class Runner(Protocol):
    """A model made ready by one system. `facts` go into its rows."""

    facts: dict[str, Any]

    def load(self, k: list[Tensor], v: list[Tensor]) -> None:
        """Take keys and values [1, G, n, D] as the first n positions."""

    def logits(self, frame: Tensor, position: int) -> Tensor:
        """[1, V] float32: the main logits after one frame [N+1, 1]."""

    def prefill(self, prompt: Tensor) -> None:
        """Read a prompt [N+1, T] from position 0 on."""

    def decode(self, frame: Tensor, position: int, count: int, seed: int) -> int:
        """Decode frames after `frame`, each handed to the host; how many they were."""


@dataclass(frozen=True)
class Model:
    """What a system gets: a model, and positions that its caches must hold."""

    config: DualARConfig
    weights: Weights
    capacity: int

    @property
    def device(self) -> torch.device:
        return self.weights.norm.device


class EngineRunner:
    """s1kernels' own engine."""

    def __init__(self, model: Model, backend: str = "auto", **options: Any) -> None:
        cache = KVCache(model.config, model.weights.norm, first=model.capacity)
        self.engine = Engine(model.config, model.weights, backend=backend, cache=cache, **options)
        self.facts: dict[str, Any] = {"dtype": name(model.weights.norm.dtype), "backends": dict(self.engine.backends)}

    def load(self, k: list[Tensor], v: list[Tensor]) -> None:
        self.engine.cache.reserve(k[0].shape[2])
        put(self.engine.cache.k, k)
        put(self.engine.cache.v, v)

    def logits(self, frame: Tensor, position: int) -> Tensor:
        self.engine.step(frame, position, SAMPLING)
        return self.engine.main_logits.clone()

    def prefill(self, prompt: Tensor) -> None:
        self.engine.prefill(prompt)

    def decode(self, frame: Tensor, position: int, count: int, seed: int) -> int:
        generator = torch.Generator(frame.device).manual_seed(seed)
        return sum(1 for _ in self.engine.frames(frame, position, count, SAMPLING, generator))


class TorchRunner:
    """A frame of plain torch calls on static buffers, launched call by call, or captured once and replayed.

    Its shapes do not depend on the position: the cache has one size, and what lies past `position`, which lives on the
    device, is masked. That is what makes it possible to capture.
    """

    def __init__(self, model: Model, graph: bool) -> None:
        config, weights, device = model.config, model.weights, model.device
        self.model = DualAR(config, weights, torch_ops)
        stack, codes = config.slow, config.codebooks
        shape = (1, stack.kv_heads, model.capacity, stack.head_dim)
        self.k, self.v = ([weights.norm.new_zeros(shape) for _ in range(stack.layers)] for _ in range(2))
        ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
        floats: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.tokens, self.position = torch.zeros(1, codes + 1, **ints), torch.zeros(1, **ints)
        self.main_noise = torch.ones(1, weights.head.shape[0], **floats)
        self.fast_noise = torch.ones(1, codes - 1, config.fast_rows, **floats)
        self.windows = torch.zeros(1, codes + 1, **ints), torch.zeros(1, codes - 1, 16, **ints)
        self.scalars = scalars(device)
        self.facts: dict[str, Any] = {"dtype": name(weights.norm.dtype)}
        self.main_logits = torch.zeros_like(self.main_noise)
        self.graph = self._captured() if graph else None

    def load(self, k: list[Tensor], v: list[Tensor]) -> None:
        put(self.k, k)
        put(self.v, v)

    def logits(self, frame: Tensor, position: int) -> Tensor:
        self._start(frame, position)
        self._step()
        return self.main_logits.clone()

    @torch.inference_mode()
    def prefill(self, prompt: Tensor) -> None:
        for start in range(0, prompt.shape[1], PREFILL_FRAMES):
            self.model.prefill(prompt[:, start : start + PREFILL_FRAMES].T.contiguous(), start, self.k, self.v)

    def decode(self, frame: Tensor, position: int, count: int, seed: int) -> int:
        torch.manual_seed(seed)
        self._start(frame, position)
        for done in range(1, count + 1):
            self._step()
            if int(self.tokens[0].cpu()[0]) == self.model.config.end_token:
                return done
        return count

    def _start(self, frame: Tensor, position: int) -> None:
        self.tokens.copy_(frame.T)
        self.position.fill_(position)

    def _step(self) -> None:
        if self.graph is None:
            self._frame()
        else:
            self.graph.replay()

    @torch.inference_mode()
    def _frame(self) -> None:
        """One frame; leaves the next one's tokens and position where it found its own."""
        self.main_noise.exponential_()
        self.fast_noise.exponential_()
        codes, logits, _ = self.model.decode_frame(
            self.tokens, self.position, self.k, self.v, *self.windows, self.main_noise, None, self.fast_noise,
            *self.scalars, None, None, self.model.weights.head,
        )  # fmt: skip
        self.tokens.copy_(codes)
        self.position.add_(1)
        self.main_logits.copy_(logits)

    def _captured(self) -> torch.cuda.CUDAGraph:
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._frame()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=side):
            self._frame()
        return graph


def put(caches: list[Tensor], values: list[Tensor]) -> None:
    """Copy values [1, G, n, D] into the first n positions of caches."""
    for cache, value in zip(caches, values, strict=True):
        cache[:, :, : value.shape[2]].copy_(value)


def scalars(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """SAMPLING as the ops take it: temperature, top_p, repetition_penalty and top_k."""
    values = (SAMPLING.temperature, SAMPLING.top_p, SAMPLING.repetition_penalty)
    temperature, top_p, penalty = (torch.tensor(x, device=device) for x in values)
    return temperature, top_p, penalty, torch.tensor(SAMPLING.top_k, dtype=torch.int32, device=device)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def seed_for(runner: Runner, count: int, frame: Tensor, position: int) -> int:
    """A seed with which `count` frames come before the end token. Raises Refused if five have none."""
    for seed in range(5):
        if runner.decode(frame, position, count, seed) == count:
            return seed
    raise Refused(f"the end token came before {count} frames, with five seeds")
