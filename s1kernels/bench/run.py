"""Everything that `s1kernels bench` measures, as a list of tasks that fill one result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from s1kernels.bench import models, ops, provenance, read_bandwidth, speech, stack, stages, systems, timing
from s1kernels.bench.runners import EngineRunner, Model
from s1kernels.bench.systems import Frames, System

KIND = "s1kernels bench"  # what a result says that it is
PARTS = ("frames", "stages", "ops", "speech", "stack")

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How much is measured. frames: of a round, at most; rounds: the median counts; exported: positions of exported
    caches; characters: of the texts; budget: seconds of a row's rounds."""

    small: bool
    contexts: tuple[int, ...]
    frames: int
    rounds: int
    exported: int
    characters: tuple[int, ...]
    speech_rounds: int
    budget: float
    parts: tuple[str, ...] = PARTS


SETTINGS = {
    ("cpu", True): Settings(True, (0, 64, 256), 4, 5, 512, (12,), 2, 4.0, PARTS[:-1]),
    ("cpu", False): Settings(False, (0, 512, 2048), 8, 5, 1024, speech.CHARACTERS, 2, 20.0),
    ("cuda", True): Settings(False, (0, 512, 2048), 24, 5, 1024, (12, 44), 3, 6.0, PARTS[:-1]),
    ("cuda", False): Settings(False, (0, 512, 2048, 8192), 64, 7, 1024, speech.CHARACTERS, 3, 20.0),
}
"""(device, quick) -> how much is measured."""


