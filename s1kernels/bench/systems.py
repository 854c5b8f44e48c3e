"""The systems that decode a frame, side by side: plain torch, a CUDA graph of it, ONNX Runtime, TensorRT, s1kernels.

All go on from the same past, are held to the same truth, and hand each frame's codes to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from s1kernels import Engine, registry
from s1kernels.bench import models, provenance, timing
from s1kernels.bench.onnx import PROVIDERS, OnnxRunner, refusal
from s1kernels.bench.runners import EngineRunner, Model, Runner, TorchRunner, require
from s1kernels.bench.timing import Wrong
from s1kernels.cli.demo import FRAMES_PER_SECOND
from s1kernels.model.weights import Weights

SLOW, FEW = 0.02, 8
"""Seconds a frame from which on a round has only so many frames."""


@dataclass(frozen=True)
class System:
    """A row: `refusal` says why it cannot run here, or None; `make` makes a model ready."""

    name: str
    refusal: Callable[[torch.device], str | None]
    make: Callable[[Model], Runner]
    exported: bool = False
    """Whether it runs files, whose caches have one size: another would be another file, which takes long to make."""


def systems(device: torch.device) -> Iterator[System]:
    """Every system, in the order of the report. Some are refused on this device or machine."""
    here, cuda = provenance.kind(), device.type == "cuda"

    def on(kind: str, reason: str | None = None) -> Callable[[torch.device], str | None]:
        elsewhere = f"this machine is {here}: run the same command on {kind}, and merge the results"
        return lambda _: elsewhere if here != kind else reason

    no_gpu = None if cuda else "it needs a CUDA device"
    triton = no_gpu or registry.BACKENDS["triton"]()
    yield System("PyTorch eager", lambda _: None, lambda model: TorchRunner(model, graph=False))
    yield System("CUDA graphs", lambda _: no_gpu, lambda model: TorchRunner(model, graph=True))
    for title, provider in PROVIDERS.items():
        yield System(title, partial(refusal, provider), partial(OnnxRunner, provider=provider), exported=True)
    for kind in ("Linux", "WSL2"):
        yield System(f"{kind} + Triton", on(kind, triton), partial(EngineRunner, backend="triton"))
    for kind in ("Linux", "WSL2", "native Windows"):
        yield System(f"s1kernels, {kind}", on(kind), EngineRunner)


class Frames:
    """Times frames of one model by every system.

    Args:
        shape, given: the model. contexts: positions before the first frame. ceiling: GB/s that plain reads reach.
        exported: positions of exported caches. frames: of a round; count:
            rounds.
    """

    def __init__(
        self,
        shape: Any,
        given: Weights,
        contexts: list[int],
        ceiling: float,
        exported: int,
        frames: int,
        count: int,
    ) -> None:
        self.shape, self.given, self.contexts, self.ceiling = shape, given, contexts, ceiling
        self.exported, self.frames, self.count, self.device = exported, frames, count, given.norm.device
        self.yardstick = models.Yardstick.measure(shape, given, contexts)
        plain = Engine(shape, given, backend="reference")
        self.bytes = {}
        for n in contexts:
            plain.cache.reserve(n + frames)
            self.bytes[n] = plain.bytes_per_frame(n + frames // 2)

    def measure(self, system: System, report: Callable[[dict[str, Any]], None]) -> None:
        """A row for every context; the system is made ready once for each size of cache."""
        runner, made, reason = None, 0, system.refusal(self.device)
        for n in self.contexts:
            row: dict[str, Any] = {"system": system.name, "context": n}
            needed = n + max(self.frames, models.FORCED) + 1
            capacity = self.exported if system.exported else -(-needed // 512) * 512
            if reason is None and needed > capacity:
                report(row | {"refused": f"it was exported for {capacity} positions"})
                continue
            try:
                if reason is None and capacity != made:
                    runner = None  # its memory is wanted
                    runner, made = system.make(Model(self.shape, self.given, capacity)), capacity
            except Exception as error:  # whatever a system fails by belongs in its row
                reason = provenance.reason(error)
            if runner is None or reason is not None:
                report(row | {"refused": reason})
                continue
            try:
                report(row | self._time(runner, n))
            except Exception as error:
                report(row | {"refused": provenance.reason(error)})

    def _time(self, runner: Runner, n: int) -> dict[str, Any]:
        text = self.yardstick.text
        runner.load([k[:, :, :n] for k in self.yardstick.k], [v[:, :, :n] for v in self.yardstick.v])
        forced = [runner.logits(text[:, t : t + 1], t) for t in range(n, n + models.FORCED)]
        error = self.yardstick.error(n, torch.cat(forced))
        allowed = models.LIMIT[getattr(torch, runner.facts["dtype"])]
        if not error <= allowed:
            raise Wrong(f"its logits' error {error:.1e} is larger than {allowed:.0e}, so it is not timed")

        def decode(count: int) -> None:
            require(runner, count, text[:, n : n + 1], n)

        decode(2)
        slow = timing.seconds(lambda: decode(2), self.device) / 2 > SLOW
        frames = min(self.frames, FEW) if slow else self.frames
        row = timing.summary(timing.rounds(lambda: decode(frames), self.count, self.device), per=frames)
        row |= runner.facts | {"error": error, "frames": frames} | timing.rates(row, self.bytes[n], self.ceiling)
        row["frames_per_second"] = 1 / row["seconds"]
        row["times_real_time"] = row["frames_per_second"] / FRAMES_PER_SECOND
        return row
