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
from s1kernels.bench.runners import EngineRunner, Model, Runner, TorchRunner, seed_for
from s1kernels.bench.timing import Refused, Wrong
from s1kernels.cli.demo import FRAMES_PER_SECOND
from s1kernels.model.config import DualARConfig
from s1kernels.model.weights import Weights

TRIAL = 2  # frames of a first run, which tells how many a round can have


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
        exported: positions of exported caches. frames: of a round, at most; count: rounds, which take `budget` seconds
            together (if two frames a round do).
    """

    def __init__(
        self, shape: DualARConfig, given: Weights, contexts: list[int], ceiling: float, exported: int, frames: int,
        count: int, budget: float,
    ) -> None:  # fmt: skip
        self.shape, self.given, self.contexts, self.ceiling = shape, given, contexts, ceiling
        self.exported, self.frames, self.count, self.budget = exported, frames, count, budget
        self.device = given.norm.device
        self.yardstick = models.Yardstick.measure(shape, given, contexts)
        plain = Engine(shape, given, backend="reference")
        self.bytes = {}
        for n in contexts:
            plain.cache.reserve(n + frames)
            self.bytes[n] = plain.bytes_per_frame(n + frames // 2)

        self._made: tuple[str, int, Runner] | None = None
        self._failed: dict[tuple[str, int], str] = {}

    def measure(self, system: System, report: Callable[[dict[str, Any]], None]) -> None:
        """A row for every context."""
        for n in self.contexts:
            row: dict[str, Any] = {"system": system.name, "context": n}
            try:
                runner, facts = self.ready(system, n)
                row |= facts | self._time(runner, n)
            except Exception as error:  # whatever a system fails by belongs in its row
                row["refused"] = timing.why(error)
            report(row)

    def ready(self, system: System, n: int) -> tuple[Runner, dict[str, Any]]:
        """The system with n positions in its caches, and facts for its row. It is made once for each size of caches.

        Raises:
            Refused: it cannot run here. Wrong: its logits are too far from the truth.
        """
        needed = n + max(self.frames, models.FORCED) + 1
        capacity = self.exported if system.exported else -(-needed // 512) * 512
        key = (system.name, capacity)
        reason = system.refusal(self.device) or self._failed.get(key)
        if reason is None and needed > capacity:
            reason = f"it was exported for {capacity} positions"
        if reason is not None:
            raise Refused(reason)
        if self._made is None or self._made[:2] != key:
            self._made = None  # its memory is wanted
            try:
                self._made = (*key, system.make(Model(self.shape, self.given, capacity)))
            except Exception as failure:
                self._failed[key] = timing.why(failure)
                raise
        runner, text = self._made[2], self.yardstick.text
        runner.load([k[:, :, :n] for k in self.yardstick.k], [v[:, :, :n] for v in self.yardstick.v])
        forced = [runner.logits(text[:, t : t + 1], t) for t in range(n, n + models.FORCED)]
        error = self.yardstick.error(n, torch.cat(forced))
        allowed = models.LIMIT[getattr(torch, runner.facts["dtype"])]
        if not error <= allowed:
            raise Wrong(f"its logits' error {error:.1e} is larger than {allowed:.0e}, so it is not timed")
        return runner, {"error": error, **runner.facts}

    def decoder(self, runner: Runner, n: int, count: int) -> Callable[[], Any]:
        """What decodes `count` frames after n positions; it has run once. Raises Refused if the end token comes."""
        frame = self.yardstick.text[:, n : n + 1]
        return partial(runner.decode, frame, n, count, seed_for(runner, count, frame, n))

    def rates(self, row: dict[str, Any], n: int) -> dict[str, Any]:
        """What a row's seconds mean."""
        each = 1 / row["seconds"]
        facts = {"frames_per_second": each, "times_real_time": each / FRAMES_PER_SECOND}
        return facts | timing.rates(row, self.bytes[n], self.ceiling)

    def _time(self, runner: Runner, n: int) -> dict[str, Any]:
        each = timing.seconds(self.decoder(runner, n, TRIAL), self.device) / TRIAL
        frames = max(TRIAL, min(self.frames, int(self.budget / self.count / each)))
        decode = self.decoder(runner, n, frames)
        taken = timing.rounds(decode, self.count, self.device, warm_up=0, budget=self.budget)
        row = timing.summary(taken, per=frames)
        return row | self.rates(row, n) | {"frames": frames}