class Bench:
    """One run.

    Args:
        settings: how much. device, dtype: where and in which numbers. chosen: names of ops, or None for all.
        report: told every row when it is measured, with its part's name.
    """

    def __init__(
        self, settings: Settings, device: torch.device, dtype: torch.dtype, chosen: list[str] | None,
        report: Callable[[str, Row], None],
    ) -> None:  # fmt: skip
        self.settings, self.device, self.dtype, self.chosen, self._report = settings, device, dtype, chosen, report
        speeches = max(sum(speech.lengths(characters)) for characters in settings.characters)
        most = max(settings.exported, max(settings.contexts) + settings.frames + models.FORCED + 1, speeches + 1)
        self.shape = models.config(settings.small, -(-most // 512) * 512)
        self.result: dict[str, Any] = {
            "kind": KIND, "provenance": provenance.collect(device),
            "options": asdict(settings) | {"device": device.type, "dtype": str(dtype)[6:], "ops": chosen},
            "model": models.describe(self.shape),
        }  # fmt: skip
        self.result |= {part: [] for part in settings.parts}
        self._frames: Frames | None = None

    def tasks(self) -> list[tuple[str, Callable[[], None]]]:
        """What there is to do, in order, each with a name for the progress bar."""
        found: list[tuple[str, Callable[[], None]]] = [("reading memory", self._read_bandwidth)]
        every, wanted = list(systems.systems(self.device)), self.settings.parts
        if {"frames", "stages", "speech"} & set(wanted):
            found.append(("the model and the truth in float64", self._prepare))
        if "frames" in wanted:
            found += [(f"frames: {system.name}", partial(self._decode, system)) for system in every]
        if "stages" in wanted:
            found.append(("stages of a frame", self._stages))
        if "speech" in wanted:
            found += [(f"speech: {system.name}", partial(self._speech, system)) for system in every]
        if "ops" in wanted:
            for op, case in ops.cases():
                if self.chosen is None or op.name in self.chosen:
                    found.append((f"op: {op.name} {case}", partial(self._op, op, case)))
        if "stack" in wanted:
            found += [
                (f"stack: {size}, {mode}", partial(self._stack, size, mode))
                for size in stack.SIZES
                for mode in stack.MODES
            ]
        return [*found, ("reading memory again", self._read_again)]

    @property
    def frames(self) -> Frames:
        assert self._frames is not None
        return self._frames

    @property
    def ceiling(self) -> float:
        return float(self.result["read_bandwidth"]["gigabytes_per_second"])

    def _to(self, part: str) -> Callable[[Row], None]:
        def add(row: Row) -> None:
            self.result[part].append(row)
            self._report(part, row)

        return add

    def _read_bandwidth(self) -> None:
        self.result["read_bandwidth"] = read_bandwidth.measure(self.device)

    def _read_again(self) -> None:
        """What memory gives may have been taken by others at first; the better rate counts, for all rows."""
        again = read_bandwidth.measure(self.device)
        if again["gigabytes_per_second"] > self.ceiling:
            self.result["read_bandwidth"] = again
            for row in (row for part in self.settings.parts for row in self.result[part]):
                if "percent_of_read_bandwidth" in row:
                    row["percent_of_read_bandwidth"] = 100 * row["gigabytes_per_second"] / self.ceiling

    def _prepare(self) -> None:
        given, s = models.weights(self.shape, self.dtype, self.device), self.settings
        self._frames = Frames(
            self.shape, given, list(s.contexts), self.ceiling, s.exported, s.frames, s.rounds, s.budget
        )
        self.result["bytes_per_frame"] = {str(n): moved for n, moved in self._frames.bytes.items()}

    def _decode(self, system: System) -> None:
        self.frames.measure(system, self._to("frames"))

    def _stages(self) -> None:
        """At the first context that has a past."""
        f, add = self.frames, self._to("stages")
        n = next((context for context in self.settings.contexts if context), 0)
        engine = EngineRunner(Model(self.shape, f.given, -(-(n + 1) // 512) * 512))
        engine.load([k[:, :, :n] for k in f.yardstick.k], [v[:, :, :n] for v in f.yardstick.v])
        frame = f.yardstick.text[:, n : n + 1]
        given, rounds = (engine.engine, frame, n, self.ceiling), self.settings.rounds
        programs: dict[str, Callable[[], list[Row]]] = {
            f"ops, {backend}": partial(stages.of_ops, *given, backend, rounds)
            for backend in (("cpu",) if self.device.type == "cpu" else ("cuda", "triton"))
        }
        if self.device.type == "cuda":
            programs["persistent kernel"] = partial(stages.persistent, *given, rounds)
        for program, measure in programs.items():
            try:
                rows = measure()
            except Exception as error:  # whatever it fails by belongs in its row
                rows = [{"program": program, "stage": "all", "refused": timing.why(error)}]
            for row in rows:
                add(row | {"context": n})

    def _speech(self, system: System) -> None:
        add, reason = self._to("speech"), system.refusal(self.device)
        if system.exported and reason is None:
            reason = "its exported step would read the prompt frame by frame"
        for characters in self.settings.characters:
            row: Row = {"system": system.name, "characters": characters}
            if reason is not None:
                add(row | {"refused": reason})
                continue
            total = sum(speech.lengths(characters))
            try:
                self.frames.ready(system, self.settings.contexts[0])  # what is wrong does not speak
                text = models.prompt(self.shape, total, self.device)
                runner = system.make(Model(self.shape, self.frames.given, -(-total // 512) * 512))
                add(row | speech.measure(runner, text, characters, self.settings.speech_rounds, self.settings.budget))
            except Exception as error:  # whatever a system fails by belongs in its row
                add(row | {"refused": timing.why(error)})

    def _op(self, op: Any, case: str) -> None:
        for contender in ops.contenders(op, self.device.type):
            if contender.name != "eager":  # the reference is the truth, not a rival
                count = 2 * self.settings.rounds - 1
                self._to("ops")(ops.measure(contender, case, self.dtype, self.device, self.ceiling, count))

    def _stack(self, size: stack.Size, mode: str) -> None:
        made = stack.Stack(size, mode, self.dtype, self.device)
        for system in stack.SYSTEMS:
            if system == "torch.compile" and self.device.type == "cpu":
                row = {**stack.describe(size, mode, system), "refused": "it compiles for minutes on a CPU: not tried"}
            else:
                row = made.measure(system, self.ceiling, self.settings.rounds)
            self._to("stack")(row)


def join(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of one machine, model and commit that have different parts, as one result each."""
    joined: dict[tuple[str, ...], dict[str, Any]] = {}
    for result in results:
        origin, parts = result["provenance"], {part for part in PARTS if part in result}
        names = (result["model"], *(str(result["options"][name]) for name in ("device", "dtype")))
        key = (provenance.machine(origin), origin["commit"], origin["torch"], *names)
        first = joined.get(key)
        if first is None or parts & first.keys():
            joined[(*key, str(len(joined))) if first else key] = dict(result)
            continue
        extra = {name: value for name, value in result.items() if name not in first}
        command = f"{first['provenance']['command']}; {origin['command']}"
        joined[key] = first | extra | {"provenance": first["provenance"] | {"command": command}}
    return list(joined.values())
