"""Side by side in one run: text in, sound out, by s1kernels and by upstream's own pipeline, by texts' lengths.

Time to the first sound, times real time, the codec's share, peak memory. Model and codec have S1-mini's shape and the
same seeded random weights, so that what is said is noise; a text takes as long as it is read aloud. s1kernels lets the
codec work between frames of one persistent kernel, or beside frames of many; upstream's decodes when all frames are
there. A pipeline has the GPU for itself: what it holds is freed before the next. One that fails has the reason and no
number. bench_frame.py and bench_codec.py hold what is said to the truth.

    python bench/bench_speech.py --json bench/results/speech.json
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from frame_table import COMPILED, EAGER
from rich.console import Console
from speech_table import show

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from speech_pipelines import Given, Ours, Spoken, Upstream

from s1kernels.bench import models, provenance, speech, timing
from s1kernels.cli import gpu
from s1kernels.cli.demo import FRAMES_PER_SECOND

MEASURES = ("first", "all")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--characters", type=int, nargs="+", default=speech.CHARACTERS, help="lengths of the texts")
    parser.add_argument("--small", action="store_true", help="a small model and codec: does it run at all?")
    parser.add_argument("--rounds", type=int, default=5, help="measurements a row; the median counts (default: 5)")
    parser.add_argument("--slow-rounds", type=int, default=2, help="the same for upstream eager (default: 2)")
    parser.add_argument("--skip-compiled", action="store_true", help="without torch.compile, which takes minutes")
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args()
    if min(*options.characters, options.rounds, options.slow_rounds) < 1:
        parser.error("--characters, --rounds and --slow-rounds must be at least 1")
    return options


@dataclass(frozen=True)
class Contender:
    """A pipeline: what makes it, and how often a text is spoken before, and while, it is timed."""

    name: str
    make: Callable[[Given], Any]
    warm_up: int
    rounds: int
    refused: str = ""
    """Why it is not measured at all."""


class Bench:
    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options, self.console = options, console
        self.device = torch.device(options.device)
        self.cuda = self.device.type == "cuda"
        self.given = Given(options.small, self.device, getattr(torch, options.dtype))
        self.result: dict[str, Any] = {"provenance": provenance.collect(self.device)}
        self.result["options"] = {name: value for name, value in vars(options).items() if name != "json"}
        self.result["model"] = models.describe(self.given.shape)
        self.rows = self.result["rows"] = []
        self.memory = self.result["memory"] = {}

    def run(self) -> None:
        for contender in self.contenders():
            try:
                if contender.refused:
                    raise timing.Refused(contender.refused)
                self.measure(contender)
            except Exception as error:  # whatever a contender fails by belongs in its row
                if not isinstance(error, timing.Refused):
                    traceback.print_exc()
                self.rows.append({"name": contender.name, "refused": timing.why(error)})
                self.console.print(f"{contender.name}: {timing.why(error)}")
            self.save()

    def contenders(self) -> list[Contender]:
        o = self.options
        beside = Contender("s1kernels, persistent=False", lambda given: Ours(given, False), 1, o.rounds)
        whole = Contender("s1kernels", lambda given: Ours(given, self.cuda), 1, o.rounds)
        skipped = "left out (--skip-compiled)" if o.skip_compiled else ""
        return [
            whole,
            *([beside] if self.cuda else []),
            Contender(EAGER, lambda given: Upstream(given, False), 0, o.slow_rounds),
            Contender(COMPILED, lambda given: Upstream(given, True), 1, o.rounds, skipped),
        ]

    def measure(self, contender: Contender) -> None:
        """A row for every length, and the contender's memory: allocated when it is there, and at most since then."""
        gpu.free(self.device)
        before = self.allocated()
        pipeline = contender.make(self.given)
        gpu.free(self.device)
        held = self.memory[contender.name] = {"before": before, "held": self.allocated() - before}
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        pipeline.warm_up()
        for characters in self.options.characters:
            row = {"name": contender.name, "characters": characters} | self.time(pipeline, contender, characters)
            self.rows.append(row)
            if self.cuda:
                held["peak"] = torch.cuda.max_memory_allocated(self.device) - before
                held["peak_reserved"] = torch.cuda.max_memory_reserved(self.device)
            self.console.print(
                f"{contender.name}, {characters} characters: first sound after {1e3 * row['first']['seconds']:.1f} ms, "
                f"{row['times_real_time']:.2f} times real time"
            )
            self.save()

    def time(self, pipeline: Any, contender: Contender, characters: int) -> dict[str, Any]:
        frames = self.given.frames(characters)
        taken = [pipeline.speak(characters, seed) for seed in range(-contender.warm_up, contender.rounds)]
        self.require(taken, frames)
        row: dict[str, Any] = {"frames": frames, "sound": frames / FRAMES_PER_SECOND}
        for measure in MEASURES:
            row[measure] = timing.summary([getattr(one, measure) for one in taken[contender.warm_up :]])
        codes = torch.zeros(self.given.shape.codebooks, frames, dtype=torch.int64)
        alone = timing.rounds(lambda: pipeline.sound(codes), contender.rounds, self.device)
        seconds = row["all"]["seconds"]
        row |= {"times_real_time": row["sound"] / seconds, "codec_alone": timing.summary(alone)}
        return row | {"codec_share": row["codec_alone"]["seconds"] / seconds}

    def require(self, taken: list[Spoken], frames: int) -> None:
        """Raise Refused unless all that was spoken has its length."""
        for spoken in taken:
            if spoken.samples != round(frames / FRAMES_PER_SECOND * 44100):
                raise timing.Refused(f"it must say {frames} frames, got {spoken.samples} samples: an end came early")

    def save(self) -> None:
        """Compare the rows of a length with upstream's, and write what there is."""
        timed = [row for row in self.rows if "refused" not in row]
        for row in timed:
            row["times_faster_than"] = {
                base["name"]: {measure: base[measure]["seconds"] / row[measure]["seconds"] for measure in MEASURES}
                for base in timed
                if base["name"] in (EAGER, COMPILED) and base["characters"] == row["characters"] and base is not row
            }
        provenance.write(self.options.json, self.result)

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.cuda else 0


def main() -> None:
    options = parse()
    bench = Bench(options, Console(stderr=True, markup=False, highlight=False))
    bench.run()
    show(bench.result, Console(markup=False, highlight=False))
    if options.json is None:
        bench.console.print("give --json PATH to keep the result")


if __name__ == "__main__":
    main()
